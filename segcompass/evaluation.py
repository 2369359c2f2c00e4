"""Evaluates a model, or any model's predictions, on a data set: the work of `segcompass evaluate`.

The model writes its own reasoning, greedily, and its masks are compared with the true ones. Everything lands in one
folder that belongs to one run, so that an interrupted evaluation resumes, on any number of processes. What is counted
is decided by the metric's protocols (segcompass/loaders/reasoning_segmentation), not here.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from datasets import Dataset
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index
from PIL import Image
from tqdm import tqdm

from segcompass.boxes_route import BoxesRoute
from segcompass.gallery import write_gallery
from segcompass.journal import claim_folder, weights_of
from segcompass.loaders import load_rows
from segcompass.loaders.folder_lock import folder_lock
from segcompass.loaders.identity import rows_digest
from segcompass.loaders.masks import encode_mask
from segcompass.loaders.reasoning_segmentation.reasoning_segmentation import (
    PROTOCOLS,
    sample_counts,
    sample_iou,
    summarise,
)
from segcompass.loaders.rows import leave_images_encoded, row_image
from segcompass.loading import load
from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.modeling_segcompass.row_errors import naming_rows
from segcompass.modeling_segcompass.whole_files import append_whole, signed_json, write_whole
from segcompass.predictions import (
    explicit_answer,
    merge_parts,
    part_path,
    predicted_masks,
    read_parts,
    read_predictions,
)
from segcompass.routes import PHOTOGRAPH, QUERY_SOURCES, Route, check_route
from segcompass.trainers.closing import closing
from segcompass.trainers.image_features import ImageFeatures, image_key, open_image_features
from segcompass.trainers.rewards import format_score

REPORTED = ("gIoU", "cIoU", "N-acc", "T-acc")


@dataclass
class Evaluation:
    """What is evaluated, on what, and how it is counted.

    Raises:
        ValueError: neither or both of model and predictions, an unknown protocol, or a threshold outside [0, 1].

    Example:
        evaluation = Evaluation(Path("runs/test"), model="examples/checkpoints/mini", split="test", num_samples=100)
        print(evaluate(evaluation)["gIoU"])
    """

    output: Path
    """folder that the results are written into."""
    model: str = ""
    """SegCompass folder or Hub id; empty where predictions are scored."""
    predictions: Path | None = None
    """JSONL of any model's predictions, scored instead of a model."""
    route: Route = "concepts"
    """from the response to masks; "boxes" takes `mllm` and `image_encoder` instead of a model."""
    mllm: str | None = None
    """see `BoxesRoute`, as for the next."""
    image_encoder: str | None = None
    dataset: str = "scenes"
    """see `load_rows`, as for the next six."""
    split: str = "test"
    seed: int = 0
    num_samples: int | None = None
    """the first so many rows; None takes all, and 500 of the scenes."""
    root: str | None = None
    split_by: str | None = None
    image_dir: str | None = None
    unit: str | None = None
    """what one sample is: "sentence", "ref" or "merged"; None takes what the protocol counts."""
    protocol: str = "rela"
    """a name of `PROTOCOLS`."""
    batch_size: int = 32
    query_source: str | None = None
    """what the queries are built from: "both", "tokens" or "concepts"; None takes what the route means."""
    threshold: float | None = None
    """confidence from which a slot is kept; None takes 0.5, and 0 where the protocol matches all slots or an MLLM has
    chosen them by boxes."""
    image_features: str | None = None
    """folder that `segcompass precompute-features` wrote."""
    close_response: bool = False
    """whether responses are closed by force, as `close_response` of joint training closes them (docs/training.md)."""

    def __post_init__(self):
        if self.route == "boxes":
            self._check_boxes()
        elif bool(self.model) == (self.predictions is not None):
            raise ValueError("either a model or predictions are evaluated; give one of --model and --predictions.")
        if self.predictions is not None and self.route != "concepts":
            raise ValueError(f"route is {self.route!r} with predictions, which are made already; leave it out.")
        if self.close_response and not self.model:
            raise ValueError(
                "close_response closes the responses that a SegCompass model writes, and here none writes; leave it "
                "out, or give a model."
            )
        meant = QUERY_SOURCES.get(self.route)
        if self.route != "concepts" and self.query_source not in (None, meant):
            raise ValueError(
                f"query_source is {self.query_source!r} with route {self.route!r}, which says what masks are made "
                "from; leave it out."
            )
        self.query_source = self.query_source or meant
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"the protocol is {self.protocol!r}; choose one of {', '.join(PROTOCOLS)}.")
        if self.num_samples is None and self.dataset == "scenes":
            self.num_samples = 500
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"the threshold is {self.threshold}; it is a probability, choose a value from 0 to 1.")
        if self.unit is None:  # ReasonSeg's texts describe the same target, and everybody evaluates on the first
            self.unit = "ref" if self.dataset == "reasonseg" else PROTOCOLS[self.protocol].unit

    def _check_boxes(self):
        """Raises ValueError where the boxes route lacks a part, or has one that it does not take."""
        if not self.mllm or not self.image_encoder:
            raise ValueError(f"route 'boxes' needs an MLLM and a SAM, such as {PHOTOGRAPH}.")
        for name in ("model", "predictions", "image_features"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} is {str(getattr(self, name))!r} with route 'boxes', which takes mllm and image_encoder "
                    "alone; leave it out."
                )

    @property
    def min_confidence(self) -> float:
        """The threshold, or its default."""
        if self.threshold is not None:
            return self.threshold
        return 0.0 if PROTOCOLS[self.protocol].matched or self.route == "boxes" else 0.5

    @property
    def name(self) -> str:
        """What is evaluated, as titles call it."""
        if self.route == "boxes":
            return f"{str(self.mllm).rstrip('/')}-boxes"
        return self.model if self.predictions is None else self.predictions.stem


