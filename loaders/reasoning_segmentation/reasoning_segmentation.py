"""Segmentation metrics by the GRES rules: cIoU, gIoU, N-acc, T-acc and Pr@X from whole pixel counts.

Notably: intersections and unions are integers at the masks' own size, nothing is smoothed by an epsilon, and masks are
counted in their run-length form. It loads with `evaluate.load("loaders/reasoning_segmentation")`; `intersection_union`,
`sample_counts` and `summarise` are plain functions that need no metric object.
"""

import math
from collections import Counter
from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
from pycocotools import mask as coco_mask

PROTOCOLS = ("rela",)
PRECISION_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)

_DESCRIPTION = """
Overlap of one predicted and one reference mask a sample (a sample is one sentence), by the rules of generalised
referring expression segmentation (GRES), in which a sentence may refer to nothing.
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
    predictions: one mask a sample: a COCO compressed RLE dict {"size": [h, w], "counts": str}, a list of them (their
        union is the mask, [] is an empty one), a 2-D bool or integer array, or a PIL image (not 0 = inside).
    references: as predictions. The `masks` column of a data set will do.
    ignore: None, or one a sample: None, or a mask in any of these forms whose pixels count nowhere.
    sample_ids: None, or one str a sample; a repeated one is an error.
    protocol: "rela", the GRES authors' rules.
Returns:
    dict: "cIoU" (sum of intersections over sum of unions; None if every union is empty), "gIoU" (mean IoU of the
    samples, a no-target sample giving 1 if the prediction is empty and 0 if not), "N-acc" (share of no-target samples
    with an empty prediction; None without such samples), "T-acc" (share of the others with a non-empty one; None
    without such samples), "Pr@0.5" to "Pr@0.9" (share of samples with a target whose IoU reaches the threshold; None
    without such samples), "n", "n_no_target" and "protocol".
Example:
    >>> metric = evaluate.load("loaders/reasoning_segmentation")
    >>> metric.compute(predictions=[np.eye(2, dtype=bool)], references=[np.ones((2, 2), dtype=bool)])["gIoU"]
    0.5
"""


def sample_counts(prediction, reference, ignore=None) -> dict:
    """What one sample adds to the metrics. Pixels inside `ignore` are left out of everything.

    Args:
        prediction: an RLE dict, a list of RLE dicts (their union), a 2-D bool or integer array, or a PIL image.
        reference: likewise.
        ignore: likewise, or None.

    Returns:
        {"I": int pixels of the intersection, "U": int pixels of the union, "pred_empty": bool, "ref_empty": bool}.

    Raises:
        ValueError: the masks differ in size, or one is not 2-D.
        TypeError: a mask is none of these forms.
    """
    prediction, reference, ignore = _same_size_rles(prediction, reference, ignore)
    both = coco_mask.merge([prediction, reference], intersect=True)
    predicted, wanted, shared = (
        int(coco_mask.area(rle)) - int(coco_mask.area(coco_mask.merge([rle, ignore], intersect=True)))
        for rle in (prediction, reference, both)
    )
    return {"I": shared, "U": predicted + wanted - shared, "pred_empty": predicted == 0, "ref_empty": wanted == 0}


def intersection_union(prediction, reference, ignore=None) -> tuple[int, int]:
    """(I, U), the whole pixels in the intersection and in the union of two masks; see `sample_counts`."""
    counts = sample_counts(prediction, reference, ignore)
    return counts["I"], counts["U"]


