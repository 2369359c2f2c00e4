"""Every cell of the no-target table under every protocol, by hand; copies across processes; memory."""

import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from segcompass.loaders.reasoning_segmentation.reasoning_segmentation import (
    PROTOCOLS,
    sample_counts,
    sample_iou,
    summarise,
)

ROOT = Path(__file__).parents[2]
METRIC = str(ROOT / "loaders" / "reasoning_segmentation")
EMPTY = np.zeros((4, 6), dtype=bool)


def box(top, left, bottom, right):
    mask = EMPTY.copy()
    mask[top:bottom, left:right] = True
    return mask


def rle(mask):
    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


P, G = box(0, 0, 2, 3), box(1, 1, 3, 4)  # 6 and 6 pixels, 2 shared, 10 in the union
IGNORE = box(0, 2, 4, 4)  # 8 pixels: 2 of P, 4 of G, 1 of both

# (prediction, reference, ignore): (I, U, IoU, prediction empty, reference empty) of each protocol
CASES = {
    "no target, nothing predicted": (
        (EMPTY, EMPTY, None),
        {
            "rela": (0, 0, 1.0, True, True),
            "lisa": (0, 0, 1.0, True, True),
            "visionreasoner": (0, 0, 0.0, True, True),
            "himtok": (0, 0, 1.0, True, True),
            "segcompass_released": (0, 0, None, True, True),
        },
    ),
    "no target, something predicted": (
        (P, EMPTY, None),
        {
            "rela": (0, 6, 0.0, False, True),
            "lisa": (0, 6, 0.0, False, True),
            "visionreasoner": (0, 6, 0.0, False, True),
            "himtok": (0, 6, 0.0, False, True),
            "segcompass_released": (0, 6, None, False, True),
        },
    ),
    "target, something predicted": (
        (P, G, None),
        {name: (2, 10, 0.2, False, False) for name in PROTOCOLS},
    ),
    "target, nothing predicted": (
        (EMPTY, G, None),
        {name: (0, 6, 0.0, True, False) for name in PROTOCOLS},
    ),
    "ignored pixels in both": (
        (P, G, IGNORE),
        {
            "rela": (1, 5, 1 / 5, False, False),  # P 4, G 2 and 1 of both are left
            "lisa": (1, 5, 1 / 5, False, False),
            "visionreasoner": (3, 13, 3 / 13, False, False),  # G grows to 10
            "himtok": (9, 13, 9 / 13, False, False),  # G grows to 10, P to 12
            "segcompass_released": (2, 10, 1 / 5, False, False),
        },
    ),
    "only ignored pixels predicted": (
        (IGNORE, EMPTY, IGNORE),
        {
            "rela": (0, 0, 1.0, True, True),
            "lisa": (0, 0, 1.0, True, True),
            "visionreasoner": (8, 8, 1.0, False, False),
            "himtok": (8, 8, 1.0, False, False),
            "segcompass_released": (0, 8, None, False, True),
        },
    ),
    "nothing predicted beside ignored pixels": (
        (EMPTY, G, IGNORE),
        {
            "rela": (0, 2, 0.0, True, False),
            "lisa": (0, 2, 0.0, True, False),
            "visionreasoner": (0, 10, 0.0, True, False),
            "himtok": (8, 10, 0.8, False, False),
            "segcompass_released": (0, 6, 0.0, True, False),
        },
    ),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "form", [np.array, rle, lambda mask: [rle(mask)] if mask.any() else []], ids=["array", "rle", "[]"]
)
def test_cells_by_hand(case, protocol, form):
    masks, expected = CASES[case]
    counts = sample_counts(*(None if mask is None else form(mask) for mask in masks), protocol)
    found = (counts["I"], counts["U"], sample_iou(counts, protocol), counts["pred_empty"], counts["ref_empty"])
    assert found == pytest.approx(expected[protocol])
    assert all(type(count) is int for count in found[:2])


def test_split_by_hand_under_every_protocol():
    samples = [CASES[name][0] for name in CASES]
    expected = {  # I, U, sum of IoUs, samples in gIoU, N-acc, T-acc
        "rela": (3, 29, 1 + 0 + 0.2 + 0 + 0.2 + 1 + 0, 7, 2 / 3, 2 / 4),
        "lisa": (3, 29, 1 + 0 + 0.2 + 0 + 0.2 + 1 + 0, 7, 2 / 3, 2 / 4),
        "visionreasoner": (13, 53, 0 + 0 + 0.2 + 0 + 3 / 13 + 1 + 0, 7, 1 / 2, 3 / 5),
        "himtok": (27, 53, 1 + 0 + 0.2 + 0 + 9 / 13 + 1 + 0.8, 7, 1 / 2, 4 / 5),
        "segcompass_released": (4, 32, 0.2 + 0 + 0.2 + 0, 4, 1 / 3, 2 / 4),
    }
    for protocol, (shared, union, ious, scored, n_acc, t_acc) in expected.items():
        result = summarise((sample_counts(*masks, protocol) for masks in samples), protocol)
        assert result["cIoU"] == pytest.approx(shared / union), protocol
        assert result["gIoU"] == pytest.approx(ious / scored), protocol
        assert (result["N-acc"], result["T-acc"]) == pytest.approx((n_acc, t_acc)), protocol
        assert (result["n"], result["n_skipped"], result["protocol"]) == (7, 7 - scored, protocol)


