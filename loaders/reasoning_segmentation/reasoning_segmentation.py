"""Segmentation metrics from whole pixel counts: cIoU, gIoU, N-acc, T-acc and Pr@X, under the rules of five projects.

Notably: intersections and unions are integers at the masks' own size and nothing is smoothed by an epsilon. Masks are
measured when they are added and only the counts are kept, so that memory does not grow with the masks and one set of
counts serves every protocol. It loads with `evaluate.load(segcompass.METRIC)`; `intersection_union`, `sample_counts`
and `summarise` are plain functions that need no metric object. Another protocol is one line of `PROTOCOLS`.
"""

import functools
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import evaluate
import numpy as np
from pycocotools import mask as coco_mask

from .run_lengths import checked_rle


@dataclass(frozen=True)
class Protocol:
    """How a project turns masks into numbers."""

    unit: str
    """What one sample is: "sentence", "ref" (an object with its first sentence) or "merged" (with all of them)."""
    ignore: str
    """What becomes of ignored pixels: "excluded", "target" (they count as wanted), "correct" (they count as wanted and
    as predicted) or "background" (they count as not wanted)."""
    both_empty: float = 1.0
    """IoU of a sample whose prediction and reference are both empty."""
    explicit: bool = False
    """Whether a model's explicit "no target" answer, where there is one, goes before its mask."""
    matched: bool = False
    """Whether single masks are matched to single instances by their overlap with the truth, and only pairs count."""


PROTOCOLS = {
    "rela": Protocol(unit="sentence", ignore="excluded", explicit=True),
    "lisa": Protocol(unit="sentence", ignore="excluded"),
    "visionreasoner": Protocol(unit="ref", ignore="target", both_empty=0.0),
    "himtok": Protocol(unit="merged", ignore="correct"),
    "segcompass_released": Protocol(unit="ref", ignore="background", matched=True),
}
PRECISION_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
_MORE = ("ignore", "sample_ids", "sample_id", "no_target")  # what a sample may have beside its two masks
RELEASED_SLOTS = 4  # the released code leaves out samples with more instances than its model has slots

_DESCRIPTION = """
Overlap of one predicted and one reference mask per sample (a sample is one sentence), by default by the rules of
generalised referring expression segmentation (GRES), in which a sentence may refer to nothing.
"""

_CITATION = """
@inproceedings{liu2023gres,
  title={{GRES}: Generalized Referring Expression Segmentation},
  author={Liu, Chang and Ding, Henghui and Jiang, Xudong},
  booktitle={CVPR},
  year={2023}
}
"""

_INPUTS = """
Args:
    predictions: one mask per sample: a COCO RLE dict {"size": [h, w], "counts": str or list}, a list of them (their
        union is the mask, [] is an empty one), a 2-D bool or integer array, or a PIL image in black and white (0
        outside, one other value inside).
    references: as predictions. The `masks` column of a data set will do.
    ignore: None, or one per sample: None, or a mask in any of these forms (the protocol says what its pixels do).
    sample_ids: None, or one str per sample. A repeated id is an error, except for the copies that a distributed sampler
        adds, which are counted once.
    no_target: None, or one per sample: None, or bool: what a model with a separate "nothing there" output answered.
    protocol: a key of `PROTOCOLS`: "rela" (the GRES authors' rules, ignored pixels excluded), "lisa", ...
Returns:
    dict: "cIoU" (sum of intersections over sum of unions; None if every union is empty), "gIoU" (mean IoU of the
    samples, a no-target sample giving 1 if the prediction is empty and 0 if not), "N-acc" (share of no-target samples
    with an empty prediction; None without such samples), "T-acc" (share of the others with a non-empty one; None
    without such samples), "Pr@0.5" to "Pr@0.9" (share of samples with a target whose IoU reaches the threshold; None
    without such samples), "n", "n_no_target", "n_skipped" (samples the protocol leaves out of cIoU, gIoU and Pr),
    "n_duplicates" (copies counted once; only if there are any) and "protocol".
Example:
    >>> metric = evaluate.load(segcompass.METRIC)
    >>> metric.compute(predictions=[np.eye(2, dtype=bool)], references=[np.ones((2, 2), dtype=bool)])["gIoU"]
    0.5
"""


