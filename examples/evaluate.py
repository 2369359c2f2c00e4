"""Evaluate a model on a data set: it writes its own reasoning, greedily, and its masks are compared with the true ones.

    python examples/evaluate.py --model examples/checkpoints/mini --dataset scenes --split test --output runs/test
    accelerate launch examples/evaluate.py --model PATH --dataset refcoco --root REFER --image-dir train2014 \\
        --split testA --output runs/testA
    python examples/evaluate.py --predictions THEIRS.jsonl --dataset reasonseg --root ReasonSeg --split val \\
        --protocol lisa --output runs/theirs

Writes into the output folder
    predictions.jsonl   one line a sample: what was written, the kept slots with their masks, the pixel counts
    metrics.json        the metrics of all samples, in [0, 1], and `by_kind` where the rows have a column `kind`
    model-index.yml     the same for a model card
    gallery.html        best, worst and random samples
    run.json            what was evaluated; predictions of another run are never mixed in
An interrupted run goes on where it was when the command is repeated, on as many processes as you like. Instead of a
model, the predictions of any model can be scored (docs/protocols.md has their format and what the protocols mean).
"""

import sys
from pathlib import Path

# Python looks for modules beside a script first: there this file would hide the library `evaluate` of the metric.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path.append(sys.path.pop(0))

import argparse
import hashlib
import json
import time
from datetime import timedelta

import torch
import yaml
from accelerate import PartialState
from gallery import write_gallery
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index
from tqdm import tqdm

from segcompass.loaders import BENCHMARKS, load_rows
from segcompass.loaders.masks import encode_mask
from segcompass.loaders.predictions import (
    merge_parts,
    part_path,
    predicted_masks,
    read_parts,
    read_predictions,
    write_text,
)
from segcompass.loaders.reasoning_segmentation.reasoning_segmentation import (
    PROTOCOLS,
    sample_counts,
    sample_iou,
    summarise,
)
from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.trainers.image_features import open_image_features
from segcompass.trainers.rewards import format_score

REPORTED = ("gIoU", "cIoU", "N-acc", "T-acc")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="SegCompass folder or Hub id")
    what.add_argument("--predictions", type=Path, help="JSONL of any model's predictions to score instead")
    names = f"'scenes', {', '.join(BENCHMARKS)}, a .jsonl file, or a folder of prepare_data.py or save_to_disk"
    parser.add_argument("--dataset", default="scenes", help=names)
    parser.add_argument("--root", help="of a benchmark: the folder with the files its authors released")
    parser.add_argument("--image-dir", help="of the RefCOCO family: COCO's train2014 images")
    parser.add_argument("--split", default="test")
    parser.add_argument("--split-by", help="of the RefCOCO family: unc, umd or google")
    parser.add_argument("--unit", choices=["sentence", "ref", "merged"], help="one sample; default: the protocol's")
    parser.add_argument("--protocol", choices=list(PROTOCOLS), default="rela")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    parser.add_argument("--num-samples", type=int, help="the first so many (default: all; 500 scenes)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--query-source", choices=["both", "tokens", "concepts"], default="both")
    parser.add_argument(
        "--threshold", type=float, help="confidence from which a slot is kept (default 0.5; 0 for segcompass_released)"
    )
    parser.add_argument("--image-features", help="folder that precompute_image_features.py wrote")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.num_samples is None and args.dataset == "scenes":
        args.num_samples = 500
    for name in ("num_samples", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
    if args.threshold is None:
        args.threshold = 0.0 if PROTOCOLS[args.protocol].matched else 0.5
    if not 0 <= args.threshold <= 1:
        parser.error(f"--threshold is {args.threshold}; it is a probability, choose a value from 0 to 1.")
    if args.unit is None:  # of ReasonSeg's texts everyone takes the first
        args.unit = "ref" if args.dataset == "reasonseg" else PROTOCOLS[args.protocol].unit
    return args


def main(argv=None):
    args = parse(argv)
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=2))
    if args.predictions is not None and state.num_processes > 1:
        raise SystemExit("predictions are scored by one process: start the script without accelerate launch.")
    try:
        with state.main_process_first():
            rows = load_rows(
                *(args.dataset, args.split, args.seed, args.num_samples),
                **{name: getattr(args, name) for name in ("root", "split_by", "unit", "image_dir")},
            )
    except (ValueError, KeyError, OSError) as error:
        raise SystemExit(f"cannot load split {args.split!r} of {args.dataset!r}: {error}") from error
    names = list(rows["sample_id"])
    if len(set(names)) < len(names):
        raise SystemExit(
            f"{args.dataset!r} repeats sample ids ({len(set(names))} in {len(names)} rows); make them unique."
        )
    try:
        with state.main_process_first():
            if state.is_main_process:
                args.output.mkdir(parents=True, exist_ok=True)
                check_run(args.output / "run.json", describe_run(args, rows))
            done = read_parts(args.output, repair=state.is_main_process)
        state.wait_for_everyone()  # from here on the files change
        if args.predictions is not None:
            done = score_predictions(args, rows, names)
        elif len(done) < len(names):
            evaluate(args, state, rows, names, done)
            state.wait_for_everyone()
            done = read_parts(args.output)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    metrics = summarise_run(args, [done[name] for name in names])
    if state.is_main_process:
        merge_parts(args.output, names, done)
        write_results(args, rows, [done[name] for name in names], metrics)
        report(metrics, sum(record.get("seconds", 0) for record in done.values()))
    state.wait_for_everyone()
    return metrics


