"""Rows from a folder: the parquet files of a conversion, or a data set that was saved to disk."""

import os
from pathlib import Path

from datasets import Dataset, load_dataset, load_from_disk

from .files import check_shards, read_json
from .signed import check_signed


def load_folder(folder: str | os.PathLike, split: str = "train") -> Dataset:
    """Rows that `segcompass prepare-data` or `datasets.Dataset.save_to_disk` wrote.

    Args:
        folder: holds SPLIT-*.parquet, or what save_to_disk wrote of a Dataset or a DatasetDict.
        split: which parquet files, which part of a DatasetDict, or which rows of a Dataset whose rows say their split.

    Returns:
        The rows as they were written.

    Raises:
        ValueError: the folder holds neither, nothing of the split, only some of the parquet files, or others than were
            signed.

    Example:
        rows = load_folder("data/refcoco", "val")
    """
    files = sorted(str(file) for file in Path(folder).glob(f"{split}-*.parquet"))
    if files:
        check_shards(files)
        check_signed([*files, Path(folder) / f"{split}.json"])
        rows = load_dataset("parquet", data_files={split: files}, split=split)
        note = Path(folder) / f"{split}.json"
        noted = read_json(note).get("rows") if note.exists() else None
        if noted is not None and noted != len(rows):
            raise ValueError(
                f"{folder} holds {len(rows)} rows of split {split!r}, {note.name} says {noted}; convert again."
            )
        return rows
    try:
        rows = load_from_disk(folder)
    except FileNotFoundError as error:
        others = sorted({file.name.rsplit("-", 3)[0] for file in Path(folder).glob("*-00000-of-*.parquet")})
        lines = sorted(Path(folder).glob("*.jsonl"))
        hint = f" It has the splits {', '.join(others)}." if others else ""
        hint = hint or (f" Its rows may be in {lines[0]}: name that file." if lines else "")
        if any(Path(folder, "data").glob("*-00000-of-*.parquet")):  # as the Hub's repositories lie
            hint = hint or f" Its parquet files lie in {Path(folder, 'data')}: name that folder."
        raise ValueError(
            f"{folder} holds neither {split}-*.parquet nor a data set written by save_to_disk.{hint}"
        ) from error
    if hasattr(rows, "keys"):
        if split not in rows:
            raise ValueError(f"{folder} holds the splits {', '.join(rows)}; {split!r} is none of them.")
        return rows[split]
    said = rows["split"][:] if "split" in rows.column_names else []
    if not set(said) - {None, split}:
        return rows
    if split not in said:
        raise ValueError(
            f"the rows of {folder} are of split {', '.join(sorted(map(str, set(said))))}, and {split!r} was asked for; "
            "name theirs."
        )
    return rows.select([number for number, each in enumerate(said) if each == split])
