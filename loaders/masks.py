"""The one mask reader and the one RLE encoder.

| a mask comes as | read by |
|---|---|
| an RLE dict, a mask file (a path, its bytes), a PIL image, an array, a tensor or rows of 0 and 1 | `read_mask` |
| polygons of one instance, flat or as points | `read_polygons` |
| a COCO annotation's segmentation: polygons or run lengths, compressed or not | `coco_rle` |
| polygons to be painted pixel by pixel, outline included | `paint_polygon` |

Every mask leaves as a COCO compressed RLE dict {"size": [h, w], "counts": str}. A picture or an array is a mask when it
has 0 (black) outside and one other value inside; anything that could mean two masks is refused. docs/data.md has the
whole table, which a test reads row by row.
"""

from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from .files import need
from .reasoning_segmentation.run_lengths import MAX_PIXELS, checked_rle

MAX_OUTLINE = 4_000_000
"""Pixels along the outline of an instance's polygons; more would take minutes and gigabytes to fill."""
FARTHEST = 10_000_000
"""Largest coordinate of a polygon's point, in pixels."""
STRIP = 256
"""Rows of a mask that are turned into columns at a time: a photograph's, all at once, take five times as long."""

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
    columns = np.empty(mask.shape, np.uint8, order="F")
    for top in range(0, len(mask), STRIP):
        columns[top : top + STRIP] = mask[top : top + STRIP]
    return _plain(coco_mask.encode(columns))


def decode_mask(rles: Sequence[dict], height: int, width: int) -> np.ndarray:
    """Decode the union of masks.

    Args:
        rles: COCO compressed RLE dicts; [] is an empty mask.
        height: of the masks, in pixels.
        width: of the masks, in pixels.

    Returns:
        bool (H, W).

    Raises:
        ValueError: a damaged RLE, or one of another size.
    """
    if not rles:
        return np.zeros((height, width), dtype=bool)
    return coco_mask.decode(coco_mask.merge([checked_rle(rle, (height, width)) for rle in rles])).astype(bool)


def has_pixels(rle: dict) -> bool:
    """Whether any pixel is inside an RLE that `read_mask` or `coco_rle` made: a mask without pixels is no instance."""
    return bool(coco_mask.area(rle))


def read_mask(mask: Any, height: int, width: int, folder: Path = Path()) -> dict:
    """Read one instance's mask.

    Args:
        mask: an RLE dict, compressed or not; a mask file (a path, bytes, or {"bytes", "path"}); a PIL image; or an
            array, a tensor or rows of (H, W), (H, W, 1) or (1, H, W). A mask has 0 (black) outside and one other value
            inside; of floats that value is 1.
        height: of its image, in pixels.
        width: of its image, in pixels.
        folder: what paths are relative to.

    Returns:
        The RLE, also when no pixel is inside.

    Raises:
        FileNotFoundError: the mask file is missing.
        ValueError: an unreadable file, another size than the image's, or values that do not say what is inside.

    Example:
        >>> read_mask([[1, 0], [0, 1]], height=2, width=2)
        {'size': [2, 2], 'counts': '0120'}
    """
    if isinstance(mask, Mapping) and "counts" in mask:
        return checked_rle(dict(mask), (height, width))
    if isinstance(mask, Mapping) and not {"bytes", "path"} & set(mask):
        return checked_rle(dict(mask))  # which says what an RLE needs
    if isinstance(mask, Mapping):
        mask = mask["bytes"] if mask.get("bytes") is not None else mask.get("path")
    if isinstance(mask, (str, Path)):
        path = need(folder / mask, "paths are relative to the JSONL's folder.")
        inside = _read_picture(path, f"the mask file {path}")
    elif isinstance(mask, (bytes, bytearray)):
        inside = _read_picture(bytes(mask), f"the mask of {len(mask)} bytes")
    elif hasattr(mask, "convert") and hasattr(mask, "getexif"):
        inside = _inside_picture(mask, "the mask")
    else:
        inside = _inside_array(mask, height, width)
    if inside.shape != (height, width):
        raise ValueError(
            f"a mask of size {inside.shape}, its image {(height, width)} (height, width); make them equal."
        )
    return encode_mask(inside)


def _inside_array(given: Any, height: int, width: int) -> np.ndarray:
    """An array, a tensor or rows as bool (H, W). Raises ValueError."""
    if np.ma.is_masked(given):
        raise ValueError("a mask is an array of which some values are masked; fill them first (array.filled(0)).")
    try:
        array = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given)
    except ValueError as error:
        raise ValueError(f"a mask must be rows of 0 and 1, all of one length: {error}.") from error
    except Exception as error:
        raise ValueError(f"a mask is a {type(given).__name__} that numpy cannot read: {error}.") from error
    if array.shape == (height, width, 1):
        array = array[..., 0]
    elif array.shape == (1, height, width):
        array = array[0]
    if array.shape in ((height, width, 2), (height, width, 3), (height, width, 4)) and array.dtype == np.uint8:
        from PIL import Image

        return _inside_picture(Image.fromarray(array), "a mask with colours")
    if array.dtype.kind not in "buif":
        raise ValueError(f"a mask must be rows of 0 and 1; got values of {array.dtype}.")
    if array.dtype.kind == "f" and not np.isin(array, (0, 1)).all():
        raise ValueError(f"a mask must be rows of 0 and 1; got values of {array.dtype}. Threshold it first.")
    return _one_value(array, "a mask")


