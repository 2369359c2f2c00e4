"""The paper's analyses of what the concepts do, on one model and one data set: Figures 4, 5, 8 and 9.

    python examples/interpret.py --model examples/checkpoints/mini --dataset scenes --output runs/interpret

The model writes its own reasoning, greedily. Each figure comes as data (CSV) and as a plot (PNG):
    figure4   active features a token, by the kind of token: question, reasoning, instance patch, background patch
    figure5   share of an instance's pixels under the K % of image tokens that fire most, or that the slots' concepts
              fire on most, against K % random ones
    figure8   left: SAE error against mask dice loss, a point a batch; right: heatmap IoU against mask IoU, a point an
              instance; regression line with the 95 % band of the mean, r and p
    figure9   instruction, image, activated tokens, heatmap, mask of the first samples that have a target
What it prints is the summary of the first three. Resumes where it was cut off.
"""

import argparse
import csv
import textwrap
from pathlib import Path

import numpy as np
import torch
from journal import Journal, weights_of
from matplotlib.figure import Figure
from pycocotools import mask as coco_mask
from scipy import stats
from segment import load, patch_extent
from tqdm import tqdm

from segcompass.loaders import load_rows
from segcompass.modeling_segcompass.faithfulness import overlap
from segcompass.modeling_segcompass.token_layout import IMAGE, INSTRUCTION
from segcompass.trainers.losses import segmentation_loss
from segcompass.trainers.targets import mask_targets

KINDS = ("question", "reasoning", "instance", "background")
LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # thresholds, in units of the SAE's usual strength
SHARES = (5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)  # K, percent
RANKINGS = ("activation", "concepts", "random")
POINTS = 8  # samples behind a point of Figure 8, left


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="SegCompass folder or Hub id")
    parser.add_argument("--dataset", default="scenes", help="'scenes' or a folder written by Dataset.save_to_disk")
    parser.add_argument("--split", default="test")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and of the random tokens")
    parser.add_argument("--num-samples", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--panels", type=int, default=6, help="rows of Figure 9")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    for name in ("num_samples", "batch_size", "panels"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1.")
    return args


def main(argv=None):
    args = parse(argv)
    try:
        rows = load_rows(args.dataset, args.split, args.seed, args.num_samples)
    except (ValueError, KeyError, OSError) as error:
        raise SystemExit(f"cannot load split {args.split!r} of {args.dataset!r}: {error}") from error
    run = {name: getattr(args, name) for name in ("model", "dataset", "split", "seed", "num_samples")}
    journal = Journal(args.output, {**run, "weights": weights_of(args.model)})
    model, processor = load(args.model)
    todo = [index for index, name in enumerate(rows["sample_id"]) if name not in journal.records]
    with tqdm(total=len(rows), initial=len(rows) - len(todo), unit="sample", dynamic_ncols=True) as bar:
        for start in range(0, len(todo), args.batch_size):
            batch = [rows[index] for index in todo[start : start + args.batch_size]]
            journal.add(measure(model, processor, batch, args.seed))
            bar.update(len(batch))
    records = [journal.records[name] for name in rows["sample_id"]]
    summary = {"figure4": figure4(records, args.output), "figure5": figure5(records, args.output)}
    summary["figure8"] = figure8(records, args.output)
    figure9(model, processor, rows, args)
    print(f"wrote the figures and their data to {args.output}")
    return summary


