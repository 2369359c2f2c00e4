"""Data of one's own: a JSONL file, one sample a line."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset
from PIL import Image

from .files import need
from .masks import coco_rle, decode_mask, encode_mask
from .reasonseg import upright_size
from .rows import to_dataset

MASK_KEYS = ("masks", "polygons", "rle", "mask")


def load_jsonl(path: str | os.PathLike, split: str = "train", num_samples: int | None = None) -> Dataset:
    """Rows from a JSONL file.

    A line is {"image": file, "instruction": str} and exactly one of
        "masks"     list, one an instance: an RLE dict, rows of 0 and 1, or a mask file
        "polygons"  list, one an instance: a flat polygon [x0, y0, x1, y1, ...], or a list of them that are united
        "rle"       an RLE dict or a list of them, compressed or not
        "mask"      a mask file, or a list of them, one an instance: what is not 0 (black) is inside
    ([] says that nothing is meant), and may have "ignore" (an RLE dict or a mask file), "sample_id", "image_id",
    "dataset", "split", "reasoning" and "kind". Files are relative to the JSONL's folder.

    Args:
        path: the JSONL file.
        split: name of the split; lines that name another are left out.
        num_samples: the first so many rows, or None for all.

    Returns:
        Dataset of the one row schema (`loaders.rows.FEATURES`); sample_id is NAME-LINE where a line has none.

    Raises:
        FileNotFoundError: the file, an image or a mask file is missing.
        ValueError: a line that is no JSON, lacks a key, or whose masks do not fit its image; the line is named.
    """
    path = need(Path(path), "give a file with one JSON object a line.").resolve()
    return to_dataset(_rows, {"path": path, "split": split}, [path], split, num_samples)


def _rows(path: Path, split: str) -> Iterator[dict]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = _row(json.loads(line), path, number, split)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{path}, line {number}: {error}") from error
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            if row is not None:
                yield row


def _row(given: dict, path: Path, number: int, split: str) -> dict | None:
    if not isinstance(given, dict):
        raise ValueError("a line must be a JSON object.")
    if given.get("split", split) != split:
        return None
    for key in ("image", "instruction"):
        if not isinstance(given.get(key), str) or not given[key].strip():
            raise ValueError(f"{key!r} is missing or blank.")
    image = need(path.parent / given["image"], "paths are relative to the JSONL's folder.")
    height, width = upright_size(image)
    masks = _instances(given, path.parent, height, width)
    kind = ("none", "single", "multi")[min(len(masks), 2)]
    return {
        "image": {"path": str(image), "bytes": None},
        "image_id": str(given.get("image_id", given["image"])),
        "sample_id": str(given.get("sample_id", f"{path.stem}-{number}")),
        "dataset": str(given.get("dataset", path.stem)),
        "split": split,
        "instruction": given["instruction"],
        "reasoning": given.get("reasoning"),
        "masks": masks,
        "ignore": None if given.get("ignore") is None else _instance(given["ignore"], path.parent, height, width),
        "height": height,
        "width": width,
        "kind": str(given.get("kind", kind)),
    }


def _instances(given: dict, folder: Path, height: int, width: int) -> list[dict]:
    """The masks of a line as RLEs. Raises ValueError."""
    keys = [key for key in MASK_KEYS if key in given]
    if len(keys) != 1:
        raise ValueError(
            f"give exactly one of {', '.join(MASK_KEYS)} ([] for no target); got {', '.join(keys) or None}."
        )
    value = given[keys[0]]
    if keys[0] in ("rle", "mask") and not isinstance(value, list):
        value = [value]
    if not isinstance(value, list):
        raise ValueError(f"{keys[0]!r} must be a list, one an instance.")
    if keys[0] != "polygons":
        return [_instance(mask, folder, height, width) for mask in value]
    masks = []
    for polygons in value:
        flat = not all(isinstance(part, list) for part in polygons)
        polygons = [polygons] if flat else polygons
        short = [part for part in polygons if len(part) < 6 or len(part) % 2]
        if short:
            raise ValueError(f"a polygon needs at least three points as [x0, y0, x1, y1, x2, y2, ...]; got {short[0]}.")
        masks.append(coco_rle(polygons, height, width))
        if masks[-1] is None:
            raise ValueError(f"polygon {len(masks)} has no pixel inside the image of {height} x {width}.")
    return masks


def _instance(mask, folder: Path, height: int, width: int) -> dict:
    """One mask as RLE, from an RLE dict, a mask file or rows of 0 and 1. Raises ValueError."""
    if isinstance(mask, dict):
        return coco_rle(mask, height, width) or encode_mask(decode_mask([], height, width))
    if isinstance(mask, str):
        file = need(folder / mask, "paths are relative to the JSONL's folder.")
        try:
            picture = np.asarray(Image.open(file))
        except OSError as error:
            raise ValueError(f"the mask file {file} cannot be read: {error}.") from error
        array = picture.any(axis=2) if picture.ndim == 3 else picture != 0
    else:
        array = np.array(mask)
        if array.dtype.kind not in "bui" or not np.isin(array, (0, 1)).all():
            raise ValueError(f"a mask must be rows of 0 and 1; got values of {array.dtype}. Threshold it first.")
    if array.shape != (height, width):
        raise ValueError(f"a mask has size {array.shape}, its image {(height, width)} (height, width).")
    return encode_mask(array != 0)
