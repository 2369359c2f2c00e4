"""Judges a sparse autoencoder on held-out rows: the work of `segcompass evaluate-sae`.

What it reconstructs, and how sparsely, comes from `trainers.sae_quality.evaluate_sae`; here is what the MLLM loses by
it: the language-model loss with the reconstruction spliced into the MLLM at layer L instead of the hidden states.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from segcompass.loaders.image_text import image_text, load_image_text
from segcompass.loading import load_mllm
from segcompass.modeling_segcompass import SparseAutoencoder
from segcompass.modeling_segcompass.backbone import backbone_of
from segcompass.modeling_segcompass.sae_origin import Origin, check_origin, origin_of
from segcompass.trainers.activations import SPECIAL, TOKEN_TYPES, batch_activations, model_special_tokens, token_types
from segcompass.trainers.collator import ImageTextCollator
from segcompass.trainers.sae_quality import evaluate_sae

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend must be chosen first)


def judge_sae(
    model: str,
    output: Path,
    sae: str | None = None,
    dataset: str = "scenes",
    split: str = "val",
    seed: int = 0,
    num_samples: int = 500,
    batch_size: int = 16,
    token_window: int = 3400,
) -> dict:
    """Measure an SAE, and write and print what was found.

    Args:
        model: SegCompass model or MLLM whose hidden states the SAE reads, as a folder or Hub id.
        output: folder for quality.json, quality.md and quality.png.
        sae: SAE folder or Hub id; None takes the SegCompass model's own.
        dataset: see `load_image_text`, as for the next three.
        split: of the data set.
        seed: of the scenes.
        num_samples: rows at most.
        batch_size: samples the MLLM reads at once.
        token_window: longer samples are skipped and counted.

    Returns:
        The content of quality.json.

    Raises:
        ValueError: no SAE, or one of another backbone.
    """
    mllm, processor = load_mllm(model)
    mllm.eval()
    if sae is None and not hasattr(mllm, "sae"):
        raise ValueError(f"{model} is an MLLM without an SAE; name one with --sae.")
    autoencoder: Any = SparseAutoencoder.from_pretrained(sae).to(mllm.device).eval() if sae else mllm.sae
    check(autoencoder, mllm)
    rows = load_image_text(dataset, split, seed, num_samples)
    collate = ImageTextCollator(processor, image_text, token_window)
    sums = LossSums()
    batches = tqdm(rows.batch(batch_size), total=-(-num_samples // batch_size), unit="batch", dynamic_ncols=True)
    quality = evaluate_sae(autoencoder, activations(mllm, autoencoder, batches, collate, sums))
    quality["language_model"] = sums.summary()
    quality["skipped"] = dict(sums.skipped)
    output.mkdir(parents=True, exist_ok=True)
    (output / "quality.json").write_text(json.dumps(quality, indent=2) + "\n")
    (output / "quality.md").write_text(table(quality))
    plot(quality, output / "quality.png")
    print(table(quality))
    return quality


def check(sae: SparseAutoencoder, model: PreTrainedModel) -> None:
    """Raises ValueError when the SAE is not of this model's width and depth, or was trained on another backbone."""
    config: Any = model.config
    mllm = getattr(model, "mllm", model)
    width, depth = mllm.config.get_text_config().hidden_size, len(backbone_of(mllm).blocks(mllm))
    if sae.config.d_in != width or sae.config.layer > depth:
        raise ValueError(
            f"the SAE reads {sae.config.d_in} numbers of layer {sae.config.layer}, but the MLLM is {width} wide and "
            f"{depth} blocks deep; give the SAE of this backbone."
        )
    if mllm is model:
        check_origin(sae.config, origin_of(config))
    elif sae is not model.sae:
        own = config.sae_config
        check_origin(sae.config, Origin(own.backbone, own.backbone_revision), origin_of(config.mllm_config))


