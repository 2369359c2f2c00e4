"""The one mask reader and the one RLE encoder.

| a mask comes as | read by |
|---|---|
| an RLE dict, a mask file, an array or rows of 0 and 1 | `read_mask` |
| polygons of one instance | `read_polygons` |
| a COCO annotation's segmentation: polygons or run lengths, compressed or not | `coco_rle` |
| polygons to be painted pixel by pixel, outline included | `paint_polygon` |

Every mask leaves as a COCO compressed RLE dict {"size": [h, w], "counts": str}.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from .files import need

_ONE = 1 << 16  # fixed point, as OpenCV follows an edge from row to row


def encode_mask(mask: np.ndarray) -> dict:
    """Encode a mask.

    Args:
        mask: bool (H, W).

    Returns:
        COCO compressed RLE dict with counts as str, as JSON and the row schema need them.

    Example:
        >>> encode_mask(np.eye(2, dtype=bool))
        {'size': [2, 2], 'counts': '0120'}
    """
    return _plain(coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)))


def decode_mask(rles: Sequence[dict], height: int, width: int) -> np.ndarray:
    """Decode the union of masks.

    Args:
        rles: COCO compressed RLE dicts; [] is an empty mask.
        height: of an empty mask, in pixels.
        width: of an empty mask, in pixels.

    Returns:
        bool (H, W).
    """
    if not rles:
        return np.zeros((height, width), dtype=bool)
    return coco_mask.decode(coco_mask.merge(list(rles))).astype(bool)


def read_mask(mask: Any, height: int, width: int, folder: Path = Path()) -> dict:
    """Read one instance's mask.

    Args:
        mask: an RLE dict, compressed or not; the path of a mask file, in which what is not 0 (black) is inside; or an
            array or rows of 0 and 1.
        height: of its image, in pixels.
        width: of its image, in pixels.
        folder: what paths are relative to.

    Returns:
        The RLE, also when no pixel is inside.

    Raises:
        FileNotFoundError: the mask file is missing.
        ValueError: an unreadable file, another size than the image's, or values other than 0 and 1.

    Example:
        >>> read_mask([[1, 0], [0, 1]], height=2, width=2)
        {'size': [2, 2], 'counts': '0120'}
    """
    if isinstance(mask, dict):
        return coco_rle(mask, height, width) or encode_mask(decode_mask([], height, width))
    array = _read_file(folder / mask) if isinstance(mask, (str, Path)) else np.array(mask)
    if array.dtype.kind not in "bui" or not np.isin(array, (0, 1)).all():
        raise ValueError(f"a mask must be rows of 0 and 1; got values of {array.dtype}. Threshold it first.")
    if array.shape != (height, width):
        raise ValueError(f"a mask of size {array.shape}, its image {(height, width)} (height, width); make them equal.")
    return encode_mask(array != 0)


def _read_file(path: Path) -> np.ndarray:
    """A mask file as bool (H, W). Raises FileNotFoundError or ValueError."""
    from PIL import Image

    need(path, "paths are relative to the JSONL's folder.")
    try:
        pixels = np.asarray(Image.open(path))  # (H, W) or (H, W, channels)
    except OSError as error:
        raise ValueError(f"the mask file {path} cannot be read: {error}.") from error
    return (pixels != 0).any(axis=2) if pixels.ndim == 3 else pixels != 0  # (H, W)


def read_polygons(polygons: Sequence, height: int, width: int) -> dict | None:
    """Read one instance's polygons.

    Args:
        polygons: a flat polygon [x0, y0, x1, y1, ...] or a list of them that are united, in pixels.
        height: of its image, in pixels.
        width: of its image, in pixels.

    Returns:
        The RLE, or None when no pixel is inside.

    Raises:
        ValueError: a polygon of fewer than three points or of an odd number of coordinates.
    """
    flat = not all(isinstance(part, list) for part in polygons)
    parts = [polygons] if flat else polygons
    short = [part for part in parts if len(part) < 6 or len(part) % 2]
    if short:
        raise ValueError(f"a polygon needs at least three points as [x0, y0, x1, y1, x2, y2, ...]; got {short[0]}.")
    return coco_rle(parts, height, width)


def coco_rle(segmentation: Any, height: int, width: int) -> dict | None:
    """The mask of a COCO annotation: all its polygons united, or its run lengths, compressed or not.

    As in the reference loaders, polygons of fewer than three points or of an odd number of coordinates are left out.
    Parts of a polygon outside the image are cut off.

    Args:
        segmentation: list of flat polygons [x0, y0, x1, y1, ...], an RLE dict, or a list of RLE dicts.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Returns:
        The RLE, or None when no pixel is inside.

    Raises:
        ValueError: an RLE of another size, or one whose counts do not fill it.
        TypeError: none of these forms.
    """
    rle: dict | None
    if isinstance(segmentation, dict):
        rle = _sized(segmentation, height, width)
    elif isinstance(segmentation, (list, tuple)) and all(isinstance(part, dict) for part in segmentation):
        rle = coco_mask.merge([_sized(part, height, width) for part in segmentation]) if segmentation else None
    elif isinstance(segmentation, (list, tuple)) and all(isinstance(part, (list, tuple)) for part in segmentation):
        polygons = [list(map(float, part)) for part in segmentation if len(part) >= 6 and len(part) % 2 == 0]
        if not np.isfinite([number for polygon in polygons for number in polygon]).all():
            raise ValueError("a polygon has a coordinate that is not finite.")
        rle = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)) if polygons else None
    else:
        raise TypeError(
            f"a segmentation must be a list of flat polygons, an RLE dict or a list of them; got "
            f"{type(segmentation).__name__}."
        )
    return _plain(rle) if rle is not None and coco_mask.area(rle) else None


def _sized(rle: dict, height: int, width: int) -> dict:
    """An RLE of the image's size, compressed. Raises ValueError."""
    if not {"size", "counts"} <= set(rle):
        raise ValueError(f'an RLE needs "size" and "counts"; this has {sorted(rle)}.')
    if list(rle["size"]) != [height, width]:
        raise ValueError(f"an RLE has size {list(rle['size'])}, its image {[height, width]} (height, width).")
    if isinstance(rle["counts"], (list, tuple)):
        counts = list(rle["counts"])
        if sum(counts) != height * width or min(counts, default=0) < 0:
            raise ValueError(f"an RLE has counts for {sum(counts)} pixels, its image {height * width}.")
        return coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    counted = _pixels(rle["counts"])
    if counted != height * width:
        raise ValueError(f"an RLE has counts for {counted} pixels, its image {height * width}.")
    return rle


