import evaluate
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from segcompass import METRIC
from segcompass.loaders.reasoning_segmentation.reasoning_segmentation import (
    PROTOCOLS,
    intersection_union,
    sample_counts,
    summarise,
)

EMPTY = np.zeros((4, 5), dtype=bool)


def box(top, left, bottom, right):
    mask = EMPTY.copy()
    mask[top:bottom, left:right] = True
    return mask


def rle(mask):
    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


@pytest.fixture
def metric(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return evaluate.load(METRIC, cache_dir=str(tmp_path))


PREDICTION, REFERENCE = box(0, 0, 2, 3), box(1, 1, 3, 4)  # 6 and 6 pixels, 2 shared, 10 in the union


def test_counts_by_hand_in_whole_pixels():
    counts = intersection_union(PREDICTION, REFERENCE)
    assert counts == (2, 10)
    assert all(type(count) is int for count in counts)


@pytest.mark.parametrize(
    "form",
    [
        rle,
        lambda mask: dict(rle(mask), counts=rle(mask)["counts"].encode()),
        lambda mask: mask.astype(np.uint8) * 255,
        Image.fromarray,
        lambda mask: [rle(mask[:, :] & (np.arange(5) < 2)), rle(mask & (np.arange(5) > 0))],  # overlapping parts
    ],
    ids=["rle", "rle bytes", "uint8", "PIL", "list of rle"],
)
def test_every_form_of_a_mask_counts_the_same(form):
    assert intersection_union(form(PREDICTION), REFERENCE) == (2, 10)
    assert intersection_union(PREDICTION, form(REFERENCE)) == (2, 10)
    assert intersection_union(PREDICTION, REFERENCE, form(EMPTY)) == (2, 10)


def test_ignored_pixels_count_nowhere():
    ignore = box(0, 0, 2, 2)  # holds 4 predicted pixels, 1 of the reference, 1 shared
    assert intersection_union(PREDICTION, REFERENCE, ignore) == (1, 6)
    everything = ~EMPTY
    expected = {"I": 0, "U": 0, "pred_empty": True, "ref_empty": True}
    assert sample_counts(PREDICTION, REFERENCE, everything) == expected
    only_prediction_ignored = sample_counts(PREDICTION, REFERENCE, PREDICTION & ~REFERENCE)
    assert only_prediction_ignored == {"I": 2, "U": 6, "pred_empty": False, "ref_empty": False}


def test_counts_agree_with_arrays():
    generator = np.random.default_rng(0)
    for _ in range(50):
        prediction, reference, ignore = generator.random((3, 7, 9)) < generator.random()
        expected = (
            int((prediction & reference & ~ignore).sum()),
            int(((prediction | reference) & ~ignore).sum()),
        )
        assert intersection_union(prediction, rle(reference), ignore) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "giou", "intersection", "union"),
    [
        (EMPTY, EMPTY, 1.0, 0, 0),
        ([], [], 1.0, 0, 0),
        (PREDICTION, EMPTY, 0.0, 0, 6),
        (PREDICTION, [], 0.0, 0, 6),
        (PREDICTION, REFERENCE, 0.2, 2, 10),
        (EMPTY, REFERENCE, 0.0, 0, 6),
        ([], REFERENCE, 0.0, 0, 6),
    ],
)
def test_cells_of_the_gres_table(prediction, reference, giou, intersection, union):
    counts = sample_counts(prediction, reference)
    assert (counts["I"], counts["U"]) == (intersection, union)
    assert summarise([counts])["gIoU"] == giou


def test_summary_by_hand():
    samples = [
        {"I": 7, "U": 10, "pred_empty": False, "ref_empty": False},
        {"I": 1, "U": 4, "pred_empty": False, "ref_empty": False},
        {"I": 0, "U": 6, "pred_empty": True, "ref_empty": False},
        {"I": 0, "U": 0, "pred_empty": True, "ref_empty": True},
        {"I": 0, "U": 5, "pred_empty": False, "ref_empty": True},
    ]
    assert summarise(samples) == {
        "cIoU": 8 / 25,
        "gIoU": pytest.approx((0.7 + 0.25 + 0 + 1 + 0) / 5),
        "N-acc": 1 / 2,
        "T-acc": 2 / 3,
        "Pr@0.5": 1 / 3,
        "Pr@0.6": 1 / 3,
        "Pr@0.7": 1 / 3,  # reached exactly
        "Pr@0.8": 0.0,
        "Pr@0.9": 0.0,
        "n": 5,
        "n_no_target": 2,
        "n_skipped": 0,
        "protocol": "rela",
    }