def activations(
    model: PreTrainedModel,
    sae: SparseAutoencoder,
    batches: Iterable[dict],
    collate: ImageTextCollator,
    sums: "LossSums",
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each batch's hidden states and token types, special tokens included; its language-model losses go into sums.

    Args:
        model: SegCompass model or MLLM.
        sae: the SAE that is judged.
        batches: columns of rows.
        collate: makes inputs of rows.
        sums: where losses and skipped samples are counted.

    Yields:
        float (N, d_in) and long (N,), N tokens of a batch.
    """
    special = model_special_tokens(model)
    for batch in batches:
        columns = batch.keys()
        inputs = collate([dict(zip(columns, row, strict=True)) for row in zip(*batch.values(), strict=True)])
        sums.skipped.update(inputs.pop("skipped"))
        if not inputs:
            continue
        sums.add(language_losses(model, sae, inputs, special))
        yield batch_activations(model, inputs, sae.config.layer, special, keep_special=True)


# -- language-model loss -----------------------------------------------------------------------------------------------


class LossSums:
    """Sums of next-token losses over tokens: clean, and with layer L replaced at the tokens of each type.

    Example:
        sums = LossSums()
        sums.add(language_losses(model, sae, inputs, special))
        print(sums.summary()["all"]["recovered"])
    """

    def __init__(self) -> None:
        self.losses: Counter = Counter()
        self.tokens = 0.0
        self.skipped: Counter = Counter()

    def add(self, losses: dict[str | tuple[str, str], float]) -> None:
        """Add what `language_losses` returned for a batch."""
        self.tokens += losses.pop("tokens")
        self.losses.update(losses)

    def summary(self) -> dict | None:
        """`clean`, then for all tokens and each type `spliced`, `zero` (nats per token) and `recovered`.

        The loss recovered is (zero - spliced) / (zero - clean): 1 if nothing is lost, 0 if the reconstruction is no
        better than zeros. None without a token.
        """
        if not self.tokens:
            return None
        mean = {name: loss / self.tokens for name, loss in self.losses.items()}
        summary: dict[str, Any] = {"clean": mean["clean"], "tokens": int(self.tokens)}
        for name in ("all", *TOKEN_TYPES):
            if (name, "spliced") in mean:
                spliced, zero = mean[name, "spliced"], mean[name, "zero"]
                gap = zero - mean["clean"]
                recovered = (zero - spliced) / gap if gap else None
                summary[name] = {"spliced": spliced, "zero": zero, "recovered": recovered}
        return summary


@torch.no_grad()
def language_losses(
    model: PreTrainedModel, sae: SparseAutoencoder, inputs: dict, special: Iterable[int]
) -> dict[str | tuple[str, str], float]:
    """Summed next-token losses of a batch.

    Predicted are the response's tokens where the rows have responses, else all text after the first token.

    Args:
        model: SegCompass model or MLLM.
        sae: its SAE.
        inputs: what the collator made.
        special: ids of special tokens.

    Returns:
        "tokens": how many are predicted; "clean": loss; (type or "all", "spliced" or "zero"): losses.
    """
    mllm = getattr(model, "mllm", model)
    types = token_types(model, inputs, special).to(mllm.device)
    real = inputs["attention_mask"].bool().to(mllm.device)
    if "labels" in inputs:
        predicted = (inputs["labels"] != -100).to(mllm.device) & real
    else:
        predicted = real & (types == TOKEN_TYPES.index("instruction"))
    predicted = predicted[:, 1:] & real[:, :-1]
    losses: dict[str | tuple[str, str], float] = {
        "tokens": int(predicted.sum()),
        "clean": next_token_loss(mllm, inputs, predicted),
    }
    for name in ("all", *TOKEN_TYPES):
        where = real & ((types != SPECIAL) if name == "all" else (types == TOKEN_TYPES.index(name)))
        if not where.any():
            continue
        for end in ("spliced", "zero"):
            losses[name, end] = next_token_loss(mllm, inputs, predicted, sae, where, end)
    return losses


def next_token_loss(
    mllm: PreTrainedModel,
    inputs: dict,
    predicted: torch.Tensor,
    sae: SparseAutoencoder | None = None,
    where: torch.Tensor | None = None,
    end: str | None = None,
) -> float:
    """Summed cross-entropy at the predicted places, with layer L's output changed at some tokens.

    Args:
        mllm: transformers' model.
        inputs: what the collator made.
        predicted: bool (B, T - 1), at t whether token t + 1 counts.
        sae: whose layer is changed; None changes nothing.
        where: bool (B, T), the tokens to change.
        end: "spliced" puts the reconstruction there, "zero" puts zeros.

    Returns:
        The sum in nats.
    """

    def change(block, args, output):
        z = output[0] if isinstance(output, tuple) else output
        changed = z.clone()
        changed[where] = sae.decode(sae.encode(z[where])).to(z.dtype) if end == "spliced" else 0
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    backbone = backbone_of(mllm)
    taken = {name: value.to(mllm.device) for name, value in backbone.mllm_inputs(mllm, inputs).items()}
    hooks = []
    if sae is not None:
        hooks.append(backbone.blocks(mllm)[sae.config.layer - 1].register_forward_hook(change))
    try:
        logits = mllm(**taken, use_cache=False).logits[:, :-1]
    finally:
        for hook in hooks:
            hook.remove()
    targets = taken["input_ids"][:, 1:]
    return torch.nn.functional.cross_entropy(logits[predicted].float(), targets[predicted], reduction="sum").item()


# -- results -----------------------------------------------------------------------------------------------------------


def table(quality: dict) -> str:
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


def plot(quality: dict, path: Path) -> None:
    """Draw explained variance and L0 by token type, and how many features have which density."""
    parts = {"all": quality, **quality["by_type"]}
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    axes[0].bar(parts.keys(), [part["explained_variance"] for part in parts.values()])
    axes[0].set(title="explained variance", ylim=(0, 1))
    axes[1].bar(parts.keys(), [part["l0"] for part in parts.values()])
    axes[1].set(title="active features per token (L0)")
    for name, part in parts.items():
        histogram = part["density_histogram"]
        axes[2].plot(list(histogram), list(histogram.values()), marker="o", label=name)
    axes[2].set(title="features by density", xlabel="share of tokens, from", ylabel="features")
    axes[2].legend()
    for axis in axes:
        axis.tick_params(axis="x", rotation=30)
    figure.savefig(path, dpi=120)
    plt.close(figure)
