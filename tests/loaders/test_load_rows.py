"""Rows by name, for commands that take a data set as an argument."""

import json

import pytest
from datasets import Dataset, DatasetDict, IterableDataset, concatenate_datasets

from segcompass.loaders import LOADERS, load_obelics, load_rows, load_scenes, register_loader
from segcompass.loaders.image_text import image_text, load_image_text
from segcompass.loaders.rows import FEATURES, PHRASES, expressions
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


def test_a_saved_data_set_gives_the_split_that_is_asked_for_or_names_its_own(tmp_path):
    parts = {split: load_scenes(split, num_samples=2) for split in ("train", "val")}
    together, folder = concatenate_datasets([*parts.values()]), str(tmp_path / "one")
    together.save_to_disk(folder)
    for split, part in parts.items():
        assert load_rows(folder, split)["sample_id"][:] == part["sample_id"][:]
    with pytest.raises(ValueError, match="one are of split train, val, and 'test' was asked for; name theirs"):
        load_rows(folder, "test")
    together.remove_columns("split").save_to_disk(tmp_path / "plain")
    assert len(load_rows(str(tmp_path / "plain"), "test")) == 4, "nobody said of which"
    DatasetDict(parts).save_to_disk(tmp_path / "two")
    assert load_rows(str(tmp_path / "two"), "val")["sample_id"][:] == parts["val"]["sample_id"][:]
    with pytest.raises(ValueError, match="two holds the splits train, val; 'test' is none of them"):
        load_rows(str(tmp_path / "two"), "test")


def test_a_copy_of_a_data_set_on_the_hub_is_read_where_its_files_lie(tmp_path):
    with pytest.raises(ValueError, match="'me/mine' is not known; .* hf download me/mine --repo-type dataset .*/data"):
        load_rows("me/mine")
    (tmp_path / "data").mkdir()
    load_scenes("val", num_samples=2).to_parquet(tmp_path / "data" / "val-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="holds neither val.* Its parquet files lie in .*data: name that folder"):
        load_rows(str(tmp_path), "val")
    assert len(load_rows(str(tmp_path / "data"), "val")) == 2


def test_scenes_have_the_columns_of_all_rows_and_phrases():
    assert load_scenes("val", num_samples=1).features == {**FEATURES, **PHRASES}


def test_unknown_names_are_refused_with_those_that_exist(tmp_path):
    for name in ("nowhere", "nowhere.load", "no where.load"):
        with pytest.raises(
            ValueError, match=f"dataset '{name}' is not known; give one of .*reasonseg, refcoco, .*scenes"
        ):
            load_rows(name)
    with pytest.raises(ValueError, match="'reasonseg' needs its root"):
        load_rows("reasonseg", "val")
    with pytest.raises(ValueError, match=r"holds neither val-\*\.parquet nor a data set"):
        load_rows(str(tmp_path), "val")
    (tmp_path / "train-00000-of-00001.parquet").touch()
    (tmp_path / "testA-00000-of-00002.parquet").touch()
    with pytest.raises(ValueError, match=r"holds neither validation-\*\.parquet .* It has the splits testA, train\."):
        load_rows(str(tmp_path), "validation")


TOY = """
from datasets import Dataset

from segcompass.loaders.masks import encode_mask
from segcompass.loaders.rows import FEATURES

import numpy as np
from PIL import Image

def load(split="train"):
    mask = np.eye(4, dtype=bool)
    rows = [
        {
            "image": Image.new("RGB", (4, 4)), "image_id": f"{split}-{number}", "sample_id": f"{split}-{number}",
            "dataset": "toy", "split": split, "instruction": "the diagonal", "reasoning": None,
            "masks": [encode_mask(mask)], "ignore": None, "height": 4, "width": 4, "kind": "single",
        }
        for number in range(3)
    ]
    return Dataset.from_list(rows, features=FEATURES)

def needs(root, shards):
    pass

def nothing():
    return []
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "toy_data.py").write_text(TOY)
    (tmp_path / "toy_broken.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_data_set_of_ones_own_is_named_by_its_function(toy):
    rows = load_rows("toy_data.load", "val")
    assert isinstance(rows, Dataset) and rows.features == FEATURES
    assert list(rows["sample_id"]) == ["val-0", "val-1", "val-2"]
    assert (
        len(load_rows("toy_data.load", num_samples=2)) == 2 and len(load_rows("toy_data.load", num_samples=None)) == 3
    )
    streamed = load_rows("toy_data.load", streaming=True)
    assert isinstance(streamed, IterableDataset) and len(list(streamed)) == 3
    row = next(iter(load_image_text("toy_data.load")))
    assert image_text(row)["text"] == "the diagonal"


def test_mistakes_in_ones_own_loader_are_named(toy):
    for name, error, message in (
        ("toy_data.lod", ValueError, "the module toy_data has no function 'lod'"),
        ("toy_data.needs", ValueError, "'toy_data.needs' needs its root: the folder"),
        ("toy_data.nothing", TypeError, "its function returned a list; it must return a datasets.Dataset"),
        ("toy_broken.load", ModuleNotFoundError, "no_such_package"),
    ):
        with pytest.raises(error, match=message):
            load_rows(name)
    with pytest.raises(ValueError, match="needs its shards: give an option of that name, or its function a default"):
        load_rows("toy_data.needs", root="here")


def test_a_registered_data_set_has_a_name():
    @register_loader("toy")
    def load_toy(split="train", seed=0, num_samples=None):
        return load_scenes(split, seed, num_samples)

    try:
        assert load_rows("toy", "val", 3, 2)["sample_id"][:] == load_scenes("val", 3, 2)["sample_id"][:]
        with pytest.raises(ValueError, match="registered as 'toy' already"):
            register_loader("toy")
    finally:
        del LOADERS["toy"]


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