# -- measuring a sample ------------------------------------------------------------------------------------------------


class Areas(NamedTuple):
    """Whole pixels of a sample's masks; every protocol's counts follow from them."""

    prediction: int
    reference: int
    shared: int
    """In prediction and reference."""
    ignore: int
    prediction_ignored: int
    """In prediction and ignore."""
    reference_ignored: int
    shared_ignored: int
    """In all three."""


class Measured(NamedTuple):
    """What is kept of a sample."""

    areas: Areas
    pairs: list[list[int]]
    """[I, U] of each predicted mask and the instance it was matched to."""
    instances: int
    """Number of reference masks."""
    no_target: bool | None
    """The model's explicit answer, None without one."""


def measure(prediction: Any, reference: Any, ignore: Any = None, no_target: bool | None = None) -> Measured:
    """The areas of a sample's masks and of their overlaps; arguments and errors as `sample_counts`."""
    masks = {
        "prediction": _form(prediction),
        "reference": _form(reference),
        "ignore": _form([] if ignore is None else ignore),
    }
    sizes = {name: size for name, (size, _) in masks.items() if size is not None}
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"masks of one sample differ in size (height, width): {shown}. Resize to the original image.")
    (_, prediction), (_, reference), (_, ignore) = masks.values()
    if not (no_target is None or isinstance(no_target, (bool, np.bool_))):
        raise ValueError(f"no_target is {no_target!r}; it must be True, False or None.")
    no_target = None if no_target is None else bool(no_target)
    if all(isinstance(mask, np.ndarray) or not mask for mask in (prediction, reference, ignore)):
        areas = Areas(*_array_areas(prediction, reference, ignore))
    else:
        prediction, reference, ignore = map(_as_rles, (prediction, reference, ignore))
        areas = Areas(*_rle_areas(*map(_union, (prediction, reference, ignore))))
    instances = 1 if isinstance(reference, np.ndarray) else len(reference)
    if isinstance(prediction, np.ndarray) or isinstance(reference, np.ndarray) or len(prediction) == instances == 1:
        pairs = [[areas.shared, areas.prediction + areas.reference - areas.shared]]
    else:
        pairs = _match(prediction, reference)
    return Measured(areas, pairs, instances, no_target)


def _form(mask) -> tuple[tuple[int, int] | None, np.ndarray | list[dict]]:
    """A mask in any accepted form as ((height, width), bool array or list of RLEs); the size of [] is None."""
    if isinstance(mask, dict):
        mask = [mask]
    if isinstance(mask, (list, tuple)) and all(isinstance(part, dict) for part in mask):
        rles = [_rle(part) for part in mask]
        sizes = {tuple(rle["size"]) for rle in rles}
        if len(sizes) > 1:
            raise ValueError(f"the masks of one list differ in size (height, width): {sorted(sizes)}.")
        # A mask without a pixel is no instance.
        return next(iter(sizes), None), [rle for rle in rles if coco_mask.area(rle)]
    if hasattr(mask, "getexif") and hasattr(mask, "mode"):
        _check_picture(mask)
    if np.ma.is_masked(mask):
        raise ValueError("a mask is an array of which some values are masked; fill them first (array.filled(0)).")
    array = np.asarray(mask)
    if array.dtype.kind not in "bui":
        holds = " with NaN" if array.dtype.kind == "f" and np.isnan(array).any() else ""
        raise TypeError(
            f"a mask must be an RLE dict, a list of RLE dicts, a bool or integer array, or a PIL image; got "
            f"{type(mask).__name__} of {array.dtype}{holds}. Threshold a probability map first."
        )
    if array.ndim != 2:
        raise ValueError(f"a mask must be 2-D (height, width), got shape {array.shape}; merge instances first.")
    if array.dtype.kind != "b":
        inside = array != 0
        values = array[inside]
        if values.size and (values.min() != values.max() or values.min() < 0):
            found = np.unique(values)
            shown = ", ".join(map(str, found[:4].tolist())) + (", ..." if len(found) > 4 else "")
            raise ValueError(
                f"an integer mask must be 0 outside and one other value inside; this one holds {shown} beside 0. "
                "Threshold it, choose one label (array == label), or, where 255 marks ignored pixels, pass these as "
                "ignore= and the mask as bool."
            )
        array = inside
    return array.shape, array


