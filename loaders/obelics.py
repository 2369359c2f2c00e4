"""OBELICS documents as image-text rows: what a sparse autoencoder is trained on.

The released parquet files hold image addresses, not images. `segcompass prepare-data obelics --download` fetches
those of the first documents into a folder, under the names that `image_name` gives.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset

from .files import need
from .registry import register_loader
from .rows import LeftOut, reserved_token, to_dataset


def image_name(address: str) -> str:
    """The file name of an image of this address: equal addresses share a file."""
    return hashlib.sha256(address.encode()).hexdigest()[:32] + ".img"


def load_obelics(
    root: str | os.PathLike = "HuggingFaceM4/OBELICS",
    image_dir: str | os.PathLike | None = None,
    num_samples: int | None = 200_000,
    max_characters: int = 600,
) -> Dataset:
    """Rows of images with the text around them, in the order of the documents.

    `instruction` is the text before the image, `reasoning` the text after it (where one is missing, the other stands
    for it). There are no masks: `masks` is empty, which does not mean that nothing is there. An image that is not on
    disk or cannot be read, and one without any text, is left out and counted in a warning.

    Args:
        root: a folder of OBELICS parquet files (columns images, texts), or a Hub id, which is streamed.
        image_dir: the images, named by `image_name`; None where the column `images` holds them itself.
        num_samples: the first so many rows (the paper takes 200,000), or None for all.
        max_characters: longer texts are cut at a word: the end is kept before the image, the beginning after it.

    Returns:
        Dataset with the columns of `loaders.rows.FEATURES`; `kind` is "document".

    Raises:
        FileNotFoundError: `image_dir` is missing, or the folder has no parquet files.
        ValueError: other columns, max_characters < 1, no usable row.

    Example:
        rows = load_obelics("OBELICS/data", image_dir="OBELICS/pictures", num_samples=1000)
    """
    if max_characters < 1:
        raise ValueError(f"max_characters={max_characters} is below 1.")
    if image_dir is not None:
        need(Path(image_dir), "`image_dir` holds the downloaded images: segcompass prepare-data obelics --download.")
    arguments = {
        "root": str(root),
        "image_dir": None if image_dir is None else Path(image_dir).resolve(),
        "max_characters": max_characters,
    }
    files = parquet_files(root)
    if image_dir is not None:
        files += sorted(file for file in Path(image_dir).iterdir() if file.is_file())  # more may be fetched later
    return to_dataset(_rows, arguments, files, "train", num_samples)


@register_loader("obelics")
def _load_local(
    root: str | os.PathLike, image_dir: str | os.PathLike | None = None, num_samples: int | None = None
) -> Dataset:
    """`load_obelics` without a default root: by name, nothing is downloaded unasked."""
    return load_obelics(root, image_dir, num_samples)


def parquet_files(root: str | os.PathLike) -> list[Path]:
    """The parquet files of a local folder; [] for a Hub id. Raises FileNotFoundError."""
    if not Path(root).is_dir():
        return []
    files = sorted(Path(root).rglob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"{root} holds no .parquet files; OBELICS comes as data/train-*.parquet.")
    return files


def open_documents(root: str | os.PathLike) -> IterableDataset:
    """The documents, streamed. Raises ValueError when they have no columns images and texts."""
    files = [str(file) for file in parquet_files(root)]
    kind, where = ("parquet", {"data_files": files}) if files else (str(root), {})
    documents = load_dataset(kind, split="train", streaming=True, **where)
    columns = documents.column_names or list(next(iter(documents)))
    if not {"images", "texts"} <= set(columns):
        raise ValueError(f"{root} has the columns {sorted(columns)}; OBELICS has images and texts.")
    return documents


def _rows(root: str, image_dir: Path | None, max_characters: int) -> Iterator[dict]:
    from segcompass.modeling_segcompass.images import upright_size  # here, since it brings torch along

    left_out = LeftOut()
    for number, document in enumerate(open_documents(root)):
        for place, source in enumerate(document["images"]):
            if source is None:
                continue
            name = f"obelics-{number}-{place}"
            before, after = _texts_around(document["texts"], place, max_characters)
            if not (before or after):
                left_out.add("no text around the image", name)
                continue
            if reserved_token(before) or reserved_token(after):
                left_out.add("text that holds <think>, </think> or <REF_POS>", name)
                continue
            image = _stored(source, image_dir)
            try:
                height, width = upright_size(image["bytes"] or image["path"])
            except ValueError:
                left_out.add("image not on disk or not readable", name)
                continue
            yield {
                "image": image,
                "image_id": name,
                "sample_id": name,
                "dataset": "obelics",
                "split": "train",
                "instruction": before or after,
                "reasoning": after or before,
                "masks": [],
                "ignore": None,
                "height": height,
                "width": width,
                "kind": "document",
            }
    left_out.warn()


def _texts_around(texts: list[str | None], place: int, limit: int) -> tuple[str, str]:
    """The nearest text before and after a place of the document, cut; "" where there is none."""
    before = next((" ".join(text.split()) for text in reversed(texts[:place]) if text and text.strip()), "")
    after = next((" ".join(text.split()) for text in texts[place + 1 :] if text and text.strip()), "")
    if len(before) > limit:
        before = before[-limit:].split(" ", 1)[-1]
    if len(after) > limit:
        after = after[:limit].rsplit(" ", 1)[0]
    return before, after


def _stored(source: str | dict, image_dir: Path | None) -> dict:
    """An image as the schema stores it. Raises ValueError for an address without a folder of images."""
    if not isinstance(source, str):
        return {"path": source.get("path"), "bytes": source.get("bytes")}
    if image_dir is None:
        raise ValueError("the images are addresses, not pictures; download them and give their image_dir.")
    return {"path": str(image_dir / image_name(source)), "bytes": None}
