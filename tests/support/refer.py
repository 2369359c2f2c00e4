"""Small annotation files in the formats that RefCOCO and gRefCOCO were released in, with their odd cases."""

import json

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 24, 32


def rectangle(left, top, right, bottom):
    """A flat polygon; with whole numbers its pixels are columns left..right-1 of rows top..bottom-1."""
    return [left, top, right, top, right, bottom, left, bottom]


def box(left, top, right, bottom, height=HEIGHT, width=WIDTH):
    mask = np.zeros((height, width), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def run_lengths(mask):
    """Uncompressed COCO run lengths by hand: column by column, beginning with zeros."""
    counts, value, run = [], False, 0
    for pixel in mask.T.ravel():
        if pixel != value:
            counts.append(run)
            value, run = pixel, 0
        run += 1
    return {"size": list(mask.shape), "counts": [*counts, run]}


CROWD = box(3, 3, 9, 5) | box(20, 10, 22, 20)

ANNOTATIONS = {  # id: (segmentation, iscrowd, mask)
    10: ([rectangle(2, 3, 10, 9)], 0, box(2, 3, 10, 9)),
    11: ([rectangle(1, 1, 4, 4), rectangle(3, 3, 8, 6)], 0, box(1, 1, 4, 4) | box(3, 3, 8, 6)),  # two, overlapping
    12: ([[5, 5, 9, 9], rectangle(12, 2, 20, 8), [1, 2, 3, 4, 5, 6, 7]], 0, box(12, 2, 20, 8)),  # degenerate ones
    13: (run_lengths(CROWD), 1, CROWD),
    14: ([rectangle(28, 20, 40, 30)], 0, box(28, 20, 32, 24)),  # leaves the image
    15: (run_lengths(box(0, 0, 5, 24)), 0, box(0, 0, 5, 24)),
    16: ([[1, 1, 5, 5]], 0, None),  # no polygon at all
    17: ([rectangle(100, 100, 120, 120)], 0, None),  # outside
}


def write_images(folder, count=3):
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        pixels = generator.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / image_name(number))


def image_name(number):
    return f"COCO_train2014_{number:012}.jpg"


def write_instances(folder, annotations=None, count=3):
    """instances.json; annotation a belongs to image a % 3."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "images": [{"id": n, "file_name": image_name(n), "height": HEIGHT, "width": WIDTH} for n in range(count)],
        "annotations": [
            {"id": name, "image_id": name % 3, "category_id": 1, "iscrowd": crowd, "segmentation": segmentation}
            for name, (segmentation, crowd, _) in (annotations or ANNOTATIONS).items()
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (folder / "instances.json").write_text(json.dumps(content))


def ref(ref_id, ann_id, sentences, split="val", image_id=None):
    image_id = ann_id % 3 if image_id is None else image_id
    return {
        "ref_id": ref_id,
        "ann_id": ann_id,
        "category_id": 1,
        "image_id": image_id,
        "file_name": f"COCO_train2014_{image_id:012}_{ann_id}.jpg",  # with the annotation's id: no such file exists
        "split": split,
        "sent_ids": [100 * ref_id + n for n in range(len(sentences))],
        "sentences": [
            {"sent_id": 100 * ref_id + n, "sent": sent, "raw": sent.upper(), "tokens": sent.split()}
            for n, sent in enumerate(sentences)
        ],
    }


def python2_pickle(value):
    """A pickle as Python 2 wrote it: protocol 2, and its strings are byte strings."""
    return b"\x80\x02" + _opcodes(value) + b"."


def _opcodes(value):
    if isinstance(value, list):
        return b"](" + b"".join(map(_opcodes, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(_opcodes(key) + _opcodes(item) for key, item in value.items()) + b"u"
    if isinstance(value, int):
        return b"J" + value.to_bytes(4, "little", signed=True)
    encoded = value.encode()
    return b"T" + len(encoded).to_bytes(4, "little") + encoded
