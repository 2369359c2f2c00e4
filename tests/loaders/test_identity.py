"""Rows are known by their content; what they were made from is part of a cache's key; empty fields mean one thing."""

import json
import os

import numpy as np
import pytest
from datasets import Dataset, Image, concatenate_datasets
from PIL import Image as PILImage

from segcompass.loaders import load_folder, load_jsonl, load_parquet, load_rows
from segcompass.loaders.identity import check_sample_ids, encoded_key, images_digest, rows_digest
from segcompass.loaders.image_text import load_image_text
from segcompass.loaders.masks import decode_mask, encode_mask
from segcompass.loaders.rows import FEATURES, row_image, to_dataset


@pytest.fixture
def write(tmp_path):
    PILImage.new("RGB", (30, 20)).save(tmp_path / "a.png")
    PILImage.new("L", (30, 20), 255).save(tmp_path / "m.png")

    def write(*lines, name="mine.jsonl", encoding="utf-8"):
        path = tmp_path / name
        lines = [{"image": "a.png", "instruction": "it", **line} for line in lines]
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding=encoding)
        return path

    return write


def areas(path):
    return [int(decode_mask(row["masks"], row["height"], row["width"]).sum()) for row in load_jsonl(path)]


def test_changed_mask_files_and_images_are_read_again(write, tmp_path):
    path = write({"mask": "m.png"}, {"masks": ["m.png"], "ignore": "m.png"})
    assert areas(path) == [600, 600]
    PILImage.fromarray(np.eye(20, 30, dtype=bool)).save(tmp_path / "m.png")
    assert areas(path) == [20, 20]
    before, stat = load_jsonl(path)[0]["masks"], (tmp_path / "m.png").stat()
    PILImage.fromarray(np.eye(20, 30, 3, dtype=bool)).save(tmp_path / "m.png")
    (tmp_path / "m.png").write_bytes((tmp_path / "m.png").read_bytes().ljust(stat.st_size, b"\0"))
    os.utime(tmp_path / "m.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (tmp_path / "m.png").stat().st_size == stat.st_size, "replaced, with its time and size"
    assert areas(path) == [20, 20] and load_jsonl(path)[0]["masks"] != before
    path = write({"masks": []})
    assert load_jsonl(path)[0]["width"] == 30
    PILImage.new("RGB", (7, 5)).save(tmp_path / "a.png")
    assert load_jsonl(path)[0]["width"] == 7


def test_a_key_that_repeats_is_named_with_its_line(write):
    path = write({"masks": []})
    line = '{"image": "a.png", "instruction": "it", "polygons": [[1, 1, 9, 1, 9, 9]], "polygons": [[2, 2, 8, 2, 8, 8]]}'
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 2: the key 'polygons' repeats"):
        load_jsonl(path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_encodings_are_read_or_named(write, encoding):
    path = write({"instruction": "the café", "masks": []}, encoding=encoding)
    if encoding == "utf-8-sig":
        assert load_jsonl(path)[0]["instruction"] == "the café"
        assert next(iter(load_image_text(str(path), streaming=False)))["instruction"] == "the café"
    else:
        with pytest.raises(ValueError, match=r"mine\.jsonl, line 1: .*(UTF-16|not UTF-8).*save .* as UTF-8"):
            load_jsonl(path)


def test_absent_null_and_empty_fields_mean_the_same(write):
    names = ("sample_id", "image_id", "dataset", "split", "reasoning", "kind", "ignore", "rle", "mask", "polygons")
    absent = load_jsonl(write({"masks": []}))[0]
    for empty in (None, "", float("nan")):
        assert load_jsonl(write({"masks": [], **dict.fromkeys(names, empty)}))[0] == absent
    assert absent["sample_id"] == "mine-1" and absent["kind"] == "none" and absent["reasoning"] is None
    assert load_jsonl(write({"masks": [], "reasoning": " \n"}))[0]["reasoning"] is None
    nothing = {"size": [20, 30], "counts": [600]}
    assert load_jsonl(write({"masks": [], "ignore": nothing}))[0]["ignore"] is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"mask": "black.png"}, "mask 1 has no pixel .*a mask without a pixel is no instance"),
        ({"rle": {"size": [20, 30], "counts": [600]}}, "mask 1 has no pixel"),
        ({"masks": [[[1] * 30] * 20, [[0] * 30] * 20]}, "mask 2 has no pixel"),
        ({"masks": [], "reasoning": "so </think>"}, "the reasoning holds '</think>'"),
        ({"masks": [], "reasoning": "<think>so"}, "the reasoning holds '<think>'"),
        ({"masks": [], "reasoning": "so<REF_POS>"}, "the reasoning holds '<REF_POS>'"),
        ({"masks": [], "reasoning": ["so"]}, "'reasoning' must be text; got a list"),
        ({"masks": [], "sample_id": [1]}, "'sample_id' must be text or a whole number"),
        ({"masks": [], "image": "../a.png"}, r"'\.\./a\.png' lies outside .*--image-dir"),
        ({"masks": [], "image": "/etc/hostname"}, "'/etc/hostname' lies outside"),
        ({"mask": "../m.png"}, "lies outside"),
        ({"masks": [], "image": "cut.png"}, r"cut\.png.*cannot be read as an image"),
        ({"masks": [], "image": "exif.png"}, r"exif\.png.*broken EXIF"),
        ({"masks": [], "image": "big.png"}, r"big\.png.*too many pixels"),
        ({"rle": {"size": [20, 30], "counts": "1 2 3"}}, "damaged or no compressed run lengths"),
    ],
)
def test_what_cannot_be_is_named_with_its_line(write, tmp_path, line, message):
    PILImage.new("L", (30, 20)).save(tmp_path / "black.png")
    PILImage.new("RGB", (30, 20)).save(tmp_path / "exif.png", exif=b"junkjunk")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n")
    if line.get("image") == "big.png":
        PILImage.new("1", (20_000, 10_000)).save(tmp_path / "big.png")
    with pytest.raises(ValueError, match=rf"mine\.jsonl, line 2: .*{message}"):
        load_jsonl(write({"masks": []}, line))


