"""A small RefCOCO of real photographs: objects cut out of some, pasted on others, with masks known to the pixel.

    pip install -c constraints.txt -e ".[photos]"
    python benchmarks/pasted_photographs.py --images 60 --output runs/pasted
    segcompass prepare-data refcoco --root runs/pasted --image-dir runs/pasted/train2014 --instances --output data/cut

The photographs are those that scikit-image ships in its package. Writes train2014/*.jpg, and under refcoco/ and
grefcoco/ the files of these data sets: instances.json with COCO's polygons, and refs. An object is a cup, a cat, a
person, a motorcycle or a coin, tinted in one of four colours; no two overlap. Everything is a function of the seed.
"""

import argparse
import json
import pickle
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

TINTS = {"red": (1.0, 0.25, 0.2), "green": (0.3, 0.9, 0.35), "blue": (0.3, 0.45, 1.0), "yellow": (1.0, 0.85, 0.2)}
GROUNDS = ("brick.png", "grass.png", "gravel.png", "moon.png", "rocket.jpg")
SIZES = ((240, 180), (180, 240), (200, 200), (256, 160))
"""Width and height of the images."""
SPLITS = {"train": 0.6, "val": 0.2, "testA": 0.1, "testB": 0.1}


def ellipse(x: float, y: float, across: float, down: float) -> list[tuple[float, float]]:
    """An ellipse of 24 corners."""
    angles = np.arange(24) * np.pi / 12
    return [(x + across * float(np.cos(a)), y + down * float(np.sin(a))) for a in angles]


CUTS: dict[str, tuple[str, list[list[tuple[float, float]]]]] = {
    "cup": ("coffee.png", [ellipse(281, 247, 198, 138), ellipse(291, 112, 121, 95)]),
    "cat": ("chelsea.png", [ellipse(222, 150, 158, 146)]),
    "person": (
        "astronaut.png",
        [
            *[
                [(236, 12), (292, 36), (304, 98), (280, 141), (322, 195), (317, 256), (365, 317), (360, 390)]
                + [(292, 402), (280, 500), (36, 500), (24, 317), (110, 244), (117, 183), (170, 146), (158, 98)]
                + [(170, 36)]
            ]
        ],
    ),
    "motorcycle": (
        "motorcycle_left.png",
        [
            [(118, 165), (256, 155), (498, 112), (525, 75), (568, 150), (645, 305), (686, 384), (670, 448)]
            + [(600, 448), (536, 360), (486, 384), (345, 438), (192, 425), (128, 384), (122, 295), (100, 200)]
        ],
    ),
    "coin": ("coins.png", [ellipse(335, 43, 28, 28)]),
}
"""Category -> photograph, and the outlines that are cut out of it, in its pixels."""


class Pasted(NamedTuple):
    """An object of an image."""

    category: str
    colour: str
    polygons: list[list[float]]
    """flat, in pixels of the image."""
    mask: np.ndarray
    """bool (H, W)."""


def photographs() -> Path:
    """The folder of scikit-image's photographs. Raises ModuleNotFoundError."""
    spec = find_spec("skimage")  # found, not imported: only its files are needed
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError('scikit-image is missing, whose photographs are used; pip install -e ".[photos]".')
    return Path(spec.submodule_search_locations[0]) / "data"


def paste(
    rng: np.random.Generator, folder: Path, width: int, height: int, taken: Sequence[str]
) -> tuple[np.ndarray, list[Pasted]]:
    """An image of two to four objects.

    Args:
        rng: that draws all of it.
        folder: of the photographs.
        width: of the image in pixels.
        height: of the image in pixels.
        taken: categories that must be in it.

    Returns:
        uint8 (height, width, 3), and its objects.
    """
    ground = Image.open(folder / GROUNDS[rng.integers(len(GROUNDS))]).convert("RGB")
    left, top = rng.integers(ground.width - width + 1), rng.integers(ground.height - height + 1)
    pixels = np.array(ground.crop((left, top, left + width, top + height)))
    objects: list[Pasted] = []
    wanted = [*taken, *rng.choice(list(CUTS), rng.integers(1, 4))]
    occupied = np.zeros((height, width), bool)
    for category in wanted:
        for _ in range(30):
            colour = list(TINTS)[rng.integers(len(TINTS))]
            found = _place(rng, folder, str(category), colour, width, height)
            if found is not None and not (found[1].mask & occupied).any():
                pixels[found[1].mask] = found[0][found[1].mask]
                occupied |= found[1].mask
                objects.append(found[1])
                break
    return pixels, objects