def _check_picture(mask: Any) -> None:
    """Refuse a PIL image whose numbers do not say what is inside. Raises ValueError."""
    if mask.mode not in ("1", "L") and not mask.mode.startswith("I"):
        raise ValueError(
            f"a mask is a PIL image of mode {mask.mode!r}, whose numbers are no black and white; convert it to 'L' or "
            "'1', and look at what became of it."
        )
    if mask.getexif().get(0x0112, 1) != 1:
        raise ValueError("a mask is a PIL image that its EXIF orientation turns; give ImageOps.exif_transpose(mask).")


def _rle(rle: dict) -> dict:
    """An RLE dict, checked; an uncompressed one is compressed."""
    if not {"size", "counts"} <= set(rle) or not isinstance(rle["counts"], (str, bytes, list)):
        raise TypeError('an RLE must be {"size": [h, w], "counts": str, bytes or list of int}.')
    return checked_rle(rle)


def _as_rles(mask: np.ndarray | list[dict]) -> list[dict]:
    if isinstance(mask, np.ndarray):
        return [coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))]
    return mask


def _union(rles: list[dict]) -> dict | None:
    """One RLE, or None for an empty list."""
    return coco_mask.merge(rles) if len(rles) > 1 else (rles[0] if rles else None)


def _overlaps(prediction, reference, ignore) -> list[tuple]:
    """The masks whose shared pixels are the fields of `Areas`, in their order."""
    pairs = [(prediction,), (reference,), (prediction, reference)]
    return [*pairs, (ignore,), *((*masks, ignore) for masks in pairs)]


def _array_areas(*masks) -> list[int]:
    """The fields of `Areas` of bool arrays, [] standing for an empty one."""
    empty = [any(isinstance(mask, list) for mask in each) for each in _overlaps(*masks)]
    return [
        0 if nothing else int(np.count_nonzero(functools.reduce(np.logical_and, each)))
        for nothing, each in zip(empty, _overlaps(*masks), strict=True)
    ]


def _rle_areas(*masks) -> list[int]:
    """The fields of `Areas` of RLEs, None standing for an empty one; one of them is not."""
    shared = [
        None if None in each else each[0] if len(each) == 1 else coco_mask.merge(list(each), intersect=True)
        for each in _overlaps(*masks)
    ]
    areas = iter(coco_mask.area([rle for rle in shared if rle is not None]).tolist())
    return [0 if rle is None else next(areas) for rle in shared]


def _match(predictions: list[dict], references: list[dict]) -> list[list[int]]:
    """[I, U] of the pairs that give the largest sum of IoUs, one to one."""
    from scipy.optimize import linear_sum_assignment

    if not predictions or not references:
        return []
    overlap = np.asarray(coco_mask.iou(predictions, references, [0] * len(references)))
    pairs = []
    for row, column in zip(*linear_sum_assignment(overlap, maximize=True), strict=True):
        pair = [predictions[row], references[column]]
        shared = int(coco_mask.area(coco_mask.merge(pair, intersect=True)))
        pairs.append([shared, sum(int(coco_mask.area(rle)) for rle in pair) - shared])
    return pairs


# -- from areas to a protocol's counts ---------------------------------------------------------------------------------


