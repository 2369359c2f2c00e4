"""The two read-outs at equal training: same frozen MLLM, SAE and image encoder, same rows, steps and decoder start.

    python examples/recipes/mini-grounded/compare_read_outs.py --model runs/mini-grounded/joined \\
        --sae runs/mini-grounded/sae --masks runs/mini-grounded/masks/masks.pt --output runs/mini-grounded/compared

`attention` is the paper's query codebook and slot mapper, trained on Eq. 6. `grounded` is what replaces them, trained
on its own losses (`trainers/grounded_masks.py`); `grounded-eq6` is the same read-out on Eq. 6 alone. All learn on kept
states, each from --seeds. The test scenes' answers are written once, and every read-out makes its masks from the same
answers. Prints gIoU and cIoU, and the paired difference to attention with a 95 % bootstrap interval over scenes, of
each seed and of their mean; the last line is RESULT {json}. Repeat the command to resume. Afterwards
`segcompass white-box --model OUTPUT/NAME` measures the criteria of each.
"""

import argparse
import json
import math
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from segcompass.loaders.scene_questions import word_kind
from segcompass.loaders.scenes import load_scenes
from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.modeling_segcompass.states import ReasoningStates
from segcompass.modeling_segcompass.whole_files import write_whole
from segcompass.trainers.collator import SegCompassCollator
from segcompass.trainers.grounded_masks import CachedStates, GroundedMasksConfig, cache_states, train_grounded
from segcompass.trainers.losses import LossWeights, segmentation_loss
from segcompass.white_box.intervals import bootstrap

sys.path.append(str(Path(__file__).resolve().parent))
from stages import Prompted  # noqa: E402

KINDS = ("attention", "grounded", "grounded-eq6")
ROWS = 12  # of a step on Eq. 6: as many as four images with three questions, a step of the grounded training's phase 2
PART = 60  # rows of a file of kept states


def build(args, reading):
    """A model with a fresh read-out of this kind; all else is the same."""
    start = SegCompassModel.from_pretrained(args.model, dtype="float32")
    start.load_sae(str(args.sae))
    Prompted(start).load_state_dict(torch.load(args.masks, weights_only=True))
    config = type(start.config).from_dict({**start.config.to_dict(), "concept_reading": reading})
    model = SegCompassModel(config)
    weights = {name: value for name, value in start.state_dict().items() if name in model.state_dict()}
    weights = {name: value for name, value in weights.items() if not name.startswith("grounded_reading.")}
    model.load_state_dict(weights, strict=False)
    return model.eval()


@torch.no_grad()
def keep_states(model, processor, rows, folder):
    """What `decode_masks` reads of each row, on the reference responses, in files of PART rows; resumable."""
    folder.mkdir(parents=True, exist_ok=True)
    collate, backbone = SegCompassCollator(processor, 4 * model.config.key_grid), model.backbone
    for number, start in enumerate(tqdm(range(0, len(rows), PART), desc="states", mininterval=10)):
        path = folder / f"{number:05}.pt"
        if path.exists():
            continue
        kept = []
        for first in range(start, min(start + PART, len(rows)), ROWS):
            batch = collate([rows[index] for index in range(first, min(first + ROWS, start + PART, len(rows)))])
            targets, keys = batch.pop("mask_targets"), model.get_image_embeddings(batch["encoder_pixel_values"])
            ids, attention, response = (batch[name] for name in ("input_ids", "attention_mask", "response_mask"))
            with model.reading_states() as recorder:
                backbone.without_head(model.mllm)(**backbone.mllm_inputs(model.mllm, batch), use_cache=False)
                states = recorder.states_of_pass(ids, attention, response)
            states = states._replace(
                image_embeddings=keys,
                reshaped_input_sizes=batch["reshaped_input_sizes"],
                patch_boxes=batch["patch_boxes"],
            )
            kept += records_of(states, targets)
        write_whole(path, partial(torch.save, kept))


def records_of(states, targets):
    """Each sample's states, without padding and in half precision, with its targets."""
    records = []
    for row, masks in enumerate(targets):
        fields = states.rows([row]).trimmed()._asdict().items()
        kept = {name: value[0].half() if value.is_floating_point() else value[0] for name, value in fields}
        records.append({**kept, "targets": (255 * masks).round().byte()})
    return records


