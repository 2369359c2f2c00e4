"""Data of one's own in every form of a mask."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from segcompass.loaders import jsonl_checks, load_jsonl, load_rows
from segcompass.loaders.jsonl import jsonl_splits
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
    rows = load_jsonl(write(full, {"polygons": [], "image_id": 7}))
    assert rows.features == FEATURES
    first, second = rows
    assert (decoded([first["ignore"]])[0] == MASK).all() and first["masks"] == []
    assert [first[name] for name in ("sample_id", "image_id", "reasoning", "kind")] == ["mine", "7", "so", "odd"]
    assert [second[name] for name in ("sample_id", "dataset", "kind", "split")] == ["mine-2", "mine", "none", "train"]
    assert (second["height"], second["width"]) == (HEIGHT, WIDTH) and second["image"].size == (WIDTH, HEIGHT)
    path = write(full | {"split": "train"}, {"masks": [], "split": "val"})
    assert list(load_jsonl(path, split="val")["sample_id"]) == ["mine-2"] and jsonl_splits(path) == ["train", "val"]
    assert load_jsonl(write({"masks": [], "image": "./photo.png"}))["image_id"] == ["photo.png"]


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
        ({"masks": [], "instruction": ["it"]}, "'instruction' must be text; got a list"),
        ({"segmentation": [[1, 2, 9, 2, 9, 9]]}, "got None, in a line of image, instruction, segmentation"),
        ({"polygons": [1, 2, 9, 2, 9, 9]}, r"each entry is a number or a point: \[1, 2, 9\].*in brackets once more"),
        ({"polygons": [[1, 2], [9, 2], [9, 9]]}, "each entry is a number or a point"),
        ({"masks": [], "image": "https://example.com/a.png"}, "is an address, and lines name files; download it"),
        ({"mask": "https://example.com/a.png"}, "is an address"),
        ({"masks": [], "image": "photos\\a.png"}, "is missing; .*Folders are separated by /"),
        ({"masks": [], "image": "Photo.png"}, "Photo.png is missing; .* There is 'photo.png': rename one of the two"),
        ({"masks": [], "split": ["val"]}, "'split' must be text"),
    ],
)
def test_bad_lines_are_named(write, line, message):
    path = write({"masks": []}, line)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"mine\.jsonl, line 2: .*{message}"):
        load_jsonl(path)


def test_other_keys_are_left_alone(write):
    extra = {"height": HEIGHT, "width": WIDTH, "id": 3, "bbox": [1, 2, 3, 4], "source": "a", "caption": "b", "area": 1}
    extra |= {"role": "user", "rule": "a", "n_polygons": 2, "reasoning_en": "so", "instance": 3, "ignored": False}
    parts = [[rectangle(2, 2, 9, 9), rectangle(12, 12, 20, 20)]]
    thing = {"category": "mug", "polygons": rectangle(2, 2, 9, 9), "mask": None, "rle": ""}
    (row,) = load_jsonl(write({"polygons": parts, **extra, "instances": [thing]}))
    assert len(row["masks"]) == 1 and len(row["instances"]) == 1


def test_a_crowd_that_is_said_in_another_way_is_not_taken_for_one_thing(write):
    thing = {"category": "pens", "polygons": rectangle(2, 2, 9, 9)}
    for said, message in (
        ({"crowd": 1}, "instance 1: 'crowd' is 1; write 'crowd': true or false"),
        ({"iscrowd": 1}, "instance 1: 'iscrowd' is 1; write 'crowd': true or false"),
    ):
        with pytest.raises(ValueError, match=message):
            load_jsonl(write({"masks": [], "instances": [{**thing, **said}]}))
    for said, crowd in (({"iscrowd": 0}, False), ({"crowd": True, "iscrowd": 1}, True), ({}, False)):
        (row,) = load_jsonl(write({"masks": [], "instances": [{**thing, **said}]}))
        assert row["instances"][0]["crowd"] is crowd


@pytest.mark.parametrize("inside", [1, 2, 3])
def test_a_part_inside_the_union_of_the_others_is_found_wherever_it_stands(write, inside):
    parts = [rectangle(2, 2, 10, 20), rectangle(10, 2, 20, 20)]
    parts.insert(inside - 1, rectangle(8, 8, 12, 12))  # half in the one, half in the other
    with pytest.raises(ValueError, match=f"has 3 parts, which are united, and part {inside} lies inside the others"):
        load_jsonl(write({"polygons": [parts]}))


def test_an_instance_of_many_parts_takes_time_by_their_number_and_not_its_square(monkeypatch):
    parts = [encode_mask(np.eye(300, dtype=bool) & (np.arange(300) == number)) for number in range(300)]
    merged = []

    def merge(rles, intersect=False):
        merged.append(len(rles))
        return coco_mask.merge(rles, intersect)

    monkeypatch.setattr(jsonl_checks, "coco_mask", SimpleNamespace(merge=merge, area=coco_mask.area))
    jsonl_checks.check_holes("polygon 1", parts)
    assert sum(merged) < 10 * len(parts)


def test_a_name_whose_accents_are_written_otherwise_is_hinted_at(write, tmp_path):
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "Ka\u0308the.png")  # as macOS writes it
    with pytest.raises(FileNotFoundError, match=r"There is 'Ka\\u0308the.png', whose accents are .*rename one"):
        load_jsonl(write({"masks": [], "image": "K\u00e4the.png"}))


def test_bad_files_are_named(write, tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jsonl is missing"):
        load_jsonl(tmp_path / "none.jsonl")
    path = write({"masks": []})
    path.write_text(path.read_text() + '{"image": ')
    with pytest.raises(ValueError, match="line 2: Expecting value"):
        load_jsonl(path)
    path.write_text("")
    with pytest.raises(ValueError, match="no usable rows of split 'train': it is empty"):
        load_jsonl(path)
    with pytest.raises(ValueError, match="no usable rows of split 'train': its lines have split validation; name one"):
        load_jsonl(write({"masks": [], "split": "validation"}))
    path.write_text(json.dumps({"image": "photo.png", "instruction": "it", "masks": []}, indent=1))
    with pytest.raises(ValueError, match="line 1: Expecting property name.* character 3; each line is one whole JSON"):
        load_jsonl(path)
    for name, text in (("mine.json", "[]"), ("mine.csv", "image,instruction")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name}' is a file, but no \.jsonl: write .* dataset 'coco'"):
            load_rows(str(tmp_path / name))
    with pytest.raises(ValueError, match=r"holds neither train-\*\.parquet nor .* may be in .*mine\.jsonl: name that"):
        load_rows(str(tmp_path))
    with pytest.raises(ValueError, match="the sample id 'a' repeats"):
        load_jsonl(write({"masks": [], "sample_id": "a"}, {"masks": [], "sample_id": "a"}))


@pytest.fixture
def phone(tmp_path):
    """Lines about a portrait photograph that a phone stored lying down: 40 x 60 pixels as it is shown."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "IMG_1.jpg", exif=exif)
    Image.fromarray(box(1, 1, 20, 20)).resize((60, 40)).save(tmp_path / "stored.png")

    def lines(**line):
        (tmp_path / "mine.jsonl").write_text(json.dumps({"image": "IMG_1.jpg", "instruction": "it", **line}))
        return tmp_path / "mine.jsonl"

    return lines