def evaluate(run: Evaluation) -> dict:
    """Predict what is not predicted yet, then write and print the metrics.

    Started by several processes (`accelerate launch`), they share the samples.

    Args:
        run: what to evaluate.

    Returns:
        The content of metrics.json.

    Raises:
        ValueError: rows that cannot be loaded or repeat a sample id, an output folder of another run, or predictions
            that do not fit the rows.
        OSError: a file that cannot be read or written, or another run that writes into the output folder.
    """
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=2))
    if run.predictions is not None and state.num_processes > 1:
        raise ValueError("predictions are scored by one process: start the command without accelerate launch.")
    with folder_lock(run.output) if state.is_main_process else nullcontext():
        return evaluate_alone(run, state)


def evaluate_alone(run: Evaluation, state: PartialState) -> dict:
    """The work of `evaluate`, whose processes alone write into the output folder.

    Args:
        run: what to evaluate.
        state: which process this is, of how many.

    Returns:
        The content of metrics.json.

    Raises:
        ValueError: as `evaluate`.
        OSError: likewise.
    """
    with state.main_process_first():
        rows = read_rows(run)
    names = list(rows["sample_id"])
    if len(set(names)) < len(names):
        raise ValueError(
            f"{run.dataset!r} repeats sample ids ({len(set(names))} in {len(names)} rows); make them unique."
        )
    with state.main_process_first():
        if state.is_main_process:
            run.output.mkdir(parents=True, exist_ok=True)
            check_folder(run.output, describe_run(run, rows))
        done = read_parts(run.output, repair=state.is_main_process)
    state.wait_for_everyone()  # from here on the files change
    if run.predictions is not None:
        done = score_predictions(run.predictions, rows, names, run.protocol)
    elif len(done) < len(names):
        predict_rest(run, state, rows, names, done)
        state.wait_for_everyone()
        done = read_parts(run.output)
    records = [done[name] for name in names]
    metrics = summarise_run(run, records)
    if state.is_main_process:
        merge_parts(run.output, names, done)
        write_results(run, rows, records, metrics)
        report(metrics, sum(record.get("seconds", 0) for record in done.values()))
    state.wait_for_everyone()
    return metrics


def read_rows(run: Evaluation) -> Dataset:
    """The rows to evaluate on. Raises ValueError when they cannot be loaded."""
    named = {name: getattr(run, name) for name in ("root", "split_by", "unit", "image_dir")}
    try:
        return load_rows(run.dataset, run.split, run.seed, run.num_samples, **named)
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"cannot load split {run.split!r} of {run.dataset!r}: {error}") from error


# -- predictions -------------------------------------------------------------------------------------------------------