# -- predictions -------------------------------------------------------------------------------------------------------


def evaluate(args, state, rows, names, done):
    """Predict what is not `done` yet, this process every n-th batch, and add each batch to this process's file.

    Batches are cut at the same rows in every run, so that a resumed run pads, and so rounds, as an uninterrupted one.
    """
    starts = range(0, len(rows), args.batch_size)
    batches = [range(start, min(start + args.batch_size, len(rows))) for start in starts]
    batches = [batch for batch in batches if any(names[index] not in done for index in batch)]
    batches = batches[state.process_index :: state.num_processes]
    model, processor = load(args.model, state.device)
    try:
        features = args.image_features and open_image_features(args.image_features, model, processor)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    ious = [iou for iou in (sample_iou(record, args.protocol) for record in done.values()) if iou is not None]
    total = len(done) + sum(names[index] not in done for batch in batches for index in batch)
    bar = tqdm(total=total, initial=len(done), unit="sample", dynamic_ncols=True, disable=not state.is_main_process)
    with part_path(args.output, state.process_index).open("a") as file, bar:
        for batch in batches:
            for record in predict(args, model, processor, [rows[index] for index in batch], features):
                if record["sample_id"] in done:
                    continue
                file.write(json.dumps(record) + "\n")
                iou = sample_iou(record, args.protocol)
                ious += [] if iou is None else [iou]
                bar.update()
            file.flush()
            bar.set_postfix(gIoU=f"{sum(ious) / len(ious):.3f}" if ious else "none")


def load(path, device):
    """The model and its processor. Raises SystemExit when they cannot be loaded."""
    try:
        processor = SegCompassProcessor.from_pretrained(path)
        model = SegCompassModel.from_pretrained(path, dtype="float32")
    except (OSError, ValueError) as error:
        raise SystemExit(f"--model {path!r} is no folder or Hub id of a SegCompass model: {error}") from error
    return model.to(device), processor


def predict(args, model, processor, batch, features=None):
    """The records of a batch of rows: what predictions.jsonl holds of each. `features` stand in for SAM's pass."""
    for row in batch:
        check_image(row)
    began = time.perf_counter()
    images, instructions = [row["image"] for row in batch], [row["instruction"] for row in batch]
    inputs = processor(images=images, text=instructions, image_encoder=not features)
    if features:
        inputs.update(features.inputs(images))
    inputs = inputs.to(model.device)
    outputs = model.segment(**inputs, query_source=args.query_source)
    sizes = [(row["height"], row["width"]) for row in batch]
    results = processor.post_process_instance_segmentation(outputs, args.threshold, target_sizes=sizes)
    texts = processor.batch_decode(outputs.sequences[:, outputs.prompt_length :], skip_special_tokens=True)
    seconds = (time.perf_counter() - began) / len(batch)
    for row, text, result in zip(batch, texts, results, strict=True):
        masks = result["masks"].cpu().numpy()
        slots = [
            {"slot": slot, "score": score, "segmentation": encode_mask(mask)}
            for slot, score, mask in zip(result["slots"].tolist(), result["scores"].tolist(), masks, strict=True)
        ]
        yield {
            "sample_id": row["sample_id"],
            **({"kind": row["kind"]} if row.get("kind") else {}),
            "instruction": row["instruction"],
            "text": text,
            "format": format_score(text, processor.num_slots),
            "slots": slots,
            **sample_counts([s["segmentation"] for s in slots], row["masks"], row["ignore"], args.protocol),
            "seconds": seconds,
        }


def check_image(row):
    """Raises ValueError when a row has no image, or one of another size than its masks."""
    if row["image"] is None:
        raise ValueError(f"sample {row['sample_id']!r} has no image; give --image-dir.")
    if row["image"].size != (row["width"], row["height"]):
        raise ValueError(
            f"the image of sample {row['sample_id']!r} has (width, height) {row['image'].size}, its masks "
            f"{(row['width'], row['height'])}; are these the images the annotations were made on?"
        )