@pytest.mark.parametrize(
    "line",
    [
        {"mask": "stored.png"},
        {"rle": run_lengths(np.ones((40, 60), dtype=bool))},
        {"polygons": [[45, 5, 55, 5, 55, 20]]},  # right of the photograph as it is shown
        {"polygons": [[[20, 5, 30, 5, 30, 20], [30, 5, 55, 5, 55, 20]]]},  # half of it
        {"polygons": [], "instances": [{"category": "mug", "polygons": [20, 5, 55, 5, 55, 20]}]},
    ],
    ids=["file", "RLE", "polygon", "half a polygon", "instance"],
)
def test_masks_of_the_stored_pixels_are_refused_where_the_photograph_is_turned(phone, line):
    with pytest.raises(ValueError, match=r"stored as 40 x 60 and shown as 60 x 40 .*EXIF orientation"):
        load_jsonl(phone(**line))


def test_masks_of_a_turned_photograph_belong_to_it_as_it_is_shown(phone):
    polygons = [rectangle(4, 50, 30, 58), rectangle(20, 2, 40.5, 20)]  # the second leaves the image by half a pixel
    (row,) = load_jsonl(phone(polygons=polygons))
    assert (row["height"], row["width"]) == (60, 40) and len(row["masks"]) == 2
    assert decoded(row["masks"])[0].sum() == 26 * 8
