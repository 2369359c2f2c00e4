"""What is true of images whose rows carry all annotated instances (`loaders.rows.INSTANCES`), see `image_truth`.

An object's looks are its category and the colour that expressions give it; its place is where its mask's centre lies.
Only what enough label images show has labels. A colour is known of an object that an expression names by it, and of
nothing else: colours are learned and scored on such objects alone, since other things may have them unsaid.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from pycocotools import mask as coco_mask

from segcompass.trainers.targets import patch_coverage

from .criteria import COVERED
from .image_truth import PLACES, ImageTruth, Said, attributes_of, looks_of

COLOURS = {
    name: (name,) for name in ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
} | {"grey": ("grey", "gray")}
"""Colours with the words for them."""
WHERE = {
    "left": ("left", "leftmost"),
    "right": ("right", "rightmost"),
    "top": ("top", "upper", "highest"),
    "bottom": ("bottom", "lower", "lowest"),
    "middle": ("middle", "center", "centre"),
}
"""Place words with their synonyms: the outer thirds of the image, and the middle of both sides."""
SHOWN_IN = 5
"""In how many label images of either half an attribute must be, to have labels."""
SAME = 0.9
"""IoU from which a row's mask is that of an instance."""

_ELSEWHERE = re.compile(
    r"\b(?:next|near|nearest|closest|beside|behind|by|to|of|on|in|under|above|below|between|front|over|at|with|without|"
    r"holding|wearing|not|than|and|that|who|which)\b"
)
"""What follows such a word is said of another thing, or of a part."""


class _Thing(NamedTuple):
    category: str | None
    colour: str | None
    said: list[str]
    mask: dict
    target: bool


