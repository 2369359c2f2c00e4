"""Rows written once into the cache of `datasets`, and mapped into memory from then on.

One Arrow file holds them, written in blocks: `datasets` encodes each row by itself, which for the annotations of
RefCOCO took more than ten times as long as reading them. Knows nothing about what the rows are.
"""

import gc
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, Features, Image, NamedSplit
from datasets.fingerprint import Hasher

BLOCK = 2000
"""Rows that are Python objects at once."""


def cached_rows(
    make: Callable[[], Iterable[Mapping[str, Any]]], features: Features, split: str, depends_on: Any
) -> Dataset:
    """Rows from the cache, or made and put there.

    Args:
        make: returns the rows, anew at each call; an `image` is {"bytes", "path"}, None, or what
            `datasets.Image` takes.
        features: the columns.
        split: name of the split.
        depends_on: all that the rows hang on, in types that `datasets` can hash.

    Returns:
        The rows, mapped from a file. A run that is killed leaves none.

    Raises:
        Exception: whatever `make` raises.

    Example:
        rows = cached_rows(lambda: iter([{"text": "a"}]), Features({"text": Value("string")}), "train", "my rows, v1")
    """
    path = _place(depends_on, (features.arrow_schema.to_string(), split), ".arrow")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            with without_collection():
                _write(part, make(), features)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    return Dataset.from_file(str(path), split=NamedSplit(split))


def cached_json(make: Callable[[], Any], depends_on: Any) -> Any:
    """A small result from the cache, or made and put there.

    Args:
        make: returns it, in types that JSON keeps.
        depends_on: all that it hangs on, in types that `datasets` can hash.

    Returns:
        What `make` returned, now or earlier.

    Raises:
        Exception: whatever `make` raises.
    """
    path = _place(depends_on, (), ".json")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with without_collection():
            made = make()
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(made), encoding="utf-8")
        part.replace(path)
    return json.loads(path.read_text(encoding="utf-8"))


def file_stamps(files: Iterable[Path]) -> list[tuple[str, int, int, int]]:
    """Path, times and size of files: what tells a changed file.

    Args:
        files: existing files.

    Returns:
        (path, time of its content, time of its entry, size) of each, in their order.
    """
    found = [(path, path.stat()) for path in files]
    return [(str(path), stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size) for path, stat in found]


@contextmanager
def without_collection() -> Iterator[None]:
    """Python's search for unreachable cycles is off while this is open: reading annotations makes millions of objects,
    none of them in a cycle."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _place(depends_on: Any, more: Any, suffix: str) -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE) / "segcompass" / f"{Hasher.hash((depends_on, more))}{suffix}"


def _write(path: Path, rows: Iterable[Mapping[str, Any]], features: Features) -> None:
    schema, rows = features.arrow_schema, iter(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        while block := [_encoded(row) for row in islice(rows, BLOCK)]:
            stream.write_table(pa.Table.from_pylist(block, schema=schema))


def _encoded(row: Mapping[str, Any]) -> Mapping[str, Any]:
    image = row.get("image")
    return row if image is None or isinstance(image, dict) else {**row, "image": Image().encode_example(image)}