def _pixels(counts: str | bytes) -> int | None:
    """How many pixels compressed run lengths describe; None when they are damaged.

    Numbers are written in groups of five bits from the low end, 48 added to each, 32 to all but the last; 16 in the
    last means negative. From the fourth on they are differences to the last but one.
    """
    groups = np.frombuffer(counts if isinstance(counts, bytes) else counts.encode(), dtype=np.uint8).astype(np.int64)
    groups -= 48
    if not len(groups) or groups.min() < 0 or groups.max() > 63 or groups[-1] & 32:
        return None
    last = (groups & 32) == 0
    starts = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    place = np.arange(len(groups)) - np.repeat(starts, np.diff(np.append(starts, len(groups))))
    if place.max() > 8:
        return None
    numbers = np.add.reduceat((groups & 31) << (5 * place), starts)
    numbers -= np.where(groups[last] & 16, 1 << (5 * (place[last] + 1)), 0)
    runs = np.concatenate([numbers[:1], numbers[1::2].cumsum(), numbers[2::2].cumsum()])
    return int(runs.sum()) if runs.min() >= 0 else None


def _plain(rle: dict) -> dict:
    counts = rle["counts"]
    counts = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {"size": [int(side) for side in rle["size"]], "counts": counts}


def paint_polygon(points: Sequence[Sequence[float]] | np.ndarray, height: int, width: int) -> np.ndarray:
    """A filled polygon with its outline, as OpenCV 4's `polylines` (thickness 1) and `fillPoly` paint it together.

    Coordinates are cut to whole numbers. Painted are the closed outline, one pixel wide, and in every row the spans
    between the outline's crossings by the even-odd rule, both ends rounded to the nearest pixel. What lies outside the
    image is cut off.

    Args:
        points: (n, 2), x and y in pixels; one point or two paint a dot or a line.
        height: of the mask, in pixels.
        width: of the mask, in pixels.

    Returns:
        bool (height, width).

    Raises:
        ValueError: no points, not (n, 2), or not finite.
    """
    given = np.asarray(points, dtype=np.float64)
    if given.ndim != 2 or given.shape[1] != 2 or not len(given) or not np.isfinite(given).all():
        raise ValueError(f"a polygon must be a list of finite points [x, y]; got an array of shape {given.shape}.")
    corners = np.clip(given, -(2**24), 2**24).astype(np.int64)  # (n, 2)
    outline = np.zeros((height, width), dtype=bool)
    rows: list[np.ndarray] = []
    crossings: list[np.ndarray] = []  # in the fixed point of _ONE
    for (x0, y0), (x1, y1) in zip(corners.tolist(), np.roll(corners, -1, axis=0).tolist(), strict=True):
        _draw_line(outline, x0, y0, x1, y1)
        if y0 > y1:
            x0, y0, x1, y1 = x1, y1, x0, y0
        if y0 < y1:
            crossed = np.arange(max(y0, 0), min(y1, height))
            slope = int((x1 - x0) * _ONE / (y1 - y0))  # towards zero, as whole numbers divide in C
            rows.append(crossed)
            crossings.append(x0 * _ONE + (crossed - y0) * slope)
    if rows:
        row, crossing = np.concatenate(rows), np.concatenate(crossings)  # (crossings,), an even number in each row
        order = np.lexsort((crossing, row))
        ends = np.clip((crossing[order] + _ONE // 2) // _ONE, -1, width)
        row, left, right = row[order][::2], np.maximum(ends[::2], 0), ends[1::2]  # (spans,)
        edges = np.zeros((height, width + 2), dtype=np.int32)  # +1 where a span begins, -1 after its end
        np.add.at(edges, (row, left), 1)
        np.add.at(edges, (row, np.maximum(np.minimum(right, width - 1) + 1, left)), -1)
        outline |= edges.cumsum(axis=1)[:, :width] > 0
    return outline


def _draw_line(canvas: np.ndarray, x0: int, y0: int, x1: int, y1: int) -> None:
    """An 8-connected line from left to right; halfway between two pixels the nearer to the start is taken."""
    if x0 > x1:
        x0, y0, x1, y1 = x1, y1, x0, y0
    across, along = x1 - x0, abs(y1 - y0)
    down = 1 if y1 >= y0 else -1
    long, short = max(across, along), min(across, along)
    steps = np.arange(long + 1)
    offset = -((long - 2 * short * steps) // (2 * long)) if long else steps  # ceil(short * step / long - 1/2)
    x, y = (x0 + steps, y0 + down * offset) if across >= along else (x0 + offset, y0 + down * steps)
    inside = (x >= 0) & (x < canvas.shape[1]) & (y >= 0) & (y < canvas.shape[0])
    canvas[y[inside], x[inside]] = True