def summarise(samples: Sequence[dict], protocol: str = "rela") -> dict:
    """The metrics of a split from the counts of its samples.

    The rules are those of Liu et al. 2023 (GRES): a no-target sample gives gIoU 1 if the prediction is empty, and
    otherwise gIoU 0 and its area to the union; a false rejection gives gIoU 0 and the target's area to the union.

    Args:
        samples: dicts as `sample_counts` returns, one a sample.
        protocol: "rela".

    Returns:
        {"cIoU", "gIoU", "N-acc", "T-acc", "Pr@0.5" ... "Pr@0.9"}: fractions in [0, 1], None where there is nothing to
        divide by; {"n", "n_no_target"}: int; {"protocol"}: str.

    Raises:
        ValueError: there is no sample, or the protocol is unknown.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; known: {', '.join(PROTOCOLS)}.")
    if not samples:
        raise ValueError("no samples: the metrics of an empty split are undefined. Give at least one.")
    targeted = [sample for sample in samples if not sample["ref_empty"]]
    no_target = [sample for sample in samples if sample["ref_empty"]]
    ious = [sample["I"] / sample["U"] for sample in targeted]
    correct_rejections = sum(sample["pred_empty"] for sample in no_target)
    results = {
        "cIoU": _share(sum(sample["I"] for sample in samples), sum(sample["U"] for sample in samples)),
        "gIoU": (math.fsum(ious) + correct_rejections) / len(samples),
        "N-acc": _share(correct_rejections, len(no_target)),
        "T-acc": _share(sum(not sample["pred_empty"] for sample in targeted), len(targeted)),
    }
    for threshold in PRECISION_THRESHOLDS:
        results[f"Pr@{threshold}"] = _share(sum(iou >= threshold for iou in ious), len(targeted))
    return results | {"n": len(samples), "n_no_target": len(no_target), "protocol": protocol}


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _rle(mask) -> dict | None:
    """A mask in any accepted form as compressed RLE with str counts; None for [], whose size is unknown."""
    if isinstance(mask, (list, tuple)) and all(isinstance(part, dict) for part in mask):
        if not mask:
            return None
        parts = [_rle(part) for part in mask]
        sizes = {tuple(part["size"]) for part in parts}
        if len(sizes) > 1:
            raise ValueError(f"the masks of one list differ in size (height, width): {sorted(sizes)}.")
        rle = coco_mask.merge(parts)
    elif isinstance(mask, dict):
        if not {"size", "counts"} <= set(mask) or not isinstance(mask["counts"], (str, bytes)):
            raise TypeError(
                'an RLE must be {"size": [h, w], "counts": str or bytes}, compressed; turn an uncompressed one into it '
                "with pycocotools.mask.frPyObjects(rle, h, w)."
            )
        rle = mask
    else:
        array = np.asarray(mask)
        if array.dtype.kind not in "bui":
            raise TypeError(
                f"a mask must be an RLE dict, a list of RLE dicts, a bool or integer array, or a PIL image; got "
                f"{type(mask).__name__} of {array.dtype}. Threshold a probability map first."
            )
        if array.ndim != 2:
            raise ValueError(f"a mask must be 2-D (height, width), got shape {array.shape}; merge instances first.")
        rle = coco_mask.encode(np.asfortranarray(array != 0, dtype=np.uint8))
    counts = rle["counts"]
    counts = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {"size": [int(side) for side in rle["size"]], "counts": counts}


def _same_size_rles(prediction, reference, ignore) -> tuple[dict, dict, dict]:
    """Prediction, reference and ignore as RLE of one size; what says nothing becomes an empty mask of that size."""
    rles = {
        "prediction": _rle(prediction),
        "reference": _rle(reference),
        "ignore": None if ignore is None else _rle(ignore),
    }
    sizes = {name: tuple(rle["size"]) for name, rle in rles.items() if rle is not None}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"masks of one sample differ in size (height, width): {told}. Resize to the original image.")
    height, width = next(iter(sizes.values()), (1, 1))  # nothing has a size: nothing predicted, nothing wanted
    empty = _rle(np.zeros((height, width), dtype=bool))
    return tuple(rle if rle is not None else empty for rle in rles.values())


_RLE_FEATURE = {"size": [datasets.Value("int64")], "counts": datasets.Value("string")}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class ReasoningSegmentation(evaluate.Metric):
    """The metric object. Masks are checked and kept as RLE when they are added; ids are checked at the end."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": _RLE_FEATURE,
                    "references": _RLE_FEATURE,
                    "ignore": _RLE_FEATURE,
                    "sample_ids": datasets.Value("string"),
                }
            ),
            reference_urls=["https://github.com/henghuiding/ReLA"],
        )

    def add_batch(self, *, predictions, references, ignore=None, sample_ids=None) -> None:
        """Add samples; the arguments are `compute`'s. Raises ValueError if their numbers differ."""
        size = len(predictions)
        ignore = [None] * size if ignore is None else ignore
        # Without ids a sample's is empty, and empty ids may repeat.
        sample_ids = [""] * size if sample_ids is None else sample_ids
        if not size == len(references) == len(ignore) == len(sample_ids):
            raise ValueError(
                f"one of each a sample: got {size} predictions, {len(references)} references, {len(ignore)} ignore "
                f"masks and {len(sample_ids)} sample_ids."
            )
        rows = [_same_size_rles(*row) for row in zip(predictions, references, ignore, strict=True)]
        if rows:
            predictions, references, ignore = (list(column) for column in zip(*rows, strict=True))
            super().add_batch(
                predictions=predictions,
                references=references,
                ignore=ignore,
                sample_ids=[str(name) for name in sample_ids],
            )

    def add(self, *, prediction, reference, ignore=None, sample_id=None) -> None:
        """Add one sample."""
        self.add_batch(
            predictions=[prediction],
            references=[reference],
            ignore=[ignore],
            sample_ids=None if sample_id is None else [sample_id],
        )

    def compute(
        self, *, predictions=None, references=None, ignore=None, sample_ids=None, protocol: str = "rela"
    ) -> dict | None:
        """Add these samples, if given, and return the metrics of all samples added since the last call.

        Raises ValueError if there is none, if a sample id repeats, or if the masks of a sample differ in size.
        """
        if (predictions is None) != (references is None):
            raise ValueError("predictions and references go together: one of the two is missing.")
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references, ignore=ignore, sample_ids=sample_ids)
        if self.writer is None:
            raise ValueError("no samples: the metrics of an empty split are undefined. Add at least one.")
        return super().compute(protocol=protocol)

    def _compute(self, predictions, references, ignore, sample_ids, protocol: str) -> dict:
        repeated = sorted(name for name, times in Counter(sample_ids).items() if name and times > 1)
        if repeated:
            raise ValueError(
                f"{len(repeated)} sample ids repeat, the first {repeated[0]!r}: a sample would count twice. In a "
                "distributed run, drop the rows the sampler added to even out the processes."
            )
        rows = zip(predictions, references, ignore, strict=True)
        return summarise([sample_counts(*row) for row in rows], protocol)