def test_files_may_lie_in_a_folder_that_is_named(write, tmp_path):
    path = write({"image": "../a.png", "mask": str(tmp_path / "m.png")}, name="deeper.jsonl")
    (tmp_path / "deep").mkdir()
    path = path.rename(tmp_path / "deep" / "deeper.jsonl")
    with pytest.raises(ValueError, match="lies outside"):
        load_jsonl(path)
    lines = path.read_text().replace("../", "")
    path.write_text(lines)
    assert len(load_rows(str(path), image_dir=tmp_path)) == 1
    os.symlink(tmp_path, tmp_path / "deep" / "linked")
    path.write_text(lines.replace('"a.png"', '"linked/a.png"').replace(str(tmp_path / "m.png"), "linked/m.png"))
    assert len(load_jsonl(path)) == 1, "the owner of the folder made the link"


def test_damaged_images_are_named_by_their_sample(write, tmp_path):
    row = {**load_jsonl(write({"masks": []}))[0], "image": {"bytes": b"\x89PNG\r\n", "path": None}}
    with pytest.raises(OSError, match="the image of sample 'mine-1' .6 bytes. cannot be read"):
        row_image(row)
    with pytest.raises(ValueError, match=r"the image of sample 'mine-1' has \(width, height\) \(9, 9\).*\(30, 20\)"):
        row_image({**row, "image": PILImage.new("RGB", (9, 9))})
    with pytest.raises(ValueError, match="sample 'mine-1' has no image"):
        row_image({**row, "image": None})


def test_digests_follow_content_and_not_names(write, tmp_path):
    rows = load_jsonl(write({"mask": "m.png"}))
    digest, images = rows_digest(rows), images_digest(rows)
    os.utime(tmp_path / "a.png", (1, 1))
    assert rows_digest(rows) == digest, "the content is the same"
    in_bytes = [{**rows[0], "image": {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}}]
    assert images_digest(Dataset.from_list(in_bytes).cast_column("image", Image())) == images
    PILImage.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    assert rows_digest(rows) != digest and rows_digest(rows, images=False) == rows_digest(rows, images=False)
    assert rows_digest(load_jsonl(write({"mask": "m.png", "instruction": "other"})), images=False) != digest
    assert encoded_key(in_bytes[0]["image"]) == encoded_key({**in_bytes[0]["image"], "path": "renamed.png"})
    assert encoded_key(rows[0]["image"]) is None


def test_ids_that_repeat_over_data_sets_are_refused(write):
    rows, others = load_jsonl(write({"masks": []})), load_jsonl(write({"masks": [], "instruction": "that"}))
    check_sample_ids(concatenate_datasets([rows, rows]), "train_dataset")
    with pytest.raises(ValueError, match="train_dataset has the sample id 'mine-1' twice, in rows 0 and 1, which"):
        check_sample_ids(concatenate_datasets([rows, others]), "train_dataset")


def test_traces_with_markers_are_refused_by_every_loader(tmp_path):
    def rows():
        common = {name: None for name in FEATURES}
        yield {**common, "sample_id": "s", "masks": [], "reasoning": "a </think> b"}

    with pytest.raises(ValueError, match="sample 's': the reasoning holds '</think>'"):
        to_dataset(rows, {}, [], "train", None)


def test_some_of_twelve_files_are_no_data_set(write, tmp_path):
    rows = load_jsonl(write({"masks": []}, {"masks": []}))
    for number in range(2):
        rows.select([number]).to_parquet(tmp_path / f"train-{number:05}-of-00003.parquet")
    for load in (lambda: load_folder(tmp_path), lambda: load_parquet(tmp_path, "train")):
        with pytest.raises(
            ValueError, match=r"2 of the 3 files train-\*-of-00003.* Add train-00002-of-00003.parquet, or"
        ):
            load()
    rows.select([0]).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="from divisions into 1 and 3: two conversions"):
        load_folder(tmp_path)
    for number in range(2):
        (tmp_path / f"train-{number:05}-of-00003.parquet").unlink()
    assert len(load_folder(tmp_path)) == 1


def test_decoding_checks_first():
    good = encode_mask(np.eye(20, 30, dtype=bool))
    for damaged in ({**good, "counts": good["counts"][:-2]}, {**good, "size": [30, 20]}):
        with pytest.raises(ValueError, match="an RLE has"):
            decode_mask([damaged, good], 20, 30)
