"""Rows to train on, of one data set or several: shuffled, sampled, and without the images of any held-out split.

RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO divide the same COCO images in different ways: an image that one trains on is
in the val split of another. Rows refer to their images by path, so a mixture holds an image as often as the disk does.
Knows nothing about models or trainers.
"""

import json
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Image, IterableDataset, concatenate_datasets

from .files import read_json
from .identity import check_sample_ids
from .refcoco import SPLIT_BY, held_out_images
from .registry import first_rows, takes_streaming
from .rows import FEATURES, leave_images_encoded

HELD_OUT = "held_out.json"
"""In a folder of `segcompass prepare-data` or `write-traces`: which images the data set's other splits hold."""
COCO_FILE = re.compile(r"(?:COCO_\w+?_)?(\d{12})\.jpg$")


@dataclass(frozen=True)
class Part:
    """One data set of a mixture.

    Raises:
        ValueError: a size or weight below 0, both of them, or no data set.

    Example:
        Part("refcoco", root="REFER", image_dir="train2014", weight=2)
    """

    dataset: str
    """see `load_rows`, as for the last four."""
    num_samples: int | None = None
    """exactly so many rows, drawn by the seed; 0 takes none, and only keeps its held-out images out of the others."""
    weight: float | None = None
    """its share of the mixture, relative to the other weights; a set that is too small for it is drawn repeatedly."""
    split: str | None = None
    """which split; None takes the mixture's."""
    root: str | None = None
    image_dir: str | None = None
    split_by: str | None = None
    unit: str = "sentence"

    def __post_init__(self):
        if not isinstance(self.dataset, str) or not self.dataset:
            raise ValueError(f"a part of the mixture names the dataset {self.dataset!r}; give a name or a path.")
        for name, kind in (("num_samples", int), ("weight", (int, float))):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, kind) or not value >= 0):
                raise ValueError(f"{self.dataset!r} has {name}={value!r} in the mixture; give a number of at least 0.")
        if self.num_samples is not None and self.weight is not None:
            raise ValueError(f"{self.dataset!r} has both num_samples and weight in the mixture; give one of them.")


@dataclass
class Mixture:
    """Rows to train on, and how they came about."""

    rows: Dataset | IterableDataset
    """in the order of the seed."""
    table: list[dict[str, Any]] = field(default_factory=list)
    """one dict for each data set: "dataset", "split", "rows", "images", "removed" (rows on held-out images), "removed
    images", "taken", "passes" (how often a row is taken, on average)."""


def mix_rows(
    dataset: str | os.PathLike | Sequence[Any],
    split: str = "train",
    seed: int = 0,
    num_samples: int | None = None,
    streaming: bool = False,
    held_out: Dataset | None = None,
) -> Mixture:
    """Rows to train on.

    Args:
        dataset: what `load_rows` takes; or a list of such and of mappings with the fields of `Part`; or that list as
            JSON text.
        split: which split of each data set.
        seed: of the drawing and of the order, and of the procedural scenes.
        num_samples: how many rows in all, drawn by the seed and not the first; None takes all. Parts with a size have
            theirs, the others share the rest by weight; without weights they share it by how many rows they have.
        streaming: data sets that are made while they are read, as the scenes are, are not stored first.
        held_out: rows that will be evaluated on; their images are trained on in no data set.

    Returns:
        The rows and the table.

    Raises:
        ValueError: a part that is wrong, too few rows for a size, images that do not fit between data sets, sample ids
            that repeat, a mixture with weights and no number, or no row left.
        FileNotFoundError: images of a data set are not on disk.
        Exception: whatever a data set's loader raises.

    Example:
        mixture = mix_rows(["data/refcoco", {"dataset": "data/grefcoco", "weight": 2}], num_samples=100_000)
    """
    from . import load_rows  # here, since the package imports this file

    parts = read_parts(dataset)
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples={num_samples} is below 1; ask for at least one row, or None for all.")
    only = parts[0]
    if len(parts) == 1 and streaming and takes_streaming(only.dataset):
        wanted = only.num_samples or num_samples
        return Mixture(load_rows(only.dataset, only.split or split, seed, wanted, streaming=True))
    loaded = [_load(load_rows, part, split, seed, num_samples, len(parts) > 1) for part in parts]
    streamed = [part.dataset for part, rows in zip(parts, loaded, strict=True) if isinstance(rows, IterableDataset)]
    if streamed and len(parts) == 1 and held_out is None:
        return Mixture(first_rows(loaded[0].shuffle(seed, buffer_size=1000), num_samples))
    if streamed:
        raise ValueError(
            f"{', '.join(streamed)} streams its rows, which can be neither mixed nor compared with held-out rows; "
            "return a datasets.Dataset."
        )
    tables = [_images_of(rows) for rows in loaded]
    _check_images(parts, tables)
    kept, table = [], []
    away = [_held_out_of(part, rows, len(parts) > 1) for part, rows in zip(parts, loaded, strict=True)]
    evaluated = _keys(_images_of(held_out)) if held_out is not None else pa.array([], pa.string())
    for number, (part, images) in enumerate(zip(parts, tables, strict=True)):
        others = [ids for other, (name, ids) in enumerate(away) if other != number and name != away[number][0]]
        keys = _keys(images)
        excluded = pc.is_in(keys, pa.concat_arrays([evaluated, *(pa.array(ids, pa.string()) for ids in others)]))
        kept.append(np.flatnonzero(~excluded.to_numpy(zero_copy_only=False)))
        table.append(
            {
                "dataset": part.dataset,
                "split": part.split or split,
                "rows": len(images),
                "images": pc.count_distinct(keys).as_py(),
                "removed": len(images) - len(kept[-1]),
                "removed images": pc.count_distinct(keys.filter(excluded)).as_py(),
            }
        )
    sizes = _sizes(parts, [len(indices) for indices in kept], num_samples)
    offset, chosen = 0, []
    for part, rows, indices, size, line in zip(parts, loaded, kept, sizes, table, strict=True):
        chosen.append(offset + _draw(indices, size, np.random.default_rng([seed, zlib.crc32(part.dataset.encode())])))
        offset += len(rows)
        line |= {"taken": size, "passes": round(size / max(1, len(indices)), 2)}
    order = np.concatenate(chosen)
    if not len(order):
        why = "; ".join(
            f"of {line['dataset']} {line['split']} {line['removed']} of {line['rows']} rows are on images that are "
            f"evaluated on or another data set holds out, and {line['taken']} are taken"
            for line in table
        )
        raise ValueError(
            f"no row is left to train on: {why}. Evaluate on other images (--eval-dataset, --eval-split), or take more "
            "rows (num_samples)."
        )
    np.random.default_rng(seed).shuffle(order)
    together = _concatenate(parts, loaded)
    _check_ids(together)
    return Mixture(together.select(order), table)


