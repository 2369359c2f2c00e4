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
from datasets import Dataset, Features, IterableDataset, NamedSplit
from PIL import Image as PILImage

from .masks import encode_mask
from .registry import register_loader
from .rows import FEATURES, NUM_SHARDS, PHRASES
from .scene_drawing import MIXED, Scene, Size, check_split_and_size, choose_size, draw_scene
from .scene_questions import KINDS, Question, ask, check_answers

STYLES: dict[str, dict] = {
    "scenes": {},
    "mixed-scenes": {"size": MIXED, "answers": "fitting", "twins": 0.04},
    "twin-scenes": {"answers": "fitting", "twins": 0.9},
}
"""How each registered set of scenes is drawn: arguments of `load_scenes` and `scene_question`."""
FOLDER = Path(__file__).resolve().parent
SOURCES = ("scene_drawing.py", "scene_questions.py", "scenes.py")
"""The files that decide what a row holds."""


def scene_question(
    split: str,
    seed: int,
    index: int,
    size: Size | str = 128,
    answers: str = "place",
    twins: float = 0.0,
    questions: int = 1,
) -> tuple[Scene, Question]:
    """The scene and question behind row `index` of `load_scenes(split, seed)`: a pure function of its arguments.

    Args:
        split: "train", "val" or "test".
        seed: not negative.
        index: row number, not negative.
        size: see `load_scenes`.
        answers: see `load_scenes`.
        twins: see `load_scenes`.
        questions: see `load_scenes`.

    Returns:
        The scene, and the question about it whose targets index the scene's objects and masks.

    Raises:
        ValueError: an unknown split or way to answer, or a size that `draw_scene` refuses.
    """
    check_split_and_size(split, size)
    rng = np.random.default_rng([zlib.crc32(split.encode()), seed, index // questions])
    scene = draw_scene(rng, split, choose_size(rng) if isinstance(size, str) else size, twins)
    if questions == 1:
        return scene, ask(rng, scene, answers=answers)
    kinds = [KINDS[kind] for kind in rng.permutation(len(KINDS))[:questions]]
    asked = [ask(rng, scene, kind, answers) for kind in kinds]
    return scene, asked[index % questions]


def _row(split: str, seed: int, index: int, style: dict) -> dict:
    scene, question = scene_question(split, seed, index, **style)
    number = index // style["questions"]
    twins = style["twins"] == STYLES["twin-scenes"]["twins"]
    image_id = f"{'mixed-' if style['size'] == MIXED else 'twin-' * twins}scenes-{split}-{seed}-{number}"
    masks = [encode_mask(mask) for mask in scene.masks]
    height, width = scene.image.shape[:2]
    return {
        "image": PILImage.fromarray(scene.image),
        "image_id": image_id,
        "sample_id": f"{image_id}-{question.kind}",
        "dataset": "scenes",
        "split": split,
        "instruction": question.instruction,
        "reasoning": question.reasoning,
        "masks": [masks[target] for target in question.targets],
        "ignore": None,
        "height": height,
        "width": width,
        "kind": question.kind,
        "phrases": [
            {"text": phrase.text, "start": phrase.start, "masks": [masks[index] for index in phrase.objects]}
            for phrase in question.phrases
        ],
    }


def _stored_rows(split: str, seed: int, style: dict, num_samples: int, source: str) -> Iterator[dict]:
    for index in range(num_samples):
        row = _row(split, seed, index, style)
        png = io.BytesIO()
        row["image"].save(png, format="PNG", compress_level=1)
        yield row | {"image": {"bytes": png.getvalue(), "path": None}}


def _streamed_rows(split: str, seed: int, style: dict, shards: list[tuple[int, int]]) -> Iterator[dict]:
    for start, stop in shards:
        for index in range(start, stop):
            yield _row(split, seed, index, style)


@register_loader("scenes")
def load_scenes(
    split: str = "train",
    seed: int = 0,
    num_samples: int | None = 1000,
    size: Size | str = 128,
    streaming: bool = False,
    answers: str = "place",
    twins: float = 0.0,
    questions: int = 1,
) -> Dataset | IterableDataset:
    """Rows of drawn scenes, one question per scene or several.

    Row i is a pure function of the arguments other than `num_samples` and `streaming`, and of i.

    Args:
        split: "train", "val" or "test"; disjoint by the pairs of looks they show (`scene_drawing.split_of_pair`).
        seed: not negative; each seed gives other scenes.
        num_samples: number of rows, at least 1.
        size: side of square images, or (height, width), in pixels: the longest at least 64 and at most twice the other;
            or "mixed": half of the images 128 x 128, the others of any ratio from 1:2 to 2:1 with a longest side of 96
            to 256 pixels.
        streaming: draw the rows while they are read instead of storing them in the `datasets` cache. A streamed set
            comes in 16 shards of consecutive rows, so that DataLoader workers draw different rows.
        answers: "place" names every target of an answer by place; "fitting" does so only where the question asks for
            places, and by look elsewhere ("two small red balls").
        twins: probability in [0, 1] that an object after the first repeats the look of an earlier one.
        questions: how many rows in a row ask about one scene, each a question of another kind, 1 to 6.

    Returns:
        Dataset, or IterableDataset when `streaming`, with the columns of `loaders.rows.FEATURES` and
        `loaders.rows.PHRASES`: `image` is RGB, `masks` has one RLE per target from left to right, `ignore` is None,
        `kind` is one of `scene_questions.KINDS`, `phrases` are those of the scan and of the answer.

    Raises:
        ValueError: an unknown split or way to answer, num_samples None or below 1, seed < 0, twins outside [0, 1],
            questions outside 1 to 6, or a size that is too small or too narrow.

    Example:
        >>> row = load_scenes("val", seed=3, num_samples=1)[0]
        >>> row["image"].size, row["kind"]
        ((128, 128), 'extreme')
    """
    check_split_and_size(split, size)
    check_answers(answers)
    if not 0 <= twins <= 1:
        raise ValueError(f"twins={twins} is no probability; use a number from 0 to 1.")
    if not 1 <= questions <= len(KINDS):
        raise ValueError(f"questions={questions} is not in 1 to {len(KINDS)}; a scene has one question of each kind.")
    if num_samples is None:
        raise ValueError("num_samples is None; scenes are drawn without end, so say how many.")
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} is below 1; ask for at least one row.")
    if seed < 0:
        raise ValueError(f"seed={seed} is negative; use 0 or more.")
    style = {"size": size, "answers": answers, "twins": twins, "questions": questions}
    if streaming:
        edges = [num_samples * shard // NUM_SHARDS for shard in range(NUM_SHARDS + 1)]
        shards = [(start, stop) for start, stop in pairwise(edges) if start < stop]
        # Without features= the PIL images pass through; with it they would be encoded and decoded.
        return IterableDataset.from_generator(
            _streamed_rows, gen_kwargs={"split": split, "seed": seed, "style": style, "shards": shards}
        )
    # Part of the cache's key: what was drawn by other code is drawn again.
    source = hashlib.sha256(b"".join((FOLDER / name).read_bytes() for name in SOURCES)).hexdigest()
    arguments = {"split": split, "seed": seed, "style": style, "num_samples": num_samples, "source": source}
    features = Features({**FEATURES, **PHRASES})
    return Dataset.from_generator(_stored_rows, features=features, gen_kwargs=arguments, split=NamedSplit(split))


@register_loader("mixed-scenes")
def load_mixed_scenes(
    split: str = "train", seed: int = 0, num_samples: int | None = 1000, streaming: bool = False
) -> Dataset | IterableDataset:
    """Scenes of any aspect, answered by look or by place, with 4 % more equal looks than chance gives.

    Args:
        split: see `load_scenes`.
        seed: see `load_scenes`.
        num_samples: see `load_scenes`.
        streaming: see `load_scenes`.

    Returns:
        `load_scenes(size="mixed", answers="fitting", twins=0.04)`.
    """
    return load_scenes(split, seed, num_samples, streaming=streaming, **STYLES["mixed-scenes"])


@register_loader("twin-scenes")
def load_twin_scenes(
    split: str = "train", seed: int = 0, num_samples: int | None = 1000, streaming: bool = False
) -> Dataset | IterableDataset:
    """Scenes whose further objects mostly repeat the look of an earlier one, so that only places tell them apart.

    Scenes of val and test begin with two objects that differ; of these, only a third object can be a twin.

    Args:
        split: see `load_scenes`.
        seed: see `load_scenes`.
        num_samples: see `load_scenes`.
        streaming: see `load_scenes`.

    Returns:
        `load_scenes(answers="fitting", twins=0.9)`.
    """
    return load_scenes(split, seed, num_samples, streaming=streaming, **STYLES["twin-scenes"])