# -- measuring ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(model, processor, batch, seed):
    """One record a row: what all figures need of it."""
    inputs = processor(images=[row["image"] for row in batch], text=[row["instruction"] for row in batch])
    _, states = model.reason(**inputs.to(model.device))
    outputs = model.decode_masks(**states._asdict())
    fires = model.concept_token_mask(states.input_ids, states.attention_mask)
    unit = mean_active_activation(model.sae)
    frame, side = model.config.image_encoder_config.image_size, 4 * model.config.key_grid
    for place, row in enumerate(batch):
        rng = np.random.default_rng([seed, place])
        z = states.z[place].float()
        h = model.sae.encode(z).float() * fires[place][:, None]
        types = outputs.token_types[place]
        targets = mask_targets(row["masks"], row["height"], row["width"], frame, side)
        instances = coco_mask.decode(row["masks"]).astype(bool).transpose(2, 0, 1) if row["masks"] else []
        grid = tuple(outputs.patch_grid[place].tolist())
        patch_of = patches_of_pixels(processor.image_processor, row["image"], grid)
        kinds = kinds_of_tokens(types, fires[place], instances, patch_of)
        record = {"sample_id": row["sample_id"], "tokens": {}, "active": {}}
        for number, kind in enumerate(KINDS):
            chosen = h[kinds == number]
            record["tokens"][kind] = len(chosen)
            record["active"][kind] = [int((chosen > level * unit).sum()) for level in LEVELS]
        record["coverage"] = coverage(h, outputs, place, types == IMAGE, instances, patch_of, rng)
        error = (z - model.sae.decode(h)).square().sum(-1)
        record["sae_error"] = float(error[fires[place]].mean())
        record["dice"] = None
        record["pairs"] = []
        if len(targets) and outputs.slot_mask[place].any():
            one = slice(place, place + 1)
            valid = model.config.frame.valid_extent(outputs.reshaped_input_sizes[one], side)
            slots = {name: outputs[name][one] for name in ("pred_masks", "heatmaps", "pred_logits", "slot_mask")}
            _, parts = segmentation_loss(type(outputs)(**slots), [targets.to(z.device)], valid)
            record["dice"] = float(parts["mask_dice"])
            record["pairs"] = heatmap_pairs(outputs, place, targets.to(z.device) > 0.5, side)
        yield record


def mean_active_activation(sae):
    """Mean of the features' usual strengths, the unit of Figure 4's thresholds."""
    return float(sae.mean_active_activation.float().mean())


def patches_of_pixels(image_processor, image, grid):
    """The image token that sees each pixel, long (H, W); -1 outside what the MLLM sees."""
    left, top, right, bottom = patch_extent(image_processor, image)
    rows, columns = grid
    row = np.floor((np.arange(image.height) + 0.5 - top) / (bottom - top) * rows).astype(int)[:, None]
    column = np.floor((np.arange(image.width) + 0.5 - left) / (right - left) * columns).astype(int)[None]
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    return np.where(inside, row * columns + column, -1)


def kinds_of_tokens(types, fires, instances, patch_of):
    """Place in KINDS of each token, long (T,); -1 for special tokens, padding and patches on an instance's edge."""
    kinds = torch.where(types == INSTRUCTION, 0, 1)
    count = int((types == IMAGE).sum())
    shown = np.bincount(patch_of[patch_of >= 0], minlength=count)
    union = np.any(instances, axis=0) & (patch_of >= 0) if len(instances) else np.zeros_like(patch_of, dtype=bool)
    share = np.bincount(patch_of[union], minlength=count) / np.maximum(shown, 1)
    patches = torch.from_numpy(np.where(share >= 0.5, 2, np.where(share == 0, 3, -1)))
    kinds[types == IMAGE] = patches.to(kinds.device)
    return kinds.masked_fill(~fires, -1)


def coverage(h, outputs, place, is_image, instances, patch_of, rng):
    """ranking -> for each instance the shares of its pixels under the first K % of the image tokens."""
    found = outputs.slot_mask[place]
    kept = found & (outputs.pred_logits[place] >= 0)
    slots = kept if kept.any() else found
    activations = outputs.concept_activations[place][is_image].float()
    weights = outputs.concept_weights[place][slots].float().sum(0)
    by_concepts = (activations - activations.mean(0)).clamp_min(0) @ weights
    scores = {
        "activation": h[is_image].sum(-1).cpu().numpy(),
        "concepts": by_concepts.cpu().numpy(),
        "random": rng.random(int(is_image.sum())),
    }
    covered = {}
    for ranking in RANKINGS:
        order = np.argsort(-scores[ranking], kind="stable")
        rank = np.empty(len(order), int)
        rank[order] = np.arange(len(order))
        seen_at = np.where(patch_of >= 0, rank[patch_of], len(order))  # pixels outside the view are never covered
        limits = [round(len(order) * share / 100) for share in SHARES]
        covered[ranking] = [[float((seen_at[mask] < limit).mean()) for limit in limits] for mask in instances]
    return covered