def _read_picture(file: Path | bytes, name: str) -> np.ndarray:
    """A mask file as bool (H, W). Raises ValueError."""
    from io import BytesIO

    from PIL import Image

    try:
        picture = Image.open(BytesIO(file) if isinstance(file, bytes) else file)
    except Exception as error:  # decoders raise whatever they like on damaged files
        raise ValueError(f"{name} cannot be read: {str(error)[:300]}.") from error
    with picture:
        return _inside_picture(picture, name)


def _inside_picture(picture: Any, name: str) -> np.ndarray:
    """A PIL image as bool (H, W), turned as its EXIF orientation says. Raises ValueError.

    Colours, the numbers of a palette and transparency may each say what is inside. They must agree.
    """
    from segcompass.modeling_segcompass.images import upright  # here, since it brings torch along

    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(f"{name} has {picture.width} x {picture.height} pixels; the limit is {MAX_PIXELS:,}.")
    kind = picture.format
    try:
        frames = getattr(picture, "n_frames", 1)
        picture.load()
    except Exception as error:
        raise ValueError(f"{name} cannot be read: {str(error)[:300]}.") from error
    if frames != 1:
        raise ValueError(f"{name} has {frames} frames or pages; save the mask as a picture of one.")
    picture = upright(picture, name)
    mode = picture.mode
    said: dict[str, np.ndarray] = {}
    if mode in ("1", "L") or mode.startswith("I"):
        said["values"] = np.asarray(picture)
    elif mode in ("P", "PA"):
        said["numbers of the palette"] = np.asarray(picture if mode == "P" else picture.convert("P"))
    if mode in ("LA", "P", "PA", "RGB", "RGBA"):
        colours = np.asarray(picture.convert("RGBA")).astype(np.int32)
        said["colours"] = (colours[..., 0] << 16) | (colours[..., 1] << 8) | colours[..., 2]
    if mode in ("LA", "PA", "RGBA") or "transparency" in picture.info:
        opaque = np.asarray(picture.convert("RGBA"))[..., 3]
        said |= {} if (opaque == 255).all() else {"transparency": opaque}
    if not said:
        raise ValueError(f"{name} has mode {mode!r}; save it as black and white (PIL mode 'L' or '1').")
    lossy = " JPEG changes values, so save masks as PNG." if kind in ("JPEG", "MPO") else ""
    inside = {each: _one_value(values, f"{name} ({each})", lossy) for each, values in said.items()}
    first, *others = inside
    for other in others:
        if not np.array_equal(inside[first], inside[other]):
            areas = f"{int(inside[first].sum())} pixels by its {first}, {int(inside[other].sum())} by its {other}"
            raise ValueError(f"{name} can be read in two ways: inside are {areas}. Save it as black and white.")
    return inside[first]


def _one_value(array: np.ndarray, name: str, hint: str = "") -> np.ndarray:
    """What is not 0, as bool. Raises ValueError unless it is all of one value above 0."""
    inside = array != 0
    if array.dtype.kind != "b" and inside.any():
        low, high = array[inside].min(), array.max()
        if low != high or low < 0:
            found = np.unique(array[inside])
            shown = ", ".join(map(str, found[:4].tolist())) + (", ..." if len(found) > 4 else "")
            raise ValueError(
                f"{name} must be 0 outside and one other value inside, such as rows of 0 and 1; got {shown} beside 0. "
                f"Threshold it, or give one mask for each instance.{hint}"
            )
    return inside


def read_polygons(polygons: Sequence, height: int, width: int) -> dict | None:
    """Read one instance's polygons.

    Args:
        polygons: a flat polygon [x0, y0, x1, y1, ...], one as points [[x0, y0], [x1, y1], ...], or a list of either,
            which are united; in pixels. What lies outside the image is cut off.
        height: of its image, in pixels.
        width: of its image, in pixels.

    Returns:
        The RLE, or None when no pixel is inside.

    Raises:
        ValueError: a polygon of fewer than three points or of an odd number of coordinates; coordinates that are no
            finite numbers, all lie from 0 to 1, or are far outside; an endless outline.
    """
    if not isinstance(polygons, (list, tuple)) or not polygons:
        raise ValueError(f"a polygon must be a list [x0, y0, x1, y1, x2, y2, ...]; got {polygons!r:.100}.")
    parts = [polygons] if _is_polygon(polygons) else polygons
    flat = []
    for part in parts:
        points = isinstance(part, (list, tuple)) and part and all(isinstance(each, (list, tuple)) for each in part)
        numbers = [number for point in part for number in point] if points else part
        if not isinstance(numbers, (list, tuple)) or any(
            isinstance(number, bool) or not isinstance(number, (int, float)) for number in numbers
        ):
            raise ValueError(f"a polygon must be a list of numbers [x0, y0, x1, y1, x2, y2, ...]; got {part!r:.100}.")
        if len(numbers) < 6 or len(numbers) % 2 or (points and any(len(point) != 2 for point in part)):
            raise ValueError(
                f"a polygon needs at least three points as [x0, y0, x1, y1, x2, y2, ...]; got {part!r:.100}."
            )
        flat.append(list(numbers))
    _check_outline(flat)
    if max(height, width) > 1 and all(0 <= number <= 1 for part in flat for number in part):
        raise ValueError(
            "all coordinates of a polygon lie from 0 to 1, as if they were shares of the image's sides; give them in "
            f"pixels: multiply x by {width} and y by {height}."
        )
    return coco_rle(flat, height, width)


