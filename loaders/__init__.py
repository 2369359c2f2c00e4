"""Loaders: every one returns a `datasets.Dataset` in the one row schema (see the README)."""

from pathlib import Path

from datasets import load_dataset, load_from_disk

from .hub import load_parquet
from .jsonl import load_jsonl
from .obelics import load_obelics
from .reasonseg import load_reasonseg
from .refcoco import SPLIT_BY, load_refcoco
from .scenes import NUM_SHARDS, load_scenes

BENCHMARKS = (*SPLIT_BY, "reasonseg")
METRIC = str(Path(__file__).resolve().parent / "reasoning_segmentation")
"""Where `evaluate.load(METRIC)` finds the metric."""


def load_rows(
    dataset,
    split="train",
    seed=0,
    num_samples=1000,
    streaming=False,
    root=None,
    split_by=None,
    unit="sentence",
    image_dir=None,
):
    """Rows by name.

    Args:
        dataset: "scenes" (procedural), a name of `BENCHMARKS`, "obelics", a .jsonl file, or a folder that
            `examples/prepare_data.py` or `datasets.Dataset.save_to_disk` wrote.
        split, num_samples: the first so many rows of a split; None means all (not for scenes).
        seed: of the scenes.
        streaming: an IterableDataset instead.
        root, split_by, unit, image_dir: of the benchmarks and OBELICS; see their loaders.

    Raises:
        ValueError: none of these, or a benchmark without its root.
    """
    if dataset == "scenes":
        return load_scenes(split=split, seed=seed, num_samples=num_samples, streaming=streaming)
    if dataset in (*BENCHMARKS, "obelics") and root is None:
        raise ValueError(f"dataset {dataset!r} needs its root: the folder with the files its authors released.")
    if dataset == "obelics":
        rows = load_obelics(root, image_dir, num_samples)
    elif dataset == "reasonseg":
        rows = load_reasonseg(root, split, unit, num_samples)
    elif dataset in BENCHMARKS:
        rows = load_refcoco(root, dataset, split_by, split, image_dir, unit, num_samples)
    elif str(dataset).endswith(".jsonl"):
        rows = load_jsonl(dataset, split, num_samples)
    else:
        rows = _load_folder(dataset, split)
        if num_samples is not None:
            rows = rows.select(range(min(num_samples, len(rows))))
    return rows.to_iterable_dataset(num_shards=min(NUM_SHARDS, len(rows))) if streaming else rows


def _load_folder(folder, split):
    """Rows that prepare_data.py or save_to_disk wrote. Raises ValueError."""
    if not Path(folder).is_dir():
        raise ValueError(
            f"dataset {folder!r} is neither 'scenes', one of {', '.join(BENCHMARKS)}, obelics, a .jsonl file, nor a "
            "folder written by prepare_data.py or Dataset.save_to_disk."
        )
    files = sorted(str(file) for file in Path(folder).glob(f"{split}-*.parquet"))
    if files:
        return load_dataset("parquet", data_files={split: files}, split=split)
    try:
        rows = load_from_disk(folder)
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds neither {split}-*.parquet nor a data set written by save_to_disk.") from error
    return rows[split] if hasattr(rows, "keys") else rows


__all__ = [
    "BENCHMARKS",
    "METRIC",
    "load_jsonl",
    "load_obelics",
    "load_parquet",
    "load_reasonseg",
    "load_refcoco",
    "load_rows",
    "load_scenes",
]
