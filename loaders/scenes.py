"""Procedural scenes with questions: reasoning segmentation without a download.

A row shows two or three drawn objects (`scene_drawing`) and asks for one, several or none of them
(`scene_questions`). It is a pure function of its split, seed and number.

This module knows nothing about models or tokens.
"""

import hashlib
import io
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from datasets import Dataset, IterableDataset, NamedSplit
from PIL import Image as PILImage

from .masks import encode_mask
from .registry import register_loader
from .rows import FEATURES, NUM_SHARDS
from .scene_drawing import Scene, check_split_and_size, draw_scene
from .scene_questions import Question, ask

FOLDER = Path(__file__).resolve().parent
SOURCES = ("scene_drawing.py", "scene_questions.py", "scenes.py")
"""The files that decide what a row holds."""


def scene_question(split: str, seed: int, index: int, size: int = 128) -> tuple[Scene, Question]:
    """The scene and question behind row `index` of `load_scenes(split, seed)`: a pure function of its arguments.

    Args:
        split: "train", "val" or "test".
        seed: not negative.
        index: row number, not negative.
        size: height and width in pixels, at least 64.

    Returns:
        The scene, and the question about it whose targets index the scene's objects and masks.

    Raises:
        ValueError: an unknown split, or a size below 64.
    """
    check_split_and_size(split, size)
    rng = np.random.default_rng([zlib.crc32(split.encode()), seed, index])
    scene = draw_scene(rng, split, size)
    return scene, ask(rng, scene)


def _row(split: str, seed: int, index: int, size: int) -> dict:
    scene, question = scene_question(split, seed, index, size)
    image_id = f"scenes-{split}-{seed}-{index}"
    return {
        "image": PILImage.fromarray(scene.image),
        "image_id": image_id,
        "sample_id": f"{image_id}-{question.kind}",
        "dataset": "scenes",
        "split": split,
        "instruction": question.instruction,
        "reasoning": question.reasoning,
        "masks": [encode_mask(scene.masks[target]) for target in question.targets],
        "ignore": None,
        "height": size,
        "width": size,
        "kind": question.kind,
    }


def _stored_rows(split: str, seed: int, size: int, num_samples: int, source: str) -> Iterator[dict]:
    for index in range(num_samples):
        row = _row(split, seed, index, size)
        png = io.BytesIO()
        row["image"].save(png, format="PNG", compress_level=1)
        yield row | {"image": {"bytes": png.getvalue(), "path": None}}


def _streamed_rows(split: str, seed: int, size: int, shards: list[tuple[int, int]]) -> Iterator[dict]:
    for start, stop in shards:
        for index in range(start, stop):
            yield _row(split, seed, index, size)


@register_loader("scenes")
def load_scenes(
    split: str = "train", seed: int = 0, num_samples: int | None = 1000, size: int = 128, streaming: bool = False
) -> Dataset | IterableDataset:
    """Rows of drawn scenes, one question per scene.

    Row i is a pure function of (split, seed, i, size), whatever `num_samples` and `streaming` are.

    Args:
        split: "train", "val" or "test"; disjoint by the pairs of looks they show (`scene_drawing.split_of_pair`).
        seed: not negative; each seed gives other scenes.
        num_samples: number of rows, at least 1.
        size: height and width in pixels, at least 64.
        streaming: draw the rows while they are read instead of storing them in the `datasets` cache. A streamed set
            comes in 16 shards of consecutive rows, so that DataLoader workers draw different rows.

    Returns:
        Dataset, or IterableDataset when `streaming`, with the columns of `loaders.rows.FEATURES`: `image` is RGB,
        `masks` has one RLE per target from left to right, `ignore` is None, `kind` is one of
        `scene_questions.KINDS`.

    Raises:
        ValueError: an unknown split, num_samples None or below 1, seed < 0 or size < 64.

    Example:
        >>> row = load_scenes("val", seed=3, num_samples=1)[0]
        >>> row["image"].size, row["kind"]
        ((128, 128), 'extreme')
    """
    check_split_and_size(split, size)
    if num_samples is None:
        raise ValueError("num_samples is None; scenes are drawn without end, so say how many.")
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} is below 1; ask for at least one row.")
    if seed < 0:
        raise ValueError(f"seed={seed} is negative; use 0 or more.")
    if streaming:
        edges = [num_samples * shard // NUM_SHARDS for shard in range(NUM_SHARDS + 1)]
        shards = [(start, stop) for start, stop in pairwise(edges) if start < stop]
        # Without features= the PIL images pass through; with it they would be encoded and decoded.
        return IterableDataset.from_generator(
            _streamed_rows, gen_kwargs={"split": split, "seed": seed, "size": size, "shards": shards}
        )
    # Part of the cache's key: what was drawn by other code is drawn again.
    source = hashlib.sha256(b"".join((FOLDER / name).read_bytes() for name in SOURCES)).hexdigest()
    arguments = {"split": split, "seed": seed, "size": size, "num_samples": num_samples, "source": source}
    return Dataset.from_generator(_stored_rows, features=FEATURES, gen_kwargs=arguments, split=NamedSplit(split))
