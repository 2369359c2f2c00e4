"""Real photographs and JPEGs, from the script to the report: prepare, evaluate, white box and dictionary.

The truth is compared with what the script pasted, by an independent computation. Needs scikit-image's photographs
(`pip install -e ".[photos]"`).
"""

import json
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segcompass.commands import dictionary, evaluate, prepare_data, white_box
from segcompass.white_box import annotated_truth, concept_labels, criteria, criteria_records
from segcompass.white_box.annotated_truth import AnnotatedTruths, label_rows
from segcompass.white_box.concept_labels import read_labelled
from segcompass.white_box.dictionary_reader import TokenReader
from segcompass.white_box.examination import annotated_rows
from segcompass.white_box.image_truth import attributes_of, patch_cover
from tests.support.scripted import lively_segcompass

pytestmark = pytest.mark.skipif(find_spec("skimage") is None, reason="scikit-image, whose photographs these are")

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "pasted_photographs.py"
GOOD = "<think>red cup</think>" + "<REF_POS>" * 3
IMAGES = 20


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(the folder of the data sets, the objects of each image as the script pasted them, the rows' folder)."""
    spec = spec_from_file_location("pasted_photographs", SCRIPT)
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    folder = tmp_path_factory.mktemp("pasted")
    objects = script.write(folder, IMAGES)
    where = ["--root", str(folder), "--image-dir", str(folder / "train2014")]
    prepare_data.main(["refcoco", *where, "--split", "train", "val", "--instances", "--output", str(folder / "rows")])
    return folder, objects, folder / "rows"


@pytest.fixture(scope="module")
def grounded(tmp_path_factory):
    """A tiny grounded model whose image patches depend on the image's ratio, saved, and its processor."""
    folder = tmp_path_factory.mktemp("grounded")
    model, processor = lively_segcompass("qwen2_5_vl", num_slots=3, concept_reading="grounded")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, processor


def test_truth_is_what_was_pasted(world, grounded):
    folder, objects, where = world
    rows = annotated_rows(str(where), "train", 1000)
    truths = AnnotatedTruths(rows.select([0]), rows.select([0]))
    seen = set()
    for row in rows:
        pasted = objects[int(row["image_id"]) - 1]
        truth = truths.of(row)
        assert np.array_equal(truth.masks, [each.mask for each in pasted]), "pixel for pixel"
        assert truth.names == [each.category for each in pasted]
        things, _ = annotated_truth._things(row)
        for thing, each in zip(things, pasted, strict=True):
            assert thing.colour in (each.colour, None)
            seen.add(thing.colour == each.colour)
        (target,) = truth.targets
        assert pasted[target].category in row["instruction"]
        for number, text in truth.questions:
            assert pasted[number].category in text
        with Image.open(folder / "train2014" / f"COCO_train2014_{int(row['image_id']):012}.jpg") as picture:
            assert picture.format == "JPEG" and picture.size == truth.masks.shape[:0:-1]
    assert seen == {True, False}
    # a grid that divides the image: each patch's share is a mean of whole pixels
    truth = truths.of(rows[0])
    height, width = truth.masks.shape[1:]
    across, down = np.meshgrid(np.arange(4), np.arange(6))  # (6, 4) each
    boxes = np.stack([across / 4, down / 6, (across + 1) / 4, (down + 1) / 6], -1).reshape(-1, 4)
    cover = patch_cover(truth.masks, torch.from_numpy(boxes)).reshape(-1, 6, 4)
    expected = truth.masks.reshape(len(truth.masks), 6, height // 6, 4, width // 4).mean((2, 4))
    assert np.allclose(cover, expected, atol=1e-6)


def test_labels_of_patches_are_those_of_the_pixels(world, monkeypatch):
    """What a patch is said to show, against a count of pixels in the patch."""
    _, objects, where = world
    monkeypatch.setattr(annotated_truth, "SHOWN_IN", 2)
    rows = annotated_rows(str(where), "train", 1000)
    truths = AnnotatedTruths(*label_rows(lambda split, n: rows.take(min(n, len(rows))), "train", "train", 7, 5, ()))
    model, processor = lively_segcompass("qwen2_5_vl", num_slots=3)
    chosen, _ = truths.label_rows()
    found = read_labelled(TokenReader(model, processor), truths, chosen, 4, "patches")["patch"]
    present, known = np.concatenate(found.present), np.concatenate(found.known)
    assert found.firings.samples == len(present) == len(known)
    names, start = list(attributes_of(truths)), 0
    for row, tokens in zip(chosen, TokenReader(model, processor).read(list(chosen)), strict=True):
        picture = objects[int(row["image_id"]) - 1]
        height, width = picture[0].mask.shape
        rows_, columns = tokens.grid
        edges = [np.linspace(0, side, n + 1) for side, n in ((height, rows_), (width, columns))]
        for top, bottom in zip(edges[0], edges[0][1:], strict=False):
            for left, right in zip(edges[1], edges[1][1:], strict=False):
                # weights of pixels by how much of them lies in the patch
                y, x = (
                    np.clip(np.minimum(np.arange(side) + 1, high) - np.maximum(np.arange(side), low), 0, 1)
                    for side, low, high in ((height, top, bottom), (width, left, right))
                )
                shares = [float(y @ each.mask @ x) / ((bottom - top) * (right - left)) for each in picture]
                if max(shares) < 0.5 and sum(shares) > 0:
                    continue  # neither the object's nor the ground's
                if abs(max(shares) - 0.5) > 1e-4:
                    shown = {each.category for each, share in zip(picture, shares, strict=True) if share >= 0.5}
                    said = {names[n] for n in np.flatnonzero(present[start])}
                    assert said & set(truths.kinds["category"]) == shown & set(truths.kinds["category"])
                start += 1
    assert start == len(present), "no patch was left out or added"


def test_whole_path_on_real_pixels(world, grounded, tmp_path, writes, monkeypatch):
    _, objects, where = world
    saved, processor = grounded
    writes(GOOD, processor)
    monkeypatch.setattr(annotated_truth, "SHOWN_IN", 2)
    for module in (criteria_records, criteria):  # a random model's masks are never right: examine them all
        monkeypatch.setattr(module, "SHOWS", -1.0)
    monkeypatch.setattr(criteria_records, "CONFIDENT", 0.0)
    options = ["--model", str(saved), "--dataset", str(where), "--num-samples", "4", "--batch-size", "4"]
    evaluated = evaluate.main([*options, "--split", "val", "--output", str(tmp_path / "val")])
    assert 0 <= evaluated["gIoU"] <= 1
    examined = [*options, "--split", "val", "--label-samples", "7"]
    metrics = white_box.main([*examined, "--output", str(tmp_path / "box")])
    assert metrics["scenes"] == 4 and metrics["masks"] > 0 and metrics["sum_error"] <= 1e-4
    labels = metrics["labels"]
    assert labels["training scenes"] + labels["held-out scenes"] == 12 and labels["looks"] >= 4
    for name in ("name", "pointing", "content", "shown"):
        mean, low, high = metrics[name]
        assert low <= mean <= high
    read = [*options, "--split", "train", "--held-out-samples", "5", "--contexts", "3"]
    scores = dictionary.main([*read, "--output", str(tmp_path / "names")])
    assert scores["patch"] and scores.keys() == set(concept_labels.READINGS[:3])
    concepts = json.loads((tmp_path / "names" / "concepts.json").read_text())["concepts"]
    texts = {each["text"] for concept in concepts for each in concept["contexts"] if each["part"] == "image"}
    assert "ground" in texts and len(texts) > 1
    known = {name for image in objects for x in image for name in (x.category, f"{x.colour} {x.category}")}
    assert texts <= known | {"ground"}