class AnnotatedTruths:
    """What is true of rows with instances. Labels come from one row of each of other images.

    Args:
        chosen: rows, each of another image, that thresholds are chosen on.
        scored: the same of yet other images, that F1 and lift are measured on.

    Example:
        chosen, scored = label_rows(load, "train", "train", 400, 300, without=set(rows["image_id"]))
        truths = AnnotatedTruths(chosen, scored)
        print(truths.kinds["category"], truths.of(rows[0]).looks)
    """

    steered: tuple[str, ...] = ("category", "colour")
    places: tuple[str, ...] = (*PLACES, *WHERE)
    ground_known: Mapping[str, bool]

    def __init__(self, chosen: Dataset, scored: Dataset):
        self._halves = (chosen, scored)
        self.missing: list[str] = []
        shown = [_shown_in(rows) for rows in self._halves]
        categories = self._common("categories", [count for count, _ in shown])
        colours = self._common("colours", [count for _, count in shown])
        self._colours = {name: f"colour {name}" if name in categories else name for name in colours}
        kinds = {"category": categories, "colour": tuple(self._colours.values())}
        self.kinds: Mapping[str, tuple[str, ...]] = {kind: names for kind, names in kinds.items() if names}
        self.ground_known = {kind: kind == "category" for kind in self.kinds}

    def _common(self, what: str, counts: Sequence[Counter]) -> tuple[str, ...]:
        """What enough images of both halves show, the most frequent first; () of fewer than two. Notes the rest."""
        seen = sorted(counts[0] | counts[1], key=lambda name: (-counts[0][name] - counts[1][name], name))
        common = tuple(name for name in seen if min(count[name] for count in counts) >= SHOWN_IN)
        rare = [name for name in seen if name not in common]
        if len(common) < 2:
            self.missing.append(
                f"{what} have no labels: {len(common)} of {len(seen)} are in {SHOWN_IN} label images of either half or "
                "more, and it takes two to tell them apart; read more with --label-samples"
                + ("." if what == "categories" else ", or expressions that name colours.")
            )
            return ()
        if rare:
            shown = ", ".join(rare[:8]) + (", …" if len(rare) > 8 else "")
            self.missing.append(
                f"{len(rare)} {what} have no labels, being in fewer than {SHOWN_IN} label images of a half: {shown}."
            )
        return common

    def label_rows(self) -> tuple[Sequence[Any], Sequence[Any]]:
        """See `image_truth.Truths`: where a row has no reasoning, its expression stands in for it."""
        return _Reasoned(self._halves[0]), _Reasoned(self._halves[1])

    def of(self, row: Mapping[str, Any]) -> ImageTruth:
        """See `image_truth.Truths`."""
        things, crowds = _things(row)
        height, width = row["height"], row["width"]
        masks = np.zeros((len(things), height, width), bool)
        for number, thing in enumerate(things):
            masks[number] = coco_mask.decode(thing.mask)
        looks = []
        for thing in things:
            mine = {"category": thing.category, "colour": self._colours.get(thing.colour or "")}
            looks.append({kind: name for kind, name in mine.items() if name in self.kinds.get(kind, ())})
        unclear = coco_mask.decode(coco_mask.merge(crowds)).astype(bool) if crowds else None
        return ImageTruth(
            masks=masks,
            looks=[{kind: str(name) for kind, name in mine.items()} for mine in looks],
            known=[
                frozenset(kind for kind, name in (("category", x.category), ("colour", x.colour)) if name)
                for x in things
            ],
            places=[places_of(mask) for mask in masks],
            targets=[number for number, thing in enumerate(things) if thing.target],
            names=[thing.category for thing in things],
            questions=_questions(row, things, [each["category"] for each in row["instances"] or ()]),
            unclear=unclear,
        )

    @cached_property
    def _words(self) -> list[tuple[int, re.Pattern]]:
        """Number of an attribute, and what finds its name in a text."""
        words: dict[str, Iterable[str]] = {name: (name,) for name in self.kinds.get("category", ())}
        words |= {mine: COLOURS[name] for name, mine in self._colours.items() if "colour" in self.kinds}
        place_of = {name: number for number, name in enumerate(attributes_of(self))}
        found = []
        for name, said in (words | WHERE).items():
            plural = "(?:e?s)?" if name in self.kinds.get("category", ()) else ""
            pattern = rf"\b(?:{'|'.join(map(re.escape, said))}){plural}\b"
            found.append((place_of[name], re.compile(pattern, re.IGNORECASE)))
        return found

    def said(self, reader: Any, ids: list[int], written: list[bool], row: Mapping[str, Any], truth: ImageTruth) -> Said:
        """See `image_truth.Truths`: phrases are the expressions of things, where the response repeats them."""
        text, spans = reader.spans(ids)
        names, kinds = attributes_of(self), list(self.kinds)
        place_of = {name: number for number, name in enumerate(names)}
        looks = len(looks_of(self))
        word = np.zeros((len(ids), len(names)), bool)
        for number, pattern in self._words:
            for match in pattern.finditer(text):
                word[_inside(spans, match), number] = True
        phrase, known = np.zeros_like(word), np.zeros((len(ids), len(kinds)), bool)
        about = np.zeros(len(ids), bool)
        things, _ = _things(row)
        asked = [number for number, thing in enumerate(things) if thing.target]
        phrases = [(row["instruction"], asked)] if asked else []
        phrases += [(said, [number]) for number, thing in enumerate(things) for said in thing.said]
        for said, numbers in phrases:
            for match in re.finditer(re.escape(said), text, re.IGNORECASE):
                inside = _inside(spans, match) & np.array(written, bool)
                about |= inside
                for number in numbers:
                    phrase[np.ix_(inside, [place_of[name] for name in truth.attributes(number)])] = True
                    known[inside] |= np.array([kind in truth.known[number] for kind in kinds], bool)
        known[~about] = [self.ground_known[kind] for kind in kinds]
        named = [names[int(found.argmax())] if found.any() else "" for found in word[:, :looks]]
        pieces = [text[start:stop].strip() for start, stop in spans]
        return Said(word, phrase, known, [name or piece for name, piece in zip(named, pieces, strict=True)])


