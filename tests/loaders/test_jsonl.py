"""Data of one's own in every form of a mask."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from segcompass.loaders import load_jsonl
from segcompass.loaders.masks import encode_mask
from segcompass.loaders.rows import FEATURES
from tests.support.refer import HEIGHT, WIDTH, box, rectangle, run_lengths

MASK, OTHER = box(2, 3, 10, 9), box(20, 1, 30, 22)


@pytest.fixture
def write(tmp_path):
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    Image.fromarray(MASK.astype(np.uint8) * 255).save(tmp_path / "mask.png")
    Image.fromarray(np.stack([MASK * 0, OTHER * 200, MASK * 0], axis=2).astype(np.uint8)).save(tmp_path / "green.png")

    def write(*lines):
        path = tmp_path / "mine.jsonl"
        lines = [{"image": "photo.png", "instruction": "it", **line} for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return write


def decoded(rles):
    return [coco_mask.decode(rle).astype(bool) for rle in rles]


@pytest.mark.parametrize(
    "given",
    [
        {"masks": [encode_mask(MASK), run_lengths(OTHER)]},
        {"masks": [MASK.astype(int).tolist(), OTHER.tolist()]},
        {"masks": ["mask.png", "green.png"]},
        {"mask": ["mask.png", "green.png"]},
        {"rle": [run_lengths(MASK), encode_mask(OTHER)]},
        {"polygons": [rectangle(2, 3, 10, 9), [rectangle(20, 1, 25, 22), rectangle(24, 1, 30, 22)]]},
    ],
    ids=["RLE", "rows", "files", "mask files", "rle", "polygons"],
)
def test_every_form_of_masks(write, given):
    (row,) = load_jsonl(write(given))
    assert [mask.tolist() for mask in decoded(row["masks"])] == [MASK.tolist(), OTHER.tolist()]
    assert row["kind"] == "multi"


def test_one_mask_needs_no_list(write):
    for given in ({"mask": "mask.png"}, {"rle": run_lengths(MASK)}):
        (row,) = load_jsonl(write(given))
        assert (decoded(row["masks"])[0] == MASK).all() and len(row["masks"]) == 1


def test_rows_have_the_one_schema(write):
    full = {"masks": [], "ignore": "mask.png", "sample_id": "mine", "image_id": 7, "reasoning": "so", "kind": "odd"}
    rows = load_jsonl(write(full, {"polygons": []}, {"masks": [], "split": "val"}))
    assert rows.features == FEATURES
    first, second = rows
    assert (decoded([first["ignore"]])[0] == MASK).all() and first["masks"] == []
    assert [first[name] for name in ("sample_id", "image_id", "reasoning", "kind")] == ["mine", "7", "so", "odd"]
    assert [second[name] for name in ("sample_id", "dataset", "kind", "split")] == ["mine-2", "mine", "none", "train"]
    assert (second["height"], second["width"]) == (HEIGHT, WIDTH) and second["image"].size == (WIDTH, HEIGHT)
    assert list(load_jsonl(write(full, {"masks": [], "split": "val"}), split="val")["sample_id"]) == ["mine", "mine-2"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({}, "exactly one of masks, polygons, rle, mask"),
        ({"masks": [], "rle": []}, "got masks, rle"),
        ({"masks": [], "instruction": " "}, "'instruction' is missing or blank"),
        ({"masks": [], "image": None}, "'image' is missing or blank"),
        ({"polygons": [[1, 2, 3, 4]]}, "at least three points"),
        ({"polygons": [rectangle(50, 50, 60, 60)]}, "polygon 1 has no pixel inside the image"),
        ({"rle": {"size": [2, 2], "counts": [4]}}, r"size \[2, 2\], its image \[24, 32\]"),
        ({"masks": [[[0, 1], [1, 0]]]}, r"size \(2, 2\), its image \(24, 32\)"),
        ({"masks": [(MASK * 0.7).tolist()]}, "must be rows of 0 and 1; got values of float64"),
        ({"masks": [np.full((24, 32), float("nan")).tolist()]}, "must be rows of 0 and 1"),
        ({"mask": "photo.jsonl"}, "photo.jsonl is missing"),
        ({"masks": [], "image": "gone.png"}, "gone.png is missing"),
        ({"mask": "mine.jsonl"}, "mine.jsonl cannot be read"),
        ({"masks": {"a": 1}}, "'masks' must be a list"),
    ],
)
def test_bad_lines_are_named(write, line, message):
    path = write({"masks": []}, line)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"mine\.jsonl, line 2: .*{message}"):
        load_jsonl(path)


def test_bad_files_are_named(write, tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jsonl is missing"):
        load_jsonl(tmp_path / "none.jsonl")
    path = write({"masks": []})
    path.write_text(path.read_text() + '{"image": ')
    with pytest.raises(ValueError, match="line 2: Expecting value"):
        load_jsonl(path)
    path.write_text("")
    with pytest.raises(ValueError, match="no usable rows"):
        load_jsonl(path)
    with pytest.raises(ValueError, match="the sample id 'a' repeats"):
        load_jsonl(write({"masks": [], "sample_id": "a"}, {"masks": [], "sample_id": "a"}))
