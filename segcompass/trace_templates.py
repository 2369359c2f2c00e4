"""Reasoning traces from annotations: sentences about what is in the image, where, how large, and what is asked for.

Names and boxes are put into words ("the leftmost of three dogs", "above the bench"); no number of a coordinate appears.
Several wordings, chosen by the sample's id, so that a model does not learn one sentence by heart. Knows nothing about
images or models.
"""

import hashlib
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from segcompass.loaders.surroundings import Thing

LONGEST = 12
"""Words of an instruction that the conclusion repeats; a longer one is a question of its own."""
MARKS = re.compile(r'[.?!:;…"“”]')
"""An instruction with one of these is not repeated: it would end the sentence, or be a quotation in a quotation."""
LISTED = 5
"""Things of a kind that are described one by one; more are counted."""
COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
PLURALS = {
    "person": "people",
    "mouse": "mice",
    "sheep": "sheep",
    "knife": "knives",
    "scissors": "scissors",
    "skis": "skis",
}


def write_trace(row: Mapping[str, Any], things: Sequence[Thing], seed: int = 0) -> str:
    """A trace for a row.

    Args:
        row: of the shared schema; its `masks`, `instruction`, `height`, `width` and `sample_id` are read.
        things: what is in the image, those asked for marked.
        seed: another one chooses other wordings.

    Returns:
        A few sentences. They hold the instruction, and otherwise no digit.

    Example:
        >>> row = {"sample_id": "a", "instruction": "the dog", "height": 90, "width": 90, "masks": [None]}
        >>> write_trace(row, [Thing("dog", (0, 0, 20, 20), True), Thing("dog", (60, 60, 90, 90), False)])
        'Asked for is "the dog". There are two dogs: a small one at the upper left, a medium-sized one at the lower \
right. So "the dog" is the leftmost dog, small, at the upper left.'
    """
    digest = hashlib.sha256(f"{seed} {row['sample_id']}".encode()).digest()
    words = _Words(random.Random(digest), row["height"], row["width"])
    asked = [thing for thing in things if thing.asked_for]
    others = [thing for thing in things if not thing.asked_for]
    opening = words.choose(
        'Asked for is "{}".', 'The instruction says "{}".', 'I look for "{}".', '"{}": I go through the image.'
    )
    sentences = [opening.format(" ".join(row["instruction"].split()))]
    if asked:
        sentences += words.survey(asked, others)
        sentences.append(words.conclusion(row["instruction"], asked, others))
    else:
        sentences += words.nothing(others)
    return " ".join(sentences)


def plural(name: str) -> str:
    """The plural of a category's name."""
    head, _, last = name.rpartition(" ")
    if last in PLURALS:
        last = PLURALS[last]
    elif last.endswith(("s", "ch", "sh", "x")):
        last += "es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{head} {last}".strip()


def place(box: tuple[float, float, float, float], height: int, width: int) -> str:
    """In which part of the image the centre of a box lies: one of `PLACES`.

    Args:
        box: left, top, right and bottom, in pixels.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Returns:
        "upper left", "top", ..., "centre", ..., "lower right".
    """
    across = (box[0] + box[2]) / 2 / width
    down = (box[1] + box[3]) / 2 / height
    column, line = min(2, int(3 * max(across, 0))), min(2, int(3 * max(down, 0)))
    return PLACES[3 * line + column]


PLACES = ("upper left", "top", "upper right", "left", "centre", "right", "lower left", "bottom", "lower right")


