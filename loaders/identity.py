"""What rows are, by their content: digests for the keys of caches and results, and ids that must not repeat.

Two files may have one name and two folders one `sample_id`. Knows nothing about models, trainers or commands.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Image

JUDGED = ("sample_id", "instruction", "masks", "ignore")
"""The columns of a row that results depend on, beside its image."""


def rows_digest(rows: Dataset, images: bool = True) -> str:
    """A hash of what results on rows depend on: questions, masks, instances and, by their files' content, images.

    Args:
        rows: with the columns of `rows.FEATURES`; `ignore` may be missing, and `instances`.
        images: False leaves the images out, where only masks are compared.

    Returns:
        64 hex digits.

    Example:
        digest = rows_digest(load_jsonl("mine.jsonl"))
    """
    digest = hashlib.sha256()
    names = [name for name in JUDGED if name in rows.column_names]
    for row in rows.select_columns(names):
        digest.update(json.dumps([row.get(name) for name in JUDGED]).encode())
    if "instances" in rows.column_names:  # which the white box's criteria read
        for row in rows.select_columns(["instances"]):
            digest.update(json.dumps(row["instances"]).encode())
    if images and "image" in rows.column_names:
        digest.update(images_digest(rows).encode())
    return digest.hexdigest()


def images_digest(rows: Dataset) -> str:
    """A hash of the images of rows: of the files' bytes, wherever the files lie.

    Args:
        rows: with a column `image`.

    Returns:
        64 hex digits.
    """
    column = rows.select_columns(["image"])
    if isinstance(rows.features["image"], Image):
        column = column.cast_column("image", Image(decode=False))
    known: dict[Any, bytes] = {}  # a path -> what it holds; files that several rows name are read once
    digest = hashlib.sha256()
    for row in column:
        digest.update(image_content(row["image"], known))
    return digest.hexdigest()


def encoded_key(image: Any) -> tuple[str, Any] | None:
    """What makes an encoded image that image: its bytes, or its path.

    Args:
        image: a row's `image`.

    Returns:
        A key that equal images share and others do not; None for an image that is decoded already.
    """
    if isinstance(image, Mapping) and image.get("bytes") is not None:
        return "bytes", hashlib.blake2b(image["bytes"], digest_size=16).digest()
    if isinstance(image, Mapping) and image.get("path") is not None:
        return "path", str(image["path"])
    return None


def check_sample_ids(rows: Dataset, name: str) -> None:
    """Refuse rows of which two have one `sample_id` and are not the same sample.

    Equal rows may repeat, as concatenating a data set with itself makes them.

    Args:
        rows: with the columns of `rows.FEATURES`.
        name: what the error calls them.

    Raises:
        ValueError: with the id.
    """
    first: dict[str, int] = {}
    compared = [name for name in ("image_id", "instruction", "masks", "height", "width") if name in rows.column_names]
    pairs = []
    for number, sample in enumerate(rows["sample_id"]):
        if (place := first.setdefault(sample, number)) != number:
            pairs.append((place, number))
    parts = rows.select_columns(compared)
    for place, number in pairs:
        if parts[place] != parts[number]:
            raise ValueError(
                f"{name} has the sample id {rows['sample_id'][number]!r} "
                f"twice, in rows {place} and {number}, which differ; two data sets were put together whose ids repeat: "
                "give each id a prefix of its own (rows.map) before concatenating."
            )


def image_content(image: Any, known: dict[Any, bytes]) -> bytes:
    """32 bytes that stand for an image as a row holds it: for the bytes of its file, wherever that lies.

    Args:
        image: {"bytes", "path"}, a path or an address, or a decoded image.
        known: path -> its 32 bytes; files that several rows name are read once.

    Returns:
        32 bytes. An address counts by its text.
    """
    if isinstance(image, Mapping) and image.get("bytes") is not None:
        return hashlib.sha256(image["bytes"]).digest()
    path = image.get("path") if isinstance(image, Mapping) else image
    if path is None:
        return b"no image".ljust(32)
    if hasattr(path, "tobytes"):  # a decoded image, or an array
        form = f"{path.mode} {path.size}" if hasattr(path, "mode") else f"{path.dtype} {path.shape}"
        return hashlib.sha256(form.encode() + path.tobytes()).digest()
    name = str(path)
    if name not in known:
        content = Path(name).read_bytes() if os.path.isfile(name) else name.encode()
        known[name] = hashlib.sha256(content).digest()
    return known[name]
