"""Loaders: every one returns a `datasets.Dataset` in the one row schema (see the README)."""

from pathlib import Path

from datasets import load_from_disk

from .scenes import load_scenes


def load_rows(dataset, split="train", seed=0, num_samples=1000, streaming=False):
    """Rows by name: "scenes" (procedural), or a folder that `datasets.Dataset.save_to_disk` wrote.

    Raises:
        ValueError: neither a known name nor a folder.
    """
    if dataset == "scenes":
        return load_scenes(split=split, seed=seed, num_samples=num_samples, streaming=streaming)
    if not Path(dataset).is_dir():
        raise ValueError(f"dataset {dataset!r} is neither 'scenes' nor a folder written by Dataset.save_to_disk.")
    rows = load_from_disk(dataset)
    rows = rows[split] if hasattr(rows, "keys") else rows
    return rows.select(range(min(num_samples, len(rows))))


__all__ = ["load_rows", "load_scenes"]
