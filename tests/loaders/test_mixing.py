"""Mixtures of data sets: how many rows of each, in which order, and none on an image that another set holds out."""

import json
import pickle
from collections import Counter

import pytest
from datasets import Dataset, IterableDataset, load_from_disk

from segcompass.loaders import load_rows, load_scenes
from segcompass.loaders.mixing import HELD_OUT, Part, mix_rows, read_parts, report
from segcompass.loaders.rows import FEATURES, leave_images_encoded
from segcompass.preparation import Conversion, prepare_data
from tests.support.refer import ref, write_images, write_instances

IMAGES = 9


def annotations():
    return {10 + n: ([[2, 3, 10, 3, 10, 9, 2, 9]], 0, None) for n in range(3 * IMAGES)}


@pytest.fixture
def world(tmp_path):
    """Nine images; RefCOCO trains on 0 to 5 and holds out 6 to 8, RefCOCOg trains on 3 to 8 and holds out 0 to 2."""
    write_images(tmp_path / "train2014", IMAGES)
    splits = {
        "refcoco": ("refs(unc).p", ["train"] * 6 + ["val", "testA", "testB"]),
        "refcocog": ("refs(umd).p", ["val", "val", "test"] + ["train"] * 6),
        "grefcoco": ("grefs(unc).json", ["train"] * 9),
    }
    for name, (file, splits_of) in splits.items():
        write_instances(tmp_path / name, annotations(), IMAGES)
        content = json.loads((tmp_path / name / "instances.json").read_text())
        for number, annotation in enumerate(content["annotations"]):
            annotation["image_id"] = number % IMAGES
        (tmp_path / name / "instances.json").write_text(json.dumps(content))
        refs = [ref(n, 10 + n, ["a", "b"], splits_of[n], image_id=n) for n in range(IMAGES)]
        if name == "grefcoco":
            refs = [{**each, "ann_id": [each["ann_id"]]} for each in refs]
            (tmp_path / name / file).write_text(json.dumps(refs))
        else:
            (tmp_path / name / file).write_bytes(pickle.dumps(refs))
    return tmp_path


def part(world, name, **fields):
    return {"dataset": name, "root": str(world), "image_dir": str(world / "train2014"), **fields}


def images_by_set(rows):
    found = {}
    for name, image in zip(rows["dataset"], rows["image_id"], strict=True):
        found.setdefault(name, set()).add(int(image) if image.isdigit() else image)
    return found


def test_no_set_trains_on_an_image_that_another_holds_out(world):
    mixture = mix_rows([part(world, name) for name in ("refcoco", "refcocog", "grefcoco")])
    assert images_by_set(mixture.rows) == {"refcoco": {3, 4, 5}, "refcocog": {3, 4, 5}, "grefcoco": {3, 4, 5}}
    assert [(line["removed"], line["removed images"], line["taken"]) for line in mixture.table] == [
        (6, 3, 6),
        (6, 3, 6),
        (12, 6, 6),
    ]
    assert report(mixture.table)[2] == (
        "grefcoco train: 6 of 18 rows on 9 images; 12 rows on 6 held-out images are removed"
    )
    alone = mix_rows([part(world, "refcoco")])
    assert images_by_set(alone.rows) == {"refcoco": {0, 1, 2, 3, 4, 5}}
    avoided = mix_rows([part(world, "refcoco"), part(world, "refcocog", num_samples=0)])
    assert images_by_set(avoided.rows) == {"refcoco": {3, 4, 5}}


def test_rows_that_are_evaluated_on_are_not_trained_on(world):
    held_out = load_rows("grefcoco", "train", num_samples=4, root=world, image_dir=world / "train2014")
    assert set(held_out["image_id"]) == {"0", "1"}
    (world / "own.jsonl").write_text(
        "\n".join(
            json.dumps({"image": f"train2014/COCO_train2014_{n:012}.jpg", "instruction": "it", "masks": []})
            for n in range(4)
        )
    )
    mixture = mix_rows([part(world, "refcoco"), str(world / "own.jsonl")], held_out=held_out)
    assert images_by_set(mixture.rows)["refcoco"] == {2, 3, 4, 5}
    assert images_by_set(mixture.rows)["own"] == {f"train2014/COCO_train2014_{n:012}.jpg" for n in (2, 3)}


