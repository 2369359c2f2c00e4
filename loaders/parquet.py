"""Parquet layouts of referring segmentation that others put on the Hub."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, Image, load_dataset
from pycocotools import mask as coco_mask

from .files import check_shards, inside_folder, need
from .masks import coco_rle, read_mask
from .rows import LeftOut, expressions, target_kind, to_dataset

FLATTENED = (
    "it keeps one flat polygon of each mask (column 'segmentation'), so objects in several parts lose all but one, and "
    "its val split is not the published one. Load the original files with load_refcoco."
)


def load_parquet(
    path: str | os.PathLike,
    split: str = "test",
    image_dir: str | os.PathLike | None = None,
    unit: str = "sentence",
    num_samples: int | None = None,
) -> Dataset:
    """Rows from a Hub data set or a folder of parquet files in one of the layouts people use.

    Known by their columns: one row per ref with COCO annotations and no image (`jxu124/refcoco`, `refcocoplus`,
    `refcocog`; their "test" is testA), and one row per mask with its image (`Ricky06662/...`). In the latter
    ReasonSeg's ignored pixels were merged into the target, which cannot be undone: score them with protocol
    "visionreasoner".

    Args:
        path: Hub id, folder or file.
        split: as the data set names it.
        image_dir: the COCO train2014 images, for the layout without images; None leaves them out.
        unit: see `load_refcoco`; the layout with images has one sentence per row whatever the unit.
        num_samples: the first so many rows, or None for all.

    Returns:
        Dataset with the columns of `loaders.rows.FEATURES`; `kind` is "single", or "none" without a target.

    Raises:
        ValueError: a layout that loses polygons, or an unknown one; a mask of another size than its image; a folder
            with only some of a split's files.
        FileNotFoundError: an image is missing.

    Example:
        rows = load_parquet("jxu124/refcocog", "test", image_dir="train2014")
    """
    expressions([], unit)
    files = []
    if Path(path).exists():
        files = [Path(path)] if Path(path).is_file() else sorted(Path(path).rglob("*.parquet"))
        if not Path(path).is_file():  # split-00000-of-00001.parquet
            files = [file for file in files if file.stem.split("-")[0] == split]
        if not files:
            raise ValueError(f"{path} holds no parquet file of split {split!r}; their names begin with the split's.")
        if not Path(path).is_file():
            check_shards(files)
        source = load_dataset("parquet", data_files={split: [str(file) for file in files]}, split=split)
    else:
        source = load_dataset(str(path), split=split)
    columns = set(source.column_names)
    arguments = {"source": source, "name": Path(path).stem, "split": split}
    if {"raw_anns", "raw_image_info", "sentences"} <= columns:
        folder = None if image_dir is None else need(Path(image_dir), "`image_dir` holds COCO's train2014 images.")
        arguments |= {"image_dir": folder, "unit": unit}
        return to_dataset(_ref_rows, arguments, files, split, num_samples, "They are in COCO's train2014.zip.")
    if {"image", "text", "mask", "img_height", "img_width"} <= columns:
        return to_dataset(_mask_rows, arguments, files, split, num_samples)
    if {"question", "answer", "segmentation"} <= columns:
        raise ValueError(f"{path} cannot give masks: {FLATTENED}")
    raise ValueError(f"{path} has the columns {sorted(columns)}, which is no layout known here; convert it to JSONL.")


def _ref_rows(source: Dataset, name: str, split: str, image_dir: Path | None, unit: str) -> Iterator[dict]:
    left_out = LeftOut()
    for ref in source:
        info, annotation = json.loads(ref["raw_image_info"]), json.loads(ref["raw_anns"])
        image = None if image_dir is None else inside_folder(image_dir, info["file_name"])
        mask = coco_rle(annotation["segmentation"], info["height"], info["width"])
        if mask is None:
            left_out.add("refs without a usable mask", f"ref {ref['ref_id']}")
            continue
        for suffix, instruction in expressions([(str(s["sent_id"]), s["sent"]) for s in ref["sentences"]], unit):
            yield {
                "image": None if image is None else {"path": str(image), "bytes": None},
                "image_id": str(ref["image_id"]),
                "sample_id": f"{name}-{split}-{ref['ref_id']}-{suffix}",
                "dataset": name,
                "split": split,
                "instruction": instruction,
                "reasoning": None,
                "masks": [mask],
                "ignore": None,
                "height": info["height"],
                "width": info["width"],
                "kind": "single",
            }
    left_out.warn()


def _mask_rows(source: Dataset, name: str, split: str) -> Iterator[dict]:
    for number, row in enumerate(source.cast_column("image", Image(decode=False))):
        height, width = row["img_height"], row["img_width"]
        try:
            mask = read_mask(row["mask"], height, width)
        except ValueError as error:
            raise ValueError(f"row {number} of {name}: {error}") from error
        masks = [mask] if coco_mask.area(mask) else []
        yield {
            "image": row["image"],
            "image_id": str(row["image_id"]),
            "sample_id": f"{name}-{split}-{row['image_id']}-{row.get('ann_id')}-{number}",
            "dataset": name,
            "split": split,
            "instruction": row["text"],
            "reasoning": None,
            "masks": masks,
            "ignore": None,
            "height": height,
            "width": width,
            "kind": target_kind(len(masks)),
        }