def score_predictions(args, rows, names):
    """The records of another model's predictions, by sample_id."""
    predictions = read_predictions(args.predictions, names)
    done = {}
    for row in tqdm(rows.remove_columns("image"), unit="sample", dynamic_ncols=True):
        given = predictions[row["sample_id"]]
        masks, answer = predicted_masks(given, row["height"], row["width"]), given.get("no_target")
        done[row["sample_id"]] = {
            "sample_id": row["sample_id"],
            **({"kind": row["kind"]} if row.get("kind") else {}),
            "instruction": row["instruction"],
            **{name: given[name] for name in ("text", "no_target") if name in given},
            "slots": [{"segmentation": mask} for mask in masks],
            **sample_counts(masks, row["masks"], row["ignore"], args.protocol, answer),
        }
    return done


# -- going on where a run stopped --------------------------------------------------------------------------------------


def describe_run(args, rows):
    """What the predictions depend on: the arguments, the weights (newest file) and the questions (a digest)."""
    if args.predictions is not None:
        source = {"predictions": hashlib.sha256(args.predictions.read_bytes()).hexdigest()}
    else:
        weights = [file.stat().st_mtime_ns for file in Path(args.model).glob("*.safetensors")]
        source = {"model": args.model, "weights": max(weights, default=None)}
        source |= {"query_source": args.query_source, "threshold": args.threshold}
    names = ("sample_id", "instruction", "masks", "ignore")
    digest = hashlib.sha256()
    for row in rows.select_columns(names):
        digest.update(json.dumps([row[name] for name in names]).encode())
    return source | {
        "dataset": args.dataset,
        "split": args.split,
        "seed": args.seed,
        "num_samples": len(rows),
        "rows": digest.hexdigest(),
        "unit": args.unit,
        "protocol": args.protocol,
    }


def check_run(path, run):
    """Write run.json, or refuse the folder when it holds another run. Raises ValueError."""
    if path.exists():
        theirs = json.loads(path.read_text())
        for name, value in run.items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"{path.parent} holds predictions made with {name}={theirs.get(name)!r}, this run has {value!r}; "
                    "choose another --output, or delete that folder."
                )
    elif read_parts(path.parent):
        raise ValueError(
            f"{path.parent} holds predictions.jsonl but no run.json to say of what; choose another --output."
        )
    write_text(path, json.dumps(run, indent=2) + "\n")


# -- what comes out ----------------------------------------------------------------------------------------------------


def summarise_run(args, records):
    """The content of metrics.json; it depends on the predictions alone."""
    metrics = summarise(records, args.protocol) | {"unit": args.unit}
    if args.model is not None:
        metrics["n_format_fail"] = sum(record["format"] == 0 for record in records)
    kinds = sorted({record["kind"] for record in records if "kind" in record})
    if kinds:
        metrics["by_kind"] = {}
        for kind in kinds:
            part = summarise((record for record in records if record.get("kind") == kind), args.protocol)
            metrics["by_kind"][kind] = {name: part[name] for name in ("gIoU", "cIoU", "n")}
    return metrics


def write_results(args, rows, records, metrics):
    """metrics.json, model-index.yml and, where there are images, gallery.html."""
    name = args.model or args.predictions.stem
    title = f"{name} on {args.dataset} {args.split}, protocol {args.protocol}"
    if rows[0]["image"] is not None:
        write_gallery(args.output / "gallery.html", rows, records, args.protocol, title)
    results = [
        EvalResult(
            task_type="image-segmentation",
            task_name="Reasoning segmentation",
            dataset_type=Path(args.dataset).name,
            dataset_name=Path(args.dataset).name,
            dataset_split=args.split,
            dataset_args={"unit": args.unit, "num_samples": metrics["n"]},
            metric_type=metric.lower(),
            metric_name=f"{metric} ({args.protocol})",
            metric_value=metrics[metric],
            metric_args={"protocol": args.protocol},
        )
        for metric in REPORTED
        if metrics[metric] is not None
    ]
    index = eval_results_to_model_index(Path(name).name, results)
    write_text(args.output / "model-index.yml", yaml.safe_dump({"model-index": index}, sort_keys=False))
    write_text(args.output / "metrics.json", json.dumps(metrics, indent=2) + "\n")


def report(metrics, seconds):
    for kind, part in metrics.get("by_kind", {}).items():
        value = "left out" if part["gIoU"] is None else f"gIoU {part['gIoU']:.4f}"
        print(f"{kind:<14}{value}   n {part['n']}")
    for name in REPORTED:
        value = metrics[name]
        print(f"{name:<14}{'no such samples' if value is None else f'{value:.4f}'}")
    told = ("n", "n_no_target", "n_skipped", "n_format_fail")
    counts = ", ".join(f"{name} {metrics[name]}" for name in told if name in metrics)
    print(f"protocol {metrics['protocol']}, {counts}, {seconds:.0f} s")


if __name__ == "__main__":
    main()
