"""Parquet layouts of the Hub: what keeps the masks is read, what loses them is refused with the reason."""

import json

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from pycocotools import mask as coco_mask

from segcompass.loaders import load_parquet
from segcompass.loaders.rows import FEATURES
from tests.support.refer import ANNOTATIONS, HEIGHT, WIDTH, box, image_name, write_images


def write(folder, rows, name="test-00000-of-00001.parquet", features=None):
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=features).to_parquet(folder / name)


def ref_row(ref_id, annotation):
    segmentation, crowd, _ = ANNOTATIONS[annotation]
    return {
        "ref_id": ref_id,
        "ann_id": annotation,
        "image_id": annotation % 3,
        "file_name": f"COCO_train2014_{annotation % 3:012}_{annotation}.jpg",
        "sentences": [
            {"raw": "A", "sent": "a", "sent_id": 2 * ref_id},
            {"raw": "B", "sent": "b", "sent_id": 2 * ref_id + 1},
        ],
        "raw_anns": json.dumps({"segmentation": segmentation, "iscrowd": crowd}),
        "raw_image_info": json.dumps({"file_name": image_name(annotation % 3), "height": HEIGHT, "width": WIDTH}),
    }


def test_layout_of_one_row_a_ref(tmp_path):
    write_images(tmp_path / "train2014")
    folder = tmp_path / "refcoco" / "data"
    write(folder, [ref_row(1, 11), ref_row(2, 14), ref_row(3, 16)])
    write(folder, [ref_row(9, 10)], "testB-00000-of-00001.parquet")
    with pytest.warns(UserWarning, match="1 left out, refs without a usable mask: ref 3"):
        rows = load_parquet(tmp_path / "refcoco", "test", tmp_path / "train2014")
    assert rows.features == FEATURES
    assert list(rows["sample_id"]) == [f"refcoco-test-{ref}-{sent}" for ref, sent in ((1, 2), (1, 3), (2, 4), (2, 5))]
    for row, annotation in zip(rows, (11, 11, 14, 14), strict=True):
        assert (coco_mask.decode(row["masks"][0]).astype(bool) == ANNOTATIONS[annotation][2]).all()
        assert row["image"].size == (WIDTH, HEIGHT)
    merged = load_parquet(tmp_path / "refcoco", "testB", unit="merged")
    assert list(merged["instruction"]) == ["Meet all the descriptions: 1. a. 2. b."] and merged["image"][0] is None
    (tmp_path / "train2014" / image_name(2)).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 1 images are not in .*000000000002\.jpg.*train2014\.zip"):
        load_parquet(tmp_path / "refcoco", "test", tmp_path / "train2014")


def test_layout_of_one_row_a_mask(tmp_path):
    mask = box(2, 3, 10, 9)
    features = Features(
        {
            "image": Image(),
            "text": Value("string"),
            "mask": List(List(Value("bool"))),
            "image_id": Value("string"),
            "ann_id": Value("string"),
            "img_height": Value("int64"),
            "img_width": Value("int64"),
        }
    )
    picture = PILImage.new("RGB", (WIDTH, HEIGHT))
    row = {"image": picture, "text": "it", "image_id": "7", "ann_id": "3", "img_height": HEIGHT, "img_width": WIDTH}
    write(tmp_path / "a", [row | {"mask": mask.tolist()}, row | {"mask": (mask & False).tolist()}], features=features)
    first, second = load_parquet(tmp_path / "a")
    assert (coco_mask.decode(first["masks"][0]).astype(bool) == mask).all() and second["masks"] == []
    assert first["image"].size == (WIDTH, HEIGHT) and first["sample_id"] != second["sample_id"]
    write(tmp_path / "b", [row | {"mask": np.zeros((3, 4), bool).tolist()}], features=features)
    with pytest.raises(ValueError, match=r"row 0 of b: a mask of size \(3, 4\), its image \(24, 32\)"):
        load_parquet(tmp_path / "b")


def test_layouts_without_masks_are_refused_with_the_reason(tmp_path):
    write(tmp_path / "flat", [{"question": "q", "answer": ["a"], "segmentation": [1.0, 2.0], "bbox": [0.0]}])
    with pytest.raises(ValueError, match="keeps one flat polygon of each mask .* load_refcoco"):
        load_parquet(tmp_path / "flat")
    write(tmp_path / "other", [{"caption": "x"}])
    with pytest.raises(ValueError, match=r"has the columns \['caption'\], which is no layout known here"):
        load_parquet(tmp_path / "other")
    with pytest.raises(ValueError, match="holds no parquet file of split 'val'"):
        load_parquet(tmp_path / "other", "val")
