"""Trainers know images and targets by their content, and name the sample whose image, masks or trace cannot serve."""

import io
import json

import datasets
import numpy as np
import pytest
from PIL import Image

from segcompass.loaders import load_jsonl
from segcompass.loaders.masks import encode_mask
from segcompass.trainers.checks import check_masks, check_rows
from segcompass.trainers.collator import SegCompassCollator
from segcompass.trainers.grpo_trainer import SegCompassGRPOTrainer
from segcompass.trainers.rollout_rows import decode_images, segmentation_batch
from segcompass.trainers.sft_trainer import SegCompassSFTConfig, SegCompassSFTTrainer
from tests.support.grpo import make_trainer, scenes, settings
from tests.support.tiny import tiny_segcompass


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def with_damaged(count, place):
    """Scenes as JPEG bytes, of which one is cut off."""
    rows = []
    for number, row in enumerate(scenes(count)):
        file = io.BytesIO()
        row["image"].save(file, "JPEG", quality=95)
        content = file.getvalue()
        content = content[: len(content) // 2] if number == place else content
        rows.append({**row, "image": {"bytes": content, "path": None}, "reasoning": "it is there"})
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


@pytest.mark.parametrize("form", ["paths", "PIL images"])
def test_two_folders_with_equal_names_keep_their_pixels_and_masks(tmp_path, own_cache, form):
    parts = []
    for name, value, width in (("a", 0, 5), ("b", 255, 15)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 20), (value,) * 3).save(tmp_path / name / "1.png")
        line = {"image": "1.png", "instruction": "x", "polygons": [[0, 0, width, 0, width, 9, 0, 9]]}
        (tmp_path / name / "train.jsonl").write_text(json.dumps(line) + "\n")
        parts.append(load_jsonl(tmp_path / name / "train.jsonl"))
    rows = datasets.concatenate_datasets(parts)
    assert len(set(rows["sample_id"])) == len(set(rows["image_id"])) == 1
    if form == "paths":
        rows = rows.cast_column("image", datasets.Image(decode=False))
    rows = decode_images([rows[0], rows[1], rows[0], rows[1]])
    assert [np.asarray(row["image"]).mean() for row in rows] == [0, 255, 0, 255]
    assert len({id(row["image"]) for row in rows}) == 2, "each is decoded once"
    batch = segmentation_batch(make_trainer(tmp_path / "run", beta=0.0), rows)
    shares = [target.sum().item() for target in batch["mask_targets"]]
    assert shares[0] == shares[2] and shares[1] == shares[3] == pytest.approx(3 * shares[0])
    with pytest.raises(ValueError, match="train_dataset has the sample id 'train-1' twice, in rows 0 and 1"):
        check_rows(datasets.concatenate_datasets(parts), None, settings(tmp_path))


def test_a_damaged_image_is_named_in_joint_training(tmp_path):
    made = make_trainer(tmp_path, max_steps=4)
    rows = with_damaged(8, 5)
    trainer = SegCompassGRPOTrainer(
        made.model, args=made.args, train_dataset=rows, processing_class=made.processing_class
    )
    with pytest.raises(OSError, match="the image of sample 'sample-5' .* cannot be read"):
        trainer.train()


def test_a_damaged_image_is_named_in_the_cold_start(tmp_path):
    model, processor = tiny_segcompass("llava")
    args = SegCompassSFTConfig(str(tmp_path), max_steps=4, use_cpu=True, bf16=False, report_to=[], save_strategy="no")
    with pytest.raises(OSError, match="the image of sample 'sample-2' .* cannot be read"):
        SegCompassSFTTrainer(model, args, processor, train_dataset=with_damaged(4, 2)).train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reasoning": "<think>the box</think><REF_POS>"}, "row 'sample-0': the reasoning holds '<think>'"),
        ({"reasoning": "the box <REF_POS>"}, "row 'sample-0': the reasoning holds '<REF_POS>'"),
        ({"reasoning": " \n"}, "row 'sample-0' has no reasoning"),
        ({"masks": [encode_mask(np.zeros((40, 40), bool))]}, "a mask of sample 'sample-0' has no pixel"),
        ({"masks": [{"size": [40, 40], "counts": "1 2 3"}]}, "a mask of sample 'sample-0' is damaged"),
        ({"height": 30}, "is .*but"),
    ],
)
def test_the_cold_start_names_the_row_that_cannot_serve(change, message):
    processor = tiny_segcompass("llava")[1]
    row = {**scenes(1)[0], "reasoning": "the box on the left", **change}
    with pytest.raises(ValueError, match=message):
        SegCompassCollator(processor, mask_side=32)([row])


def test_masks_that_cannot_serve_are_named_before_the_first_step():
    row = {"sample_id": "s", "height": 4, "width": 5}
    good = encode_mask(np.ones((4, 5), bool))
    check_masks({**row, "masks": [good]})
    for mask, message in (
        ({**good, "counts": "\\x80"}, "a mask of sample 's' is damaged: an RLE has counts"),
        (
            encode_mask(np.zeros((4, 5), bool)),
            r"a mask of sample 's' has no pixel, .* give \[\] where nothing is meant",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            check_masks({**row, "masks": [good, mask]})
