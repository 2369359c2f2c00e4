"""What the examinations of a data set share: reading its rows, and measuring them so that a killed run resumes."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset
from tqdm import tqdm

from segcompass.journal import Journal
from segcompass.loaders import load_rows
from segcompass.loaders.refcoco import SPLIT_BY
from segcompass.loaders.scenes import STYLES

from .annotated_truth import AnnotatedTruths, label_rows
from .image_truth import Truths
from .scene_truth import SceneTruths


def read_rows(dataset: str, split: str, seed: int, num_samples: int, **options: Any) -> Dataset:
    """The rows to examine, see `load_rows`.

    Args:
        dataset: name, file or folder.
        split: of the data set.
        seed: of the scenes.
        num_samples: the first so many rows.
        **options: the rest of `load_rows`' arguments.

    Returns:
        The rows.

    Raises:
        ValueError: they cannot be loaded, or repeat a sample id: the records of two rows would become one.
    """
    try:
        rows = load_rows(dataset, split, seed, num_samples, **options)
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"cannot load split {split!r} of {dataset!r}: {error}") from error
    different = len(set(rows["sample_id"]))
    if different < len(rows):
        raise ValueError(f"{dataset!r} repeats sample ids ({different} in {len(rows)} rows); make them unique.")
    return rows


def annotated_rows(dataset: str, split: str, num_samples: int, **options: Any) -> Dataset:
    """Rows whose images are known: they carry all annotated things in them.

    Args:
        dataset: name, file or folder.
        split: of the data set.
        num_samples: the first so many rows.
        **options: root, image_dir and split_by of `load_rows`.

    Returns:
        The rows, with the columns of `loaders.rows.INSTANCES`.

    Raises:
        ValueError: they cannot be loaded, carry no instances or no images, or repeat a sample id.
    """
    rows = read_rows(dataset, split, 0, num_samples, instances=True, **options)
    if "instances" not in rows.column_names:
        raise ValueError(
            f"the rows of {dataset!r} do not say what else is in their images, and what a concept means is measured "
            f"against that. Use {' or '.join(map(repr, STYLES))}; {', '.join(SPLIT_BY)} with --root and --image-dir; "
            "coco with --root; a folder that `segcompass prepare-data … --instances` wrote; or a .jsonl file whose "
            "lines have 'instances' (docs/data.md)."
        )
    told = rows.select_columns(["instances", "sample_id"]).with_format("arrow")[:]
    silent = told.column("sample_id").filter(pc.is_null(told.column("instances"))).to_pylist()
    if silent:
        raise ValueError(
            f"{len(silent)} of {len(rows)} rows of {dataset!r} (split {split!r}) do not say what else is in their "
            f"image, such as {silent[0]!r}, and all of it would count as ground. Give each line the 'instances' of "
            "its image, also where another line of the same image has them ([] where there is nothing), or leave such "
            "lines out."
        )
    images = rows.select_columns(["image", "sample_id"]).with_format("arrow")[:]
    empty = [pc.is_null(pc.struct_field(images.column("image"), part)) for part in ("bytes", "path")]
    without = images.column("sample_id").filter(pc.and_(*empty)).to_pylist()
    if without:
        raise ValueError(f"{len(without)} rows of {dataset!r} have no image, such as {without[0]!r}; give --image-dir.")
    return rows


def truths_of(
    examined: Collection[str],
    dataset: str,
    label_split: str,
    held_out: str | None,
    seed: int,
    chosen: int,
    scored: int,
    **options: Any,
) -> Truths:
    """What is true of the images of a data set, and which others label the concepts.

    Args:
        examined: ids of the images that are examined; these label nothing.
        dataset: name, file or folder.
        label_split: whose images thresholds are chosen on; of scenes always "train".
        held_out: whose images F1 and lift are measured on; None takes the test split of scenes, and further images of
            `label_split` of other data.
        seed: of the scenes that label.
        chosen: how many images thresholds are chosen on.
        scored: how many F1 and lift are measured on.
        **options: see `annotated_rows`.

    Returns:
        The truths.

    Raises:
        ValueError: there are too few images to label concepts.
    """
    if dataset in STYLES:
        return SceneTruths(dataset, held_out or "test", seed, chosen, scored)

    def load(split: str, count: int) -> Dataset:
        return annotated_rows(dataset, split, count, **options)

    return AnnotatedTruths(*label_rows(load, label_split, held_out or label_split, chosen, scored, examined))


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