def test_a_perfect_prediction_scores_exactly_one(metric):
    results = metric.compute(predictions=[PREDICTION], references=[PREDICTION])
    assert results["cIoU"] == results["gIoU"] == results["Pr@0.9"] == results["T-acc"] == 1.0


def test_what_has_no_samples_is_none_not_zero():
    targeted = summarise([sample_counts(PREDICTION, REFERENCE)])
    assert targeted["N-acc"] is None and targeted["T-acc"] == 1.0
    no_target = summarise([sample_counts(EMPTY, EMPTY)])
    assert no_target["T-acc"] is None and no_target["Pr@0.5"] is None and no_target["cIoU"] is None
    assert no_target["N-acc"] == no_target["gIoU"] == 1.0


def test_metric_object_offline_equals_the_functions(metric):
    predictions = [PREDICTION, rle(EMPTY), Image.fromarray(PREDICTION), [rle(PREDICTION)]]
    references = [REFERENCE, EMPTY, [], [rle(REFERENCE), rle(box(3, 0, 4, 5))]]
    ignore = [None, None, None, box(0, 0, 2, 2)]
    expected = summarise([sample_counts(*row) for row in zip(predictions, references, ignore, strict=True)])
    ids = ["a", "b", "c", "d"]
    result = metric.compute(predictions=predictions, references=references, ignore=ignore, sample_ids=ids)
    assert result == expected
    metric.add_batch(predictions=predictions[:3], references=references[:3], sample_ids=ids[:3])
    metric.add(prediction=predictions[3], reference=references[3], ignore=ignore[3], sample_id="d")
    assert metric.compute() == expected


def test_masks_of_different_samples_may_differ_in_size(metric):
    square = np.ones((3, 3), dtype=bool)
    assert metric.compute(predictions=[PREDICTION, square], references=[REFERENCE, square])["cIoU"] == 11 / 19


def test_masks_of_one_sample_may_not_differ_in_size(metric):
    with pytest.raises(ValueError, match=r"prediction \(4, 5\), reference \(3, 3\)"):
        metric.compute(predictions=[PREDICTION], references=[np.ones((3, 3), dtype=bool)])
    with pytest.raises(ValueError, match=r"ignore \(3, 3\)"):
        intersection_union(PREDICTION, REFERENCE, np.ones((3, 3), dtype=bool))


def test_empty_input_is_refused(metric):
    with pytest.raises(ValueError, match="no samples"):
        metric.compute(predictions=[], references=[])
    with pytest.raises(ValueError, match="no samples"):
        metric.compute()
    with pytest.raises(ValueError, match="no samples"):
        summarise([])


def test_a_repeated_sample_id_is_refused_and_the_metric_stays_usable(metric):
    masks = [PREDICTION] * 3
    with pytest.raises(ValueError, match="1 sample ids repeat, the first 'b'"):
        metric.compute(predictions=masks, references=masks, sample_ids=["a", "b", "b"])
    assert metric.compute(predictions=masks, references=masks)["n"] == 3
    assert metric.compute(predictions=masks, references=masks, sample_ids=["a", "b", "c"])["n"] == 3


def test_errors_name_what_is_wrong(metric):
    with pytest.raises(ValueError, match="2 predictions, 1 references"):
        metric.compute(predictions=[PREDICTION] * 2, references=[REFERENCE])
    with pytest.raises(ValueError, match="go together"):
        metric.compute(references=[REFERENCE])
    with pytest.raises(ValueError, match="unknown protocol 'lsia'"):
        summarise([sample_counts(PREDICTION, REFERENCE)], protocol="lsia")
    with pytest.raises(TypeError, match="Threshold"):
        intersection_union(PREDICTION.astype(np.float32), REFERENCE)
    with pytest.raises(TypeError, match="NaN"):
        intersection_union(np.full((4, 5), np.nan), REFERENCE)
    with pytest.raises(TypeError, match="must be an RLE dict"):
        intersection_union(None, REFERENCE)
    with pytest.raises(ValueError, match="counts for 19 pixels"):
        intersection_union({"size": [4, 5], "counts": [19]}, REFERENCE)
    for values in ([0, 1, 255], [0, 1, 2], [0, 40, 200], [-1, 0, 0]):  # ignored pixels, labels, soft edges, none
        with pytest.raises(ValueError, match="0 outside and one other value inside"):
            intersection_union(np.array([values]), np.array([[0, 1, 1]]))
    turned = Image.new("L", (3, 1), 255)
    turned.getexif()[0x0112] = 6
    for picture, message in ((Image.new("P", (3, 1)), "mode 'P'"), (turned, "EXIF orientation")):
        with pytest.raises(ValueError, match=message):
            intersection_union(picture, np.array([[0, 1, 1]]))
    for answer in ("false", 0, "no"):
        with pytest.raises(ValueError, match="it must be True, False or None"):
            sample_counts(PREDICTION, REFERENCE, no_target=answer)
    with pytest.raises(ValueError, match="2-D"):
        intersection_union(PREDICTION[None], REFERENCE)


