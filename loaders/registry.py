"""Data sets by name: `LOADERS` is filled by `@register_loader` above the function that loads each.

A function of one's own needs no entry: its dotted path ("my_data.load") names its data set wherever one is named.
"""

import inspect
from collections.abc import Callable
from importlib import import_module

from datasets import Dataset, IterableDataset

from .rows import FEATURES, NUM_SHARDS

Loader = Callable[..., Dataset | IterableDataset]
"""A function that loads rows. It takes by name what it needs of `load_rows`' arguments: split, seed, num_samples (None
means all rows), streaming, root, split_by, unit, image_dir, instances. What has no default the user must give."""

LOADERS: dict[str, Loader] = {}
"""Name -> the function that loads the data set."""

MEANINGS = {"root": "the folder with the files its authors released"}
"""What an argument that a loader needs is, for errors."""


def register_loader(name: str) -> Callable[[Loader], Loader]:
    """Decorator: the function loads the data set of this name.

    Args:
        name: what `load_rows` and every `--dataset` call it.

    Returns:
        The decorator, which returns the function unchanged.

    Raises:
        ValueError: another function has the name.

    Example:
        @register_loader("street-signs")
        def load_street_signs(split: str = "train", num_samples: int | None = None) -> Dataset:
            return load_jsonl(f"signs/{split}.jsonl", split, num_samples)
    """
    if name in LOADERS:
        raise ValueError(f"a data set is registered as {name!r} already; choose another name.")

    def register(load: Loader) -> Loader:
        LOADERS[name] = load
        return load

    return register


def known_datasets() -> str:
    """What names a data set, for errors and help texts."""
    return (
        f"{', '.join(LOADERS)}, a .jsonl file, a folder written by prepare-data or Dataset.save_to_disk, or the dotted "
        "path of a function that returns rows (my_data.load)"
    )


def import_loader(path: str) -> Loader | None:
    """The function of a dotted path.

    Args:
        path: "package.module.function".

    Returns:
        The function; None when the text is no dotted path or there is no such module.

    Raises:
        ValueError: the module exists, but has no such function.
        Exception: whatever importing the module raises.
    """
    module, _, name = path.rpartition(".")
    if not all(part.isidentifier() for part in path.split(".")) or not module:
        return None
    try:
        load = getattr(import_module(module), name, None)
    except ModuleNotFoundError as error:
        if f"{module}.".startswith(f"{error.name}."):
            return None
        raise  # the module exists; what it imports does not
    if not callable(load):
        raise ValueError(f"dataset {path!r}: the module {module} has no function {name!r}; define it there.")
    return load


def call_loader(
    dataset: str, load: Loader, num_samples: int | None = None, streaming: bool = False, **options
) -> Dataset | IterableDataset:
    """Load a data set with those of the arguments that its function takes.

    Args:
        dataset: its name, for errors.
        load: its function.
        num_samples: the first so many rows, or None for all; taken here if the function does not.
        streaming: an IterableDataset instead; made here if the function does not.
        **options: the rest of `load_rows`' arguments. None leaves one to the function's default.

    Returns:
        The rows.

    Raises:
        ValueError: an argument that the function needs is None.
        TypeError: the function returned no data set.
    """
    takes = inspect.signature(load).parameters
    options = {name: value for name, value in options.items() if name in takes and value is not None}
    options |= {"num_samples": num_samples} if "num_samples" in takes else {}
    options |= {"streaming": streaming} if "streaming" in takes else {}
    for name, parameter in takes.items():
        if parameter.default is inspect.Parameter.empty and name not in options:
            meaning = MEANINGS.get(name, "give an option of that name, or its function a default for it")
            raise ValueError(f"dataset {dataset!r} needs its {name}: {meaning}.")
    rows = load(**options)
    if not isinstance(rows, (Dataset, IterableDataset)):
        raise TypeError(
            f"dataset {dataset!r}: its function returned a {type(rows).__name__}; it must return a datasets.Dataset "
            f"with the columns {', '.join(FEATURES)}."
        )
    rows = first_rows(rows, num_samples)
    if streaming and isinstance(rows, Dataset):
        return rows.to_iterable_dataset(num_shards=min(NUM_SHARDS, len(rows)))
    return rows


def first_rows(rows: Dataset | IterableDataset, num_samples: int | None) -> Dataset | IterableDataset:
    """The first `num_samples` rows, or as many as there are; None means all."""
    if num_samples is None or (isinstance(rows, Dataset) and len(rows) <= num_samples):
        return rows
    return rows.take(num_samples)


def takes_streaming(dataset: str) -> bool:
    """Whether a registered data set makes its rows while they are read, each by itself, as the scenes are drawn."""
    return dataset in LOADERS and "streaming" in inspect.signature(LOADERS[dataset]).parameters
