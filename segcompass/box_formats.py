"""How MLLMs write boxes: what each family is asked, and which part of the image its numbers mean.

    written = format_of(config)                        # by the MLLM's `model_type`; None for an unknown family
    answer = written.read(text, image.size, shown)     # regions in pixels of the image, or why there are none

A family is a small class below and an entry in `FORMATS`. An answer is read as it stands: what is cut off, lies outside
the image or has no area is left out and counted, and nothing is guessed. Knows nothing about models or masks.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels of the image."""
Point = tuple[float, float]
"""(x, y) in pixels of the image."""

NO_BOX = "the answer holds no box"
UNUSABLE = "no box of the answer has an area inside the image"
CUT = "the answer ends before its reasoning does"

REACH = 0.05
"""How far beyond an edge a number may lie, as a share of the whole range; further off it is another format's."""
ROUNDING = 1e-6
"""Pixels by which a point may lie beyond an edge, so that one on the edge is inside however its numbers are rounded,
and which a box beside the image may seem to have inside it."""
NUMBER = r"""["']?(-?(?:\d+(?:\.\d*)?|\.\d+))["']?"""  # digits in one way alone: many of them take no longer
QUADRUPLE = rf"\[\s*{NUMBER}\s*,\s*{NUMBER}\s*,\s*{NUMBER}\s*,\s*{NUMBER}\s*\]"
CORNERS = rf"\(\s*{NUMBER}\s*,\s*{NUMBER}\s*\)\s*,?\s*\(\s*{NUMBER}\s*,\s*{NUMBER}\s*\)"
NAMED_POINT = rf"""["']point(?:_2d)?["']\s*:\s*[\[(]\s*{NUMBER}\s*,\s*{NUMBER}\s*[\])]"""
TAGGED_POINT = rf"""<points?\s+x1?\s*=\s*{NUMBER}\s+y1?\s*=\s*{NUMBER}"""
LONE_POINT = rf"[\[(]+\s*{NUMBER}\s*,\s*{NUMBER}\s*[\])]+"
WRITTEN = re.compile("|".join((QUADRUPLE, CORNERS, NAMED_POINT, TAGGED_POINT)))
LOCATIONS = re.compile(r"<loc(\d{4})>" * 4)
NOTHING = re.compile(
    r"\W*(?:answer\W+)?(?:(?:none|nothing)(?: (?:in|is|matches|fits)\b[^.\n]*)?\W*$"
    r"|(?:no such|no (?:object|match)\w*|there (?:is|are) no)\b)"
    r"|[^.\n]*\bnot (?:present|visible|found|shown|there)? ?in (?:the|this) (?:image|picture|photo)",
    re.IGNORECASE,
)
"""How an answer begins that says that nothing is meant."""


class Region(NamedTuple):
    """What an answer points at: one thing."""

    box: Box | None
    """inside the image, with an area; None where a point alone was given."""
    point: Point | None = None
    """inside the image."""


class Answer(NamedTuple):
    """An answer and what it points at."""

    text: str
    """as the MLLM wrote it."""
    regions: list[Region]
    """usable ones, in order, each once."""
    nothing: bool
    """whether it says that nothing in the image is meant."""
    fault: str | None
    """why there are no regions though it does not say "nothing"; None otherwise."""
    left_out: int
    """boxes and points that cannot be used: no area, or outside the image."""