def heatmap_pairs(outputs, place, targets, side):
    """(heatmap IoU, mask IoU) of each target with the slot whose mask overlaps it most."""
    slots = outputs.slot_mask[place].nonzero()[:, 0]
    masks = outputs.pred_masks[place, slots] > 0
    heat = torch.nn.functional.interpolate(
        outputs.heatmaps[place, slots][None].float(), (side, side), mode="bilinear", align_corners=False
    )[0]
    pairs = []
    for target in targets:
        ious = overlap(masks, target)
        best = int(ious.argmax())
        pairs.append([float(overlap(heat[best : best + 1] > 0, target)[0]), float(ious[best])])
    return pairs


# -- figures -----------------------------------------------------------------------------------------------------------


def write_csv(path, header, lines):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(lines)


def figure4(records, folder):
    """kind -> active features a token at each level."""
    means = {}
    for kind in KINDS:
        tokens = sum(record["tokens"][kind] for record in records)
        active = np.sum([record["active"][kind] for record in records], axis=0)
        means[kind] = (active / max(tokens, 1)).tolist()
    lines = [[kind, level, value] for kind in KINDS for level, value in zip(LEVELS, means[kind], strict=True)]
    write_csv(folder / "figure4.csv", ["kind", "threshold_in_usual_strengths", "active_features_per_token"], lines)
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    for kind in KINDS:
        ax.plot(LEVELS, means[kind], marker="o", label=kind)
    ax.set(xlabel="threshold (usual strengths)", ylabel="active features a token")
    ax.legend(frameon=False)
    figure.savefig(folder / "figure4.png", dpi=130)
    print("\nFigure 4: active features a token, by threshold")
    print(f"{'':<12}" + "".join(f"{level:>8.2f}" for level in LEVELS))
    for kind in KINDS:
        print(f"{kind:<12}" + "".join(f"{value:>8.2f}" for value in means[kind]))
    return means


def figure5(records, folder):
    """ranking -> coverage at each K; {} when no sample has a target."""
    curves = {ranking: [curve for record in records for curve in record["coverage"][ranking]] for ranking in RANKINGS}
    if not curves["random"]:
        print("\nFigure 5: no sample has a target")
        return {}
    means = {ranking: np.mean(curves[ranking], axis=0).tolist() for ranking in RANKINGS}
    lines = [
        [ranking, share, value] for ranking in RANKINGS for share, value in zip(SHARES, means[ranking], strict=True)
    ]
    write_csv(folder / "figure5.csv", ["ranking", "top_percent", "instance_coverage"], lines)
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    told = {"activation": "strongest activations", "concepts": "slots' concepts", "random": "random tokens"}
    for ranking in RANKINGS:
        ax.plot(SHARES, means[ranking], marker="o", label=told[ranking])
    ax.set(xlabel="top K % of the image tokens", ylabel="instance coverage")
    ax.legend(frameon=False)
    figure.savefig(folder / "figure5.png", dpi=130)
    print(f"\nFigure 5: coverage of {len(curves['random'])} instances by the top K % of image tokens")
    print(f"{'K':<12}" + "".join(f"{share:>7}" for share in SHARES))
    for ranking in RANKINGS:
        print(f"{ranking:<12}" + "".join(f"{value:>7.3f}" for value in means[ranking]))
    return means


