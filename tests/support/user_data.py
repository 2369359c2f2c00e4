"""What a user has on disk: the RefCOCO family, ReasonSeg and OBELICS as they were released, and a JSONL of one's own.

    python -m tests.support.user_data FOLDER

Small drawings stand for photographs: one or two coloured boxes and balls on grey. The folders, files and fields are
those of the releases: pickled refs of Python 2, COCO's file names, ids that the four sets share, different divisions of
the same images into splits, expressions that nothing or several things fit, photographs of several megapixels.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from segcompass.loaders.obelics import image_name
from tests.support.refer import python2_pickle, rectangle

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "yellow": (230, 210, 60)}
KINDS = {"box": 1, "ball": 2}
SIZES = [(96, 128), (128, 96), (112, 112)]  # height, width
GREY = 128
IMAGES = 36


class Drawn(NamedTuple):
    """One thing in an image."""

    number: int
    """of its annotation."""
    colour: str
    kind: str
    polygon: list[float]
    left: bool
    """whether it lies in the left half."""


def draw(number, count):
    """An image with one or two things, which differ in colour, and what they are; the number says which."""
    height, width = SIZES[number % len(SIZES)]
    rng = np.random.default_rng([7, number])
    image = Image.new("RGB", (width, height), (GREY, GREY, GREY))
    names, things = [*COLOURS], []
    for place in range(count):
        colour, kind = names[(number + place * (1 + number // 4 % 3)) % 4], [*KINDS][(number // 2 + place) % 2]
        room = width // count
        side = int(rng.integers(room // 3, room // 2 + 1)) if count == 1 else int(rng.integers(room // 2, room - 8))
        left = place * room + int(rng.integers(2, room - side - 1))
        top = int(rng.integers(2, height - side - 1))
        if kind == "box":
            polygon = rectangle(left, top, left + side, top + side)
        else:
            angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
            around = [left + side / 2 * (1 + np.cos(angles)), top + side / 2 * (1 + np.sin(angles))]
            polygon = np.stack(around, 1).round(2).ravel().tolist()
        ImageDraw.Draw(image).polygon(polygon, fill=COLOURS[colour])
        things.append(Drawn(1000 + 10 * number + place, colour, kind, polygon, left + side / 2 < width / 2))
    return image, things


def bounds(polygon):
    """COCO's bbox: left, top, width, height."""
    across, down = polygon[::2], polygon[1::2]
    return [min(across), min(down), max(across) - min(across), max(down) - min(down)]


# -- the RefCOCO family ------------------------------------------------------------------------------------------------


def coco_name(image_id):
    return f"COCO_train2014_{image_id:012}.jpg"


