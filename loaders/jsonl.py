"""Data of one's own: a JSONL file with one sample per line."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features
from PIL import Image

from .files import inside_folder, need, read_jsonl
from .jsonl_checks import (
    MASK_KEYS,
    Agreement,
    check_different,
    check_holes,
    check_keys,
    check_place,
    check_size,
    names_alike,
)
from .masks import has_pixels, read_mask, read_polygons
from .rows import FEATURES, INSTANCES, check_reasoning, reserved_token, target_kind, to_dataset


def load_jsonl(
    path: str | os.PathLike,
    split: str = "train",
    num_samples: int | None = None,
    image_dir: str | os.PathLike | None = None,
) -> Dataset:
    """Rows from a JSONL file.

    A line is {"image": file, "instruction": str} and exactly one of
        "masks"     list, one per instance: an RLE dict, rows of 0 and 1, or a mask file
        "polygons"  list, one per instance: a polygon [x0, y0, x1, y1, ...] or [[x0, y0], [x1, y1], ...], or a list of
                    them that are united
        "rle"       an RLE dict or a list of them, compressed or not
        "mask"      a mask file, or a list of them, one per instance: what is not 0 (black) is inside
    ([] says that nothing is meant; a mask without a pixel is refused). It may have "ignore" (an RLE dict or a mask
    file), "sample_id", "image_id", "dataset", "split", "reasoning", "kind" and "instances"; null and "" are as good as
    absent, for these and for the four above. docs/data.md says what a mask file may hold. Other keys are left alone,
    but for those that are nearly one of these, and for a "height" and "width" that are not the image's.

    "instances" lists all things in the image, for the white box's criteria: each {"category": str} with its mask as one
    entry of "polygons", "rle" or "mask", and maybe "expressions" (texts that mean it alone) and "crowd" (true).

    Files are relative to the JSONL's folder or to `image_dir`, and may not lie outside it.

    Args:
        path: the JSONL file, in UTF-8.
        split: name of the split; lines that name another are left out.
        num_samples: the first so many rows, or None for all.
        image_dir: the folder of the images and mask files; None takes the JSONL's.

    Returns:
        Dataset with the columns of `loaders.rows.FEATURES`, and of `loaders.rows.INSTANCES` where a line has
        instances; `sample_id` is NAME-LINE where a line has none.

    Raises:
        FileNotFoundError: the file, an image or a mask file is missing.
        ValueError: a line that is no JSON, lacks a key, or whose masks do not fit its image; lines that do not agree on
            splits and ids. The line is named.

    Example:
        rows = load_jsonl("mine.jsonl", "train")
    """
    path = need(Path(path), "give a file with one JSON object per line.").resolve()
    folder = path.parent if image_dir is None else need(Path(image_dir), "`image_dir` holds the images.").resolve()
    named, instances, _ = _look_over(path, folder)
    files = [path, *(file for file in named if file.is_file())]
    arguments = {"path": path, "split": split, "folder": folder, "instances": instances}
    features = Features({**FEATURES, **INSTANCES}) if instances else FEATURES
    return to_dataset(_rows, arguments, files, split, num_samples, features=features)


def jsonl_splits(path: str | os.PathLike) -> list[str]:
    """The splits that the lines of a JSONL name.

    Args:
        path: the file.

    Returns:
        In the order of the file; [] where no line names one.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: a line that is no JSON, or lines that do not agree on their splits.

    Example:
        jsonl_splits("mine.jsonl")  # ["train", "val"]
    """
    path = need(Path(path), "give a file with one JSON object per line.").resolve()
    return _look_over(path, path.parent)[2]


def _look_over(path: Path, folder: Path) -> tuple[list[Path], bool, list[str]]:
    """The files that a JSONL names, each once (rows are made anew when one has changed); whether it has instances; and
    its splits. Raises ValueError."""
    named: set[str] = set()
    instances = False
    lines = Agreement()
    for number, line in read_jsonl(path):
        try:
            check_keys(_filled(line))
            lines.split(_filled(line).get("split"), number)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        given = [line.get(name) for name in ("image", "ignore", "mask", "masks")]
        if isinstance(things := line.get("instances"), list):
            instances = True
            given += [thing.get("mask") for thing in things if isinstance(thing, dict)]
        for value in given:
            named |= {each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)}
    return [folder / name for name in sorted(named) if "\0" not in name and len(name) < 4096], instances, lines.splits


def _filled(line: dict) -> dict:
    """A line without its empty fields: null and "" are as good as absent, and so is the NaN that tables write."""
    return {name: value for name, value in line.items() if not (value is None or value == "" or value != value)}


def _rows(path: Path, split: str, folder: Path, instances: bool) -> Iterator[dict]:
    others: set[str] = set()
    found = False
    lines = Agreement()
    for number, line in read_jsonl(path):
        try:
            row = _row(line, path, number, split, folder)
            if row is not None:
                lines.sample(row["sample_id"], number)
                lines.image(row["image_id"], Path(row["image"]["path"]), number)
            if row is not None and instances:
                things, image = line.get("instances"), Path(row["image"]["path"])
                row["instances"] = _things(things, image, folder, row["height"], row["width"])
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path}, line {number}: {error}") from error
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        if row is None:
            others.add(str(line.get("split")))
        else:
            found = True
            yield row
    if not found:
        named = f"its lines have split {', '.join(sorted(others))}; name one of them" if others else "it is empty"
        raise ValueError(f"{path} has no usable rows of split {split!r}: {named}.")


def _row(given: dict, path: Path, number: int, split: str, folder: Path) -> dict | None:
    from segcompass.modeling_segcompass.images import upright_size  # here, since it brings torch along

    given = _filled(given)
    if str(given.get("split", split)) != split:
        return None
    for key in ("image", "instruction"):
        if key in given and not isinstance(given[key], str):
            raise ValueError(f"{key!r} must be text; got a {type(given[key]).__name__}.")
        if not given.get(key, "").strip():
            raise ValueError(f"{key!r} is missing or blank.")
    for key, value in given.items():
        if isinstance(value, str) and not value.isascii() and value != value.encode("utf-8", "replace").decode("utf-8"):
            raise ValueError(f"{key!r} holds half of a character (a lone surrogate); write the text anew.")
    if token := reserved_token(given["instruction"]):
        raise ValueError(f"the instruction holds {token!r}, which only responses have; remove it.")
    reasoning = given.get("reasoning")
    if not isinstance(reasoning, (str, type(None))):
        raise ValueError(f"'reasoning' must be text; got a {type(reasoning).__name__}.")
    reasoning = reasoning if (reasoning or "").strip() else None
    check_reasoning(reasoning)
    for key in ("sample_id", "image_id", "dataset", "kind"):
        if isinstance(given.get(key), (dict, list, float, bool)):
            raise ValueError(f"{key!r} must be text or a whole number; got {given[key]!r:.100}.")
    image = _file(folder, given["image"])
    height, width = upright_size(image)
    try:
        check_size(given, height, width)
    except ValueError as error:
        raise ValueError(f"{error}{_turned(image, height, width)}") from error
    masks = _instances(given, image, folder, height, width)
    ignore = _read(given["ignore"], folder, height, width) if given.get("ignore") else None
    return {
        "image": {"path": str(image), "bytes": None},
        "image_id": str(given.get("image_id", image.relative_to(folder).as_posix())),
        "sample_id": str(given.get("sample_id", f"{path.stem}-{number}")),
        "dataset": str(given.get("dataset", path.stem)),
        "split": split,
        "instruction": given["instruction"],
        "reasoning": reasoning,
        "masks": masks,
        "ignore": ignore if ignore and has_pixels(ignore) else None,
        "height": height,
        "width": width,
        "kind": str(given.get("kind", target_kind(len(masks)))),
    }


def _things(given: Any, image: Path, folder: Path, height: int, width: int) -> list[dict] | None:
    """A line's instances, None where it has none. Raises ValueError."""
    if given is None or given == "":
        return None
    if not isinstance(given, list):
        raise ValueError("'instances' must be a list with one entry per thing in the image ([] for none).")
    found = []
    for number, each in enumerate(given, 1):
        if not isinstance(each, dict) or not isinstance(each.get("category"), str) or not each["category"].strip():
            raise ValueError(f"instance {number} has no 'category': give its name, such as \"mug\".")
        each = _filled(each)
        said, keys = each.get("expressions") or [], [key for key in MASK_KEYS[1:] if key in each]
        if not isinstance(said, list) or not all(isinstance(text, str) for text in said):
            raise ValueError(f"instance {number}: 'expressions' must be a list of texts.")
        if len(keys) != 1:
            raise ValueError(f"instance {number} needs exactly one of {', '.join(MASK_KEYS[1:])}; got {keys or None}.")
        try:
            (mask,) = _instances({keys[0]: [each[keys[0]]]}, image, folder, height, width)
        except ValueError as error:
            raise ValueError(f"instance {number}: {error}") from error
        crowd = each.get("crowd", False)
        if not isinstance(crowd, bool) or each.get("iscrowd", crowd) != crowd:
            key = "crowd" if "crowd" in each else "iscrowd"
            raise ValueError(f"instance {number}: {key!r} is {each[key]!r}; write 'crowd': true or false.")
        found.append({"category": each["category"].strip(), "expressions": said, "crowd": crowd, "mask": mask})
    return found


