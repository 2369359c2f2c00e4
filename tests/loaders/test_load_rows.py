"""Rows by name, for scripts that take a data set as an argument."""

import json

import pytest

from segcompass.loaders import load_obelics, load_rows, load_scenes
from segcompass.loaders.rows import FEATURES, expressions
from tests.support.refer import ref, write_images, write_instances


def test_names_lead_to_their_loaders(tmp_path):
    write_images(tmp_path / "train2014")
    write_instances(tmp_path / "grefcoco")
    (tmp_path / "grefcoco" / "grefs(unc).json").write_text(json.dumps([ref(1, [10], ["a", "b"], image_id=1)]))
    given = {"root": tmp_path, "image_dir": tmp_path / "train2014"}
    rows = load_rows("grefcoco", "val", **given)
    assert list(rows["instruction"]) == ["a", "b"] and rows.features == FEATURES
    assert len(load_rows("grefcoco", "val", unit="ref", **given)) == 1
    streamed = list(load_rows("grefcoco", "val", streaming=True, **given))
    assert [row["instruction"] for row in streamed] == ["a", "b"] and streamed[0]["image"].size == (32, 24)

    rows.save_to_disk(tmp_path / "saved")
    assert load_rows(str(tmp_path / "saved"), "val", num_samples=1)["instruction"] == ["a"]
    line = {"image": "train2014/COCO_train2014_000000000000.jpg", "instruction": "it", "masks": []}
    (tmp_path / "mine.jsonl").write_text(json.dumps(line))
    assert load_rows(str(tmp_path / "mine.jsonl"), "train")["instruction"] == ["it"]


def test_every_loader_has_the_columns_of_the_scenes():
    assert load_scenes("val", num_samples=1).features == FEATURES


def test_unknown_names_are_told(tmp_path):
    with pytest.raises(ValueError, match="dataset 'nowhere' is neither 'scenes', one of refcoco, "):
        load_rows("nowhere")
    with pytest.raises(ValueError, match="'reasonseg' needs its root"):
        load_rows("reasonseg", "val")
    with pytest.raises(ValueError, match=r"holds neither val-\*\.parquet nor a data set"):
        load_rows(str(tmp_path), "val")


def test_bad_obelics_input_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no \.parquet files; OBELICS comes as data/train"):
        load_obelics(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere is missing; .*--download"):
        load_obelics(tmp_path, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="max_characters=0"):
        load_obelics(tmp_path, max_characters=0)


def test_expressions():
    sentences = [("1", " a "), ("2", "  "), ("3", "b")]
    assert expressions(sentences, "sentence") == [("1", "a"), ("3", "b")]
    assert expressions(sentences, "ref") == [("ref", "a")]
    assert expressions(sentences, "merged") == [("merged", "Meet all the descriptions: 1. a. 2. b.")]
    assert expressions([("1", "")], "ref") == []
