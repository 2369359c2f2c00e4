"""What is true of an image, as the criteria ask it: its objects, what each is called and where it is.

The criteria know data sets by `Truths` alone. `scene_truth` answers for procedural scenes, `annotated_truth` for rows
that carry the annotated instances of their image. Knows nothing about models beyond how one sees an image.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from segcompass.loaders.masks import encode_mask
from segcompass.trainers.targets import patch_coverage

PLACES = (
    *(column + row for column in "ABCD" for row in "1234"),
    *(f"column {column}" for column in "ABCD"),
    *(f"row {row}" for row in "1234"),
)
"""Cells of a board of 4 x 4 over the image, its columns and its rows."""


class ImageTruth(NamedTuple):
    """What is true of the image of one row, which shows n objects."""

    masks: np.ndarray
    """bool (n, H, W)."""
    looks: list[dict[str, str]]
    """of each object, kind -> attribute; a kind is missing where the labels know no attribute of the object."""
    known: list[frozenset[str]]
    """of each object, the kinds that somebody looked at: what is missing from `looks` there is absent, not unknown."""
    places: list[tuple[str, ...]]
    """of each object, the attributes that say where it is."""
    targets: list[int]
    """the objects that the row asks for."""
    names: list[str | None]
    """of each object; two of one name are twins, None is nobody's twin."""
    questions: list[tuple[int, str]]
    """two objects that can each be asked for, and how; or []."""
    unclear: np.ndarray | None = None
    """bool (H, W), where objects are that nobody told apart; None where there are none."""

    def attributes(self, thing: int) -> set[str]:
        """All attributes of an object."""
        return {*self.looks[thing].values(), *self.places[thing]}

    def has_twin(self, thing: int) -> bool:
        """Whether another object has its name."""
        return self.names[thing] is not None and self.names.count(self.names[thing]) > 1


class Said(NamedTuple):
    """What the text tokens of a sample say. T tokens, A attributes, K kinds."""

    word: np.ndarray
    """bool (T, A), the token is of the attribute's name."""
    phrase: np.ndarray
    """bool (T, A), the token is of words about an object that has the attribute."""
    known: np.ndarray
    """bool (T, K), whether `phrase` knows the kind's attributes of what the token is about."""
    names: list[str]
    """the attribute that each token names, or its text."""


class Truths(Protocol):
    """What is true of the images of a data set."""

    kinds: Mapping[str, tuple[str, ...]]
    """kind of look -> its attributes."""
    places: tuple[str, ...]
    """the attributes that say where an object is."""
    steered: tuple[str, ...]
    """the kinds by which one object is turned into another."""
    ground_known: Mapping[str, bool]
    """kind -> whether what no object covers has none of its attributes."""
    missing: list[str]
    """sentences on what these data cannot say."""

    def of(self, row: Mapping[str, Any]) -> ImageTruth:
        """What is true of a row's image."""

    def said(self, reader: Any, ids: list[int], written: list[bool], row: Mapping[str, Any], truth: ImageTruth) -> Said:
        """What text tokens say; `reader` is a `TokenReader`, `written` marks the tokens of the response."""

    def label_rows(self) -> tuple[Sequence[Any], Sequence[Any]]:
        """Rows with a reasoning that thresholds are chosen on, and rows that F1 and lift are measured on."""


def looks_of(truths: Truths) -> tuple[str, ...]:
    """All looks, kind by kind."""
    return tuple(name for names in truths.kinds.values() for name in names)


def attributes_of(truths: Truths) -> tuple[str, ...]:
    """All attributes that concepts may detect, looks first."""
    return (*looks_of(truths), *truths.places)


def kinds_of(truths: Truths) -> np.ndarray:
    """long (A,): the number of each attribute's kind; places come after the last kind of look."""
    sizes = [len(names) for names in truths.kinds.values()]
    return np.repeat(np.arange(len(sizes) + 1), [*sizes, len(truths.places)])


def patch_cover(masks: np.ndarray, boxes: torch.Tensor) -> np.ndarray:
    """How much of each patch that the MLLM sees shows each object.

    Args:
        masks: bool (n, H, W), of the objects.
        boxes: float (P, 4), the part of the image that each patch shows, see `patch_boxes`.

    Returns:
        float (n, P).
    """
    height, width = masks.shape[1:]
    return patch_coverage([encode_mask(mask) for mask in masks], height, width, boxes).numpy()
