"""What the alignment term does, beside its controls at equal length: right pairs, exchanged pairs, no term.

    python examples/recipes/mini-grounded/alignment_controls.py --start runs/mini/masks --output runs/alignment

From the same small model, each MLLM sees the same scenes in the same order for the same number of steps. `phrases` has
the term; in `exchanged` the words of each kind are said to mean the next look of that kind ("blue" the patches of the
next colour); `none` has no term. Then a plain SAE of each learns for as many steps, and the figures of shared concepts
are those that `segcompass white-box` prints; beside them the language loss on fresh scenes. The last line is RESULT
{json}. Repeat the command to resume: a finished MLLM, SAE or measurement is kept, in folders that bear the settings.
"""

import argparse
import json
import sys
from argparse import Namespace
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from segcompass.commands import train_sae
from segcompass.loaders.scene_questions import word_kind
from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.modeling_segcompass.whole_files import write_whole
from segcompass.trainers.alignment import AlignmentTargets
from segcompass.white_box.concept_labels import find_labels
from segcompass.white_box.scene_truth import SceneTruths
from segcompass.white_box.shared_concepts import exchanged

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent / "mini")]
from make_backbones import IMAGE_SIZE, PATCH, Conversations, Talking, make_mllm, make_processor  # noqa: E402
from stages import join  # noqa: E402

ARMS = ("phrases", "exchanged", "none")
IMAGES = 8  # of a step, with three questions each
RATES = (2.5e-4, 1e-3, 7e-4)  # of what sees, the patches' head, the language part: those of run.sh
HELD_OUT = 24  # batches on which the language loss is measured


def conversations(processor, arm, seed):
    """Endless batches, the same for every arm but for what its words are said to mean."""
    align = AlignmentTargets(processor, word_kind, exchanged() if arm == "exchanged" else None)
    return DataLoader(Conversations(processor, align, IMAGE_SIZE // PATCH, IMAGES, seed), batch_size=None)


def train_mllm(args, arm, folder):
    """Train one arm's MLLM and measure its language loss."""
    torch.manual_seed(args.seed)
    processor = make_processor(SegCompassProcessor.from_pretrained(args.start).tokenizer, True)
    mllm = make_mllm(processor)
    mllm.set_attn_implementation("eager")  # the fastest on a CPU
    mllm.load_state_dict(SegCompassModel.from_pretrained(args.start, dtype="float32").mllm.state_dict())
    pupil = Talking(mllm, rates=RATES).train()
    groups = [{"params": list(part.parameters()), "peak": rate} for part, rate in pupil.learning_rates()]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    batches = islice(conversations(processor, arm, [7, args.seed, 0]), args.steps)
    bar = tqdm(batches, total=args.steps, desc=arm, mininterval=10)
    for step, batch in enumerate(bar):
        rate = min(1.0, (step + 1) / 20) * (1 - 0.98 * step / args.steps)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        if arm == "none":
            batch.pop("alignment")
        loss, parts = pupil(**batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(pupil.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix({name: round(value, 3) for name, value in parts.items()}, refresh=False)
    pupil.eval()
    losses = []
    with torch.no_grad():
        for batch in islice(conversations(processor, "phrases", [8, 0, 0]), HELD_OUT):
            losses.append(pupil(**batch)[1])
    mllm.save_pretrained(folder)
    processor.save_pretrained(folder)
    means = {name: sum(part[name] for part in losses) / len(losses) for name in ("language", "alignment")}
    write_whole(folder / "losses.json", json.dumps(means))


def measure(args, arm):
    """All figures of one arm."""
    base = args.output / f"{arm}-{args.steps}-{args.sae_steps}-{args.label_samples}-seed{args.seed}"
    mllm, joined, sae, figures = (base / name for name in ("mllm", "joined", "sae", "figures.json"))
    if figures.exists():
        return json.loads(figures.read_text())
    if not (mllm / "losses.json").exists():
        train_mllm(args, arm, mllm)
    if not (joined / "model.safetensors").exists():
        join(Namespace(mllm=mllm, weights=args.start, output=joined))
    if not (sae / "quality.json").exists():
        words = ["--config", HERE / "sae.yaml", "--model", joined, "--output_dir", sae, "--max_steps", args.sae_steps]
        words += ["--seed", args.seed]
        train_sae.main([str(word) for word in words])
    model = SegCompassModel.from_pretrained(joined, dtype="float32").eval()
    model.load_sae(str(sae))
    truths = SceneTruths("scenes", "test", seed=900101, chosen=args.label_samples, scored=args.label_samples)
    found = find_labels(model, SegCompassProcessor.from_pretrained(joined), truths, 16)
    quality = json.loads((sae / "quality.json").read_text())
    shared = {name.replace(" ", "_"): value for name, value in found.counts["shared"].items() if name != "best"}
    losses = json.loads((mllm / "losses.json").read_text())
    values = {**losses, "explained_variance": quality["explained_variance"], **shared}
    write_whole(figures, json.dumps(values))
    return values


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, required=True, help="a small model with the attention read-out")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--steps", type=int, default=400, help="of the MLLM; default: %(default)s")
    parser.add_argument("--sae-steps", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes, their order and the SAE's start")
    parser.add_argument("--label-samples", type=int, default=300, help="scenes that label, and others that score")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for arm in args.arms:
        results[arm] = measure(args, arm)
        print(
            arm, {name: round(value, 3) if isinstance(value, float) else value for name, value in results[arm].items()}
        )
    print("RESULT", json.dumps(results))


if __name__ == "__main__":
    main()