class BoxFormat:
    """How one family writes boxes. The defaults are those of most: (left, top, right, bottom) in thousandths.

    Example:
        written = FORMATS["qwen3_vl"]
        (region,) = written.read('[{"bbox_2d": [100, 200, 500, 600]}]', (640, 480)).regions
        print(region.box)  # (64.0, 96.0, 320.0, 288.0)
    """

    model_types: tuple[str, ...] = ()
    """`model_type` of the MLLMs' configurations."""
    question = (
        'Find what is meant by "{instruction}" in this image. Output the bbox coordinates in JSON format, like '
        '[{{"bbox_2d": [x1, y1, x2, y2], "label": "..."}}], one entry for each thing that is meant. If nothing in the '
        "image is meant, output []."
    )
    """what is asked, with `{instruction}`."""
    full: float = 1000
    """the number that stands for the right and the lower edge."""
    smallest: float = 1
    """the shortest side that a box may have, in the format's own numbers."""
    chat_template: str | None = None
    """of MLLMs that come without one."""

    def fits(self, config: Any) -> bool:
        """Whether an MLLM of one of the `model_types` is of this family: some are shared."""
        return True

    def picture(self, image: Image.Image, image_processor: Any) -> Image.Image:
        """What the MLLM is given of an image.

        Args:
            image: upright RGB.
            image_processor: the MLLM's.

        Returns:
            The image itself, in most families.
        """
        return image

    def shown_size(self, inputs: Mapping[str, Any], row: int, image_processor: Any) -> tuple[int, int] | None:
        """(width, height) of what the image processor made of a sample's image, where the numbers count its pixels.

        Args:
            inputs: what the processor made of a batch.
            row: which sample.
            image_processor: the MLLM's.

        Returns:
            None where the numbers do not depend on it.
        """
        return None

    def edges(self, size: tuple[int, int], shown: tuple[int, int] | None) -> tuple[tuple[float, float], Box]:
        """Which numbers stand for the right and lower edges, and of which part of the image.

        Args:
            size: of the image, (width, height).
            shown: as `shown_size` gives it.

        Returns:
            (x, y), and the part whose left upper corner is (0, 0) and whose right lower corner is (x, y).
        """
        return (self.full, self.full), (0, 0, *size)

    def find(self, text: str) -> Iterator[tuple[list[float] | None, list[float] | None]]:
        """The boxes and points of an answer, in the format's own numbers.

        Args:
            text: what was said after the reasoning.

        Yields:
            (left, top, right, bottom) or None, and (x, y) or None.
        """
        yield from find_written(text)

    def says_nothing(self, text: str) -> bool:
        """Whether an answer without a box says that nothing is meant."""
        return says_nothing(text)

    def read(self, text: str, size: tuple[int, int], shown: tuple[int, int] | None = None) -> Answer:
        """Read an answer.

        Args:
            text: as the MLLM wrote it.
            size: of the image, (width, height) in pixels.
            shown: as `shown_size` gives it.

        Returns:
            What it points at, in pixels of the image.
        """
        said = after_reasoning(text)
        if said is None:
            return Answer(text, [], False, CUT, 0)
        regions, left_out = [], 0
        for box, point in self.find(said):
            region = self._place(box, point, size, shown)
            left_out += region is None
            if region is not None and region not in regions:
                regions.append(region)
        if regions:
            return Answer(text, regions, False, None, left_out)
        if left_out:
            return Answer(text, [], False, UNUSABLE, left_out)
        nothing = self.says_nothing(said)
        return Answer(text, [], nothing, None if nothing else NO_BOX, 0)

    def _place(self, box, point, size, shown):
        """A region in pixels; None if it cannot be used."""
        full, (left, top, right, bottom) = self.edges(size, shown)
        for number, edge in zip([*(box or ()), *(point or ())], full * 3, strict=False):
            if not -REACH * edge <= number <= (1 + REACH) * edge:
                return None
        scale_x, scale_y = (right - left) / full[0], (bottom - top) / full[1]

        def inside(x, y):
            return min(max(left + x * scale_x, 0.0), float(size[0])), min(max(top + y * scale_y, 0.0), float(size[1]))

        placed: Box | None = None
        if box is not None:
            (x1, x2), (y1, y2) = sorted(box[::2]), sorted(box[1::2])
            placed = (*inside(x1, y1), *inside(x2, y2))
            too_small = min(x2 - x1, y2 - y1) < self.smallest
            if too_small or min(placed[2] - placed[0], placed[3] - placed[1]) <= ROUNDING:
                return None
        at = None if point is None else inside(*point)
        if placed is None and point is not None:
            x, y = left + point[0] * scale_x, top + point[1] * scale_y
            if not (-ROUNDING <= x <= size[0] + ROUNDING and -ROUNDING <= y <= size[1] + ROUNDING):
                return None
        return Region(placed, at)


