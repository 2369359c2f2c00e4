"""Do the concepts make the masks? Take the heaviest away, keep only them, and compare with random ones.

    python examples/faithfulness.py --model examples/checkpoints/mini --num-samples 400 --output runs/faithfulness

The model writes its own reasoning, greedily; then each mask that is right (a slot of confidence 0.5 or more whose IoU
with a target reaches 0.5) is decoded again and again with some of its concepts switched off. Prints how much the IoU
falls without a slot's heaviest concepts and without random active ones, the deletion and insertion curves, and what
is left of the masks when the queries are built from the concentration tokens or the concepts alone. All intervals are
95 % bootstrap intervals over scenes. Writes metrics.json, curves.csv and curves.png. Resumes where it was cut off.
"""

import sys
from pathlib import Path

# Python looks for modules beside a script first: there evaluate.py would hide the library of the metric.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path.append(sys.path.pop(0))

import argparse
import csv
import json

import numpy as np
import torch
from journal import Journal, weights_of
from matplotlib.figure import Figure
from pycocotools import mask as coco_mask
from segment import load
from tqdm import tqdm

from segcompass.loaders import load_rows
from segcompass.loaders.reasoning_segmentation.reasoning_segmentation import sample_counts, summarise
from segcompass.modeling_segcompass.faithfulness import (
    FRACTIONS,
    ORDERS,
    area_under,
    bootstrap,
    overlap,
    slot_faithfulness,
)
from segcompass.trainers.targets import mask_targets