def _place(rng, folder, category, colour, width, height):
    """Pixels (height, width, 3) that hold a cut-out somewhere, and the object; None where it is too small."""
    name, outlines = CUTS[category]
    source = Image.open(folder / name).convert("RGB")
    corners = np.array([corner for outline in outlines for corner in outline])
    low, high = corners.min(0), corners.max(0)
    scale = rng.uniform(0.3, 0.5) * min(width, height) / float((high - low).max())
    room = np.array([width, height]) - (high - low) * scale
    shift = rng.uniform(0, room) - low * scale
    polygons = [[round(float(n), 2) for n in (np.array(outline) * scale + shift).ravel()] for outline in outlines]
    mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))).astype(bool)
    # pixel (x, y) of the image shows the photograph at ((x, y) - shift) / scale
    back = (1 / scale, 0, -shift[0] / scale, 0, 1 / scale, -shift[1] / scale)
    shown = np.asarray(source.transform((width, height), Image.Transform.AFFINE, back, Image.Resampling.BICUBIC))
    grey = shown.astype(float).mean(2, keepdims=True)
    tinted = np.clip((0.25 + 0.9 * grey / 255) * np.array(TINTS[colour]) * 255, 0, 255)
    return (tinted.astype(np.uint8), Pasted(category, colour, polygons, mask)) if mask.sum() > 60 else None


def expressions(objects: Sequence[Pasted], number: int) -> list[str]:
    """What means one of some objects and no other."""
    mine = objects[number]
    same = [each for each in objects if each.category == mine.category]
    centres = [float(each.mask.nonzero()[1].mean()) for each in same]
    rank = centres.index(float(mine.mask.nonzero()[1].mean()))
    found = []
    if sum(each.colour == mine.colour for each in same) == 1:
        found += [f"the {mine.colour} {mine.category}", f"{mine.colour} {mine.category}"]
    if len(same) == 1:
        found.append(f"the {mine.category}")
    elif centres[rank] == min(centres):
        found.append(f"the left {mine.category}")
    elif centres[rank] == max(centres):
        found.append(f"the right {mine.category}")
    return found


def write(output: Path, images: int, seed: int = 0) -> list[list[Pasted]]:
    """Write the data sets.

    Args:
        output: folder, made if it does not exist.
        images: how many.
        seed: of all that is drawn.

    Returns:
        The objects of each image; those of image n have the annotations that instances.json lists for id n + 1.

    Raises:
        ModuleNotFoundError: scikit-image is missing.
    """
    folder = photographs()
    (output / "train2014").mkdir(parents=True, exist_ok=True)
    content: dict[str, list[Any]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": n, "name": name, "supercategory": "object"} for n, name in enumerate(CUTS, 1)],
    }
    refs: list[dict] = []
    grefs: list[dict] = []
    splits = [name for name, share in SPLITS.items() for _ in range(round(share * images))]
    made = []
    for number in range(images):
        rng = np.random.default_rng([seed, number])
        width, height = SIZES[number % len(SIZES)]
        pixels, objects = paste(rng, folder, width, height, [list(CUTS)[number % len(CUTS)]])
        made.append(objects)
        image, name = number + 1, f"COCO_train2014_{number + 1:012}.jpg"
        Image.fromarray(pixels).save(output / "train2014" / name, quality=92)
        content["images"].append({"id": image, "file_name": name, "width": width, "height": height})
        split = splits[number] if number < len(splits) else "testB"
        ids = []
        for place, each in enumerate(objects):
            ids.append(len(content["annotations"]) + 1)
            y, x = each.mask.nonzero()
            content["annotations"].append(
                {
                    "id": ids[-1],
                    "image_id": image,
                    "category_id": list(CUTS).index(each.category) + 1,
                    "segmentation": each.polygons,
                    "area": int(each.mask.sum()),
                    "bbox": [int(x.min()), int(y.min()), int(np.ptp(x)) + 1, int(np.ptp(y)) + 1],
                    "iscrowd": 0,
                }
            )
            _refer(refs, ids[-1], image, name, split, expressions(objects, place))
            _refer(grefs, [ids[-1]], image, name, split, expressions(objects, place)[:1])
        _refer(grefs, ids, image, name, split, ["everything"])
        absent = next((each for each in CUTS if all(each != o.category for o in objects)), None)
        _refer(grefs, [-1], image, name, split, [f"the {absent}"] if absent else [])
    for dataset in ("refcoco", "grefcoco"):
        (output / dataset).mkdir(exist_ok=True)
        (output / dataset / "instances.json").write_text(json.dumps(content))
    (output / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    (output / "grefcoco" / "grefs(unc).json").write_text(json.dumps(grefs))
    return made


def _refer(refs: list[dict], annotation: Any, image: int, name: str, split: str, said: Sequence[str]) -> None:
    """Add a ref, unless nothing is said."""
    first = sum(len(ref["sentences"]) for ref in refs)
    sentences = [
        {"sent_id": first + n, "sent": text, "raw": text, "tokens": text.split()} for n, text in enumerate(said)
    ]
    if sentences:
        refs.append(
            {
                "ref_id": len(refs) + 1,
                "ann_id": annotation,
                "image_id": image,
                "category_id": 1,
                "split": split,
                "file_name": name,
                "sent_ids": [each["sent_id"] for each in sentences],
                "sentences": sentences,
            }
        )


def main(argv: list[str] | None = None) -> None:
    """Run the command with these options; None takes the process's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60, help="how many; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn; default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, help="folder of the data sets")
    args = parser.parse_args(argv)
    made = write(args.output, args.images, args.seed)
    print(f"{len(made)} images with {sum(map(len, made))} objects: {args.output}")


if __name__ == "__main__":
    main()