class Thousandths(BoxFormat):
    """Qwen3-VL and Qwen3.5: JSON, in thousandths of the image's width and height."""

    model_types = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")


class Qwen2VL(BoxFormat):
    """Qwen2-VL: `<|box_start|>(x1,y1),(x2,y2)<|box_end|>` in thousandths."""

    model_types = ("qwen2_vl",)
    question = (
        "Please provide the bounding box coordinates of the region this sentence describes: "
        "<|object_ref_start|>{instruction}<|object_ref_end|>"
    )


class Pixels(BoxFormat):
    """Qwen2.5-VL: JSON, in pixels of the image as its image processor resized it."""

    model_types = ("qwen2_5_vl",)

    def shown_size(self, inputs: Mapping[str, Any], row: int, image_processor: Any) -> tuple[int, int] | None:
        """The grid of patches times their side."""
        _, rows, columns = (int(number) for number in inputs["image_grid_thw"][row])
        return columns * image_processor.patch_size, rows * image_processor.patch_size

    def edges(self, size: tuple[int, int], shown: tuple[int, int] | None) -> tuple[tuple[float, float], Box]:
        """The resized image's own. Raises ValueError when its size is not given."""
        if shown is None:
            raise ValueError("Qwen2.5-VL counts pixels of the resized image; give shown, that image's (width, height).")
        return shown, (0, 0, *size)


class InternVL(BoxFormat):
    """InternVL: `<ref>…</ref><box>[[x1, y1, x2, y2], …]</box>` in thousandths."""

    model_types = ("internvl",)
    question = (
        "Please provide the bounding box coordinate of the region this sentence describes: <ref>{instruction}</ref>"
    )


class Llava(BoxFormat):
    """LLaVA-1.5: `[x1, y1, x2, y2]` from 0 to 1 on a square, in whose middle the image lies."""

    model_types = ("llava",)
    question = "Please provide the bounding box coordinate of the region this sentence describes: {instruction}"
    full = 1
    smallest = 0.001

    def fits(self, config: Any) -> bool:
        """Pixtral is a "llava" too, with another vision tower and another training."""
        return config.vision_config.model_type == "clip_vision_model"

    def picture(self, image: Image.Image, image_processor: Any) -> Image.Image:
        """The square: the image in its middle, the mean colour beside it, as LLaVA-1.5 was trained."""
        side = max(image.size)
        red, green, blue = (int(255 * value) for value in image_processor.image_mean)
        square = Image.new("RGB", (side, side), (red, green, blue))
        square.paste(image, self._corner(image.size))
        return square

    def edges(self, size: tuple[int, int], shown: tuple[int, int] | None) -> tuple[tuple[float, float], Box]:
        """The square's, which reaches beyond the image."""
        left, top = self._corner(size)
        return (1, 1), (-left, -top, max(size) - left, max(size) - top)

    @staticmethod
    def _corner(size):
        return (max(size) - size[0]) // 2, (max(size) - size[1]) // 2


class PaliGemma(BoxFormat):
    """PaliGemma: `<loc0000>` to `<loc1023>`, top, left, bottom and right in a row; an empty answer for nothing."""

    model_types = ("paligemma",)
    question = "detect {instruction}"
    full = 1024
    chat_template = (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        "<image>{{ bos_token }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}{{ '\n' }}"
    )

    def find(self, text: str) -> Iterator[tuple[list[float] | None, list[float] | None]]:
        """Four location tokens in a row."""
        for top, left, bottom, right in LOCATIONS.findall(text):
            yield [float(left), float(top), float(right), float(bottom)], None

    def says_nothing(self, text: str) -> bool:
        """An empty answer is its way to say so."""
        return not text.strip() or says_nothing(text)