def figure8(records, folder):
    """side -> {"r", "p", "slope", "n"}; a side without three points is left out."""
    scored = [record for record in records if record["dice"] is not None]
    groups = [scored[start : start + POINTS] for start in range(0, len(scored) - POINTS + 1, POINTS)]
    errors = [[np.mean([r["sae_error"] for r in group]), np.mean([r["dice"] for r in group])] for group in groups]
    pairs = [pair for record in scored for pair in record["pairs"]]
    write_csv(folder / "figure8_sae.csv", ["sae_error", "mask_dice_loss"], errors)
    write_csv(folder / "figure8_heatmap.csv", ["heatmap_iou", "mask_iou"], pairs)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    found = {}
    for ax, name, points, labels in zip(
        figure.subplots(1, 2),
        ("sae", "heatmap"),
        (errors, pairs),
        (("SAE error ||z - ẑ||²", "mask dice loss"), ("heatmap IoU", "mask IoU")),
        strict=True,
    ):
        ax.set(xlabel=labels[0], ylabel=labels[1])
        if len(points) < 3 or np.ptp(np.array(points)[:, 0]) == 0:
            ax.set_title(f"{len(points)} points: too few")
            continue
        x, y = np.array(points).T
        line = stats.linregress(x, y)
        found[name] = {"r": line.rvalue, "p": line.pvalue, "slope": line.slope, "n": len(x)}
        ax.scatter(x, y, s=12, alpha=0.5)
        at, low, high = confidence_band(x, y, line)
        ax.plot(at, line.intercept + line.slope * at, color="#e8338b")
        ax.fill_between(at, low, high, color="#e8338b", alpha=0.2)
        ax.set_title(f"r = {line.rvalue:.2f}, p = {line.pvalue:.1e}, n = {len(x)}")
    figure.savefig(folder / "figure8.png", dpi=130)
    print("\nFigure 8: correlations")
    for name, told in found.items():
        print(f"{name:<12}r {told['r']:+.3f}   p {told['p']:.2e}   slope {told['slope']:+.4g}   n {told['n']}")
    return found


def confidence_band(x, y, line):
    """(at, low, high): the 95 % band of the regression's mean over the range of x."""
    at = np.linspace(x.min(), x.max(), 50)
    rest = y - (line.intercept + line.slope * x)
    error = np.sqrt((rest**2).sum() / (len(x) - 2))
    width = stats.t.ppf(0.975, len(x) - 2) * error
    width = width * np.sqrt(1 / len(x) + (at - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum())
    middle = line.intercept + line.slope * at
    return at, middle - width, middle + width


@torch.no_grad()
def figure9(model, processor, rows, args):
    """Panels of the first samples that have a target and a slot, right or wrong."""
    figure, count = None, 0
    for row in rows:
        if not row["masks"]:
            continue
        inputs = processor(images=row["image"], text=row["instruction"]).to(model.device)
        outputs = model.segment(**inputs)
        slots = outputs.slot_mask[0].nonzero()[:, 0].tolist()
        if not slots:
            continue
        surest = max(slots, key=lambda slot: float(outputs.pred_logits[0, slot]))
        told = model.explain(outputs, slot=surest, processor=processor)
        size = [(row["height"], row["width"])]
        mask = processor.post_process_masks(outputs.pred_masks, size)[0][surest].cpu().numpy() > 0
        if figure is None:
            figure = Figure(figsize=(12, 2.6 * args.panels), layout="constrained")
            axes = figure.subplots(args.panels, 5, squeeze=False)
            for ax, title in zip(axes[0], ("instruction", "image", "activated tokens", "heatmap", "mask"), strict=True):
                ax.set_title(title)
        draw_panels(axes[count], row, told, mask, patch_extent(processor.image_processor, row["image"]))
        count += 1
        if count == args.panels:
            break
    if figure is None:
        print("\nFigure 9: no sample with a target has a slot")
        return
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.set_frame_on(False)
    figure.savefig(args.output / "figure9.png", dpi=110)


def draw_panels(axes, row, told, mask, extent):
    image = np.asarray(row["image"].convert("RGB"))
    height, width = image.shape[:2]
    left, top, right, bottom = extent
    axes[0].text(0.5, 0.5, textwrap.fill(row["instruction"], 22), ha="center", va="center", parse_math=False)
    patches = told.patch_map / max(told.patch_map.max(), 1e-9)
    layers = (None, (patches, (left, right, bottom, top)), (told.heatmap, None), (np.float32(mask), None))
    for ax, layer in zip(axes[1:], layers, strict=True):
        ax.imshow(image, extent=(0, width, height, 0), alpha=1 if layer is None else 0.6)
        if layer is not None:
            values, area = layer
            area = area or (0, width, height, 0)
            ax.imshow(values, extent=area, cmap="inferno", vmin=0, vmax=1, alpha=0.85 * np.clip(values, 0, 1))
        ax.set(xlim=(0, width), ylim=(height, 0))


if __name__ == "__main__":
    main()