def predict_rest(run: Evaluation, state: PartialState, rows: Dataset, names: list[str], done: dict[str, dict]) -> None:
    """Predict what is not done yet, this process every n-th batch, and add each batch to this process's file.

    Batches are cut at the same rows in every run, so that a resumed run pads, and so rounds, as an uninterrupted one.

    Args:
        run: what to evaluate.
        state: which process this is, of how many.
        rows: all rows.
        names: their sample ids.
        done: records that exist already, by sample id.
    """
    starts = range(0, len(rows), run.batch_size)
    batches = [range(start, min(start + run.batch_size, len(rows))) for start in starts]
    batches = [batch for batch in batches if any(names[index] not in done for index in batch)]
    batches = batches[state.process_index :: state.num_processes]
    predicted = predictor(run, state.device)
    ious = [iou for iou in (sample_iou(record, run.protocol) for record in done.values()) if iou is not None]
    total = len(done) + sum(names[index] not in done for batch in batches for index in batch)
    rows = leave_images_encoded(rows)
    bar = tqdm(total=total, initial=len(done), unit="sample", dynamic_ncols=True, disable=not state.is_main_process)
    part = part_path(run.output, state.process_index)
    with bar:
        for batch in batches:
            lines = ""
            for record in predicted([rows[index] for index in batch]):
                if record["sample_id"] in done:
                    continue
                lines += signed_json(record) + "\n"
                iou = sample_iou(record, run.protocol)
                ious += [] if iou is None else [iou]
                bar.update()
            append_whole(part, lines)
            bar.set_postfix(gIoU=f"{sum(ious) / len(ious):.3f}" if ious else "none")


def predictor(run: Evaluation, device: Any) -> Callable[[list[dict]], Iterator[dict]]:
    """What makes a batch of rows into records.

    Args:
        run: what to evaluate.
        device: where the model goes.

    Returns:
        `predict` or `predict_by_boxes`, with everything loaded.

    Raises:
        ValueError: no such model, or one that cannot take the route.
    """
    if run.route == "boxes":
        return partial(predict_by_boxes, run, BoxesRoute(str(run.mllm), str(run.image_encoder), device))
    model, processor = load(run.model, device)
    check_route(model, run.route)
    features = open_image_features(run.image_features, model, processor) if run.image_features else None
    return lambda batch: predict(run, model, processor, batch, features)


def predict(
    run: Evaluation,
    model: SegCompassModel,
    processor: SegCompassProcessor,
    batch: list[dict],
    features: ImageFeatures | None = None,
) -> Iterator[dict]:
    """The records of a batch of rows: what predictions.jsonl holds of each.

    Args:
        run: what to evaluate.
        model: the model.
        processor: its processor.
        batch: rows.
        features: saved image features; they replace the image encoder's pass.

    Yields:
        One record per row.

    Raises:
        ValueError: a row without an image, or with one of another size than its masks.
        OSError: an image that cannot be read; its sample is named.
    """
    batch = [{**row, "image": row_image(row)} for row in batch]
    began = time.perf_counter()
    images, instructions = [row["image"] for row in batch], [row["instruction"] for row in batch]
    names = [row["sample_id"] for row in batch]
    with naming_rows(names):
        inputs = processor(images=images, text=instructions, image_encoder=False)
    inputs.update(features.inputs(images) if features else encode_once(model, processor, images, names))
    inputs = inputs.to(model.device)
    limit = model.config.max_response_length
    closed: dict[str, Any] = {}
    if run.close_response:
        closed = {"logits_processor": [closing(model, limit)], "max_new_tokens": limit}
    outputs: Any = model.segment(**inputs, query_source=str(run.query_source), **closed)
    sizes = [(row["height"], row["width"]) for row in batch]
    results = processor.post_process_instance_segmentation(outputs, run.min_confidence, target_sizes=sizes)
    texts = processor.batch_decode(outputs.sequences[:, outputs.prompt_length :], skip_special_tokens=True)
    seconds = (time.perf_counter() - began) / len(batch)
    for row, text, result in zip(batch, texts, results, strict=True):
        yield record_of(row, text, format_score(text, processor.num_slots), result, run.protocol, seconds)