def count(measured: Measured, protocol: str = "rela") -> dict:
    """What a measured sample adds under a protocol; see `sample_counts`."""
    rules = _rules(protocol)
    areas = measured.areas
    shared, predicted, wanted = areas.shared, areas.prediction, areas.reference
    if rules.ignore == "excluded":
        shared -= areas.shared_ignored
        predicted -= areas.prediction_ignored
        wanted -= areas.reference_ignored
    elif rules.ignore in ("target", "correct"):
        wanted += areas.ignore - areas.reference_ignored
        shared += areas.prediction_ignored - areas.shared_ignored
    if rules.ignore == "correct":
        predicted += areas.ignore - areas.prediction_ignored
        shared += areas.ignore - areas.prediction_ignored
    union, rejected = predicted + wanted - shared, predicted == 0
    if rules.explicit and measured.no_target is not None:
        rejected = measured.no_target
        if rejected:
            shared, union = 0, union if wanted else 0
    counts: dict[str, Any] = {"I": shared, "U": union, "pred_empty": rejected, "ref_empty": wanted == 0}
    if rules.matched:
        pairs = measured.pairs or [[shared, union]]
        counts |= {"I": sum(i for i, _ in pairs), "U": sum(u for _, u in pairs)}
        counts |= {"pairs": pairs, "instances": measured.instances}
    return counts


def sample_counts(
    prediction: Any, reference: Any, ignore: Any = None, protocol: str = "rela", no_target: bool | None = None
) -> dict:
    """What one sample adds to the metrics.

    Args:
        prediction: an RLE dict, a list of RLE dicts (their union), a 2-D bool or integer array, or a PIL image.
        reference: likewise.
        ignore: likewise, or None. The protocol says what becomes of these pixels; "rela" leaves them out of everything.
        protocol: a key of `PROTOCOLS`.
        no_target: a model's explicit answer that nothing is there; None takes an empty mask as that answer.

    Returns:
        {"I": int pixels of the intersection, "U": int pixels of the union, "pred_empty": bool, "ref_empty": bool};
        under "segcompass_released" also "pairs" ([I, U] each) and "instances".

    Raises:
        ValueError: the masks differ in size, one is not 2-D or holds several values beside 0, an answer that is no
            bool, or the protocol is unknown.
        TypeError: a mask in none of these forms; floating-point masks are not.

    Example:
        >>> sample_counts(np.eye(2, dtype=bool), np.ones((2, 2), dtype=bool))
        {'I': 2, 'U': 4, 'pred_empty': False, 'ref_empty': False}
    """
    return count(measure(prediction, reference, ignore, no_target), protocol)


def intersection_union(prediction: Any, reference: Any, ignore: Any = None) -> tuple[int, int]:
    """(I, U), the whole pixels in the intersection and in the union of two masks; see `sample_counts`."""
    counts = sample_counts(prediction, reference, ignore)
    return counts["I"], counts["U"]


def sample_iou(counts: dict, protocol: str = "rela") -> float | None:
    """A sample's term of gIoU from its counts; None when the protocol leaves the sample out."""
    rules = _rules(protocol)
    if rules.matched:
        if counts["ref_empty"] or counts["instances"] > RELEASED_SLOTS:
            return None
        ious = [shared / union if union else 0.0 for shared, union in counts["pairs"]]
        return math.fsum(ious) / len(ious)
    if counts["U"]:
        return counts["I"] / counts["U"]
    return rules.both_empty if counts["pred_empty"] else 0.0