def batch_of(records):
    """ReasoningStates of some records, padded to the left as a batch is, and their targets."""
    longest = max(len(record["input_ids"]) for record in records)

    def stacked(name):
        values = [record[name] for record in records]
        values = [value.float() if value.is_floating_point() else value for value in values]
        if name in ("input_ids", "attention_mask", "response_mask", "z", "last_hidden"):
            values = [torch.cat([value.new_zeros(longest - len(value), *value.shape[1:]), value]) for value in values]
        return torch.stack(values)

    states = ReasoningStates(**{name: stacked(name) for name in ReasoningStates._fields})
    return states, [record["targets"].float() / 255 for record in records]


def train_eq6(model, records, args, seed, path):
    """Train read-out and mask decoder on Eq. 6 over kept states; resumes from `path`."""
    model.requires_grad_(False)
    parts = [model.mask_decoder]
    parts += [model.grounded_reading] if model.grounded else [model.query_codebook, model.slot_mapper]
    for part in parts:
        part.requires_grad_(True)
    learning = [weight for part in parts for weight in part.parameters()]
    groups = [
        {"params": [weight for part in parts[1:] for weight in part.parameters()], "peak": args.rate},
        {"params": list(model.mask_decoder.parameters()), "peak": 5e-4},
    ]
    optimizer, steps, step = torch.optim.AdamW(groups, lr=args.rate, weight_decay=0.01), args.steps, 0
    if path.exists():
        kept = torch.load(path, weights_only=True)
        step = kept["step"]
        optimizer.load_state_dict(kept["optimizer"])
        for part, weights in zip(parts, kept["parts"], strict=True):
            part.load_state_dict(weights)
    bar = tqdm(range(step, steps), initial=step, total=steps, mininterval=10)
    for step in bar:
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        states, targets = batch_of([records[i] for i in torch.randperm(len(records), generator=generator)[:ROWS]])
        output = model.decode_masks(**states._asdict())
        extent = model.config.frame.valid_extent(states.reshaped_input_sizes, output.pred_masks.shape[-1])
        loss, parts_of = segmentation_loss(output, targets, extent, LossWeights())
        rate = min(1.0, (step + 1) / 30) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        if step % 25 == 0:
            bar.set_postfix({name: round(float(value), 3) for name, value in parts_of.items()}, refresh=False)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            kept = {
                "step": step + 1,
                "optimizer": optimizer.state_dict(),
                "parts": [part.state_dict() for part in parts],
            }
            write_whole(path, partial(torch.save, kept))