# -- damaged input and evaluate.combine --------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", ["cut", "repr", "", "1 2 3", "o" * 40])
def test_damaged_run_lengths_are_refused_before_the_c_code(counts):
    """That code would read past its end, or loop for ever."""
    mask = np.zeros((20, 30), bool)
    mask[5:10, 5:15] = True
    good = {"size": [20, 30], "counts": coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()}
    counts = {"cut": good["counts"][:-2], "repr": str(good["counts"].encode())}.get(counts, counts)
    for prediction, reference in (({**good, "counts": counts}, good), (good, [{**good, "counts": counts}, good])):
        with pytest.raises(ValueError, match="an RLE has counts for"):
            sample_counts(prediction, reference)


def test_masks_without_a_pixel_are_no_instances():
    nothing, some = ({"size": [2, 2], "counts": counts} for counts in ([4], [0, 1, 3]))
    for protocol in PROTOCOLS:
        for given, expected in (([nothing, some], [some]), ([nothing], []), ([nothing, nothing], [])):
            assert sample_counts(some, given, protocol=protocol) == sample_counts(some, expected, protocol=protocol)
            assert sample_counts(given, some, protocol=protocol) == sample_counts(expected, some, protocol=protocol)


@pytest.mark.parametrize("way", ["compute", "add_batch", "add"])
def test_the_metric_works_within_combine(tmp_path, way):
    full, half = np.ones((4, 6), bool), np.arange(24).reshape(4, 6) % 2 == 0
    metric = evaluate.combine([evaluate.load(METRIC, cache_dir=str(tmp_path))])
    given = {}
    if way == "compute":
        given = {"predictions": [full, half], "references": [full, full]}
    elif way == "add_batch":
        metric.add_batch(predictions=[full, half], references=[full, full])
    else:
        metric.add(prediction=full, reference=full)
        metric.add(prediction=half, reference=full)
    assert metric.compute(**given)["gIoU"] == 0.75


@pytest.mark.parametrize("way", ["compute", "add_batch", "add"])
def test_ignored_pixels_ids_and_answers_count_within_combine(tmp_path, way):
    """`evaluate.combine` hands a metric only the names it asks for; all that was added must arrive, or be refused."""
    full, half = np.ones((4, 6), bool), np.arange(24).reshape(4, 6) % 2 == 0
    given = {"predictions": [half, full, full], "references": [full, full, []], "ignore": [~half, None, half]}
    more = {"sample_ids": ["a", "b", "c"], "no_target": [None, False, True]}
    alone = evaluate.load(METRIC, cache_dir=str(tmp_path / "alone")).compute(**given, **more)
    assert (alone["gIoU"], alone["n"]) == (1.0, 3)  # 5/6 without the ignored pixels, 2/3 without the answer
    metric = evaluate.combine([evaluate.load(METRIC, cache_dir=str(tmp_path / "combined"))])

    def add(ids):
        if way == "compute":
            return metric.compute(**given, **more | {"sample_ids": ids})
        if way == "add_batch":
            metric.add_batch(**given, **more | {"sample_ids": ids})
        for number, name in enumerate(ids if way == "add" else ()):
            of_sample = {key: values[number] for key, values in given.items() if key == "ignore"}
            pair = {"prediction": given["predictions"][number], "reference": given["references"][number]}
            metric.add(**pair, **of_sample, sample_id=name, no_target=more["no_target"][number])
        return metric.compute()

    assert add(["a", "b", "c"]) == alone
    with pytest.raises(ValueError, match="1 sample ids repeat, the first 'b'"):
        add(["a", "b", "b"])