def _file(folder: Path, given: str) -> Path:
    """A file that a line names. Raises FileNotFoundError or ValueError."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", given):
        raise ValueError(f"{given[:200]!r} is an address, and lines name files; download it first.")
    hint = " Folders are separated by /." if "\\" in given else ""
    path = inside_folder(folder, given)
    if not path.exists():
        hint += names_alike(path)
    return need(path, f"paths are relative to the JSONL's folder.{hint}")


def _read(mask: Any, folder: Path, height: int, width: int) -> dict:
    """`read_mask` of a mask file inside the folder, or of another form. Raises as `read_mask`."""
    return read_mask(_file(folder, mask) if isinstance(mask, str) else mask, height, width)


def _instances(given: dict, image: Path, folder: Path, height: int, width: int) -> list[dict]:
    """The masks of a line as RLEs. Raises ValueError."""
    keys = [key for key in MASK_KEYS if key in given]
    if len(keys) != 1:
        raise ValueError(
            f"give exactly one of {', '.join(MASK_KEYS)} ([] for no target); got {', '.join(keys) or None}, in a line "
            f"of {', '.join(map(str, given))}."
        )
    value = given[keys[0]]
    if keys[0] in ("rle", "mask") and not isinstance(value, list):
        value = [value]
    if not isinstance(value, list):
        raise ValueError(f"{keys[0]!r} must be a list with one entry per instance.")
    if keys[0] == "polygons" and len(value) > 2 and all(len(_numbers(each)) <= 2 for each in value):
        raise ValueError(
            f"'polygons' has one entry per instance, and here each entry is a number or a point: {value[:3]!r:.60}...; "
            "put the polygon in brackets once more: [[x0, y0, x1, y1, ...]]."
        )
    masks = []
    for number, each in enumerate(value, 1):
        polygon = keys[0] == "polygons"
        try:
            mask = read_polygons(each, height, width) if polygon else _read(each, folder, height, width)
        except ValueError as error:
            raise ValueError(f"{error}{_turned(image, height, width)}") from error
        if mask is None or not has_pixels(mask):
            raise ValueError(
                f"{'polygon' if polygon else 'mask'} {number} has no pixel inside the image of {height} x {width}; a "
                "mask without a pixel is no instance: leave it out, and give [] where nothing is meant."
                + _turned(image, height, width)
            )
        if polygon and _fits_lying_down(_numbers(each), height, width) and (why := _turned(image, height, width)):
            raise ValueError(f"polygon {number} reaches outside the image of {height} x {width} (height x width).{why}")
        if polygon:
            check_place(f"polygon {number}", _numbers(each), height, width)
            parts = [read_polygons(part, height, width) for part in each] if _united(each) else []
            check_holes(f"polygon {number}", [part for part in parts if part])
        masks.append(mask)
    check_different(masks)
    return masks


def _united(given: list) -> bool:
    """Whether an entry of "polygons" is a list of polygons: flat ones, or those of points."""
    return all(isinstance(each, (list, tuple)) and len(each) > 2 for each in given)


def _numbers(given: Any) -> list:
    """What is in lists of lists, one after the other."""
    return [number for each in given for number in _numbers(each)] if isinstance(given, (list, tuple)) else [given]


def _fits_lying_down(polygon: list[float], height: int, width: int) -> bool:
    """Whether a polygon reaches well outside its image, but not outside one of exchanged sides."""
    right, bottom = max(polygon[::2]), max(polygon[1::2])
    return (right > 1.02 * width or bottom > 1.02 * height) and right <= height and bottom <= width


def _turned(image: Path, height: int, width: int) -> str:
    """The end of an error about masks of an image that its EXIF orientation turns; "" for others."""
    with Image.open(image) as stored:
        if stored.size == (width, height):
            return ""
    return (
        f" The photograph is stored as {width} x {height} and shown as {height} x {width} (height x width), turned as "
        "its EXIF orientation says: masks and coordinates belong to it as it is shown. Were they made on the stored "
        "pixels, turn them, or save the photograph upright."
    )
