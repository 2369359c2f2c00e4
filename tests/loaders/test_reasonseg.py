"""ReasonSeg in its released format: labelled shapes beside images."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from segcompass.loaders import load_reasonseg
from segcompass.loaders.rows import FEATURES
from tests.support.refer import box

HEIGHT, WIDTH = 20, 30


def square(left, top, right, bottom):
    """Corner points; painted with their outline, so columns left..right of rows top..bottom."""
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def filled(left, top, right, bottom):
    return box(left, top, right + 1, bottom + 1, HEIGHT, WIDTH)


def shape(label, points):
    return {"label": label, "points": points, "shape_type": "polygon", "image_name": "a.jpg", "group_id": None}


def write(folder, name, shapes, text=("the thing",), is_sentence=True, orientation=None, encoding="utf-8"):
    folder.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    exif = Image.Exif()
    if orientation:
        image = image.transpose(Image.Transpose.ROTATE_90)  # stored lying, to be turned when it is shown
        exif[0x0112] = orientation
    image.save(folder / f"{name}.jpg", exif=exif)
    content = {"text": text, "is_sentence": is_sentence, "shapes": shapes}
    (folder / f"{name}.json").write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))


def union(rles):
    return np.any([coco_mask.decode(rle).astype(bool) for rle in rles], axis=0)


def test_shapes_are_painted_largest_first_and_ignore_is_kept_apart(tmp_path):
    shapes = [
        shape("target", square(12, 8, 14, 10)),  # small, on the ignored one
        shape("Ignore", square(10, 5, 20, 15)),
        shape("target", square(2, 2, 18, 12)),  # the largest: partly under the ignored one
        shape("flag", square(0, 0, 29, 19)),
    ]
    write(tmp_path / "val", "a", shapes)
    (row,) = load_reasonseg(tmp_path, "val")
    ignore = filled(10, 5, 20, 15) & ~filled(12, 8, 14, 10)
    wanted = (filled(2, 2, 18, 12) & ~filled(10, 5, 20, 15)) | filled(12, 8, 14, 10)
    assert (union([row["ignore"]]) == ignore).all()
    assert (union(row["masks"]) == wanted).all()
    assert len(row["masks"]) == 2 and (union(row["masks"][:1]) == filled(12, 8, 14, 10)).all()
    assert not (wanted & ignore).any()


def test_of_shapes_of_one_area_the_first_in_the_file_stays_on_top(tmp_path):
    for first, second in (("target", "ignore"), ("ignore", "target")):
        write(tmp_path / first, "a", [shape(first, square(2, 2, 9, 9)), shape(second, square(5, 5, 12, 12))])
        (row,) = load_reasonseg(tmp_path, first)
        on_top = union(row["masks"]) if first == "target" else union([row["ignore"]])
        assert (on_top == filled(2, 2, 9, 9)).all()


def test_rows_have_the_one_schema(tmp_path):
    write(tmp_path / "train", "b", [shape("target", square(1, 1, 5, 5))], ["who?", "which one?"], True)
    write(tmp_path / "train", "a", [shape("target", square(1, 1, 5, 5))], ["a phrase"], False)
    rows = load_reasonseg(tmp_path, "train")
    assert rows.features == FEATURES
    assert list(rows["sample_id"]) == ["reasonseg-train-a-0", "reasonseg-train-b-0", "reasonseg-train-b-1"]
    assert list(rows["instruction"]) == ["a phrase", "who?", "which one?"]
    assert list(rows["kind"]) == ["short", "long", "long"]
    assert rows["ignore"][0] is None
    assert list(load_reasonseg(tmp_path, "train", unit="ref")["instruction"]) == ["a phrase", "who?"]
    merged = load_reasonseg(tmp_path, "train", unit="merged")
    assert merged[1]["instruction"] == "Meet all the descriptions: 1. who?. 2. which one?."
    assert len(load_reasonseg(tmp_path, "train", num_samples=1)) == 1


def test_cp1252_text(tmp_path):
    write(tmp_path / "val", "a", [shape("target", square(1, 1, 5, 5))], ["the man’s café"], encoding="cp1252")
    assert load_reasonseg(tmp_path, "val")["instruction"][0] == "the man’s café"


def test_image_that_lies_is_turned_and_so_are_its_masks(tmp_path):
    target = square(20, 2, 28, 6)  # beyond the width of the image as it is stored
    write(tmp_path / "val", "a", [shape("target", target)], orientation=6)
    write(tmp_path / "val", "b", [shape("target", target)])
    turned, plain = load_reasonseg(tmp_path, "val")
    assert Image.open(tmp_path / "val" / "a.jpg").size == (HEIGHT, WIDTH), "stored lying"
    assert (turned["height"], turned["width"]) == (HEIGHT, WIDTH)
    assert turned["image"].size == (WIDTH, HEIGHT)
    assert turned["masks"] == plain["masks"] and (union(turned["masks"]) == filled(20, 2, 28, 6)).all()


def test_image_without_a_visible_target_is_counted(tmp_path):
    write(tmp_path / "val", "a", [shape("target", square(1, 1, 5, 5))])
    write(tmp_path / "val", "b", [shape("ignore", square(1, 1, 5, 5))])
    write(tmp_path / "val", "c", [shape("target", square(50, 50, 60, 60))])
    with pytest.warns(UserWarning, match="2 left out, images without a visible target: b.jpg, c.jpg"):
        assert len(load_reasonseg(tmp_path, "val")) == 1


def test_bad_input_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="`root` is the folder they are in"):
        load_reasonseg(tmp_path, "val")
    (tmp_path / "val").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no .jpg files"):
        load_reasonseg(tmp_path, "val")
    write(tmp_path / "val", "a", [shape("target", square(1, 1, 5, 5))])
    (tmp_path / "val" / "a.json").rename(tmp_path / "val" / "b.json")
    with pytest.raises(FileNotFoundError, match=r"1 images in .* have no \.json beside them; add a\.json"):
        load_reasonseg(tmp_path, "val")
    for content, message in (
        ("{", r"a\.json is truncated"),
        ("[]", r"a\.json needs the keys shapes, text"),
        ('{"text": ["x"], "is_sentence": true, "shapes": [{"label": "target", "points": []}]}', r"a\.json: a polygon"),
        ('{"text": ["x"], "is_sentence": true, "shapes": [{"points": []}]}', r"a\.json: 'label'"),
    ):
        (tmp_path / "val" / "a.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_reasonseg(tmp_path, "val")
    write(tmp_path / "val", "a", [shape("target", square(1, 1, 5, 5))])
    (tmp_path / "val" / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.jpg'\) cannot be read"):
        load_reasonseg(tmp_path, "val")
