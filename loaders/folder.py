"""Rows from a folder: the parquet files of a conversion, or a data set that was saved to disk."""

import os
from pathlib import Path

from datasets import Dataset, load_dataset, load_from_disk


def load_folder(folder: str | os.PathLike, split: str = "train") -> Dataset:
    """Rows that `segcompass prepare-data` or `datasets.Dataset.save_to_disk` wrote.

    Args:
        folder: holds SPLIT-*.parquet, or what save_to_disk wrote of a Dataset or a DatasetDict.
        split: which parquet files, or which part of a DatasetDict.

    Returns:
        The rows as they were written.

    Raises:
        ValueError: the folder holds neither.

    Example:
        rows = load_folder("data/refcoco", "val")
    """
    files = sorted(str(file) for file in Path(folder).glob(f"{split}-*.parquet"))
    if files:
        return load_dataset("parquet", data_files={split: files}, split=split)
    try:
        rows = load_from_disk(folder)
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds neither {split}-*.parquet nor a data set written by save_to_disk.") from error
    return rows[split] if hasattr(rows, "keys") else rows