def test_treatments_of_ignored_pixels_agree_with_arrays():
    generator = np.random.default_rng(0)
    for _ in range(40):
        prediction, reference, ignore = generator.random((3, 7, 9)) < generator.random()
        treated = {
            "rela": (prediction & ~ignore, reference & ~ignore),
            "visionreasoner": (prediction, reference | ignore),
            "himtok": (prediction | ignore, reference | ignore),
            "segcompass_released": (prediction, reference),
        }
        for protocol, (predicted, wanted) in treated.items():
            for form in (np.array, rle):
                counts = sample_counts(form(prediction), form(reference), form(ignore), protocol)
                assert counts["I"] == (predicted & wanted).sum() and counts["U"] == (predicted | wanted).sum()
                assert (counts["pred_empty"], counts["ref_empty"]) == (not predicted.any(), not wanted.any())


def test_an_explicit_answer_goes_before_the_mask_as_the_gres_authors_count():
    def counted(prediction, reference, no_target, protocol="rela"):
        counts = sample_counts(prediction, reference, None, protocol, no_target)
        return counts["I"], counts["U"], sample_iou(counts, protocol), counts["pred_empty"]

    assert counted(P, EMPTY, True) == (0, 0, 1.0, True)
    assert counted(EMPTY, EMPTY, False) == (0, 0, 0.0, False)
    assert counted(P, G, True) == (0, 10, 0.0, True), "the union is that with the rejected mask"
    assert counted(P, G, False) == (2, 10, 0.2, False)
    assert counted(P, EMPTY, True, "lisa") == (0, 6, 0.0, False), "others know no such answer"


def test_released_protocol_matches_masks_to_instances_by_the_truth():
    left, right = box(0, 0, 4, 2), box(0, 4, 4, 6)  # 8 pixels each
    half = box(0, 4, 2, 6)  # half of the right one
    wrong = box(0, 2, 4, 4)

    def iou(predictions, references):
        counts = sample_counts(list(map(rle, predictions)), list(map(rle, references)), None, "segcompass_released")
        return sample_iou(counts, "segcompass_released")

    assert iou([half, left], [left, right]) == 0.75, "the order does not matter"
    assert iou([half, left, wrong, wrong | left], [left, right]) == 0.75, "spurious masks cost nothing"
    assert iou([left], [left, right]) == 1.0, "neither does a missing one: only pairs count"
    assert iou([], [left, right]) == 0.0
    assert iou([left], [left] * 4) == 1.0 and iou([left], [left] * 5) is None, "more than four are left out"
    spurious = [rle(left), rle(half), rle(wrong)]
    assert sample_iou(sample_counts(spurious, [rle(left), rle(right)])) == 12 / 24, "the union counts them"


def test_metric_object_takes_protocols_and_answers(tmp_path):
    metric = evaluate.load(METRIC, cache_dir=str(tmp_path))
    samples = [CASES[name][0] for name in CASES]
    predictions, references, ignore = ([row[column] for row in samples] for column in range(3))
    for protocol in PROTOCOLS:
        expected = summarise([sample_counts(*masks, protocol) for masks in samples], protocol)
        given = {"predictions": predictions, "references": references, "ignore": ignore}
        assert metric.compute(**given, protocol=protocol) == expected
    answers = metric.compute(predictions=[P, P], references=[EMPTY, G], no_target=[True, None])
    assert (answers["gIoU"], answers["N-acc"], answers["T-acc"]) == (0.6, 1.0, 1.0)
    with pytest.raises(ValueError, match="unknown protocol 'x'; known: rela, lisa"):
        metric.compute(predictions=[P], references=[G], protocol="x")
    with pytest.raises(ValueError, match="1 no_target answers"):
        metric.compute(predictions=[P, P], references=[G, G], no_target=[True])


PROCESS = """
import sys
import evaluate
import numpy as np
rank, folder = int(sys.argv[2]), sys.argv[3]
masks = {"a": [[1, 1, 0]], "b": [[1, 0, 0]], "c": [[0, 1, 1]]}
share = {0: "ab", 1: "ca"}[rank]  # a sampler that evens out the processes repeats the first sample
for case in ("equal", "differ"):
    options = dict(num_process=2, process_id=rank, experiment_id=case, cache_dir=folder)
    metric = evaluate.load(sys.argv[1], **options)
    for name in share:
        mask = np.array(masks[name], dtype=bool)
        if case == "differ" and rank:
            mask = ~mask
        metric.add(prediction=mask, reference=np.array([[1, 1, 0]], dtype=bool), sample_id=name)
    try:
        print(metric.compute())
    except ValueError as error:
        print(error)
"""


def test_copies_on_other_processes_are_counted_once_and_must_be_equal(tmp_path):
    command = [sys.executable, "-c", PROCESS, METRIC]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    (printed, error), (second, _) = (process.communicate(timeout=600) for process in processes)
    assert processes[0].returncode == 0, error
    first, refused = printed.splitlines()
    assert second.split() == ["None", "None"] and "1 sample ids repeat, the first 'a'" in refused
    result = eval(first)
    assert (result["n"], result["n_duplicates"]) == (3, 1)
    assert result["gIoU"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3) and result["cIoU"] == 4 / 7
