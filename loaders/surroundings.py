"""What else is in an image: the things that COCO's annotations name, with those that a row asks for marked.

The files are those of the RefCOCO family. Rows of other data sets name nothing; there only what is asked for is known.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from .arrow_files import without_collection
from .files import need, read_json
from .refcoco import all_refs, annotation_ids, refs_file


@dataclass(frozen=True)
class Thing:
    """One thing in an image.

    Example:
        Thing("dog", (10.0, 20.0, 60.0, 90.0), asked_for=True)
    """

    name: str | None
    """of its category; None where nobody said."""
    box: tuple[float, float, float, float]
    """left, top, right and bottom, in pixels."""
    asked_for: bool
    """whether the row is about it."""


Surroundings = Callable[[Mapping[str, Any]], list[Thing]]
"""row -> the things in its image; [] where nothing is known."""


def masks_alone(row: Mapping[str, Any]) -> list[Thing]:
    """What a row's masks alone say: where the things are that it asks for.

    Args:
        row: of the shared schema.

    Returns:
        One thing without a name per mask.
    """
    things = []
    for mask in row["masks"]:
        left, top, width, height = coco_mask.toBbox({**mask, "counts": mask["counts"].encode()}).tolist()
        things.append(Thing(None, (left, top, left + width, top + height), True))
    return things


def _without_outline(found: dict) -> dict:
    """An object of a COCO file without what takes most of the memory."""
    found.pop("segmentation", None)
    return found


def read_surroundings(
    root: str | os.PathLike, name: str, split_by: str | None = None, split: str = "train"
) -> Surroundings:
    """The things in the images of a data set of the RefCOCO family.

    Args:
        root: see `load_refcoco`, as for the others.
        name: of the data set.
        split_by: whose division into splits.
        split: whose rows will be asked for.

    Returns:
        A function of rows that `load_refcoco` made with any `unit`.

    Raises:
        FileNotFoundError: an annotation file is missing.
        ValueError: a damaged file.

    Example:
        things = read_surroundings("REFER", "refcoco")(rows[0])
    """
    refs, instances = refs_file(root, name, split_by), Path(root) / name / "instances.json"
    need(instances, "it lies beside the refs.")
    with without_collection():
        about = {
            str(ref["ref_id"]): (ref["image_id"], frozenset(annotation_ids(ref)))
            for ref in all_refs(refs)
            if ref["split"] == split
        }
        wanted = {image for image, _ in about.values()}
        content = read_json(instances, _without_outline)
        names = {each["id"]: each["name"] for each in content.get("categories", ())}
        there: dict[int, list[tuple[int, str | None, tuple[float, float, float, float]]]] = {}
        for each in content["annotations"]:
            if each["image_id"] in wanted and not each.get("iscrowd") and len(each.get("bbox") or ()) == 4:
                left, top, width, height = map(float, each["bbox"])
                place = (left, top, left + width, top + height)
                there.setdefault(each["image_id"], []).append((each["id"], names.get(each.get("category_id")), place))

    def find(row: Mapping[str, Any]) -> list[Thing]:
        image, targets = about.get(row["sample_id"].rsplit("-", 2)[-2], (None, frozenset()))
        things = [Thing(name, box, number in targets) for number, name, box in there.get(image, ())]
        if sum(thing.asked_for for thing in things) == len(row["masks"]):
            return things
        return [thing for thing in things if not thing.asked_for] + masks_alone(row)  # crowds, and what has no box

    return find
