"""COCO's instances as referring segmentation: of each image one row per category, "the cup" or "every cup".

COCO has no expressions. Its rows are for looking into a model (`segcompass white-box`) and for images of one's own that
are annotated in COCO's format.
"""

import os
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features

from .files import inside_folder, need, read_json
from .jsonl_checks import check_place
from .masks import coco_rle, packed_polygons
from .registry import register_loader
from .rows import FEATURES, INSTANCES, LeftOut, reserved_token, target_kind, to_dataset

FIELDS = {
    "categories": ("id", "name"),
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "segmentation"),
}
HINTS = {
    "categories": "",
    "images": " Each image needs its file, and the size that masks were made on.",
    "annotations": " A box alone is no mask: export masks from the labelling tool, or leave such annotations out.",
}


@register_loader("coco")
def load_coco(
    root: str | os.PathLike,
    split: str = "val2017",
    image_dir: str | os.PathLike | None = None,
    num_samples: int | None = None,
) -> Dataset:
    """Rows of a data set in COCO's layout.

    Args:
        root: holds annotations/instances_SPLIT.json and SPLIT/ with the images.
        split: such as "train2017" or "val2017".
        image_dir: the folder of the images, where it is another.
        num_samples: the first so many rows, or None for all.

    Returns:
        Dataset with the columns of `loaders.rows.FEATURES` and `loaders.rows.INSTANCES`; images in the order of the
        file, categories in the order of their first instance. `sample_id` is coco-SPLIT-IMAGE-CATEGORY. A category of
        which the image has a crowd is not asked for, since nobody told its instances apart. Instances without a pixel
        inside the image are left out, and counted in a warning.

    Raises:
        FileNotFoundError: the annotations, or images, are missing.
        ValueError: no COCO annotation file, a field that is missing, ids that do not fit, or a segmentation that cannot
            be read, or is none (a box alone); the annotation is named.

    Example:
        rows = load_coco("COCO", "val2017", num_samples=100)
    """
    where = "`root` is the folder that has annotations/ in it (annotations_trainval2017.zip of COCO)."
    path = need(Path(root) / "annotations" / f"instances_{split}.json", where)
    folder = Path(root) / split if image_dir is None else Path(image_dir)
    need(folder, f"it is the folder of the images of {split}; name another with image_dir.")
    arguments = {"path": path, "split": split, "folder": folder.resolve()}
    return to_dataset(_rows, arguments, [path], split, num_samples, features=Features({**FEATURES, **INSTANCES}))


def _rows(path: Path, split: str, folder: Path) -> Iterator[dict]:
    content = read_json(path, packed_polygons)
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= content.keys():
        raise ValueError(f"{path} is no COCO annotation file: it needs the keys images, annotations and categories.")
    for part, fields in FIELDS.items():
        if not isinstance(content[part], list):
            raise ValueError(f"{path}: {part!r} must be a list; got {type(content[part]).__name__}.")
        for number, each in enumerate(content[part]):
            if lacking := [name for name in fields if each.get(name) is None]:
                which = f"{part}[{number}] (id {each.get('id')})"
                raise ValueError(f"{path}, {which}: it has no {' and no '.join(map(repr, lacking))}.{HINTS[part]}")
    for image in content["images"]:
        if not all(isinstance(image[side], int) and image[side] > 0 for side in ("height", "width")):
            sides = f"{image['height']!r} and {image['width']!r}"
            raise ValueError(f"{path}, image {image['id']}: its height and width are {sides}; give numbers of pixels.")
    for each in content["categories"]:
        if not str(each["name"]).strip() or reserved_token(str(each["name"])):
            raise ValueError(
                f"{path}, category {each['id']}: its name is {each['name']!r}; give the word that people say, such as "
                "'mug'."
            )
    names = {each["id"]: str(each["name"]).strip() for each in content["categories"]}
    ids = [image["id"] for image in content["images"]]
    listed, written, left_out = set(ids), {str(number) for number in ids}, LeftOut()
    if len(listed) < len(ids):
        raise ValueError(f"{path} lists the image id {Counter(ids).most_common(1)[0][0]!r} more than once; renumber.")
    there: dict[int, list[dict]] = {}
    for each in content["annotations"]:
        if each["category_id"] not in names:
            raise ValueError(f"{path}, annotation {each['id']}: it has no category that the file names.")
        image_id = each["image_id"]
        if image_id not in listed and str(image_id) in written:
            raise ValueError(
                f"{path}, annotation {each['id']}: its image_id is {image_id!r}, and the image's id is a number or "
                "text where this is the other; write both alike."
            )
        there.setdefault(image_id, []).append(each)
    for image in content["images"]:
        things: list[dict[str, Any]] = []
        for each in there.get(image["id"], ()):
            try:
                if not each["segmentation"]:
                    raise ValueError(f"its segmentation is {each['segmentation']!r}.{HINTS['annotations']}")
                check_outlines(each["segmentation"], image["height"], image["width"])
                mask = coco_rle(each["segmentation"], image["height"], image["width"])
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, annotation {each['id']}: {error}") from error
            name, crowd = names[each["category_id"]], bool(each.get("iscrowd"))
            thing = {"category": name, "expressions": [], "crowd": crowd, "mask": mask}
            if mask is None or thing in things:
                why = "without a pixel inside their image" if mask is None else "that are another's, pixel for pixel"
                left_out.add(f"instances of {path.name} {why}", f"annotation {each['id']}")
            else:
                things.append(thing)
        crowds = {thing["category"] for thing in things if thing["crowd"]}
        for name in dict.fromkeys(thing["category"] for thing in things):
            if name in crowds:
                continue
            masks = [thing["mask"] for thing in things if thing["category"] == name]
            yield {
                "image": {"path": str(inside_folder(folder, image["file_name"])), "bytes": None},
                "image_id": str(image["id"]),
                "sample_id": f"coco-{split}-{image['id']}-{name}",
                "dataset": "coco",
                "split": split,
                "instruction": f"{'the' if len(masks) == 1 else 'every'} {name}",
                "reasoning": None,
                "masks": masks,
                "ignore": None,
                "height": image["height"],
                "width": image["width"],
                "kind": target_kind(len(masks)),
                "instances": things,
            }
    left_out.warn()


def check_outlines(segmentation: Any, height: int, width: int) -> None:
    """Refuse polygons in shares of the image's sides, or made on the image at another size.

    Args:
        segmentation: of an annotation; what is no list of flat polygons is left to `coco_rle`.
        height: of the image, in pixels.
        width: likewise.

    Raises:
        ValueError: such a polygon.
    """
    if not isinstance(segmentation, list):
        return
    for polygon in segmentation:
        if isinstance(polygon, array) and len(polygon) >= 6:
            if max(polygon) <= 1 < max(height, width) and min(polygon) >= 0:
                raise ValueError(f"all coordinates of a polygon lie from 0 to 1; multiply x by {width}, y by {height}.")
            check_place("a polygon", polygon, height, width)
