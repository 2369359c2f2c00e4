"""Data sets by name: every loader returns a `datasets.Dataset` of the one row schema (`rows.FEATURES`).

Knows nothing about models or trainers. The metric lies in the folder `reasoning_segmentation`.
"""

import os
from functools import partial
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from datasets import Dataset, IterableDataset

from .folder import load_folder
from .jsonl import load_jsonl
from .obelics import load_obelics
from .parquet import load_parquet
from .reasonseg import load_reasonseg
from .refcoco import SPLIT_BY, load_refcoco
from .registry import LOADERS, Loader, call_loader, import_loader, known_datasets, register_loader
from .scenes import load_scenes

for _module in iter_modules(__path__):  # a new file that registers a loader needs no mention here
    import_module(f"{__name__}.{_module.name}")

BENCHMARKS = (*SPLIT_BY, "reasonseg")
METRIC = str(Path(__file__).resolve().parent / "reasoning_segmentation")
"""Where `evaluate.load(METRIC)` finds the metric."""


def load_rows(
    dataset: str | os.PathLike,
    split: str = "train",
    seed: int = 0,
    num_samples: int | None = 1000,
    streaming: bool = False,
    root: str | os.PathLike | None = None,
    split_by: str | None = None,
    unit: str = "sentence",
    image_dir: str | os.PathLike | None = None,
    instances: bool = False,
) -> Dataset | IterableDataset:
    """Rows by name.

    Args:
        dataset: a name of `LOADERS`, a .jsonl file, a folder that `segcompass prepare-data` or
            `datasets.Dataset.save_to_disk` wrote, or the dotted path of a function that returns rows.
        split: which split.
        seed: seed of the procedural scenes; others ignore it.
        num_samples: the first so many rows, or None for all (the scenes need a number).
        streaming: an IterableDataset instead.
        root: of a benchmark or OBELICS: the folder with the files its authors released.
        split_by: of the RefCOCO family: whose division into splits.
        unit: of a benchmark: what one row is, see `load_refcoco`.
        image_dir: of the RefCOCO family and OBELICS: the folder of the images.
        instances: of the RefCOCO family: rows also carry all annotated things of their image. A .jsonl file and a
            folder carry them where they were written with them.

    Returns:
        The rows, with the columns of `rows.FEATURES`, and of `rows.INSTANCES` where they carry them.

    Raises:
        ValueError: no such data set, or one without an argument that it needs.
        Exception: whatever the data set's loader raises.

    Example:
        >>> load_rows("scenes", "val", num_samples=2)["kind"][:]
        ['comparison', 'extreme']
    """
    dataset, load = str(dataset), _loader(str(dataset))
    options = {"split": split, "seed": seed, "root": root, "split_by": split_by, "unit": unit, "image_dir": image_dir}
    options |= {"instances": True} if instances else {}
    return call_loader(dataset, load, num_samples, streaming, **options)


def _loader(dataset: str) -> Loader:
    """The function that loads a data set. Raises ValueError when there is none."""
    if dataset in LOADERS:
        return LOADERS[dataset]
    if dataset.endswith(".jsonl"):
        return partial(load_jsonl, dataset)
    if Path(dataset).is_dir():
        return partial(load_folder, dataset)
    if Path(dataset).is_file():
        raise ValueError(
            f"dataset {dataset!r} is a file, but no .jsonl: write your samples as one JSON object per line "
            "(docs/own_data.md). COCO's annotations are read by dataset 'coco', from the folder that holds them."
        )
    load = import_loader(dataset)
    if load is None:
        hub = ""
        if dataset.count("/") == 1 and not dataset.startswith((".", "/")):
            hub = (
                f" Of a data set on the Hub name a copy: hf download {dataset} --repo-type dataset --local-dir COPY, "
                "then COPY/data."
            )
        raise ValueError(f"dataset {dataset!r} is not known; give one of {known_datasets()}.{hub}")
    return load


__all__ = [
    "BENCHMARKS",
    "LOADERS",
    "METRIC",
    "known_datasets",
    "load_folder",
    "load_jsonl",
    "load_obelics",
    "load_parquet",
    "load_reasonseg",
    "load_refcoco",
    "load_rows",
    "load_scenes",
    "register_loader",
]
