"""What a line of a JSONL must hold to mean one thing, and what all lines of a file must agree on.

Each check raises a ValueError that says what was given, what is needed and what to do; who reads the file adds its name
and the line's number. Knows nothing about rows.
"""

import difflib
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

MASK_KEYS = ("masks", "polygons", "rle", "mask")
TEXTS = ("image", "instruction", "sample_id", "image_id", "dataset", "kind")
READ_IF_THERE = (*MASK_KEYS, "ignore", "split", "reasoning", "instances")
"""What a slip in the key's name would leave out without a word."""


def check_keys(line: Mapping[str, Any]) -> None:
    """Refuse a key that is nearly one that is read: "Split", "reasonning", "polygon".

    Other keys are the user's own and are left alone.

    Args:
        line: the fields that are not empty.

    Raises:
        ValueError: such a key.
    """
    for key in line:
        if key in READ_IF_THERE or key in TEXTS:
            continue
        plain = key.strip().casefold().replace("-", "_").replace(" ", "_")
        meant = plain if plain in (*READ_IF_THERE, *TEXTS) else ""
        if near := meant or next(iter(difflib.get_close_matches(plain, READ_IF_THERE, 1, 0.85)), ""):
            raise ValueError(f"the key {key!r} is not read, {near!r} is: write that, or name yours less alike.")


def check_size(line: Mapping[str, Any], height: int, width: int) -> None:
    """Refuse a line whose "height" or "width" is not the image's: its masks were made on another.

    Args:
        line: the fields that are not empty.
        height: of the image as it is shown, in pixels.
        width: likewise.

    Raises:
        ValueError: they differ.
    """
    for key, true in (("height", height), ("width", width)):
        said = line.get(key)
        if isinstance(said, (int, float)) and not isinstance(said, bool) and said != true:
            raise ValueError(
                f"the line says that {key!r} is {said}, and its image has {height} x {width} (height x width). Were "
                "masks and coordinates made on the image at another size? Scale them, or name the image that they were "
                "made on; if not, leave 'height' and 'width' out."
            )


def check_place(given: str, numbers: Sequence[float], height: int, width: int) -> None:
    """Refuse a polygon that lies elsewhere than on its image.

    Args:
        given: how the error calls it.
        numbers: all coordinates, x and y by turns.
        height: of the image, in pixels.
        width: likewise.

    Raises:
        ValueError: more than half of its box lies outside the image.
    """
    left, right, top, bottom = min(numbers[::2]), max(numbers[::2]), min(numbers[1::2]), max(numbers[1::2])
    across, down = max(0, min(right, width) - max(left, 0)), max(0, min(bottom, height) - max(top, 0))
    if across * down < (right - left) * (bottom - top) / 2:
        raise ValueError(
            f"{given} reaches from ({left:g}, {top:g}) to ({right:g}, {bottom:g}) (x, y), so that most of it lies "
            f"outside the image of {height} x {width} (height x width). Was it made on the image at another size? "
            "Scale it; if not, clip it to the image."
        )


def check_holes(given: str, parts: Sequence[dict]) -> None:
    """Refuse a polygon with a hole that would be filled.

    Args:
        given: how the error calls it.
        parts: RLEs of the polygons that are united.

    Raises:
        ValueError: one part lies inside the others.
    """
    for number, part in enumerate(parts, 1):
        others = coco_mask.merge([each for each in parts if each is not part]) if len(parts) > 1 else None
        if others and coco_mask.area(coco_mask.merge([part, others], intersect=True)) == coco_mask.area(part):
            raise ValueError(
                f"{given} has {len(parts)} parts, which are united, and part {number} lies inside the others. If it is "
                "a hole, give a mask file or RLE in place of polygons; if not, leave it out."
            )


def check_different(masks: Sequence[Mapping[str, Any]]) -> None:
    """Refuse one thing that is given twice.

    Args:
        masks: a line's RLEs.

    Raises:
        ValueError: two of them are the same, pixel for pixel.
    """
    first: dict[Any, int] = {}
    for number, mask in enumerate(masks, 1):
        if (before := first.setdefault(mask["counts"], number)) != number:
            raise ValueError(
                f"masks {before} and {number} are the same, pixel for pixel, and each mask is another thing: leave one "
                "out."
            )


def names_alike(missing: Path) -> str:
    """The end of an error about a file that is not there: one whose name differs in case, blanks or accents' form.

    Args:
        missing: the path.

    Returns:
        A sentence with a blank before it, "" where there is no such file.
    """

    def plain(name: str) -> str:
        return unicodedata.normalize("NFC", name).casefold().strip()

    try:
        found = [each.name for each in missing.parent.iterdir() if plain(each.name) == plain(missing.name)]
    except OSError:
        return ""
    if not found:
        return ""
    same = unicodedata.normalize("NFC", found[0]) == unicodedata.normalize("NFC", missing.name)
    what = ", whose accents are written as characters of their own (as macOS does)" if same else ""
    return f" There is {ascii(found[0]) if same else repr(found[0])}{what}: rename one of the two."


class Agreement:
    """What the lines of one file have said so far.

    Example:
        lines = Agreement()
        lines.split("train", 1)
        lines.split("Train", 2)  # ValueError
    """

    def __init__(self) -> None:
        self._splits: dict[str | None, int] = {}
        self._samples: dict[str, int] = {}
        self._images: dict[str, tuple[Path, int]] = {}

    @property
    def splits(self) -> list[str]:
        """The splits that lines name, in the order of the file."""
        return [split for split in self._splits if split is not None]

    def split(self, split: Any, number: int) -> None:
        """Note a line's split.

        Args:
            split: as it stands there, None where the line has none.
            number: of the line.

        Raises:
            ValueError: no text, a name that differs from another in case or blanks alone, or a line without a split
                among lines with one.
        """
        if split is not None and (isinstance(split, bool) or not isinstance(split, (str, int))):
            raise ValueError(f"'split' must be text; got {split!r:.100}.")
        split = None if split is None else str(split)
        if split in self._splits:
            return
        for other, line in self._splits.items():
            if split is None or other is None:
                without, named = (number, line) if split is None else (line, number)
                raise ValueError(
                    f"line {without} has no 'split' and line {named} has one, so that line {without} would be of every "
                    "split, what is trained on and what is held out: give each line its split, or none."
                )
            if other.strip().casefold() == split.strip().casefold():
                raise ValueError(f"the split {split!r} is not {other!r} of line {line}: write both alike.")
        self._splits[split] = number

    def sample(self, sample_id: str, number: int) -> None:
        """Note a line's sample id. Raises ValueError where another line has it."""
        if (before := self._samples.setdefault(sample_id, number)) != number:
            raise ValueError(
                f"the sample id {sample_id!r} repeats: line {before} has it too (a line without 'sample_id' is called "
                "by the file's name and its number). Give each line its own."
            )

    def image(self, image_id: str, image: Path, number: int) -> None:
        """Note a line's image. Raises ValueError where its id is another image's."""
        other, line = self._images.setdefault(image_id, (image, number))
        if other != image:
            raise ValueError(
                f"the image id {image_id!r} is that of {other.name} in line {line}, and here of {image.name}: an id "
                "stands for one image; give each its own, or leave 'image_id' out."
            )