def by_unc(place):
    """The split of an image as UNC divided them."""
    return "train" if place < 24 else ("val", "testA", "testB")[(place - 24) // 4]


def by_umd(place):
    """The same of UMD, whose train split holds images of UNC's val split."""
    return "train" if 6 <= place < 30 else "val" if place < 3 else "test"


def make_refer(folder, images_folder):
    """refcoco, refcoco+, refcocog and grefcoco, over the same images."""
    images_folder.mkdir(parents=True)
    pictures, images, annotations = [], [], []
    for place in range(IMAGES):
        image, things = draw(place, 1 + (place % 3 == 2))
        image_id = 581000 + 7 * place
        image.save(images_folder / coco_name(image_id), quality=95)
        pictures.append((image_id, things))
        size = {"height": image.height, "width": image.width}
        images.append({"id": image_id, "file_name": coco_name(image_id), "license": 1, **size})
        for thing in things:
            across, down = np.reshape(thing.polygon, (-1, 2)).T
            area = abs(np.dot(across, np.roll(down, 1)) - np.dot(down, np.roll(across, 1))) / 2
            annotations.append(
                {
                    "id": thing.number,
                    "image_id": image_id,
                    "category_id": KINDS[thing.kind],
                    "iscrowd": 0,
                    "area": float(area),
                    "bbox": bounds(thing.polygon),
                    "segmentation": [thing.polygon],
                }
            )
    categories = [{"id": number, "name": name, "supercategory": "object"} for name, number in KINDS.items()]
    instances = {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
    for name in ("refcoco", "refcoco+", "refcocog", "grefcoco"):
        (folder / name).mkdir(parents=True)
        (folder / name / "instances.json").write_text(json.dumps(instances))
    for name, division, split_of in (
        ("refcoco", "unc", by_unc),
        ("refcoco+", "unc", by_unc),
        ("refcocog", "umd", by_umd),
    ):
        refs = [
            ref
            for place, (image_id, things) in enumerate(pictures)
            for thing in things
            for ref in [single_ref(thing, image_id, split_of(place), said(name, thing))]
        ]
        (folder / name / f"refs({division}).p").write_bytes(python2_pickle(refs))
    grefs = [ref for place, (image_id, things) in enumerate(pictures) for ref in group_refs(place, image_id, things)]
    (folder / "grefcoco" / "grefs(unc).json").write_text(json.dumps(grefs))


def said(name, thing):
    """What a data set calls a thing; RefCOCO+ names no places, RefCOCOg is wordier."""
    plain = f"{thing.colour} {thing.kind}"
    side = "left" if thing.left else "right"
    return {
        "refcoco": [plain, f"the {plain} on the {side}"],
        "refcoco+": [plain, f"the {thing.colour} one"],
        "refcocog": [f"the {plain} that is on the {side}"],
    }[name]


def single_ref(thing, image_id, split, expressions):
    first = 10 * thing.number
    return {
        "ref_id": thing.number,
        "ann_id": thing.number,
        "category_id": KINDS[thing.kind],
        "image_id": image_id,
        "file_name": coco_name(image_id).replace(".jpg", f"_{thing.number}.jpg"),  # no such file: as released
        "split": split,
        "sent_ids": [first + place for place in range(len(expressions))],
        "sentences": [
            {"sent_id": first + place, "sent": text, "raw": text.title(), "tokens": text.split()}
            for place, text in enumerate(expressions)
        ],
    }


def group_refs(place, image_id, things):
    """gRefCOCO: one thing, all of them where there are two, and none."""
    one, *more = things
    asked = [([one.number], f"the {one.colour} {one.kind}")]
    if more:
        both = " and ".join(f"the {thing.colour} {thing.kind}" for thing in things)
        asked.append(([thing.number for thing in things], both))
    if place % 2:
        asked.append(([-1], "the purple elephant"))
    for number, (annotations, text) in enumerate(asked):
        sentence = {"sent_id": 10 * place + number, "sent": text, "raw": text, "tokens": text.split()}
        none = annotations == [-1]
        yield {
            "ref_id": 10 * place + number,
            "image_id": image_id,
            "ann_id": annotations,
            "category_id": [-1] if none else [KINDS[thing.kind] for thing in things if thing.number in annotations],
            "split": by_unc(place),
            "file_name": coco_name(image_id),
            "sent_ids": [10 * place + number],
            "sentences": [{**sentence, "exist": not none}],
            "no_target": none,
        }


# -- ReasonSeg, OBELICS, one's own -------------------------------------------------------------------------------------


def make_reasonseg(folder):
    """Photographs of several sizes, up to six megapixels, with one shape each."""
    for split in ("train", "val", "test"):
        (folder / split).mkdir(parents=True)
        for number, (width, height) in enumerate(((640, 480), (3000, 2000), (480, 640), (100, 60))):
            image = Image.new("RGB", (width, height), (GREY, GREY, GREY))
            corners = [[0.2 * width, 0.3 * height], [0.6 * width, 0.3 * height], [0.6 * width, 0.8 * height]]
            corners.append([0.2 * width, 0.8 * height])
            ImageDraw.Draw(image).polygon([tuple(corner) for corner in corners], fill=COLOURS["red"])
            name = f"{number}_{split}"
            image.save(folder / split / f"{name}.jpg", quality=80)
            shape = {"label": "target", "labels": ["target"], "shape_type": "polygon", "group_id": None, "flags": {}}
            shape |= {"image_name": f"{name}.jpg", "points": corners}
            questions = ["what here would stop a car at night?", "the red box"]
            content = {"text": [questions[number % 2]], "is_sentence": number % 2 == 0, "shapes": [shape]}
            (folder / split / f"{name}.json").write_text(json.dumps(content))


def make_obelics(folder, pictures):
    """Documents with addresses of images, and the images that were fetched from there."""
    (folder / "data").mkdir(parents=True)
    pictures.mkdir(parents=True)
    documents = {"images": [], "texts": []}
    for number in range(32):
        image, things = draw(100 + number, 1 + number % 2)
        address = f"https://example.org/{number}.png"
        image.save(pictures / image_name(address), "png")
        what = " and ".join(f"a {thing.colour} {thing.kind}" for thing in things)
        side = "left" if things[0].left else "right"
        documents["images"].append([None, address, None])
        documents["texts"].append([f"there is {what}.", None, f"the {things[0].colour} one is on the {side}."])
    pq.write_table(pa.table(documents), folder / "data" / "train-00000-of-00001.parquet")


def make_own(folder):
    """mine.jsonl beside its images: 12 questions to train on and 4 to keep; masks as polygons and as pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(16):
        image, (thing,) = draw(200 + number, 1)
        image.save(folder / f"{number}.png")
        line = {"image": f"{number}.png", "instruction": f"the {thing.colour} {thing.kind}"}
        if number % 4:
            line["polygons"] = [thing.polygon]
        else:
            mask = Image.new("L", image.size)
            ImageDraw.Draw(mask).polygon(thing.polygon, fill=255)
            mask.save(folder / f"mask-{number}.png")
            line["mask"] = f"mask-{number}.png"
        lines.append({**line, "split": "train" if number < 12 else "val"})
    (folder / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw(212, 1)[0].save(folder / "photo.png")


def make_user_data(folder):
    """Write all of it: REFER, train2014, ReasonSeg, OBELICS, pictures and data/mine.jsonl."""
    folder = Path(folder)
    make_refer(folder / "REFER", folder / "train2014")
    make_reasonseg(folder / "ReasonSeg")
    make_obelics(folder / "OBELICS", folder / "pictures")
    make_own(folder / "data")


if __name__ == "__main__":
    make_user_data(sys.argv[1])
