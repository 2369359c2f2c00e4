"""Judge a sparse autoencoder on held-out rows: what it reconstructs, how sparsely, and what the MLLM loses by it.

    python examples/evaluate_sae.py --model examples/checkpoints/mini --output runs/sae-quality
    python examples/evaluate_sae.py --model llava-hf/llava-1.5-7b-hf --sae ORG/SAE --dataset rows.jsonl --output DIR

Everything is given for all tokens but special ones, which the SAE is not made for, and for each token type (image,
instruction, response, special). Writes
    quality.json   explained variance, FVU, L0, dead share, density histogram, L2 ratio, relative reconstruction bias
                   (`trainers.sae_quality.evaluate_sae` names the formulas), and the language-model loss
    quality.png    explained variance and L0 by type, the density histogram
    quality.md     the table of the card

Language-model loss recovered by splicing the reconstruction into the MLLM at layer L instead of the hidden states, at
the tokens of a type only, is (zero - spliced) / (zero - clean): 1 if nothing is lost, 0 if no better than zeros there.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import torch
from tqdm import tqdm
from train_sae import load
from transformers import AutoConfig

from segcompass.loaders.image_text import image_text, load_image_text
from segcompass.modeling_segcompass import SparseAutoencoder
from segcompass.trainers.activations import SPECIAL, TOKEN_TYPES, batch_activations, model_special_tokens, token_types
from segcompass.trainers.collator import ImageTextCollator
from segcompass.trainers.sae_quality import evaluate_sae

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend must be chosen first)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="SegCompass folder or Hub id, or the MLLM's")
    parser.add_argument("--sae", help="SAE folder or Hub id; default: the SegCompass model's own")
    parser.add_argument("--dataset", default="scenes", help="'scenes', a save_to_disk folder, a .jsonl, a Hub id")
    parser.add_argument("--split", default="val")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    parser.add_argument("--num-samples", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--token-window", type=int, default=3400, help="longer samples are skipped and counted")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    for name in ("num_samples", "batch_size", "token_window"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1.")
    return args


def main(argv=None):
    args = parse(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model_config = AutoConfig.from_pretrained(args.model)
    model, processor = load(args.model, model_config, SimpleNamespace(bf16=False, device=device))
    model.eval()
    if args.sae is None and not hasattr(model, "sae"):
        raise SystemExit(f"{args.model} is an MLLM without an SAE; name one with --sae.")
    sae = SparseAutoencoder.from_pretrained(args.sae).to(device).eval() if args.sae else model.sae
    check(sae, model)
    rows = load_image_text(args.dataset, args.split, args.seed, args.num_samples)
    collate = ImageTextCollator(processor, image_text, args.token_window)
    sums = LossSums()
    quality = evaluate_sae(sae, activations(model, sae, rows, collate, args, sums))
    quality["language_model"] = sums.summary()
    quality["skipped"] = dict(sums.skipped)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "quality.json").write_text(json.dumps(quality, indent=2) + "\n")
    (args.output / "quality.md").write_text(table(quality))
    plot(quality, args.output / "quality.png")
    print(table(quality))
    return quality


def check(sae, model):
    mllm = getattr(model, "mllm", model)
    width, depth = mllm.config.get_text_config().hidden_size, len(mllm.get_decoder().layers)
    if sae.config.d_in != width or sae.config.layer > depth:
        raise SystemExit(
            f"the SAE reads {sae.config.d_in} numbers of layer {sae.config.layer}, but the MLLM is {width} wide and "
            f"{depth} blocks deep; give the SAE of this backbone."
        )


def activations(model, sae, rows, collate, args, sums):
    """Yield (hidden states, types) of each batch, special tokens included, adding its language-model losses to sums."""
    special = model_special_tokens(model)
    with tqdm(total=args.num_samples, unit="sample", dynamic_ncols=True) as bar:
        for batch in rows.batch(args.batch_size):
            columns = batch.keys()
            inputs = collate([dict(zip(columns, row, strict=True)) for row in zip(*batch.values(), strict=True)])
            sums.skipped.update(inputs.pop("skipped"))
            bar.update(len(next(iter(batch.values()))))
            if not inputs:
                continue
            sums.add(language_losses(model, sae, inputs, special))
            yield batch_activations(model, inputs, sae.config.layer, special, keep_special=True)


# -- language-model loss -----------------------------------------------------------------------------------------------


class LossSums:
    """Sums of next-token losses over tokens: clean, and with layer L replaced at the tokens of each type."""

    def __init__(self):
        self.losses, self.tokens, self.skipped = Counter(), 0, Counter()

    def add(self, losses):
        self.tokens += losses.pop("tokens")
        self.losses.update(losses)

    def summary(self):
        """`clean`, then of all tokens and of each type `spliced`, `zero` (nats a token) and `recovered`."""
        if not self.tokens:
            return None
        mean = {name: loss / self.tokens for name, loss in self.losses.items()}
        summary = {"clean": mean["clean"], "tokens": self.tokens}
        for name in ("all", *TOKEN_TYPES):
            if (name, "spliced") in mean:
                spliced, zero = mean[name, "spliced"], mean[name, "zero"]
                gap = zero - mean["clean"]
                recovered = (zero - spliced) / gap if gap else None
                summary[name] = {"spliced": spliced, "zero": zero, "recovered": recovered}
        return summary


@torch.no_grad()
def language_losses(model, sae, inputs, special):
    """Summed next-token losses of a batch: {"tokens", "clean", (type or "all", "spliced" or "zero")}.

    Predicted are the response's tokens where the rows have responses, else all text after the first token.
    """
    mllm = getattr(model, "mllm", model)
    types = token_types(model, inputs, special).to(mllm.device)
    real = inputs["attention_mask"].bool().to(mllm.device)
    if "labels" in inputs:
        predicted = (inputs["labels"] != -100).to(mllm.device) & real
    else:
        predicted = real & (types == TOKEN_TYPES.index("instruction"))
    predicted = predicted[:, 1:] & real[:, :-1]
    losses = {"tokens": int(predicted.sum()), "clean": next_token_loss(mllm, inputs, predicted)}
    for name in ("all", *TOKEN_TYPES):
        where = real & ((types != SPECIAL) if name == "all" else (types == TOKEN_TYPES.index(name)))
        if not where.any():
            continue
        for end in ("spliced", "zero"):
            losses[name, end] = next_token_loss(mllm, inputs, predicted, sae, where, end)
    return losses


def next_token_loss(mllm, inputs, predicted, sae=None, where=None, end=None):
    """Summed cross-entropy at the `predicted` places, with layer L's output changed at `where`.

    Args:
        predicted: bool (B, T - 1), at t whether token t + 1 counts.
        where: bool (B, T). end: "spliced" puts the reconstruction there, "zero" puts zeros.
    """

    def change(block, args, output):
        z = output[0] if isinstance(output, tuple) else output
        changed = z.clone()
        changed[where] = sae.decode(sae.encode(z[where])).to(z.dtype) if end == "spliced" else 0
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    names = {"input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids"}
    taken = {name: value.to(mllm.device) for name, value in inputs.items() if name in names}
    hooks = [mllm.get_decoder().layers[sae.config.layer - 1].register_forward_hook(change)] if sae is not None else []
    try:
        logits = mllm(**taken, use_cache=False).logits[:, :-1]
    finally:
        for hook in hooks:
            hook.remove()
    targets = taken["input_ids"][:, 1:]
    return torch.nn.functional.cross_entropy(logits[predicted].float(), targets[predicted], reduction="sum").item()


# -- what comes out ----------------------------------------------------------------------------------------------------


def table(quality):
    """The card's table, in Markdown."""
    lines = [
        "| tokens | n | explained variance | FVU | L0 (share) | dead | L2 ratio | relative bias | LM loss recovered |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    language = quality["language_model"] or {}
    for name, part in {"all": quality, **quality["by_type"]}.items():
        recovered = (language.get(name) or {}).get("recovered")
        lines.append(
            f"| {name} | {part['tokens']:,} | {part['explained_variance']:.4f} | {part['fvu']:.4f} "
            f"| {part['l0']:.1f} ({part['l0_share']:.2%}) | {part['dead_share']:.2%} | {part['l2_ratio']:.4f} "
            f"| {part['relative_reconstruction_bias']:.4f} | {'–' if recovered is None else f'{recovered:.4f}'} |"
        )
    return "\n".join(lines) + "\n"


def plot(quality, path):
    parts = {"all": quality, **quality["by_type"]}
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    axes[0].bar(parts.keys(), [part["explained_variance"] for part in parts.values()])
    axes[0].set(title="explained variance", ylim=(0, 1))
    axes[1].bar(parts.keys(), [part["l0"] for part in parts.values()])
    axes[1].set(title="active features a token (L0)")
    for name, part in parts.items():
        histogram = part["density_histogram"]
        axes[2].plot(list(histogram), list(histogram.values()), marker="o", label=name)
    axes[2].set(title="features by density", xlabel="share of tokens, from", ylabel="features")
    axes[2].legend()
    for axis in axes:
        axis.tick_params(axis="x", rotation=30)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
