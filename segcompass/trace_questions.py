"""What a teacher is asked for a trace, which traces are refused, and whether a trace leads to its target.

The teacher sees the target drawn and writes a trace; then it sees the plain image, the instruction and its trace, and
says where the target is. Knows nothing about teachers or files.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from segcompass.loaders.masks import decode_mask
from segcompass.loaders.rows import check_reasoning
from segcompass.loaders.surroundings import masks_alone
from segcompass.trace_templates import PLACES, place

Check = Literal["position", "box"]
DRAWN = (255, 0, 0)
LENGTHS = (20, 1500)
"""Characters of a trace, at least and at most."""
SAME_BOX = 0.5
"""IoU from which a box is the target's."""

WRITE = (
    '{drawn} Somebody who saw the image without it asked: "{instruction}". Write what one thinks who looks at the '
    "image and works out what is meant: what is there, what the words say about it, and which it is in the end. Two to "
    "four plain sentences, no list, no numbers of coordinates, and no word about the drawn line."
)
ONE = "A red line is drawn around one thing in this image."
SEVERAL = "Red lines are drawn around {count} things in this image."
NONE = "Nothing is drawn into this image, because nothing in it fits what was asked for."
POSITION = (
    'Somebody asked about this image: "{instruction}". One thought: "{trace}" In which part of the image is the middle '
    "of what is meant? Answer with one of: {places}. If several things are meant, answer with one part for each, "
    "separated by commas. If nothing in the image is meant, answer: none. Nothing else."
)
BOX = (
    'Somebody asked about this image: "{instruction}". One thought: "{trace}" Give the bounding box of what is meant '
    "as [x1, y1, x2, y2]. If several things are meant, one box for each. If nothing is meant, answer: none."
)
TELLS = re.compile(
    r"\b(red|drawn|marked|highlighted|thick|coloured|colored)\s+(line|lines|outline|outlines|box|boxes|contour|border)\b"
    r"|\b(outlined|circled|highlighted|encircled|bounding box)\b",
    re.IGNORECASE,
)
COORDINATES = re.compile(r"[\[(]\s*\d+(\.\d+)?\s*,\s*\d+|\d+\s*(px|pixels)\b|\b\d{2,4}\s*,\s*\d{2,4}\b|\bx\s*=\s*\d")


def writing_question(row: Mapping[str, Any], image: Image.Image) -> tuple[Image.Image, str]:
    """The picture with the target drawn, and the request for a trace.

    Args:
        row: of the shared schema.
        image: its image, upright RGB.

    Returns:
        Picture and text.
    """
    count = len(row["masks"])
    drawn = NONE if not count else ONE if count == 1 else SEVERAL.format(count=count)
    return draw_targets(image, row["masks"]), WRITE.format(drawn=drawn, instruction=_one_line(row["instruction"]))


def draw_targets(image: Image.Image, masks: Sequence[dict], colour: tuple[int, int, int] = DRAWN) -> Image.Image:
    """The image with an outline around each mask.

    Args:
        image: RGB, of the masks' size.
        masks: RLEs.
        colour: of the outline.

    Returns:
        A new image.
    """
    pixels = np.array(image)
    thick = max(2, round(max(image.size) / 200))
    for mask in masks:
        inside = decode_mask([mask], image.height, image.width)
        grown = inside
        for _ in range(thick):
            padded = np.pad(grown, 1)
            grown = grown | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
        pixels[grown & ~inside] = colour
    return Image.fromarray(pixels)


def clean_trace(answer: str) -> str:
    """An answer as a trace: on one line, without the marks of a reasoning model or of a quotation around it."""
    wrapped = re.fullmatch(r"\s*<think>(.*)</think>\s*", answer, re.DOTALL)
    text = _one_line(wrapped[1] if wrapped else answer)
    return text[1:-1].strip() if len(text) > 2 and text[0] == text[-1] == '"' and '"' not in text[1:-1] else text