SOURCES = ("both", "tokens", "concepts")
CONFIDENT, RIGHT = 0.5, 0.5  # a mask is measured from this confidence and this IoU with a target


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="SegCompass folder or Hub id")
    parser.add_argument("--dataset", default="scenes", help="'scenes' or a folder written by Dataset.save_to_disk")
    parser.add_argument("--split", default="test")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and of the random concepts")
    parser.add_argument("--num-samples", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--top", type=int, default=5, help="how many concepts are taken away")
    parser.add_argument("--draws", type=int, default=8, help="how often random ones are drawn, a mask")
    parser.add_argument("--query-source", choices=["both", "concepts"], default="both", help="under which they are")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    for name in ("num_samples", "batch_size", "top", "draws"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1.")
    return args


def main(argv=None):
    args = parse(argv)
    try:
        rows = load_rows(args.dataset, args.split, args.seed, args.num_samples)
    except (ValueError, KeyError, OSError) as error:
        raise SystemExit(f"cannot load split {args.split!r} of {args.dataset!r}: {error}") from error
    run = {name: value for name, value in vars(args).items() if name not in ("output", "batch_size")}
    journal = Journal(args.output, {**run, "weights": weights_of(args.model)})
    todo = [index for index, name in enumerate(rows["sample_id"]) if name not in journal.records]
    if todo:
        model, processor = load(args.model)
        with tqdm(total=len(rows), initial=len(rows) - len(todo), unit="sample", dynamic_ncols=True) as bar:
            for start in range(0, len(todo), args.batch_size):
                batch = [rows[index] for index in todo[start : start + args.batch_size]]
                journal.add(measure(args, model, processor, batch))
                bar.update(len(batch))
    records = [journal.records[name] for name in rows["sample_id"]]
    metrics = analyse(records, args.top, args.seed)
    (args.output / "metrics.json").write_text(json.dumps(finite(metrics), indent=2) + "\n")
    report(metrics, args.top)
    if metrics["masks"]:
        write_curves(metrics, args.output)
    return finite(metrics)


# -- measuring ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(args, model, processor, batch):
    """One record a row: pixel counts under each query source, and what interventions do to each right mask."""
    inputs = processor(images=[row["image"] for row in batch], text=[row["instruction"] for row in batch])
    states = model.reason(**inputs.to(model.device))[1]._asdict()
    sizes = [(row["height"], row["width"]) for row in batch]
    frame, side = model.config.image_encoder_config.image_size, 4 * model.config.key_grid
    decoded = {source: model.decode_masks(**states, query_source=source) for source in SOURCES}
    found = {
        source: processor.post_process_instance_segmentation(outputs, CONFIDENT, target_sizes=sizes)
        for source, outputs in decoded.items()
    }
    for place, row in enumerate(batch):
        counts = {
            source: sample_counts([encode(mask) for mask in found[source][place]["masks"]], row["masks"], row["ignore"])
            for source in SOURCES
        }
        targets = mask_targets(row["masks"], row["height"], row["width"], frame, side) > 0.5
        targets = targets.to(model.device)
        slots = []
        for slot in found[args.query_source][place]["slots"].tolist():
            mask = decoded[args.query_source].pred_masks[place, slot] > 0
            ious = overlap(targets, mask)
            if max(ious, default=-1) < RIGHT:
                continue
            told = slot_faithfulness(
                model,
                states,
                slot,
                place,
                targets[int(ious.argmax())],
                top=args.top,
                draws=args.draws,
                query_source=args.query_source,
                seed=args.seed,
            )
            slots.append({"slot": slot, **plain(told)})
        yield {"sample_id": row["sample_id"], "counts": counts, "slots": slots}


def encode(mask):
    rle = coco_mask.encode(np.asfortranarray(mask.cpu().numpy(), dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def plain(told):
    """A SlotFaithfulness as JSON."""
    curves = {
        name: {order: curve.tolist() for order, curve in getattr(told, name).items()}
        for name in ("deletion", "insertion")
    }
    return {**told._asdict(), **curves}


# -- summing up --------------------------------------------------------------------------------------------------------


def analyse(records, top, seed=0):
    """What is told of the records: every value is [estimate, low, high]."""
    metrics = {"scenes": len(records), "top": top, "ablation": {}}
    for source in SOURCES:
        part = summarise([record["counts"][source] for record in records])
        metrics["ablation"][source] = {name: part[name] for name in ("gIoU", "cIoU", "N-acc", "T-acc")}
    slots = [(record["sample_id"], slot) for record in records for slot in record["slots"]]
    metrics["masks"], metrics["scenes_with_masks"] = len(slots), len({name for name, _ in slots})
    if not slots:
        return metrics
    groups = np.unique([name for name, _ in slots], return_inverse=True)[1]

    def interval(values, statistic=np.mean):
        return list(bootstrap(values, statistic, groups, seed=seed))

    taken = np.array([[slot["full"] - slot["without_top"], slot["full"] - slot["without_random"]] for _, slot in slots])
    left = np.array([[slot["full"] - slot["only_top"], slot["full"] - slot["only_random"]] for _, slot in slots])
    metrics["full"] = interval([slot["full"] for _, slot in slots])
    for name, statistic in (("median", np.median), ("mean", np.mean)):
        metrics[f"drop_top_{name}"] = interval(taken[:, 0], statistic)
        metrics[f"drop_random_{name}"] = interval(taken[:, 1], statistic)
        metrics[f"ratio_of_{name}s"] = interval(taken, lambda rows, s=statistic: ratio(s(rows[:, 0]), s(rows[:, 1])))
    metrics["comprehensiveness"], metrics["comprehensiveness_random"] = interval(taken[:, 0]), interval(taken[:, 1])
    metrics["sufficiency"], metrics["sufficiency_random"] = interval(left[:, 0]), interval(left[:, 1])
    for name in ("deletion", "insertion"):
        curves = {order: np.array([slot[name][order] for _, slot in slots]) for order in ORDERS}
        metrics[name] = {
            order: {
                "curve": curve.mean(0).tolist(),
                "auc": interval([area_under(row) for row in curve]),
            }
            for order, curve in curves.items()
        }
    return metrics


def ratio(top, random):
    """How many times as much; infinite when random ones change nothing, nan when neither does."""
    if random > 0:
        return top / random
    return float("inf") if top > 0 else float("nan")


def finite(value):
    """JSON knows no infinity and no nan: they become null."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return value if not isinstance(value, float) or np.isfinite(value) else None


def report(metrics, top):
    print(f"\n{metrics['scenes']} scenes; queries built from  gIoU    cIoU    N-acc   T-acc")
    for source, part in metrics["ablation"].items():
        values = "  ".join("  –   " if part[name] is None else f"{part[name]:.4f}" for name in part)
        told = {"both": "e_k and r_k", "tokens": "e_k alone", "concepts": "r_k alone"}[source]
        print(f"  {told:<32}{values}")
    print(f"\n{metrics['masks']} right masks in {metrics['scenes_with_masks']} scenes")
    if not metrics["masks"]:
        return
    print(f"  IoU with all concepts                  {told_interval(metrics['full'])}")
    for name in ("median", "mean"):
        print(f"  {name} drop without the top {top:<12} {told_interval(metrics[f'drop_top_{name}'])}")
        print(f"  {name} drop without {top} random active   {told_interval(metrics[f'drop_random_{name}'])}")
        print(f"  ratio of {name}s                       {told_interval(metrics[f'ratio_of_{name}s'], 2)}")
    print(f"  sufficiency, top (random)              {told_interval(metrics['sufficiency'])}", end="")
    print(f"  ({told_interval(metrics['sufficiency_random'])})")
    print("\narea under the curve     by weight               random                  lightest first")
    for name in ("deletion", "insertion"):
        print(f"  {name:<20}  " + "  ".join(told_interval(metrics[name][order]["auc"]) for order in ORDERS))


def told_interval(values, digits=3):
    estimate, low, high = values
    return f"{estimate:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def write_curves(metrics, folder):
    with (folder / "curves.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["curve", "order", "share_of_concepts", "iou"])
        for name in ("deletion", "insertion"):
            for order in ORDERS:
                for share, iou in zip(FRACTIONS, metrics[name][order]["curve"], strict=True):
                    writer.writerow([name, order, share, iou])
    figure = Figure(figsize=(10, 4), layout="constrained")
    told = {"weight": "heaviest first", "random": "random", "reverse": "lightest first"}
    for ax, name in zip(figure.subplots(1, 2, sharey=True), ("deletion", "insertion"), strict=True):
        for order in ORDERS:
            ax.plot(FRACTIONS, metrics[name][order]["curve"], marker=".", label=told[order])
        ax.set(title=name, xlabel=f"share of concepts {'taken away' if name == 'deletion' else 'put in'}")
        ax.legend(frameon=False)
    figure.supylabel("IoU with the target", fontsize="medium")
    figure.savefig(folder / "curves.png", dpi=130)


if __name__ == "__main__":
    main()