class _Words:
    """Puts boxes of one image into words."""

    def __init__(self, rng: random.Random, height: int, width: int):
        self.rng, self.height, self.width = rng, height, width

    def choose(self, *wordings: str) -> str:
        return self.rng.choice(wordings)

    # -- one thing

    def at(self, thing: Thing) -> str:
        where = place(thing.box, self.height, self.width)
        return f"in the {where}" if where == "centre" else f"at the {where}"

    def size(self, thing: Thing) -> str:
        share = _area(thing.box) / (self.height * self.width)
        for limit, word in ((0.02, "tiny"), (0.06, "small"), (0.2, "medium-sized"), (0.5, "large")):
            if share < limit:
                return word
        return "very large"

    # -- several

    def survey(self, asked: Sequence[Thing], others: Sequence[Thing]) -> list[str]:
        """What there is of the kinds that are asked for, and beside."""
        sentences = []
        kinds = list(dict.fromkeys(thing.name for thing in asked))
        for kind in kinds:
            if kind is None:
                continue
            same = sorted((t for t in (*asked, *others) if t.name == kind), key=lambda t: t.box[0])
            if len(same) == 1:
                there = self.choose("There is one {}.", "I see a single {}.", "Only one {} is in the image.")
                sentences.append(there.format(kind))
                continue
            listed = [f"a {self.size(thing)} one {self.at(thing)}" for thing in same[:LISTED]]
            more = f", and {_number(len(same) - LISTED)} more" if len(same) > LISTED else ""
            there = self.choose("There are {} {}: {}{}.", "I see {} {}: {}{}.", "The image shows {} {}: {}{}.")
            sentences.append(there.format(_number(len(same)), plural(kind), ", ".join(listed), more))
        beside = [kind for kind in dict.fromkeys(thing.name for thing in others) if kind and kind not in kinds]
        if beside and self.rng.random() < 0.5:
            sentences.append(f"Beside, there {_are(others, beside[:3])}.")
        return sentences

    def conclusion(self, instruction: str, asked: Sequence[Thing], others: Sequence[Thing]) -> str:
        """Which of them is meant, in one sentence: a grounded read-out reads the last one alone."""
        if len(asked) > 1:
            listed = [f"the {self.size(t)} {t.name or 'one'} {self.at(t)}" for t in asked[:LISTED]]
            more = f", and {_number(len(asked) - LISTED)} more" if len(asked) > LISTED else ""
            all_of_kind = asked[0].name is not None and {t.name for t in asked} == {asked[0].name}
            alone = all_of_kind and not any(thing.name == asked[0].name for thing in others)
            things = (
                f"all {_number(len(asked))} {plural(str(asked[0].name))}" if alone else f"{_number(len(asked))} things"
            )
            meant = f"{things} are meant: {', '.join(listed)}{more}"
            return f"{self.choose('So', 'Therefore', 'By that,')} {meant}."
        (thing,) = asked
        name, alike = thing.name or "thing", [other for other in others if other.name == thing.name and thing.name]
        told = self.told_apart(thing, alike)
        relation = self.relation(thing, [other for other in others if other.name and other.name != thing.name])
        which = f"{told} {name}" if told else f"{name}"
        which = f"the {which}{f', {relation}' if relation else ''}, {self.size(thing)}, {self.at(thing)}"
        words = " ".join(instruction.split())
        if len(words.split()) > LONGEST or MARKS.search(words):
            return self.choose("What is meant is {}.", "So it is {}.", "I find it: {}.").format(which)
        return self.choose('So "{}" is {}.', 'What is meant, "{}", is {}.', '"{}" is {}.').format(words, which)

    def nothing(self, others: Sequence[Thing]) -> list[str]:
        """That nothing is meant."""
        kinds = [kind for kind in dict.fromkeys(thing.name for thing in others) if kind]
        seen = [f"There {_are(others, kinds[:4])}."] if kinds else []
        end = self.choose(
            "Nothing here fits the instruction, so there is nothing to segment.",
            "None of it is what is asked for, so no mask is needed.",
            "What is asked for is not in the image.",
        )
        return [*seen, end]

    def told_apart(self, thing: Thing, alike: Sequence[Thing]) -> str:
        """What only this one of its kind is, such as "leftmost"; "" where it is alone or nothing stands out."""
        measures: dict[str, Callable[[Thing], float]] = {
            "leftmost": lambda t: _middle(t.box)[0] / self.width,
            "rightmost": lambda t: -_middle(t.box)[0] / self.width,
            "topmost": lambda t: _middle(t.box)[1] / self.height,
            "lowest": lambda t: -_middle(t.box)[1] / self.height,
            "largest": lambda t: -_area(t.box) / (self.height * self.width),
            "smallest": lambda t: _area(t.box) / (self.height * self.width),
        }
        if not alike:
            return ""
        margins = {word: min(map(measure, alike)) - measure(thing) for word, measure in measures.items()}
        word = max(margins, key=margins.__getitem__)
        return word if margins[word] > 0.02 else ""

    def relation(self, thing: Thing, others: Sequence[Thing]) -> str:
        """How it lies to the nearest thing of another kind; "" where there is none, or nearly in one place."""
        if not others or self.rng.random() < 0.4:
            return ""
        x, y = _middle(thing.box)

        def distance(other: Thing) -> float:
            a, b = _middle(other.box)
            return ((a - x) / self.width) ** 2 + ((b - y) / self.height) ** 2

        near = min(others, key=distance)
        across = (x - _middle(near.box)[0]) / self.width
        down = (y - _middle(near.box)[1]) / self.height
        if max(abs(across), abs(down)) < 0.05:
            return ""
        one = "a" if sum(other.name == near.name for other in others) > 1 else "the"
        if abs(across) >= abs(down):
            return f"{'left' if across < 0 else 'right'} of {one} {near.name}"
        return f"{'above' if down < 0 else 'below'} {one} {near.name}"


def _number(count: int) -> str:
    return COUNTS[count] if count < len(COUNTS) else "many"


def _are(things: Sequence[Thing], kinds: Sequence[str]) -> str:
    """ "is one dog and two chairs"."""
    counts = [sum(thing.name == kind for thing in things) for kind in kinds]
    parts = [
        f"one {kind}" if count == 1 else f"{_number(count)} {plural(kind)}"
        for kind, count in zip(kinds, counts, strict=True)
    ]
    verb = "is" if counts[0] == 1 else "are"
    return f"{verb} {parts[0]}" if len(parts) == 1 else f"{verb} {', '.join(parts[:-1])} and {parts[-1]}"


def _middle(box: tuple[float, float, float, float]) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _area(box: tuple[float, float, float, float]) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
