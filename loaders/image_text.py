"""Image-text rows from any data set, for what needs no masks: hidden states to train a sparse autoencoder on.

Understood are the rows of this project, OBELICS-style interleaved documents (lists `images` and `texts` in reading
order), JSON lines, and tables with an image and a text column. Every row becomes `image`, `text`, `response`.

This module knows nothing about models or tokens, and it opens no image: see `trainers.collator.ImageTextCollator`.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, IterableDataset, Sequence, load_dataset

from .files import inside_folder, read_jsonl
from .folder import load_folder
from .identity import image_content
from .registry import LOADERS, call_loader, first_rows, import_loader

IMAGE_COLUMNS = ("image", "image_path", "img_path", "path", "image_url", "url")
TEXT_COLUMNS = ("text", "instruction", "question", "prompt", "caption")
RESPONSE_COLUMNS = ("response", "answer")
"""Names under which a row's parts are looked for; the first that has something counts."""

SHUFFLED = 10_000
"""Streamed rows that are shuffled together."""


def load_image_text(
    dataset: str,
    split: str = "train",
    seed: int = 0,
    num_samples: int | None = None,
    streaming: bool = True,
    shuffled: bool = False,
) -> Dataset | IterableDataset:
    """Load rows by name.

    Args:
        dataset: "scenes"; a folder that `segcompass prepare-data` or `save_to_disk` wrote; a `.jsonl` file (paths of
            images in it are relative to the file and stay in its folder); the dotted path of a function that returns
            rows; or the id of a data set on the Hub.
        split: which split; of a `.jsonl` file the lines that name it, or all where the first line names none.
        seed: seed of the procedural scenes, and of the order of others.
        num_samples: rows at most; None means all, and 100,000 scenes.
        streaming: read (or draw) rows while they are used instead of storing them first.
        shuffled: the rows come in the order of the seed, so that `num_samples` of them are not the first (streamed
            ones among the next 10,000). Scenes are drawn independently and keep their order.

    Returns:
        Dataset or IterableDataset, its rows as they are; `image_text` reads them.

    Raises:
        ValueError: num_samples is below 1, the data set cannot be found, or no line of the file has the split.

    Example:
        >>> row = next(iter(load_image_text("scenes", "val", num_samples=1)))
        >>> image_text(row)["text"]
        'everything larger than the moon'
    """
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; ask for at least one row, or None for all.")
    if dataset == "scenes":
        num_samples = num_samples or 100_000
    if dataset in LOADERS:
        return call_loader(dataset, LOADERS[dataset], num_samples, streaming, split=split, seed=seed)
    path = Path(dataset)
    if path.suffix in (".jsonl", ".json"):
        if not path.is_file():
            raise ValueError(f"dataset {dataset!r} is no file; give the path of a .jsonl file.")
        rows = load_dataset("json", data_files=str(path), split="train", streaming=streaming)
        rows = rows.map(_relative_to, fn_kwargs={"folder": str(path.parent)})
        if has_splits(dataset):
            rows = rows.filter(_is_of, fn_kwargs={"split": split})
            if next(iter(rows), None) is None:
                raise ValueError(f"{dataset} has no line of split {split!r}; name one that its lines have.")
    elif path.is_dir():
        rows = load_folder(dataset, split)
    elif load := import_loader(dataset):
        rows = call_loader(dataset, load, None if shuffled else num_samples, streaming, split=split, seed=seed)
    else:
        rows = load_dataset(dataset, split=split, streaming=streaming)
    rows = _undecoded(rows)
    if shuffled:
        rows = rows.shuffle(seed, buffer_size=SHUFFLED) if isinstance(rows, IterableDataset) else rows.shuffle(seed)
    return first_rows(rows, num_samples)


def has_splits(dataset: str) -> bool:
    """Whether a data set of `load_image_text` may be divided into splits: an undivided folder is not, nor a file whose
    first line names none."""
    path = Path(dataset)
    if path.suffix == ".jsonl" and path.is_file():
        _, line = next(read_jsonl(path), (0, {}))
        return line.get("split") not in (None, "")
    divided = (path / "dataset_dict.json").exists() or any(path.glob("*.parquet"))
    return dataset in LOADERS or not (path.is_file() or (path.is_dir() and not divided))


def image_text(row: Mapping) -> dict:
    """The image and the text of a row of any of the forms above.

    An interleaved document gives its first image and the text after it (before it, if none follows).

    Args:
        row: a row of this project, an interleaved document, a JSON line, or a table's row.

    Returns:
        {"image", "text", "response", "reasoning"}: `image` is what the row holds, in a form that
        `modeling_segcompass.images.read_image` reads; `response` is None or text as it is; `reasoning` is None or a
        trace of our own rows, which the processor puts into a response.

    Raises:
        ValueError: no image, or no text.
    """
    if "images" in row and "texts" in row:
        image, text = _first_image_with_text(row["images"], row["texts"])
        return {"image": image, "text": text, "response": None, "reasoning": None}
    image = next((row[name] for name in IMAGE_COLUMNS if row.get(name)), None)
    text = next((row[name] for name in TEXT_COLUMNS if row.get(name)), None)
    if image is None or not str(text or "").strip():
        missing, names = ("image", IMAGE_COLUMNS) if image is None else ("text", TEXT_COLUMNS)
        raise ValueError(f"the row has no {missing}; it has {sorted(row)}, looked for were {names}.")
    response = next((row[name] for name in RESPONSE_COLUMNS if row.get(name)), None)
    return {"image": image, "text": text, "response": response, "reasoning": row.get("reasoning")}


def image_text_digest(rows: Iterable[Mapping]) -> str:
    """A hash of what `image_text` reads of rows: their texts and, by the bytes of their files, their images.

    Args:
        rows: rows in any form that `image_text` reads; each image file is read once.

    Returns:
        64 hex digits. An image on the web counts by its address.
    """
    digest, known = hashlib.sha256(), dict[Any, bytes]()
    for row in rows:
        try:
            read = image_text(row)
        except ValueError:  # such a row is left out
            digest.update(b"no image or text")
            continue
        digest.update(json.dumps([read["text"], read["response"], read["reasoning"]], default=str).encode())
        digest.update(image_content(read["image"], known))
    return digest.hexdigest()


def _first_image_with_text(images, texts):
    places = [place for place, image in enumerate(images) if image]
    if not places:
        raise ValueError("the document has no image.")
    for place in places:
        after = next((text for text in texts[place:] if text and text.strip()), None)
        if after:
            return images[place], after
    before = next((text for text in reversed(texts[: places[0]]) if text and text.strip()), None)
    if before is None:
        raise ValueError("the document has no text.")
    return images[places[0]], before


def _relative_to(row, folder):
    """Paths of images in a row, made absolute."""

    def absolute(path):
        if isinstance(path, str) and "://" not in path:
            return str(inside_folder(Path(folder), path))
        return path

    changed = {name: absolute(row[name]) for name in IMAGE_COLUMNS if isinstance(row.get(name), str)}
    if isinstance(row.get("images"), list):
        changed["images"] = [absolute(image) for image in row["images"]]
    return changed


def _is_of(row, split):
    return str(row["split"]) == split


def _undecoded(rows):
    """Leave images as bytes or paths, so that one that does not open costs its row and not the whole run."""
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            rows = rows.cast_column(name, Sequence(Image(decode=False)))
    return rows
