"""What is true of procedural scenes, see `image_truth`: every object's colour, shape, size and cell is known."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from segcompass.loaders import load_rows
from segcompass.loaders.scene_drawing import COLOURS, SHAPES, SIZES, Scene, SceneObject
from segcompass.loaders.scenes import STYLES, scene_question

from .image_truth import PLACES, ImageTruth, Said

KINDS = {"colour": tuple(COLOURS), "shape": SHAPES, "size": tuple(SIZES)}
NAMED = (*(name for names in KINDS.values() for name in names), *PLACES)
"""The attributes that concepts may detect."""

_PHRASE = re.compile(
    rf"\b([A-D][1-4])(?:(?: small| large)?(?: {'| '.join(COLOURS)}) (?:{'|'.join(SHAPES)}))?",
)


class SceneTruths:
    """What is true of the scenes of a registered data set. Labels come from training and from held-out scenes.

    Args:
        dataset: a key of `STYLES`.
        held_out: split of the held-out scenes.
        seed: of the training scenes; the held-out ones have the next.
        chosen: how many training scenes.
        scored: how many held-out scenes.

    Example:
        truths = SceneTruths("scenes", "test", seed=900101, chosen=400, scored=300)
        print(truths.of(load_rows("scenes", "test", 0, 1)[0]).looks)
    """

    kinds: Mapping[str, tuple[str, ...]] = KINDS
    places: tuple[str, ...] = PLACES
    steered: tuple[str, ...] = ("colour", "shape")
    ground_known: Mapping[str, bool] = dict.fromkeys(KINDS, True)
    missing: list[str] = []

    def __init__(self, dataset: str, held_out: str, seed: int, chosen: int, scored: int):
        self.dataset, self.held_out, self.seed, self.chosen, self.scored = dataset, held_out, seed, chosen, scored

    def of(self, row: Mapping[str, Any]) -> ImageTruth:
        """See `image_truth.Truths`."""
        *_, split, seed, number = row["image_id"].split("-")
        scene, question = scene_question(split, int(seed), int(number), **STYLES[self.dataset])
        return ImageTruth(
            masks=scene.masks,
            looks=[{"colour": thing.colour, "shape": thing.shape, "size": thing.size} for thing in scene.objects],
            known=[frozenset(KINDS)] * len(scene.objects),
            places=[places_of(thing) for thing in scene.objects],
            targets=list(question.targets),
            names=[f"{thing.size} {thing.colour} {thing.shape}" for thing in scene.objects],
            questions=two_questions(scene) or [],
        )

    def said(self, reader: Any, ids: list[int], written: list[bool], row: Mapping[str, Any], truth: ImageTruth) -> Said:
        """See `image_truth.Truths`."""
        words = reader.words(ids)
        word, phrase = said_of_scene(words, written, truth)
        return Said(word, phrase, np.ones((len(words), len(KINDS)), bool), words)

    def label_rows(self) -> tuple[Sequence[Any], Sequence[Any]]:
        """See `image_truth.Truths`."""
        train = load_rows(self.dataset, "train", self.seed, self.chosen)
        return train, load_rows(self.dataset, self.held_out, self.seed + 1, self.scored)


def places_of(thing: SceneObject) -> tuple[str, str, str]:
    """The cell of an object, its column and its row."""
    column, row = thing.place[0], thing.place[1]
    return thing.place, f"column {column}", f"row {row}"


def said_of_scene(words: list[str], written: list[bool], truth: ImageTruth) -> tuple[np.ndarray, np.ndarray]:
    """What word pieces say about a scene.

    Args:
        words: T texts, without spaces around them.
        written: of each, whether it is of the response.
        truth: of the scene.

    Returns:
        bool (T, A) each: the word is the attribute's name; the word is of a phrase about an object that has it.
    """
    place_of = {name: number for number, name in enumerate(NAMED)}
    word = np.zeros((len(words), len(NAMED)), bool)
    phrase = np.zeros_like(word)
    text, ends = "", []
    for number, (piece, mine) in enumerate(zip(words, written, strict=True)):
        name = piece
        if mine and piece in ("A", "B", "C", "D"):
            name = f"column {piece}"
        elif mine and piece in ("1", "2", "3", "4"):
            name = f"row {piece}"
        if name in place_of:
            word[number, place_of[name]] = True
        joined = bool(text) and piece[:1].isdigit() and text[-1:] in "ABCD"  # "B", "4" is the place B4
        text += ("" if joined else " ") + (piece if mine else " " * len(piece))
        ends.append((len(text) - len(piece), len(text)))
    for match in _PHRASE.finditer(text):
        inside = np.flatnonzero([a < match.end() and b > match.start() for a, b in ends])[:, None]
        for thing, places in enumerate(truth.places):
            if places[0] == match.group(1):
                phrase[inside, [place_of[name] for name in truth.attributes(thing)]] = True
    return word, phrase


def two_questions(scene: Scene) -> list[tuple[int, str]] | None:
    """Two objects that can each be asked for by look alone, and how.

    Args:
        scene: any.

    Returns:
        [(object, instruction), (object, instruction)], or None when there are no two.
    """
    found = []
    for number, thing in enumerate(scene.objects):
        for names in (("colour", "shape"), ("shape",), ("colour",)):
            same = [all(getattr(other, name) == getattr(thing, name) for name in names) for other in scene.objects]
            if sum(same) == 1:
                words = [getattr(thing, name) for name in names]
                found.append((number, "find the " + " ".join(words + ["thing"] * ("shape" not in names))))
                break
    return found[:2] if len(found) > 1 else None