def predict_by_boxes(run: Evaluation, route: BoxesRoute, batch: list[dict]) -> Iterator[dict]:
    """As `predict`, by an MLLM's boxes.

    Args:
        run: what to evaluate.
        route: the MLLM and SAM.
        batch: rows.

    Yields:
        One record per row; its "format" is 1 if the answer points at something or says that nothing is there, else 0.

    Raises:
        ValueError: as `predict`.
        OSError: likewise.
    """
    batch = [{**row, "image": row_image(row)} for row in batch]
    began = time.perf_counter()
    with naming_rows([row["sample_id"] for row in batch]):
        outputs, answers = route.segment([row["image"] for row in batch], [row["instruction"] for row in batch])
    sizes = [(row["height"], row["width"]) for row in batch]
    results = route.processor.post_process_instance_segmentation(outputs, run.min_confidence, target_sizes=sizes)
    seconds = (time.perf_counter() - began) / len(batch)
    for row, answer, result in zip(batch, answers, results, strict=True):
        yield record_of(row, answer.text, float(answer.fault is None), result, run.protocol, seconds)


def record_of(row: dict, text: str, form: float, result: dict, protocol: str, seconds: float) -> dict:
    """What predictions.jsonl holds of a row.

    Args:
        row: of the shared schema.
        text: what was written about it.
        form: how well the text has the form that it must have, in [0, 1].
        result: of `post_process_instance_segmentation`.
        protocol: how it is counted.
        seconds: that it took.

    Returns:
        The record.
    """
    masks = result["masks"].cpu().numpy()
    slots = [
        {"slot": slot, "score": score, "segmentation": encode_mask(mask)}
        for slot, score, mask in zip(result["slots"].tolist(), result["scores"].tolist(), masks, strict=True)
    ]
    return {
        "sample_id": row["sample_id"],
        **({"kind": row["kind"]} if row.get("kind") else {}),
        "instruction": row["instruction"],
        "text": text,
        "format": form,
        "slots": slots,
        **counts_of(row, [s["segmentation"] for s in slots], protocol),
        "seconds": seconds,
    }


@torch.no_grad()
def encode_once(
    model: SegCompassModel, processor: SegCompassProcessor, images: list[Image.Image], names: list[str]
) -> dict[str, torch.Tensor]:
    """In place of `processor.encoder_inputs(images)`: an image that several rows ask about is encoded once.

    Args:
        model: the model.
        processor: its processor.
        images: B images.
        names: their sample ids, for errors.

    Returns:
        image_embeddings float (B, d_k, h, w); original_sizes and reshaped_input_sizes long (B, 2), (H, W).

    Raises:
        ValueError: an image that the encoder cannot take; its sample is named.
    """
    keys = [image_key(image) for image in images]
    firsts = {key: keys.index(key) for key in keys}  # in the order in which they come
    with naming_rows([names[row] for row in firsts.values()]):
        inputs = processor.encoder_inputs([images[row] for row in firsts.values()])
    pixels = inputs.pop("encoder_pixel_values").to(model.device)
    found = {**inputs, "image_embeddings": model.get_image_embeddings(pixels)}
    places = [list(firsts).index(key) for key in keys]
    return {name: value[places] for name, value in found.items()}


def counts_of(row: dict, masks: list[dict], protocol: str, answer: bool | None = None) -> dict:
    """What a row adds to the metrics, see `sample_counts`; its errors name the sample. Raises ValueError."""
    try:
        return sample_counts(masks, row["masks"], row.get("ignore"), protocol, answer)
    except (ValueError, TypeError) as error:
        raise ValueError(f"sample {row['sample_id']!r}: {error}") from error


def score_predictions(path: Path, rows: Dataset, names: list[str], protocol: str) -> dict[str, dict]:
    """The records of another model's predictions.

    Args:
        path: JSONL of predictions.
        rows: all rows.
        names: their sample ids.
        protocol: how they are counted.

    Returns:
        sample_id -> what predictions.jsonl holds of it.
    """
    predictions = read_predictions(path, names)
    done = {}
    for row in tqdm(rows.remove_columns("image"), unit="sample", dynamic_ncols=True):
        given = predictions[row["sample_id"]]
        masks, answer = predicted_masks(given, row["height"], row["width"]), explicit_answer(given)
        done[row["sample_id"]] = {
            "sample_id": row["sample_id"],
            **({"kind": row["kind"]} if row.get("kind") else {}),
            "instruction": row["instruction"],
            **{name: given[name] for name in ("text", "no_target") if name in given},
            "slots": [{"segmentation": mask} for mask in masks],
            **counts_of(row, masks, protocol, answer),
        }
    return done