def train(args, kind, seed, processor, records):
    """Train one read-out from one seed and save the model; nothing is done where it is saved already."""
    folder = args.output / f"{kind}-{seed}"
    if (folder / "manifest.json").exists():
        return
    torch.manual_seed(seed)
    model = build(args, "feature" if kind == "attention" else "grounded")
    begun = time.monotonic()
    if kind == "grounded":
        steps = {"patch_steps": args.steps // 3, "mask_steps": args.steps - args.steps // 3}
        config = GroundedMasksConfig(**steps, seed=seed, held_out=("purple", "star"), save_steps=100)
        for _ in tqdm(train_grounded(model, args.output / "codes", args.output / f"{kind}-{seed}.pt", config)):
            pass
    else:
        if model.grounded:
            spread, bias = CachedStates(args.output / "codes").spread_and_start()
            with torch.no_grad():
                model.grounded_reading.spread.copy_(spread)
                model.grounded_reading.concept_bias.copy_(bias)
        train_eq6(model, records, args, seed, args.output / f"{kind}-{seed}.pt")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_whole(args.output / f"{kind}-{seed}.seconds", json.dumps(time.monotonic() - begun))


@torch.no_grad()
def measure(args, kind, seed, answers):
    """(intersection, union) of each test scene's whole mask, pixels of the mask frame, in `answers`' order."""
    path = args.output / f"{kind}-{seed}.json"
    if path.exists():
        return np.array(json.loads(path.read_text()))
    model = SegCompassModel.from_pretrained(args.output / f"{kind}-{seed}", dtype="float32")
    areas = []
    for start in range(0, len(answers), ROWS):
        states, targets = batch_of(answers[start : start + ROWS])
        output = model.decode_masks(**states._asdict())
        sure = (output.pred_logits >= 0) & output.slot_mask
        shown = ((output.pred_masks > 0) & sure[..., None, None]).any(1)  # (B, 4h, 4w)
        extents = model.config.frame.valid_extent(states.reshaped_input_sizes, shown.shape[-1])
        for mask, wanted, (height, width) in zip(shown, targets, extents.tolist(), strict=True):
            goal = (wanted > 0.5).any(0) if len(wanted) else torch.zeros_like(mask)
            mask, goal = mask[:height, :width], goal[:height, :width]
            areas.append([int((mask & goal).sum()), int((mask | goal).sum())])
    write_whole(path, json.dumps(areas))
    return np.array(areas)


@torch.no_grad()
def write_answers(args, model, processor, rows):
    """The states of the MLLM's own answers to the test scenes, with the targets; kept in one file."""
    path = args.output / "answers.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    collate, kept = SegCompassCollator(processor, 4 * model.config.key_grid), []
    for start in tqdm(range(0, len(rows), ROWS), desc="answers", mininterval=10):
        batch = [rows[index] for index in range(start, min(start + ROWS, len(rows)))]
        targets = collate(batch)["mask_targets"]
        inputs = processor(images=[row["image"] for row in batch], text=[row["instruction"] for row in batch])
        _, states = model.reason(**inputs)
        kept += records_of(states, targets)
    write_whole(path, partial(torch.save, kept))
    return kept


def giou(areas):
    """Mean over scenes of intersection / union, 1 where both masks are empty."""
    return np.where(areas[:, 1] == 0, 1.0, areas[:, 0] / np.maximum(areas[:, 1], 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "sae", "masks", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scenes", type=int, default=2800, help="training scenes, with three questions each")
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate of a read-out on Eq. 6")
    parser.add_argument("--test-scenes", type=int, default=500)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    processor = SegCompassProcessor.from_pretrained(args.model)
    model = build(args, "grounded")
    style = {"size": "mixed", "answers": "fitting", "twins": 0.04}
    rows = load_scenes("train", 3, 3 * args.scenes, **style, questions=3)
    cache_states(model, processor, rows, args.output / "codes", word_kind)
    keep_states(model, processor, rows, args.output / "states")
    test = load_scenes("test", 100, args.test_scenes)
    answers = write_answers(args, model, processor, test)
    records: list[dict] = []
    areas = {}
    for seed in args.seeds:
        for kind in args.kinds:
            if kind != "grounded" and not (args.output / f"{kind}-{seed}/manifest.json").exists() and not records:
                files = sorted((args.output / "states").glob("*.pt"))
                records = [record for path in files for record in torch.load(path, weights_only=True)]
            train(args, kind, seed, processor, records)
            areas[kind, seed] = measure(args, kind, seed, answers)
            print(kind, seed, f"gIoU {giou(areas[kind, seed]).mean():.4f}", flush=True)
    result = {}
    scenes = np.arange(len(answers))
    for kind in args.kinds:
        runs = [areas[kind, seed] for seed in args.seeds]
        result[kind] = {
            "giou": [round(float(giou(run).mean()), 4) for run in runs],
            "ciou": [round(float(run[:, 0].sum() / run[:, 1].sum()), 4) for run in runs],
            "seconds": [round(json.loads((args.output / f"{kind}-{s}.seconds").read_text())) for s in args.seeds],
        }
        if kind != "attention" and "attention" in args.kinds:
            gains = [giou(areas[kind, seed]) - giou(areas["attention", seed]) for seed in args.seeds]
            mean = partial(np.mean, axis=0)
            result[kind]["gain"] = [
                [round(value, 4) for value in bootstrap(gain, mean, scenes, resamples=1000, seed=0)]
                for gain in (*gains, np.mean(gains, 0))
            ]
        print(kind, json.dumps(result[kind]))
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
