"""Evaluate a model on a data set: it writes its own reasoning, greedily, and its masks are compared with the true ones.

    python examples/evaluate.py --model examples/checkpoints/mini --dataset scenes --split test --seed 0
    python examples/evaluate.py --model PATH --dataset FOLDER --split val --num-samples 200 --output runs/val

Writes into the output folder
    predictions.jsonl   one line a sample: what was written, the kept slots with their masks, the pixel counts
    metrics.json        the metrics of all samples, in [0, 1], and `by_kind` where the rows have a column `kind`
    run.json            what was evaluated; predictions of another run are never mixed in
An interrupted run goes on where it was when the command is repeated.
"""

import sys
from pathlib import Path

# Python looks for modules beside a script first: there this file would hide the library `evaluate` of the metric.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]

import argparse
import hashlib
import json
import time

import numpy as np
import torch
from pycocotools import mask as coco_mask
from tqdm import tqdm

from loaders import load_rows
from loaders.reasoning_segmentation.reasoning_segmentation import sample_counts, summarise
from modeling_segcompass import SegCompassModel, SegCompassProcessor
from trainers.image_features import open_image_features
from trainers.rewards import format_score


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="SegCompass folder or Hub id")
    parser.add_argument("--dataset", default="scenes", help="'scenes' or a folder written by Dataset.save_to_disk")
    parser.add_argument("--split", default="test")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    parser.add_argument("--num-samples", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--query-source", choices=["both", "tokens", "concepts"], default="both")
    parser.add_argument("--threshold", type=float, default=0.5, help="confidence from which a slot is kept")
    parser.add_argument("--image-features", help="folder that precompute_image_features.py wrote")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    for name in ("num_samples", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1.")
    if not 0 <= args.threshold <= 1:
        parser.error(f"--threshold is {args.threshold}; it is a probability, choose a value from 0 to 1.")
    return args


def main(argv=None):
    args = parse(argv)
    try:
        rows = load_rows(args.dataset, args.split, args.seed, args.num_samples)
    except (ValueError, KeyError, OSError) as error:
        raise SystemExit(f"cannot load split {args.split!r} of {args.dataset!r}: {error}") from error
    names = list(rows["sample_id"])
    if len(set(names)) < len(names):
        raise SystemExit(
            f"{args.dataset!r} repeats sample ids ({len(set(names))} in {len(names)} rows); make them unique."
        )
    args.output.mkdir(parents=True, exist_ok=True)
    check_run(args.output / "run.json", describe_run(args, rows))
    path = args.output / "predictions.jsonl"
    done = read_predictions(path)
    if len(done) < len(names):
        evaluate(args, rows, names, path, done)
    metrics = summarise_run([done[name] for name in names])
    (args.output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    report(metrics)
    return metrics


# -- predictions -------------------------------------------------------------------------------------------------------


def evaluate(args, rows, names, path, done):
    """Predict what is not `done` yet, batch by batch; each batch is added to the file and to `done`.

    Batches are cut at the same rows in every run, so that a resumed run pads, and so rounds, as an uninterrupted one.
    """
    model, processor = load(args.model)
    try:
        features = args.image_features and open_image_features(args.image_features, model, processor)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    with path.open("a") as file, tqdm(total=len(rows), initial=len(done), unit="sample", dynamic_ncols=True) as bar:
        for start in range(0, len(rows), args.batch_size):
            indices = range(start, min(start + args.batch_size, len(rows)))
            if all(names[index] in done for index in indices):
                continue
            for record in predict(args, model, processor, [rows[index] for index in indices], features):
                if record["sample_id"] not in done:
                    done[record["sample_id"]] = record
                    file.write(json.dumps(record) + "\n")
                    bar.update()
            file.flush()
            bar.set_postfix(gIoU=f"{summarise(list(done.values()))['gIoU']:.3f}")


def load(path):
    """The model, on the GPU when there is one, and its processor. Raises SystemExit when they cannot be loaded."""
    try:
        processor = SegCompassProcessor.from_pretrained(path)
        model = SegCompassModel.from_pretrained(path, dtype="float32")
    except (OSError, ValueError) as error:
        raise SystemExit(f"--model {path!r} is no folder or Hub id of a SegCompass model: {error}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), processor


def predict(args, model, processor, batch, features=None):
    """The records of a batch of rows: what predictions.jsonl holds of each. `features` stand in for SAM's pass."""
    began = time.perf_counter()
    images, instructions = [row["image"] for row in batch], [row["instruction"] for row in batch]
    inputs = processor(images=images, text=instructions, sam=not features)
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
            {"slot": slot, "score": score, "segmentation": encode(mask)}
            for slot, score, mask in zip(result["slots"].tolist(), result["scores"].tolist(), masks, strict=True)
        ]
        yield {
            "sample_id": row["sample_id"],
            **({"kind": row["kind"]} if "kind" in row else {}),
            "instruction": row["instruction"],
            "text": text,
            "format": format_score(text, processor.num_slots),
            "slots": slots,
            **sample_counts([slot["segmentation"] for slot in slots], row["masks"], row["ignore"]),
            "seconds": seconds,
        }


def encode(mask):
    """bool (H, W) -> COCO compressed RLE with str counts."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


# -- going on where a run stopped --------------------------------------------------------------------------------------


def describe_run(args, rows):
    """What the predictions depend on: the arguments, the weights (newest file) and the questions (a digest)."""
    weights = [file.stat().st_mtime_ns for file in Path(args.model).glob("*.safetensors")]
    names = ("sample_id", "instruction", "masks", "ignore")
    digest = hashlib.sha256()
    for row in rows.select_columns(names):
        digest.update(json.dumps([row[name] for name in names]).encode())
    return {
        "model": args.model,
        "weights": max(weights, default=None),
        "dataset": args.dataset,
        "split": args.split,
        "seed": args.seed,
        "num_samples": len(rows),
        "rows": digest.hexdigest(),
        "query_source": args.query_source,
        "threshold": args.threshold,
    }


def check_run(path, run):
    """Write run.json, or refuse the folder when it holds another run. Raises SystemExit."""
    if path.exists():
        theirs = json.loads(path.read_text())
        for name, value in run.items():
            if theirs.get(name) != value:
                raise SystemExit(
                    f"{path.parent} holds predictions made with {name}={theirs.get(name)!r}, this run has {value!r}; "
                    "choose another --output, or delete that folder."
                )
    elif (path.parent / "predictions.jsonl").exists():
        raise SystemExit(
            f"{path.parent} holds predictions.jsonl but no run.json to say of what; choose another --output."
        )
    path.write_text(json.dumps(run, indent=2) + "\n")


def read_predictions(path):
    """The records already in the file by sample_id. A last line that was cut off is removed from the file."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    records = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise SystemExit(f"{path}, line {number} is damaged ({error}); delete it and start again.") from error
        records[record["sample_id"]] = record
    return records


# -- what comes out ----------------------------------------------------------------------------------------------------


def summarise_run(records):
    """The content of metrics.json."""
    metrics = summarise(records)
    metrics["n_format_fail"] = sum(record["format"] == 0 for record in records)
    metrics["seconds"] = round(sum(record["seconds"] for record in records), 3)
    kinds = sorted({record["kind"] for record in records if "kind" in record})
    if kinds:
        metrics["by_kind"] = {}
        for kind in kinds:
            part = summarise([record for record in records if record.get("kind") == kind])
            metrics["by_kind"][kind] = {"gIoU": part["gIoU"], "n": part["n"]}
    return metrics


def report(metrics):
    for kind, part in metrics.get("by_kind", {}).items():
        print(f"{kind:<14}gIoU {part['gIoU']:.4f}   n {part['n']}")
    for name in ("gIoU", "cIoU", "N-acc", "T-acc"):
        value = metrics[name]
        print(f"{name:<14}{'no such samples' if value is None else f'{value:.4f}'}")
    counts = ", ".join(f"{name} {metrics[name]}" for name in ("n", "n_no_target", "n_format_fail"))
    print(f"{counts}, {metrics['seconds']:.0f} s")


if __name__ == "__main__":
    main()