def test_a_prepared_folder_remembers_what_its_other_splits_hold(world, tmp_path):
    for name in ("refcoco", "refcocog"):
        prepare_data(Conversion(name, tmp_path / "data" / name, ["train"], str(world), world / "train2014"))
    folders = [str(tmp_path / "data" / name) for name in ("refcoco", "refcocog")]
    mixture = mix_rows(folders)
    assert images_by_set(mixture.rows) == {"refcoco": {3, 4, 5}, "refcocog": {3, 4, 5}}
    for name in (HELD_OUT, "manifest.json"):  # as of an earlier version, which wrote neither
        (tmp_path / "data" / "refcocog" / name).unlink()
    with pytest.raises(ValueError, match=r"refcocog' holds rows of refcocog, but no held_out.json .*convert it again"):
        mix_rows(folders)
    assert len(mix_rows(folders[1]).rows) == 12


def test_sizes_and_weights(world):
    names = ("refcoco", "grefcoco")

    def taken(num_samples, *fields):
        parts = [part(world, name, **more) for name, more in zip(names, fields, strict=True)]
        mixture = mix_rows(parts, num_samples=num_samples)
        counts = Counter(mixture.rows["dataset"])
        assert [line["taken"] for line in mixture.table] == [counts[name] for name in names]
        return [counts[name] for name in names], mixture

    assert taken(None, {}, {})[0] == [12, 12]  # gRefCOCO loses the images that RefCOCO holds out
    assert taken(8, {}, {})[0] == [4, 4]
    assert taken(9, {"weight": 2}, {"weight": 1})[0] == [6, 3]
    assert taken(10, {"num_samples": 3}, {})[0] == [3, 7]
    counts, mixture = taken(36, {"weight": 2}, {})
    assert counts == [24, 12] and mixture.table[0]["passes"] == 2.0
    assert set(Counter(mixture.rows["sample_id"]).values()) == {1, 2}
    for fields, num_samples, message in (
        (({"num_samples": 13}, {}), None, "'refcoco' has 12 rows to train on, but num_samples=13"),
        (({"weight": 1}, {}), None, "has weights, but num_samples says not how many"),
        (({"num_samples": 9}, {"num_samples": 2}), 10, "add up to 11, more than num_samples=10"),
        (({"num_samples": 0}, {"num_samples": 0}), None, "no row is left to train on"),
        (({"num_samples": 1, "weight": 1}, {}), None, "has both num_samples and weight"),
        (({"weight": -1}, {}), None, "weight=-1 in the mixture; give a number of at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            taken(num_samples, *fields)


def test_rows_are_drawn_and_shuffled_by_the_seed_and_are_not_the_first(world):
    def ids(seed, num_samples=None):
        return list(mix_rows([part(world, "grefcoco")], seed=seed, num_samples=num_samples).rows["sample_id"])

    everything = list(load_rows("grefcoco", "train", num_samples=None, root=world)["sample_id"])
    assert ids(0) == ids(0) != ids(1) and sorted(ids(0)) == sorted(everything) and ids(0) != everything
    drawn = [ids(seed, 6) for seed in range(4)]
    assert all(len(set(each)) == 6 for each in drawn) and len({frozenset(each) for each in drawn}) > 1
    assert all(set(each) != set(everything[:6]) for each in drawn)


def test_images_are_named_and_not_copied(world):
    mixture = mix_rows([part(world, "refcoco"), part(world, "refcocog")])
    images = sorted((world / "train2014").iterdir())[3:6]
    rows = leave_images_encoded(mixture.rows)
    assert {row["image"]["bytes"] for row in rows} == {None}
    assert {row["image"]["path"] for row in rows} == {str(path) for path in images}


def test_procedural_rows_are_made_while_they_are_read_or_mixed_as_many_as_wanted(world):
    streamed = mix_rows("scenes", num_samples=5, streaming=True)
    assert isinstance(streamed.rows, IterableDataset) and streamed.table == []
    assert [row["sample_id"] for row in streamed.rows] == list(load_scenes("train", 0, 5)["sample_id"])
    mixed = mix_rows([part(world, "refcoco"), {"dataset": "scenes", "num_samples": 2}], streaming=True)
    assert Counter(mixed.rows["dataset"]) == {"refcoco": 12, "scenes": 2}
    with pytest.raises(ValueError, match="'scenes' draws its rows as they are wanted; say how many"):
        mix_rows(["scenes", part(world, "refcoco")])


def test_wrong_lists_are_named(world):
    assert read_parts('[{"dataset": "a", "weight": 2}, "b"]') == [Part("a", weight=2), Part("b")]
    for given, message in (
        ([], "an empty list"),
        ("[nonsense", "begins as a list, but is no JSON"),
        ([{"dataset": "a", "wieght": 2}], "a part of the mixture is .*any of num_samples, weight, split, root"),
        ([{"weight": 2}], "a part of the mixture is"),
        ([{"dataset": ""}], "names the dataset ''"),
        ([["a"]], "a part of the mixture is"),
    ):
        with pytest.raises(ValueError, match=message):
            read_parts(given)
    with pytest.raises(ValueError, match="'nowhere', a part of the mixture: dataset 'nowhere' is not known"):
        mix_rows([part(world, "refcoco"), "nowhere"])


def test_images_of_other_roots_are_named(world, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    write_images(elsewhere, 3)
    with pytest.raises(FileNotFoundError, match=r"'refcoco', a part of the mixture: \d of \d images are not in"):
        mix_rows([part(world, "refcoco", image_dir=str(elsewhere)), part(world, "refcocog")])
    rows = load_rows("grefcoco", "train", num_samples=None, root=world, image_dir=world / "train2014")
    wrong = leave_images_encoded(rows).map(lambda row: {"height": 48, "sample_id": "x" + row["sample_id"]})
    wrong.save_to_disk(tmp_path / "wrong")
    (tmp_path / "wrong" / HELD_OUT).write_text(json.dumps({"name": "grefcoco", "split_by": "unc", "images": {}}))
    with pytest.raises(ValueError, match=r"image \d of COCO has 24 x 32 and 48 x 32 pixels .* in .*wrong and refcoco"):
        mix_rows([part(world, "refcoco"), str(tmp_path / "wrong")])
    prepare_data(Conversion("refcoco", tmp_path / "data", ["train"], str(world), world / "train2014"))
    (world / "train2014" / "COCO_train2014_000000000004.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="data': 1 of its 6 images are not on disk, such as .*000000000004.jpg"):
        mix_rows(str(tmp_path / "data"))


def test_ids_that_repeat_between_sets_are_refused(world, tmp_path):
    rows = leave_images_encoded(load_rows("grefcoco", "train", num_samples=None, root=world))
    rows.map(lambda row: {"instruction": "another"}).save_to_disk(tmp_path / "other")
    (tmp_path / "other" / HELD_OUT).write_text(json.dumps({"name": "mine", "split_by": "", "images": {}}))
    with pytest.raises(ValueError, match="the mixture has the sample id 'grefcoco-.*twice.*which differ"):
        mix_rows([{"dataset": "grefcoco", "root": str(world)}, str(tmp_path / "other")])
    load_from_disk(tmp_path / "other").remove_columns("masks").save_to_disk(tmp_path / "less")
    (tmp_path / "less" / HELD_OUT).write_text(json.dumps({"name": "mine", "split_by": "", "images": {}}))
    with pytest.raises(ValueError, match="less' has no column masks"):
        mix_rows([{"dataset": "grefcoco", "root": str(world)}, str(tmp_path / "less")])


def test_the_schema_is_that_of_all_rows(world):
    mixture = mix_rows([part(world, "refcoco"), part(world, "grefcoco")])
    assert isinstance(mixture.rows, Dataset) and list(mixture.rows.features) == list(FEATURES)


def test_a_single_data_set_may_lack_columns_that_training_does_not_need(world, tmp_path):
    rows = load_rows("grefcoco", "train", num_samples=None, root=world, image_dir=world / "train2014")
    rows.remove_columns(["dataset", "split", "kind", "ignore"]).save_to_disk(tmp_path / "less")
    mixture = mix_rows(str(tmp_path / "less"), num_samples=5, held_out=rows.select([0]))
    assert len(mixture.rows) == 5 and mixture.table[0]["rows"] == 18
    assert mixture.table[0]["removed"] == 2  # the images are embedded, but keep the names of their files
