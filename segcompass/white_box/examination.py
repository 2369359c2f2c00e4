"""What the examinations of a data set share: reading its rows, and measuring them so that a killed run resumes."""

from collections.abc import Callable, Iterable
from typing import Any

from datasets import Dataset
from tqdm import tqdm

from segcompass.journal import Journal
from segcompass.loaders import load_rows


def read_rows(dataset: str, split: str, seed: int, num_samples: int) -> Dataset:
    """The rows to examine, see `load_rows`.

    Args:
        dataset: name, file or folder.
        split: of the data set.
        seed: of the scenes.
        num_samples: the first so many rows.

    Returns:
        The rows.

    Raises:
        ValueError: they cannot be loaded, or repeat a sample id: the records of two rows would become one.
    """
    try:
        rows = load_rows(dataset, split, seed, num_samples)
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"cannot load split {split!r} of {dataset!r}: {error}") from error
    different = len(set(rows["sample_id"]))
    if different < len(rows):
        raise ValueError(f"{dataset!r} repeats sample ids ({different} in {len(rows)} rows); make them unique.")
    return rows


def examine(
    journal: Journal,
    rows: Dataset,
    measure: Callable[[list[dict[str, Any]]], Iterable[dict[str, Any]]],
    batch_size: int,
) -> list[dict[str, Any]]:
    """Measure the rows that a journal does not hold yet.

    Args:
        journal: of the run.
        rows: all rows.
        measure: a batch of rows -> one record per row, with its `sample_id`.
        batch_size: rows measured at a time.

    Returns:
        The records of all rows, in their order.
    """
    todo = [index for index, name in enumerate(rows["sample_id"]) if name not in journal.records]
    with tqdm(total=len(rows), initial=len(rows) - len(todo), unit="sample", dynamic_ncols=True) as bar:
        for start in range(0, len(todo), batch_size):
            batch = [rows[index] for index in todo[start : start + batch_size]]
            journal.add(measure(batch))
            bar.update(len(batch))
    return [journal.records[name] for name in rows["sample_id"]]
