"""Faithfulness over a data set: what interventions do to every right mask, and what is left without e_k or r_k.

The model writes its own reasoning, greedily; a mask is right when its confidence reaches `CONFIDENT` and its IoU with a
target reaches `RIGHT`. `measure` makes one record per row; `summarise_records` sums them up with 95 % intervals over
scenes.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from segcompass.loaders.masks import encode_mask
from segcompass.loaders.reasoning_segmentation.reasoning_segmentation import sample_counts, summarise
from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.trainers.targets import mask_targets

from .decoding import decode, overlap
from .faithfulness import FRACTIONS, ORDERS, SlotFaithfulness, slot_faithfulness
from .intervals import area_under, bootstrap, ratio

SOURCES = ("both", "tokens", "concepts")
"""What queries are built from; a grounded read-out has no queries and is measured as it is, under "both"."""
CONFIDENT, RIGHT = 0.5, 0.5
ABLATED = ("gIoU", "cIoU", "N-acc", "T-acc")


@torch.no_grad()
def measure(
    model: SegCompassModel,
    processor: SegCompassProcessor,
    rows: list[dict[str, Any]],
    top: int = 5,
    draws: int = 8,
    query_source: str = "both",
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Measure one batch.

    Args:
        model: in evaluation mode.
        processor: the model's.
        rows: of a data set.
        top: see `slot_faithfulness`.
        draws: see `slot_faithfulness`.
        query_source: how the queries of the measured masks are built, "both" or "concepts".
        seed: of the random concepts.

    Yields:
        One record per row, of types that JSON knows: `sample_id`; `counts`, the pixel counts under each of `SOURCES`
        that the model has;
        `slots`, the fields of SlotFaithfulness of each right mask.
    """
    inputs = processor(images=[row["image"] for row in rows], text=[row["instruction"] for row in rows])
    _, states = model.reason(**inputs.to(model.device))
    sizes = [(row["height"], row["width"]) for row in rows]
    frame, side = model.config.frame, 4 * model.config.key_grid
    sources = ("both",) if model.grounded else SOURCES
    decoded: dict[str, Any] = {
        source: decode(model, states, source) for source in dict.fromkeys((*sources, query_source))
    }
    found = {
        source: processor.post_process_instance_segmentation(outputs, CONFIDENT, target_sizes=sizes)
        for source, outputs in decoded.items()
    }
    for place, row in enumerate(rows):
        counts = {
            source: sample_counts(
                [encode_mask(mask.cpu().numpy()) for mask in found[source][place]["masks"]], row["masks"], row["ignore"]
            )
            for source in sources
        }
        targets = mask_targets(row["masks"], row["height"], row["width"], frame, side) > 0.5  # (G, 4h, 4w)
        targets = targets.to(model.device)
        slots = []
        for slot in found[query_source][place]["slots"].tolist():
            mask = decoded[query_source].pred_masks[place, slot] > 0  # (4h, 4w)
            ious = overlap(targets, mask)  # (G,)
            if max(ious, default=-1) < RIGHT:
                continue
            target = targets[int(ious.argmax())]
            measured = slot_faithfulness(
                model, states, slot, place, target, top=top, draws=draws, query_source=query_source, seed=seed
            )
            slots.append({"slot": slot, **_plain(measured)})
        yield {"sample_id": row["sample_id"], "counts": counts, "slots": slots}


def _plain(measured: SlotFaithfulness) -> dict[str, Any]:
    """A SlotFaithfulness in types that JSON knows."""
    curves = {
        name: {order: curve.tolist() for order, curve in getattr(measured, name).items()}
        for name in ("deletion", "insertion")
    }
    return {**measured._asdict(), **curves}


def _ratio_of(statistic: Callable[..., float], lost: np.ndarray) -> float:
    return ratio(statistic(lost[:, 0]), statistic(lost[:, 1]))


def summarise_records(records: list[dict[str, Any]], top: int, seed: int = 0) -> dict[str, Any]:
    """Sum up the records of `measure`.

    Args:
        records: one per sample.
        top: how many concepts were taken away.
        seed: of the bootstrap.

    Returns:
        The metrics by name; all but the counts and the ablation are [estimate, low, high], ratios may be inf or nan.
        Without a right mask only counts and ablation.
    """
    metrics: dict[str, Any] = {"scenes": len(records), "top": top, "ablation": {}}
    for source in [source for source in SOURCES if all(source in record["counts"] for record in records)]:
        scores = summarise([record["counts"][source] for record in records])
        metrics["ablation"][source] = {name: scores[name] for name in ABLATED}
    slots = [(record["sample_id"], slot) for record in records for slot in record["slots"]]
    metrics["masks"], metrics["scenes_with_masks"] = len(slots), len({name for name, _ in slots})
    if not slots:
        return metrics
    groups = np.unique([name for name, _ in slots], return_inverse=True)[1]  # (N,) the scene of each mask

    def interval(values: Any, statistic: Callable[[np.ndarray], float] = np.mean) -> list[float]:
        return list(bootstrap(values, statistic, groups, seed=seed))

    full = np.array([slot["full"] for _, slot in slots])  # (N,)
    lost = full[:, None] - [[slot["without_top"], slot["without_random"]] for _, slot in slots]  # (N, 2)
    left = full[:, None] - [[slot["only_top"], slot["only_random"]] for _, slot in slots]  # (N, 2)
    metrics["full"] = interval(full)
    for name, statistic in (("median", np.median), ("mean", np.mean)):
        metrics[f"drop_top_{name}"] = interval(lost[:, 0], statistic)
        metrics[f"drop_random_{name}"] = interval(lost[:, 1], statistic)
        metrics[f"ratio_of_{name}s"] = interval(lost, partial(_ratio_of, statistic))
    metrics["comprehensiveness"], metrics["comprehensiveness_random"] = interval(lost[:, 0]), interval(lost[:, 1])
    metrics["sufficiency"], metrics["sufficiency_random"] = interval(left[:, 0]), interval(left[:, 1])
    for name in ("deletion", "insertion"):
        metrics[name] = {}
        for order in ORDERS:
            curves = np.array([slot[name][order] for _, slot in slots])  # (N, S)
            areas = [area_under(curve, FRACTIONS) for curve in curves]
            metrics[name][order] = {"curve": curves.mean(0).tolist(), "auc": interval(areas)}
    return metrics