def read_parts(dataset: str | os.PathLike | Sequence[Any]) -> list[Part]:
    """The data sets that a recipe or an option names.

    Args:
        dataset: see `mix_rows`.

    Returns:
        At least one part.

    Raises:
        ValueError: an empty list, text that is no JSON, or a part with a field that does not exist.

    Example:
        >>> [part.weight for part in read_parts('["scenes", {"dataset": "mine.jsonl", "weight": 2}]')]
        [None, 2]
    """
    if isinstance(dataset, str) and dataset.lstrip().startswith("["):
        try:
            dataset = json.loads(dataset)
        except ValueError as error:
            raise ValueError(f"the dataset {dataset!r:.200} begins as a list, but is no JSON: {error}.") from error
    listed = [dataset] if isinstance(dataset, (str, os.PathLike)) else list(dataset or ())
    if not listed:
        raise ValueError("the dataset is an empty list; name at least one data set.")
    known = [each.name for each in fields(Part)]
    parts = []
    for given in listed:
        if isinstance(given, (str, os.PathLike)):
            given = {"dataset": str(given)}
        if not isinstance(given, Mapping) or "dataset" not in given or not set(given) <= set(known):
            raise ValueError(
                f"a part of the mixture is {given!r:.200}; give a name, or a mapping with dataset and any of "
                f"{', '.join(known[1:])}."
            )
        parts.append(Part(**given))
    return parts