def fault_of_trace(trace: str) -> str | None:
    """Why a trace cannot be learned from; None if it can.

    Args:
        trace: as `clean_trace` returns it.

    Returns:
        A reason that the report counts by.
    """
    try:
        check_reasoning(trace)
    except ValueError:
        return "it holds a marker of the response's frame"
    if len(trace) < LENGTHS[0]:
        return "it is too short"
    if len(trace) > LENGTHS[1]:
        return "it is too long"
    if TELLS.search(trace):
        return "it speaks of the drawn line"
    if COORDINATES.search(trace):
        return "it holds coordinates"
    return None


def checking_question(row: Mapping[str, Any], trace: str, check: Check) -> str:
    """The text that asks where the target is, beside the plain image.

    Args:
        row: of the shared schema.
        trace: the teacher's own.
        check: whether a part of the image or a box is asked for.

    Returns:
        The text.
    """
    if check == "box":
        return BOX.format(instruction=_one_line(row["instruction"]), trace=trace)
    return POSITION.format(instruction=_one_line(row["instruction"]), trace=trace, places=", ".join(PLACES))


def fault_of_check(row: Mapping[str, Any], answer: str, check: Check) -> str | None:
    """Why an answer does not name the target; None if it does.

    Args:
        row: of the shared schema.
        answer: to `checking_question`.
        check: what was asked for.

    Returns:
        A reason that the report counts by.
    """
    boxes = [thing.box for thing in masks_alone(row)]
    none = re.search(r"\b(none|nothing)\b", answer, re.IGNORECASE) is not None
    height, width = row["height"], row["width"]
    if check == "position":
        named = _places_in(answer)
        wanted = sorted({place(box, height, width) for box in boxes})
        if not named and not none:
            return "the check's answer names no part of the image"
        right = sorted(set(named)) == wanted
    else:
        found = _boxes_in(answer, height, width)
        if not found and not none:
            return "the check's answer holds no box"
        right = any(_same_boxes(boxes, reading) for reading in found) if boxes else not found
    return None if right else "the check picks another place"


def _places_in(answer: str) -> list[str]:
    words = re.sub(r"[-_]", " ", answer.lower()).replace("center", "centre").replace("middle", "centre")
    found = []
    for name in sorted(PLACES, key=len, reverse=True):  # "upper left" before "left"
        words, count = re.subn(rf"\b{name}\b", " ", words)
        found += [name] * bool(count)
    return found


def _boxes_in(answer: str, height: int, width: int) -> list[list[tuple[float, float, float, float]]]:
    """The boxes of an answer, read in each way that its numbers allow: pixels, thousandths, shares; [] if none."""
    numbers = [float(text) for text in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w])", answer)]  # not bbox_2d's, x1's
    groups = [numbers[start : start + 4] for start in range(0, len(numbers) - 3, 4)]
    if not groups or len(numbers) % 4:
        return []
    largest = max(max(group) for group in groups)
    scales = [(width, height)] if largest <= 1 else [(1, 1)] + [(width / 1000, height / 1000)] * (largest <= 1000)
    return [[(a * x, b * y, c * x, d * y) for a, b, c, d in groups] for x, y in scales]


def _same_boxes(wanted: Sequence[tuple[float, ...]], found: Sequence[tuple[float, ...]]) -> bool:
    """Whether the boxes pair up."""
    left = list(found)
    for box in wanted:
        best = max(left, key=lambda other: _iou(box, other), default=None)
        if best is None or _iou(box, best) < SAME_BOX:
            return False
        left.remove(best)
    return not left


def _iou(one: Sequence[float], other: Sequence[float]) -> float:
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, across) * max(0.0, down)
    areas = [max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (one, other)]
    return shared / (sum(areas) - shared) if sum(areas) > shared else 0.0


def _one_line(text: str) -> str:
    return " ".join(text.split())
