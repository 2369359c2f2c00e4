"""What a teacher is asked for a trace, which traces are refused, and whether a trace leads to its target.

The teacher sees the target drawn and writes a trace; then it sees the plain image, the instruction and its trace, and
says where the target is. Knows nothing about teachers or files.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from segcompass.box_formats import Box, says_nothing
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
    "four plain sentences, of which the last says what it is, what it looks like and where. No list, no numbers of "
    "coordinates, and no word about the drawn line."
)
ONE = "A red line is drawn around one thing in this image."
SEVERAL = "Red lines are drawn around {count} things in this image."
NONE = "Nothing is drawn into this image, because nothing in it fits what was asked for."
POSITION = (
    'Somebody asked about this image: "{instruction}". One thought: "{trace}" In which part of the image is the middle '
    "of what is meant? Answer with one of: {places}. If several things are meant, answer with one part for each, "
    "separated by commas. If nothing in the image is meant, answer: none. Nothing else."
)
TELLS = re.compile(
    r"\b(red|drawn|marked|highlighted|thick|coloured|colored)\s+(line|lines|outline|outlines|box|boxes|contour|border)\b"
    r"|\b(outlined|circled|highlighted|encircled|bounding box)\b",
    re.IGNORECASE,
)
ELSEWHERE = "the check picks another place"
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


def draw_targets(
    image: Image.Image,
    masks: Sequence[dict],
    colour: tuple[int, int, int] = DRAWN,
    rim: tuple[int, int, int] | None = None,
) -> Image.Image:
    """The image with an outline around each mask.

    Args:
        image: RGB, of the masks' size.
        masks: RLEs.
        colour: of the outline.
        rim: of a line around the outline, which shows it on things of its own colour; None draws none.

    Returns:
        A new image.
    """
    pixels = np.array(image)
    thick = max(2, round(max(image.size) / 200))
    for mask in masks:
        inside = decode_mask([mask], image.height, image.width)
        grown = inside
        for line in (colour, rim):
            within = grown
            for _ in range(thick if line else 0):
                padded = np.pad(grown, 1)
                grown = grown | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
            pixels[grown & ~within] = line or colour
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


def position_question(row: Mapping[str, Any], trace: str) -> str:
    """The text that asks in which part of the plain image the target is.

    Args:
        row: of the shared schema.
        trace: the teacher's own.

    Returns:
        The text.
    """
    return POSITION.format(instruction=_one_line(row["instruction"]), trace=trace, places=", ".join(PLACES))


def with_thought(row: Mapping[str, Any], trace: str) -> str:
    """The instruction by which a teacher is asked for the target's box in the plain image.

    Args:
        row: of the shared schema.
        trace: the teacher's own.

    Returns:
        The text.
    """
    return f"{_one_line(row['instruction'])} ({trace})"


def fault_of_position(row: Mapping[str, Any], answer: str) -> str | None:
    """Why an answer does not name the part of the image where the target is; None if it does.

    Args:
        row: of the shared schema.
        answer: to `position_question`.

    Returns:
        A reason that the report counts by.
    """
    named = _places_in(answer)
    none = re.search(r"\b(none|nothing)\b", answer, re.IGNORECASE) is not None
    if not named and not none:
        return "the check's answer names no part of the image"
    wanted = {place(thing.box, row["height"], row["width"]) for thing in masks_alone(row)}
    return None if sorted(set(named)) == sorted(wanted) else ELSEWHERE


def fault_of_boxes(row: Mapping[str, Any], answer: str, readings: Sequence[Sequence[Box]]) -> str | None:
    """Why an answer's boxes are not the target's; None if they are.

    Args:
        row: of the shared schema.
        answer: of the teacher.
        readings: its boxes in pixels, once for each way in which they can be meant.

    Returns:
        A reason that the report counts by.
    """
    if not readings and not says_nothing(answer):
        return "the check's answer holds no box"
    wanted = [thing.box for thing in masks_alone(row)]
    right = any(_same_boxes(wanted, found) for found in readings) if wanted else not readings
    return None if right else ELSEWHERE


def _places_in(answer: str) -> list[str]:
    words = re.sub(r"[-_]", " ", answer.lower()).replace("center", "centre").replace("middle", "centre")
    found = []
    for name in sorted(PLACES, key=len, reverse=True):  # "upper left" before "left"
        words, count = re.subn(rf"\b{name}\b", " ", words)
        found += [name] * bool(count)
    return found


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