def _is_polygon(given: Sequence) -> bool:
    """Whether this is one polygon, flat or as points, and not a list of them."""
    if any(not isinstance(each, (list, tuple)) for each in given):
        return True
    return len(given) > 2 and all(len(each) == 2 and not isinstance(each[0], (list, tuple)) for each in given)


def _check_outline(polygons: Sequence[Sequence[float]]) -> None:
    """Raises ValueError for flat polygons that the C code cannot fill in bounded time and memory."""
    length = 0.0
    for polygon in polygons:
        points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
        if not np.isfinite(points).all():
            raise ValueError("a polygon has a coordinate that is not finite.")
        if np.abs(points).max() > FARTHEST:
            raise ValueError(f"a polygon has the coordinate {np.abs(points).max():g}; the farthest is {FARTHEST:,}.")
        length += np.abs(np.diff(points, axis=0, append=points[:1])).max(axis=1).sum()
    if length > MAX_OUTLINE:
        raise ValueError(f"a polygon's outline has {length:,.0f} pixels; the limit is {MAX_OUTLINE:,}: simplify it.")


def coco_rle(segmentation: Any, height: int, width: int) -> dict | None:
    """The mask of a COCO annotation: all its polygons united, or its run lengths, compressed or not.

    As in the reference loaders, polygons of fewer than three points or of an odd number of coordinates are left out.
    Parts of a polygon outside the image are cut off.

    Args:
        segmentation: list of flat polygons [x0, y0, x1, y1, ...], each a list, a tuple or an array; an RLE dict, or a
            list of RLE dicts.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Returns:
        The RLE, or None when no pixel is inside.

    Raises:
        ValueError: an RLE of another size, or one whose counts do not fill it; a polygon that is not finite or endless.
        TypeError: none of these forms.
    """
    rle: dict | None
    size = (height, width)
    if isinstance(segmentation, dict):
        rle = checked_rle(segmentation, size)
    elif isinstance(segmentation, (list, tuple)) and all(isinstance(part, dict) for part in segmentation):
        rle = coco_mask.merge([checked_rle(part, size) for part in segmentation]) if segmentation else None
    elif isinstance(segmentation, (list, tuple)) and all(
        isinstance(part, (list, tuple, array)) for part in segmentation
    ):
        if any(isinstance(each, (list, tuple)) for part in segmentation for each in part[:1]):
            raise TypeError("a polygon must be flat, [x0, y0, x1, y1, ...]; got points: join them to one list.")
        polygons = [list(map(float, part)) for part in segmentation if len(part) >= 6 and len(part) % 2 == 0]
        _check_outline(polygons)
        rle = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)) if polygons else None
    else:
        raise TypeError(
            f"a segmentation must be a list of flat polygons, an RLE dict or a list of them; got "
            f"{type(segmentation).__name__}."
        )
    return _plain(rle) if rle is not None and coco_mask.area(rle) else None


def packed_polygons(found: dict) -> dict:
    """An object of a COCO file, changed so that polygons take a quarter of the memory: numbers, not Python's objects.

    Args:
        found: an annotation; anything else stays as it is.

    Returns:
        The same object. Its polygons are arrays, which `coco_rle` reads as it reads lists; a segmentation that is not
        made of polygons of numbers is left to `coco_rle`'s errors.

    Example:
        >>> packed_polygons({"segmentation": [[1, 1, 5, 1, 5, 4]]})
        {'segmentation': [array('d', [1.0, 1.0, 5.0, 1.0, 5.0, 4.0])]}
    """
    polygons = found.get("segmentation")
    if isinstance(polygons, list) and all(isinstance(each, list) for each in polygons):
        with suppress(TypeError, OverflowError):
            found["segmentation"] = [array("d", each) for each in polygons]
    return found


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
        ValueError: no points, not (n, 2), not finite, or an endless outline.
    """
    given = np.asarray(points, dtype=np.float64)
    if given.ndim != 2 or given.shape[1] != 2 or not len(given) or not np.isfinite(given).all():
        raise ValueError(f"a polygon must be a list of finite points [x, y]; got an array of shape {given.shape}.")
    _check_outline([given.ravel().tolist()])
    corners = given.astype(np.int64)  # (n, 2)
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