def summarise(samples: Iterable[dict], protocol: str = "rela") -> dict:
    """The metrics of a split from the counts of its samples.

    Args:
        samples: dicts as `sample_counts` returns under the same protocol, one per sample; read once.
        protocol: a key of `PROTOCOLS`. "rela" (Liu et al. 2023): a no-target sample gives gIoU 1 if the prediction is
            empty, and otherwise gIoU 0 and its area to the union; a false rejection gives gIoU 0 and the target's area
            to the union.

    Returns:
        {"cIoU", "gIoU", "N-acc", "T-acc", "Pr@0.5" ... "Pr@0.9"}: fractions in [0, 1], None where there is nothing to
        divide by; {"n", "n_no_target", "n_skipped"}: int; {"protocol"}: str. The order of the samples changes nothing.

    Raises:
        ValueError: there is no sample, or the protocol is unknown.
    """
    _rules(protocol)
    n = no_target = targeted_scored = shared = union = correct_rejections = correct_findings = 0
    reached = dict.fromkeys(PRECISION_THRESHOLDS, 0)
    ious = []
    for sample in samples:
        n += 1
        no_target += sample["ref_empty"]
        correct_rejections += sample["ref_empty"] and sample["pred_empty"]
        correct_findings += not sample["ref_empty"] and not sample["pred_empty"]
        iou = sample_iou(sample, protocol)
        if iou is None:
            continue
        ious.append(iou)
        shared += sample["I"]
        union += sample["U"]
        if not sample["ref_empty"]:
            targeted_scored += 1
            for threshold in PRECISION_THRESHOLDS:
                reached[threshold] += iou >= threshold
    if not n:
        raise ValueError("no samples: the metrics of an empty split are undefined. Give at least one.")
    return {
        "cIoU": _share(shared, union),
        "gIoU": _share(math.fsum(ious), len(ious)),
        "N-acc": _share(correct_rejections, no_target),
        "T-acc": _share(correct_findings, n - no_target),
        **{f"Pr@{threshold}": _share(times, targeted_scored) for threshold, times in reached.items()},
        "n": n,
        "n_no_target": no_target,
        "n_skipped": n - len(ious),
        "protocol": protocol,
    }


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def _rules(protocol: str) -> Protocol:
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; known: {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[protocol]


# -- the metric object -------------------------------------------------------------------------------------------------


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class ReasoningSegmentation(evaluate.Metric):
    """The metric object. Masks are checked and measured when they are added; ids are checked at the end.

    Example:
        metric = evaluate.load(segcompass.METRIC)
        metric.add_batch(predictions=masks, references=rows["masks"], ignore=rows["ignore"])
        print(metric.compute(protocol="lisa")["gIoU"])
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            # What is kept of each sample, split over the two names that every metric has: `evaluate.combine` hands each
            # metric exactly the names that stand here.
            features=datasets.Features(
                {
                    "predictions": {
                        "areas": {name: datasets.Value("int64") for name in Areas._fields},
                        "no_target": datasets.Value("bool"),
                        "sample_id": datasets.Value("string"),
                        "process": datasets.Value("int32"),
                    },
                    "references": {
                        "pairs": datasets.List(datasets.List(datasets.Value("int64"))),
                        "instances": datasets.Value("int32"),
                    },
                }
            ),
            reference_urls=["https://github.com/henghuiding/ReLA"],
        )

    def _feature_names(self) -> list[str]:
        # `evaluate.combine` hands each metric what this returns, and drops all else that was added without a word;
        # there, the names of ours that were added belong to it too.
        names = super()._feature_names()
        caller = sys._getframe(1)
        if isinstance(caller.f_locals.get("self"), evaluate.CombinedEvaluations):
            names += [name for name in caller.f_locals.get("kwargs", ()) if name in _MORE]
        return names

    def add_batch(
        self,
        *,
        predictions: Sequence,
        references: Sequence,
        ignore: Sequence | None = None,
        sample_ids: Sequence[str] | None = None,
        no_target: Sequence[bool | None] | None = None,
    ) -> None:
        """Add samples; the arguments are `compute`'s. Raises ValueError if their numbers differ."""
        size = len(predictions)
        ignore = [None] * size if ignore is None else ignore
        no_target = [None] * size if no_target is None else no_target
        # Without ids a sample's is empty, and empty ids may repeat.
        sample_ids = [""] * size if sample_ids is None else sample_ids
        if not size == len(references) == len(ignore) == len(sample_ids) == len(no_target):
            raise ValueError(
                f"give one of each per sample; got {size} predictions, {len(references)} references, {len(ignore)} "
                f"ignore masks, {len(sample_ids)} sample_ids and {len(no_target)} no_target answers."
            )
        rows = [measure(*row) for row in zip(predictions, references, ignore, no_target, strict=True)]
        if rows:
            super().add_batch(
                predictions=[
                    {
                        "areas": row.areas._asdict(),
                        "no_target": row.no_target,
                        "sample_id": str(name),
                        "process": self.process_id,
                    }
                    for row, name in zip(rows, sample_ids, strict=True)
                ],
                references=[{"pairs": row.pairs, "instances": row.instances} for row in rows],
            )

    def add(
        self,
        *,
        prediction: Any = None,
        reference: Any = None,
        ignore: Any = None,
        sample_id: str | None = None,
        no_target: bool | None = None,
        predictions: Any = None,
        references: Any = None,
    ) -> None:
        """Add one sample.

        Args:
            prediction: see `sample_counts`, as for the next two.
            reference: likewise.
            ignore: likewise.
            sample_id: the sample's id, or None.
            no_target: what a model with a separate "nothing there" output answered, or None.
            predictions: `prediction`, as `evaluate.combine` and other metrics call it.
            references: `reference`, likewise.

        Raises:
            ValueError: prediction or reference is missing or given twice, or as `sample_counts`.
        """
        for name, one, other in (("prediction", prediction, predictions), ("reference", reference, references)):
            if (one is None) == (other is None):
                raise ValueError(
                    f"add takes one {name} ([] for an empty mask); got {'none' if one is None else 'two'}."
                )
        self.add_batch(
            predictions=[predictions if prediction is None else prediction],
            references=[references if reference is None else reference],
            ignore=[ignore],
            sample_ids=None if sample_id is None else [sample_id],
            no_target=[no_target],
        )

    def compute(
        self,
        *,
        predictions: Sequence | None = None,
        references: Sequence | None = None,
        ignore: Sequence | None = None,
        sample_ids: Sequence[str] | None = None,
        no_target: Sequence[bool | None] | None = None,
        protocol: str = "rela",
    ) -> dict | None:
        """Add these samples, if given, and return the metrics of all samples added since the last call.

        In a distributed run every process calls it; process 0 returns the metrics of all, the others None.

        Args:
            predictions: one mask per sample, in any form that `sample_counts` takes.
            references: likewise.
            ignore: likewise, or None for no ignored pixels; an entry may be None.
            sample_ids: one per sample, or None.
            no_target: what a model with a separate "nothing there" output answered, one per sample, or None.
            protocol: a key of `PROTOCOLS`.

        Returns:
            As `summarise`, and "n_duplicates" where copies were counted once.

        Raises:
            ValueError: no sample; a repeated sample id (except for equal copies on other processes); masks of a sample
                that differ in size; an unknown protocol.
        """
        _rules(protocol)
        if (predictions is None) != (references is None):
            raise ValueError("predictions and references go together: one of the two is missing.")
        if predictions is not None and references is not None:
            self.add_batch(
                predictions=predictions,
                references=references,
                ignore=ignore,
                sample_ids=sample_ids,
                no_target=no_target,
            )
        if self.writer is None:
            raise ValueError("no samples: the metrics of an empty split are undefined. Add at least one.")
        return super().compute(protocol=protocol)

    def _compute(self, predictions, references, protocol: str) -> dict:
        seen: dict[str, tuple[Measured, int]] = {}
        samples, repeated = [], []
        for prediction, reference in zip(predictions, references, strict=True):
            name, rank = prediction["sample_id"], prediction["process"]
            areas = Areas(**prediction["areas"])
            measured = Measured(areas, reference["pairs"], reference["instances"], prediction["no_target"])
            if name in seen:
                first, first_rank = seen[name]
                if rank == first_rank or measured != first:
                    repeated.append(name)
                continue
            if name:
                seen[name] = (measured, rank)
            samples.append(count(measured, protocol))
        if repeated:
            raise ValueError(
                f"{len(repeated)} sample ids repeat, the first {min(repeated)!r}: a sample would count twice. Only "
                "equal copies on different processes, as a distributed sampler adds them, are counted once."
            )
        results = summarise(samples, protocol)
        duplicates = len(predictions) - len(samples)
        return results | ({"n_duplicates": duplicates} if duplicates else {})
