"""Data of one's own: a JSONL file with one sample per line."""

import os
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset

from .files import need, read_jsonl
from .masks import read_mask, read_polygons
from .rows import target_kind, to_dataset

MASK_KEYS = ("masks", "polygons", "rle", "mask")


def load_jsonl(path: str | os.PathLike, split: str = "train", num_samples: int | None = None) -> Dataset:
    """Rows from a JSONL file.

    A line is {"image": file, "instruction": str} and exactly one of
        "masks"     list, one per instance: an RLE dict, rows of 0 and 1, or a mask file
        "polygons"  list, one per instance: a flat polygon [x0, y0, x1, y1, ...], or a list of them that are united
        "rle"       an RLE dict or a list of them, compressed or not
        "mask"      a mask file, or a list of them, one per instance: what is not 0 (black) is inside
    ([] says that nothing is meant). It may have "ignore" (an RLE dict or a mask file), "sample_id", "image_id",
    "dataset", "split", "reasoning" and "kind". Files are relative to the JSONL's folder.

    Args:
        path: the JSONL file.
        split: name of the split; lines that name another are left out.
        num_samples: the first so many rows, or None for all.

    Returns:
        Dataset with the columns of `loaders.rows.FEATURES`; `sample_id` is NAME-LINE where a line has none.

    Raises:
        FileNotFoundError: the file, an image or a mask file is missing.
        ValueError: a line that is no JSON, lacks a key, or whose masks do not fit its image; the line is named.

    Example:
        rows = load_jsonl("mine.jsonl", "train")
    """
    path = need(Path(path), "give a file with one JSON object per line.").resolve()
    return to_dataset(_rows, {"path": path, "split": split}, [path], split, num_samples)


def _rows(path: Path, split: str) -> Iterator[dict]:
    for number, line in read_jsonl(path):
        try:
            row = _row(line, path, number, split)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path}, line {number}: {error}") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        if row is not None:
            yield row


def _row(given: dict, path: Path, number: int, split: str) -> dict | None:
    from segcompass.modeling_segcompass.images import upright_size  # here, since it brings torch along

    if given.get("split", split) != split:
        return None
    for key in ("image", "instruction"):
        if not isinstance(given.get(key), str) or not given[key].strip():
            raise ValueError(f"{key!r} is missing or blank.")
    image = need(path.parent / given["image"], "paths are relative to the JSONL's folder.")
    height, width = upright_size(image)
    masks = _instances(given, path.parent, height, width)
    kind = target_kind(len(masks))
    return {
        "image": {"path": str(image), "bytes": None},
        "image_id": str(given.get("image_id", given["image"])),
        "sample_id": str(given.get("sample_id", f"{path.stem}-{number}")),
        "dataset": str(given.get("dataset", path.stem)),
        "split": split,
        "instruction": given["instruction"],
        "reasoning": given.get("reasoning"),
        "masks": masks,
        "ignore": None if given.get("ignore") is None else read_mask(given["ignore"], height, width, path.parent),
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
        raise ValueError(f"{keys[0]!r} must be a list with one entry per instance.")
    if keys[0] != "polygons":
        return [read_mask(mask, height, width, folder) for mask in value]
    masks = []
    for number, polygons in enumerate(value, 1):
        mask = read_polygons(polygons, height, width)
        if mask is None:
            raise ValueError(f"polygon {number} has no pixel inside the image of {height} x {width}.")
        masks.append(mask)
    return masks