def report(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """A mixture's table as lines of text.

    Args:
        table: `Mixture.table`; [] of a streamed data set.

    Returns:
        One line for each data set.
    """
    return [
        f"{line['dataset']} {line['split']}: {line['taken']:,} of {line['rows']:,} rows on {line['images']:,} images"
        + (f", {line['passes']:g} passes" if line["passes"] > 1 else "")
        + (
            f"; {line['removed']:,} rows on {line['removed images']:,} held-out images are removed"
            if line["removed"]
            else ""
        )
        for line in table
    ]


def note_held_out(folder: Path, name: str, root: str | os.PathLike, split_by: str | None) -> None:
    """Write into a folder which images its data set's other splits hold.

    Args:
        folder: of the rows.
        name: of the data set, of the RefCOCO family.
        root: see `load_refcoco`.
        split_by: see `load_refcoco`.

    Raises:
        FileNotFoundError: the refs are missing.
        ValueError: they are damaged.
    """
    note = {"name": name, "split_by": split_by or SPLIT_BY[name][0], "images": held_out_images(root, name, split_by)}
    from segcompass.modeling_segcompass.whole_files import write_whole  # here, since its package brings torch along

    write_whole(folder / HELD_OUT, json.dumps(note))


# -- the parts ---------------------------------------------------------------------------------------------------------


def _load(
    load_rows: Callable[..., Any], part: Part, split: str, seed: int, num_samples: int | None, mixed: bool
) -> Dataset | IterableDataset:
    """All rows of a part, encoded; of procedural data sets as many as are wanted."""
    named = {name: getattr(part, name) for name in ("root", "split_by", "unit", "image_dir")}
    drawn = takes_streaming(part.dataset)
    wanted = (part.num_samples or num_samples) if drawn else None
    if drawn and wanted is None:
        raise ValueError(f"{part.dataset!r} draws its rows as they are wanted; say how many, with num_samples.")
    try:
        return leave_images_encoded(load_rows(part.dataset, part.split or split, seed, wanted, **named))
    except (ValueError, OSError) as error:
        if not mixed:
            raise
        raise type(error)(f"{part.dataset!r}, a part of the mixture: {error}") from error


def _images_of(rows: Dataset) -> pa.Table:
    """Columns dataset, image_id, height, width, path and name of the rows; null where rows have no such column.

    `path` is that of a file on disk, `name` what the file is or was called before it was embedded.
    """
    rows = leave_images_encoded(rows)
    names = {"dataset": pa.string(), "image_id": pa.string(), "height": pa.int32(), "width": pa.int32()}
    there = [name for name in (*names, "image") if name in rows.column_names]
    table = rows.select_columns(there).with_format("arrow")[:]
    columns = {
        name: table.column(name).combine_chunks().cast(kind) if name in there else pa.nulls(len(table), kind)
        for name, kind in names.items()
    }
    columns |= {"path": pa.nulls(len(table), pa.string()), "name": pa.nulls(len(table), pa.string())}
    if isinstance(rows.features.get("image"), Image):
        image = table.column("image").combine_chunks()
        embedded = pc.is_valid(pc.struct_field(image, "bytes"))
        columns["name"] = pc.struct_field(image, "path")
        columns["path"] = pc.if_else(embedded, columns["path"], columns["name"])
    return pa.table(columns)


def _keys(images: pa.Table) -> pa.Array:
    """What tells images apart across data sets: the COCO image, or the file; text."""
    names, ids = (images.column(name).combine_chunks() for name in ("dataset", "image_id"))
    of_coco = pc.fill_null(pc.is_in(names, pa.array(list(SPLIT_BY))), False)
    keys = pc.binary_join_element_wise("coco", ids, ":")
    if not pc.all(of_coco).as_py():
        paths, files = (images.column(name).combine_chunks().dictionary_encode() for name in ("path", "name"))
        of_file = [f"file:{path}" for path in paths.dictionary.to_pylist()]
        named = [_coco_key(path) for path in files.dictionary.to_pylist()]
        own = pc.binary_join_element_wise(names, ids, ":")  # of embedded images: apart within one data set
        found = [pa.array(named, pa.string()).take(files.indices), pa.array(of_file, pa.string()).take(paths.indices)]
        keys = pc.if_else(of_coco, keys, pc.coalesce(*found, own))
    return keys


def _coco_key(path: str) -> str | None:
    """The key of a file with COCO's name; None for other files."""
    found = COCO_FILE.search(path)
    return f"coco:{int(found[1])}" if found else None


def _held_out_of(part: Part, rows: Dataset, mixed: bool) -> tuple[str, list[str]]:
    """(which division into splits this is, keys of the images of its splits but train)."""
    name, folder = part.dataset, Path(part.dataset)
    if not mixed:
        return name, []
    if name in SPLIT_BY:
        found = held_out_images(part.root or "", name, part.split_by)
        return f"{name} {part.split_by or SPLIT_BY[name][0]}", _coco_keys(found)
    if (folder / HELD_OUT).is_file():
        note = read_json(folder / HELD_OUT)
        return f"{note['name']} {note['split_by']}", _coco_keys(note["images"])
    names = rows.unique("dataset") if "dataset" in rows.column_names else []
    family = sorted({each for each in names if each in SPLIT_BY})
    if family:
        raise ValueError(
            f"{part.dataset!r} holds rows of {', '.join(family)}, but no {HELD_OUT} says which images its val and test "
            "splits have, and another part may train on them; convert it again with `segcompass prepare-data`, or mix "
            f"{{dataset: {family[0]}, root: …}} itself."
        )
    return name, []


def _coco_keys(images: Mapping[str, Sequence[int]]) -> list[str]:
    return [f"coco:{number}" for ids in images.values() for number in ids]


def _check_images(parts: Sequence[Part], tables: Sequence[pa.Table]) -> None:
    """Raises FileNotFoundError for images that are not on disk, ValueError for one of two sizes."""
    for part, images in zip(parts, tables, strict=True):
        paths = [Path(path) for path in pc.unique(images.column("path")).to_pylist() if path and "::" not in path]
        missing = [path for path in paths if not path.exists()]
        if missing:
            raise FileNotFoundError(
                f"{part.dataset!r}: {len(missing)} of its {len(paths)} images are not on disk, such as {missing[0]}; "
                "put them there, or make the data set again with the folder where they are (--image-dir)."
            )
    sizes = pa.concat_tables(
        pa.table(
            {
                "key": _keys(images),
                "height": images.column("height").combine_chunks(),
                "width": images.column("width").combine_chunks(),
                "part": pa.array([number] * len(images), pa.int32()),
            }
        )
        for number, images in enumerate(tables)
    )
    sizes = sizes.filter(pc.starts_with(sizes["key"], "coco:"))
    extremes = [(name, how) for name in ("height", "width", "part") for how in ("min", "max")]
    found = sizes.group_by("key").aggregate(extremes)
    differ = pc.or_(
        pc.not_equal(found["height_min"], found["height_max"]), pc.not_equal(found["width_min"], found["width_max"])
    )
    for line in found.filter(differ).slice(0, 1).to_pylist():
        both = " and ".join(sorted({parts[line["part_min"]].dataset, parts[line["part_max"]].dataset}))
        raise ValueError(
            f"image {line['key'].removeprefix('coco:')} of COCO has {line['height_min']} x {line['width_min']} and "
            f"{line['height_max']} x {line['width_max']} pixels (height x width) in {both}; one of them was made on "
            "other pictures than COCO's own."
        )


# -- how many of each --------------------------------------------------------------------------------------------------


def _sizes(parts: Sequence[Part], there: Sequence[int], num_samples: int | None) -> list[int]:
    """How many rows of each part are taken. Raises ValueError."""
    for part, count in zip(parts, there, strict=True):
        if part.num_samples is not None and part.num_samples > count:
            raise ValueError(
                f"{part.dataset!r} has {count} rows to train on, but num_samples={part.num_samples} of it are wanted; "
                "ask for fewer, or give it a weight, by which rows are drawn repeatedly."
            )
    fixed = sum(part.num_samples or 0 for part in parts)
    shares = [index for index, part in enumerate(parts) if part.num_samples is None]
    sizes = [part.num_samples or 0 for part in parts]
    if any(part.weight is not None for part in parts):
        if num_samples is None:
            raise ValueError("the mixture has weights, but num_samples says not how many rows in all; give it.")
        weights = [1.0 if (weight := parts[index].weight) is None else float(weight) for index in shares]
        weights = [weight * (there[index] > 0) for weight, index in zip(weights, shares, strict=True)]
        wanted = num_samples - fixed
    else:
        weights = [float(there[index]) for index in shares]
        wanted = sum(there[index] for index in shares)
        wanted = wanted if num_samples is None else min(wanted, num_samples - fixed)
    if wanted < 0:
        raise ValueError(
            f"the sizes of the mixture's parts add up to {fixed}, more than num_samples={num_samples}; raise it."
        )
    if sum(weights):
        for index, count in zip(shares, _apportion(weights, wanted), strict=True):
            sizes[index] = count
    return sizes


def _apportion(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in the proportion of the weights, which add up to the total (largest remainders)."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: (counts[index] - exact[index], index))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def _draw(indices: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """So many of the indices: each as often as any other, and the odd ones by chance."""
    whole, rest = divmod(size, max(1, len(indices)))
    return np.concatenate([np.tile(indices, whole), rng.choice(indices, rest, replace=False)]).astype(np.int64)


def _concatenate(parts: Sequence[Part], loaded: Sequence[Dataset]) -> Dataset:
    """All rows, with the columns that all have. Raises ValueError."""
    if len(loaded) == 1:
        return loaded[0]
    features = leave_images_encoded(Dataset.from_dict({name: [] for name in FEATURES}, features=FEATURES)).features
    same = []
    for part, rows in zip(parts, loaded, strict=True):
        missing = [name for name in FEATURES if name not in rows.column_names]
        if missing:
            raise ValueError(f'{part.dataset!r} has no column {", ".join(missing)}; see README, "Rows".')
        rows = rows.select_columns(list(FEATURES))
        try:
            same.append(rows if rows.features == features else rows.cast(features))
        except (ValueError, TypeError, pa.ArrowInvalid) as error:
            raise ValueError(f"{part.dataset!r} has columns of other types than the rows' schema: {error}") from error
    return concatenate_datasets(same)


def _check_ids(rows: Dataset) -> None:
    """Raises ValueError for a sample id of two different samples."""
    if "sample_id" not in rows.column_names:
        return  # the trainers say what rows need
    ids = rows.select_columns(["sample_id"]).with_format("arrow")[:].column("sample_id")
    if pc.count_distinct(ids).as_py() < len(ids):
        check_sample_ids(rows, "the mixture")