# -- resuming ----------------------------------------------------------------------------------------------------------


def describe_run(run: Evaluation, rows: Dataset) -> dict:
    """What the predictions depend on: the arguments, the model's files, the questions, masks and images."""
    if run.predictions is not None:
        source: dict[str, Any] = {"predictions": hashlib.sha256(run.predictions.read_bytes()).hexdigest()}
    elif run.route == "boxes":
        source = {"route": run.route, "threshold": run.min_confidence}
        for name in ("mllm", "image_encoder"):
            source |= {name: getattr(run, name), f"{name}_weights": weights_of(getattr(run, name))}
    else:
        source = {"model": run.model, "weights": weights_of(run.model)}
        source |= {"query_source": run.query_source, "threshold": run.min_confidence}
        source |= {"close_response": True} if run.close_response else {}
    return source | {
        "dataset": run.dataset,
        "split": run.split,
        "seed": run.seed,
        "num_samples": len(rows),
        "rows": rows_digest(rows, images=run.predictions is None),
        "unit": run.unit,
        "protocol": run.protocol,
    }


def check_folder(folder: Path, run: dict) -> None:
    """Write run.json, or refuse the folder when it holds another run. Raises ValueError."""
    if not (folder / "run.json").exists() and read_parts(folder):
        raise ValueError(f"{folder} holds predictions.jsonl but no run.json to say of what; choose another --output.")
    claim_folder(folder, run, holds="predictions made")


# -- results -----------------------------------------------------------------------------------------------------------


def summarise_run(run: Evaluation, records: list[dict]) -> dict:
    """The content of metrics.json; it depends on the predictions alone."""
    metrics = summarise(records, run.protocol) | {"unit": run.unit}
    if run.predictions is None:
        metrics["n_format_fail"] = sum(record["format"] == 0 for record in records)
    kinds = sorted({record["kind"] for record in records if "kind" in record})
    if kinds:
        metrics["by_kind"] = {}
        for kind in kinds:
            part = summarise((record for record in records if record.get("kind") == kind), run.protocol)
            metrics["by_kind"][kind] = {name: part[name] for name in ("gIoU", "cIoU", "n")}
    return metrics


def write_results(run: Evaluation, rows: Dataset, records: list[dict], metrics: dict) -> None:
    """Write metrics.json, model-index.yml and, where there are images, gallery.html."""
    name = run.name
    title = f"{name} on {run.dataset} {run.split}, protocol {run.protocol}"
    if rows[0]["image"] is not None:
        write_gallery(run.output / "gallery.html", leave_images_encoded(rows), records, run.protocol, title)
    results = [
        EvalResult(
            task_type="image-segmentation",
            task_name="Reasoning segmentation",
            dataset_type=Path(run.dataset).name,
            dataset_name=Path(run.dataset).name,
            dataset_split=run.split,
            dataset_args={"unit": run.unit, "num_samples": metrics["n"]},
            metric_type=metric.lower(),
            metric_name=f"{metric} ({run.protocol})",
            metric_value=metrics[metric],
            metric_args={"protocol": run.protocol},
        )
        for metric in REPORTED
        if metrics[metric] is not None
    ]
    index = eval_results_to_model_index(Path(name).name, results)
    write_whole(run.output / "model-index.yml", yaml.safe_dump({"model-index": index}, sort_keys=False))
    write_whole(run.output / "metrics.json", json.dumps(metrics, indent=2) + "\n")


def report(metrics: dict, seconds: float) -> None:
    """Print the metrics, by kind of sample first."""
    for kind, part in metrics.get("by_kind", {}).items():
        value = "left out" if part["gIoU"] is None else f"gIoU {part['gIoU']:.4f}"
        print(f"{kind:<14}{value}   n {part['n']}")
    for name in REPORTED:
        value = metrics[name]
        print(f"{name:<14}{'no such samples' if value is None else f'{value:.4f}'}")
    counted = ("n", "n_no_target", "n_skipped", "n_format_fail")
    counts = ", ".join(f"{name} {metrics[name]}" for name in counted if name in metrics)
    print(f"protocol {metrics['protocol']}, {counts}, {seconds:.0f} s")