FORMATS: dict[str, BoxFormat] = {
    name: written
    for written in (Thousandths(), Qwen2VL(), Pixels(), InternVL(), Llava(), PaliGemma())
    for name in written.model_types
}
"""`model_type` of an MLLM -> how it writes boxes."""


def format_of(config: Any) -> BoxFormat | None:
    """How an MLLM writes boxes.

    Args:
        config: the MLLM's configuration, or a SegCompass model's.

    Returns:
        None for a family that is not listed.
    """
    config = getattr(config, "mllm_config", config)
    written = FORMATS.get(config.model_type)
    return written if written is not None and written.fits(config) else None


def known_format(config: Any, name: str) -> BoxFormat:
    """How an MLLM writes boxes, where that must be known.

    Args:
        config: as for `format_of`.
        name: what errors call the MLLM.

    Returns:
        Its format.

    Raises:
        ValueError: it is not listed.
    """
    written = format_of(config)
    if written is None:
        config = getattr(config, "mllm_config", config)
        vision = getattr(getattr(config, "vision_config", None), "model_type", None)
        kind = repr(config.model_type) + (f" with vision tower {vision!r}" if config.model_type in FORMATS else "")
        raise ValueError(
            f"mllm={name!r} is of type {kind}, of which it is not known how it writes boxes; choose one of "
            f"{', '.join(FORMATS)} (docs/routes.md)."
        )
    return written


def after_reasoning(text: str) -> str | None:
    """What an answer says in the end: after `</think>`, and inside `<answer>` where there is one.

    Args:
        text: the answer.

    Returns:
        None when the reasoning was begun and not ended.
    """
    before, ended, said = text.rpartition("</think>")
    if not ended and "<think>" in text:
        return None
    if "<answer>" in said:
        said = said.partition("<answer>")[2].partition("</answer>")[0]
    return said


def says_nothing(text: str) -> bool:
    """Whether an answer without a box says that nothing is meant: an empty list, or words to that effect."""
    said = text.strip()
    return re.fullmatch(r"(```\w*)?\s*\[\s*\]\s*(```)?", said) is not None or NOTHING.match(said) is not None


def find_written(text: str) -> Iterator[tuple[list[float] | None, list[float] | None]]:
    """Boxes and points as most MLLMs write them: in JSON or lists, as pairs of corners, or in tags.

    Args:
        text: prose, code fences, and what is cut off at the end do not matter.

    Yields:
        Four numbers or None, and two numbers or None. A box and a point of one JSON object come together.
    """
    found: list[tuple[list[float] | None, list[float] | None]] = []
    end = 0
    for match in WRITTEN.finditer(text):
        numbers = [float(number) for number in match.groups() if number is not None]
        box, point = (numbers, None) if len(numbers) == 4 else (None, numbers)
        together = bool(found) and not re.search(r"[{}]", text[end : match.start()]) and "{" in text[:end]
        if together and (found[-1][0] is None) != (box is None) and None in found[-1]:
            found[-1] = (found[-1][0] or box, found[-1][1] or point)
        else:
            found.append((box, point))
        end = match.end()
    if not found and (lone := re.fullmatch(LONE_POINT, text.strip(" \n.`"))):
        found.append((None, [float(number) for number in lone.groups()]))
    yield from found


def possible_boxes(text: str, size: tuple[int, int]) -> list[list[Box]]:
    """The boxes of an answer of whom it is not known how he counts, read in each way that the numbers allow.

    Args:
        text: the answer.
        size: of the image, (width, height).

    Returns:
        The readings: pixels, thousandths or shares of the image; [] without a box.
    """
    boxes = [box for box, _ in find_written(after_reasoning(text) or "") if box is not None]
    if not boxes:
        return []
    width, height = size
    largest = max(max(box) for box in boxes)
    thousandths = (width / 1000, height / 1000)
    scales: Sequence[tuple[float, float]] = [(width, height)] if largest <= 1 else [(1, 1)]
    scales = [*scales, *([thousandths] if 1 < largest <= 1000 else [])]
    return [[(x * left, y * top, x * right, y * bottom) for left, top, right, bottom in boxes] for x, y in scales]