class _Reasoned(Sequence):
    """Rows whose expression stands in where they have no reasoning."""

    def __init__(self, rows: Dataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row = self.rows[index]
        return {**row, "reasoning": row["reasoning"] or row["instruction"]}


def patch_texts(rows: Dataset) -> Callable[[int, torch.Tensor], list[str]]:
    """What each patch of an image shows: "red cup", or "ground" where no object covers half of it.

    Args:
        rows: with instances.

    Returns:
        (number of the row, boxes of its patches) -> one text per patch.
    """
    known = rows.select_columns(["instances", "masks", "instruction", "height", "width"])
    found: dict[int, list[str]] = {}

    def texts(number: int, boxes: torch.Tensor) -> list[str]:
        if number not in found:
            row = known[number]
            things, _ = _things(row)
            cover = patch_coverage([thing.mask for thing in things], row["height"], row["width"], boxes)  # (n, P)
            found[number] = ["ground"] * len(boxes)
            for thing, shares in zip(things, cover, strict=True):
                for patch in (shares >= COVERED).nonzero()[:, 0].tolist():
                    found[number][patch] = " ".join(filter(None, (thing.colour, thing.category))) or "something"
        return found[number]

    return texts


def _inside(spans: Sequence[tuple[int, int]], match: re.Match) -> np.ndarray:
    """bool (T,), the tokens that a match touches."""
    return np.array([start < match.end() and stop > match.start() for start, stop in spans], bool)


def _things(row: Mapping[str, Any]) -> tuple[list[_Thing], list[dict]]:
    """The things of a row's image, in the order of its instances, and the masks of its crowds.

    A mask of the row that is no instance's is a thing that nobody named.
    """
    instances, masks = list(row["instances"] or ()), list(row["masks"])
    owner: dict[int, int] = {}  # instance -> the row's mask that is its own
    if instances and masks:
        found = coco_mask.iou(
            [_rle(mask) for mask in masks], [_rle(each["mask"]) for each in instances], [0] * len(instances)
        )
        for number, ious in enumerate(found):
            if ious.max() >= SAME:
                owner.setdefault(int(ious.argmax()), number)
    lone = len(masks) == 1
    things, crowds = [], []
    for number, each in enumerate(instances):
        target = number in owner
        if each["crowd"] and not target:
            crowds.append(_rle(each["mask"]))
            continue
        said = list(dict.fromkeys([*(each["expressions"] or ()), *([row["instruction"]] if target and lone else [])]))
        things.append(_Thing(each["category"], colour_of(said), said, _rle(each["mask"]), target))
    for number, mask in enumerate(masks):
        if number not in owner.values():
            said = [row["instruction"]] if lone else []
            things.append(_Thing(None, colour_of(said), said, _rle(mask), True))
    return things, crowds


def _rle(mask: Mapping[str, Any]) -> dict:
    return {"size": list(mask["size"]), "counts": mask["counts"].encode()}


def colour_of(expressions: Iterable[str]) -> str | None:
    """The colour that expressions give to what they mean.

    Only what stands before a word such as "with" or "next to" counts, since what follows is another thing's or a
    part's. An expression with several colours says none; of several expressions most must agree.

    Args:
        expressions: that mean one thing alone.

    Returns:
        A key of `COLOURS`, or None.

    Example:
        >>> colour_of(["red cup on the left", "the cup next to the blue plate", "red mug"])
        'red'
    """
    votes: Counter[str] = Counter()
    for text in expressions:
        words = set(re.findall(r"[a-z]+", _ELSEWHERE.split(text.lower())[0]))
        named = [name for name, said in COLOURS.items() if words & set(said)]
        votes.update(named if len(named) == 1 else [])
    if not votes:
        return None
    best, count = votes.most_common(1)[0]
    return best if 2 * count > votes.total() else None


def places_of(mask: np.ndarray) -> tuple[str, ...]:
    """Where a mask's centre lies: the cell of a board of 4 x 4, its column and row, and place words.

    Args:
        mask: bool (H, W), with a pixel.

    Returns:
        Attributes of `AnnotatedTruths.places`.
    """
    height, width = mask.shape
    y, x = (float(axis.mean()) + 0.5 for axis in mask.nonzero())
    column, row = "ABCD"[int(x * 4 / width)], str(int(y * 4 / height) + 1)
    words = [side for side, there in (("left", 3 * x < width), ("right", 3 * x > 2 * width)) if there]
    words += [side for side, there in (("top", 3 * y < height), ("bottom", 3 * y > 2 * height)) if there]
    return column + row, f"column {column}", f"row {row}", *(words or ["middle"])


def _questions(
    row: Mapping[str, Any], things: Sequence[_Thing], categories: Sequence[str | None]
) -> list[tuple[int, str]]:
    """Two things that can each be asked for, the row's targets first: by an expression of their own, or by a category
    that nothing else in the image has."""
    said = Counter(text.lower() for thing in things for text in thing.said)
    found = []
    for number, thing in sorted(enumerate(things), key=lambda each: not each[1].target):
        own = [text for text in thing.said if said[text.lower()] == 1]
        if not own and thing.category and categories.count(thing.category) == 1:
            own = [f"the {thing.category}"]
        found += [(number, own[0])] if own else []
    return found[:2] if len(found) > 1 else []


def _shown_in(rows: Dataset) -> tuple[Counter, Counter]:
    """In how many rows each category, and each colour, is."""
    categories: Counter[str] = Counter()
    colours: Counter[str] = Counter()
    for row in rows.select_columns(["instances", "masks", "instruction"]):
        things, _ = _things(row)
        categories.update({thing.category for thing in things if thing.category})
        colours.update({thing.colour for thing in things if thing.colour})
    return categories, colours


def label_rows(
    load: Callable[[str, int], Dataset],
    split: str,
    held_out: str,
    chosen: int,
    scored: int,
    without: Collection[str],
) -> tuple[Dataset, Dataset]:
    """Rows that label concepts: one of each image, none of an image that is examined or in the other half.

    Args:
        load: (split, number of rows) -> so many first rows, or all there are.
        split: whose images thresholds are chosen on.
        held_out: whose images F1 and lift are measured on.
        chosen: how many images at most.
        scored: the same of the other half.
        without: ids of the images that are examined.

    Returns:
        The two halves. Where there are fewer images than asked for, both are smaller in proportion.

    Raises:
        ValueError: fewer than two images.
    """
    if split == held_out:
        rows = _one_per_image(load, split, chosen + scored, without)
        if len(rows) < 2:
            raise ValueError(
                f"split {split!r} has {len(rows)} images that are not examined; labels need at least two, better some "
                "hundreds: name another with --label-split."
            )
        first = max(1, min(chosen, round(len(rows) * chosen / (chosen + scored)), len(rows) - 1))
        return rows.select(range(first)), rows.select(range(first, len(rows)))
    rows = _one_per_image(load, split, chosen, without)
    other = _one_per_image(load, held_out, scored, {*without, *rows["image_id"]})
    for name, part in ((split, rows), (held_out, other)):
        if not len(part):
            raise ValueError(f"split {name!r} has no image that is neither examined nor in the other half of labels.")
    return rows, other


def _one_per_image(load: Callable[[str, int], Dataset], split: str, count: int, without: Collection[str]) -> Dataset:
    """Of each of so many images the first row that asks for something, or its first row."""
    wanted = 8 * count
    while True:
        rows = load(split, wanted)
        kept: dict[str, int] = {}
        asks = [len(masks) > 0 for masks in rows["masks"]]
        for number, image in enumerate(rows["image_id"]):
            if image not in without and (image not in kept or (asks[number] and not asks[kept[image]])):
                kept[image] = number
        if len(kept) >= count or len(rows) < wanted:
            return rows.select(list(kept.values())[:count])
        wanted *= 4
