"""ReasonSeg from the files its authors released: NAME.jpg with NAME.json beside it."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset

from .files import need, read_json
from .masks import encode_mask, paint_polygon
from .registry import register_loader
from .rows import LeftOut, expressions, to_dataset


@register_loader("reasonseg")
def load_reasonseg(
    root: str | os.PathLike, split: str = "val", unit: str = "sentence", num_samples: int | None = None
) -> Dataset:
    """Rows of a ReasonSeg split.

    Shapes are painted from the largest to the smallest, so that a small one stays visible on a large one; shapes
    labelled "flag" are dropped and those labelled "ignore" become the `ignore` mask. Images stand as their EXIF
    orientation says, and so do the masks.

    Args:
        root: holds the folders train/, val/ and test/.
        split: one of these.
        unit: one row per "sentence" (training images have up to five rephrasings), per "ref" (the first sentence, as
            most evaluations do), or all sentences "merged" into one row.
        num_samples: the first so many rows in the order of file names, or None for all.

    Returns:
        Dataset with the columns of `loaders.rows.FEATURES`; `masks` has one mask per target shape; `kind` is "long" for
        a whole question and "short" for a phrase.

    Raises:
        FileNotFoundError: no such folder, no images in it, or an image without its JSON.
        ValueError: a damaged file, an unknown unit, or a shape that is no polygon.

    Example:
        rows = load_reasonseg("ReasonSeg", "val", unit="ref")
    """
    expressions([], unit)
    folder = need(
        Path(root) / split, "ReasonSeg's archive holds train/, val/ and test/; `root` is the folder they are in."
    )
    images = sorted(folder.glob("*.jpg"))
    if not images:
        raise FileNotFoundError(f"{folder} holds no .jpg files; ReasonSeg's images and .json files lie side by side.")
    absent = [image.with_suffix(".json").name for image in images if not image.with_suffix(".json").exists()]
    if absent:
        raise FileNotFoundError(
            f"{len(absent)} images in {folder} have no .json beside them; add {', '.join(absent[:5])}."
        )
    files = [file for image in images for file in (image, image.with_suffix(".json"))]
    arguments = {"folder": folder.resolve(), "split": split, "unit": unit}
    return to_dataset(_rows, arguments, files, split, num_samples)


def _rows(folder: Path, split: str, unit: str) -> Iterator[dict]:
    from segcompass.modeling_segcompass.images import upright_size  # here, since it brings torch along

    left_out = LeftOut()
    for image in sorted(folder.glob("*.jpg")):
        path = image.with_suffix(".json")
        content = read_json(path)
        if not isinstance(content, dict) or not {"shapes", "text", "is_sentence"} <= content.keys():
            raise ValueError(f"{path} needs the keys shapes, text and is_sentence.")
        height, width = upright_size(image)
        try:
            masks, ignore = paint_shapes(content["shapes"], height, width)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path}: {error}") from error
        if not masks:
            left_out.add("images without a visible target", image.name)
            continue
        texts = [content["text"]] if isinstance(content["text"], str) else content["text"]
        asked = expressions([(str(number), text) for number, text in enumerate(texts)], unit)
        if not asked:
            left_out.add("blank expressions", image.name)
        for suffix, instruction in asked:
            yield {
                "image": {"path": str(image), "bytes": None},
                "image_id": image.stem,
                "sample_id": f"reasonseg-{split}-{image.stem}-{suffix}",
                "dataset": "reasonseg",
                "split": split,
                "instruction": instruction,
                "reasoning": None,
                "masks": masks,
                "ignore": ignore,
                "height": height,
                "width": width,
                "kind": "long" if content["is_sentence"] else "short",
            }
    left_out.warn()


def paint_shapes(shapes: list[dict], height: int, width: int) -> tuple[list[dict], dict | None]:
    """The target masks and the ignore mask of a labelled image.

    Args:
        shapes: each with "label" and "points" [[x, y], ...].
        height: of the image, in pixels.
        width: of the image, in pixels.

    Returns:
        One RLE per target shape that is visible; the RLE of ignored pixels, or None when there are none.

    Raises:
        ValueError: a shape is no polygon.
        KeyError: a shape without label or points.
    """
    kept = [shape for shape in shapes if shape["label"].lower() != "flag"]
    painted = [paint_polygon(shape["points"], height, width) for shape in kept]
    ignored = ["ignore" in shape["label"].lower() for shape in kept]
    # Of shapes of one area the later in the file is painted first, as in the reference code.
    order = np.argsort([mask.sum() for mask in painted], kind="stable")[::-1]
    label = np.zeros((height, width), dtype=np.uint8)
    for index in order:
        label[painted[index]] = 2 if ignored[index] else 1
    masks = [mask & (label == 1) for mask, ignore in zip(painted, ignored, strict=True) if not ignore]
    ignore = label == 2
    return [encode_mask(mask) for mask in masks if mask.any()], encode_mask(ignore) if ignore.any() else None
