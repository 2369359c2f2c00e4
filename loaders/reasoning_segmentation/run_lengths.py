"""Run-length encodings (RLE) are checked here, in Python, before pycocotools' C code sees them.

That code trusts its input: counts that are cut off make it read past their end, and some make it loop for ever. The
file lies beside the metric because the metric also runs alone, as a script of the `evaluate` library. It knows nothing
about images.
"""

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

MAX_PIXELS = 178_956_970
"""Of a mask; the same limit as that of images."""


def checked_rle(rle: Any, size: tuple[int, int] | None = None) -> dict:
    """An RLE that is safe to hand to pycocotools.

    Args:
        rle: {"size": [height, width], "counts": ...}; counts are compressed (str or bytes) or a list of whole numbers.
        size: (height, width) that the RLE must have; None takes any.

    Returns:
        {"size": [height, width], "counts": str}, compressed.

    Raises:
        ValueError: keys, size or counts that cannot be, or that do not fit each other.

    Example:
        >>> checked_rle({"size": [2, 2], "counts": [0, 1, 2, 1]})
        {'size': [2, 2], 'counts': '0121'}
    """
    if not isinstance(rle, dict) or not {"size", "counts"} <= set(rle):
        shown = sorted(map(str, rle))[:9] if isinstance(rle, dict) else type(rle).__name__
        raise ValueError(f'an RLE needs "size" and "counts"; this has {shown}.')
    try:
        given = [int(side) for side in rle["size"]]
        whole = len(given) == 2 and all(side == number for side, number in zip(rle["size"], given, strict=True))
    except (TypeError, ValueError, OverflowError):
        given, whole = [], False
    if not whole or min(given) < 1 or given[0] * given[1] > MAX_PIXELS:
        raise ValueError(
            f"an RLE has size {rle['size']!r:.100}; it must be [height, width], whole numbers from 1 with a product of "
            f"at most {MAX_PIXELS:,}."
        )
    if size is not None and given != list(size):
        raise ValueError(f"an RLE has size {given}, its image {list(size)} (height, width).")
    pixels, counts = given[0] * given[1], rle["counts"]
    if isinstance(counts, (str, bytes)):
        runs = read_counts(counts)
        if runs is None:
            raise ValueError(
                f"an RLE has counts for no number of pixels, its image {pixels}: its {len(counts)} characters "
                f"({counts[:20]!r}...) are damaged or no compressed run lengths."
            )
        _check_sum(runs, pixels)
        return {"size": given, "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}
    try:
        runs = np.asarray(counts)
    except (TypeError, ValueError):
        runs = np.empty(0)
    if runs.ndim != 1 or runs.dtype.kind not in "ui" or not len(runs):
        raise ValueError(
            f"an RLE has counts of type {type(counts).__name__}; they must be compressed text, or a list of whole "
            "numbers."
        )
    _check_sum(runs, pixels)
    packed = coco_mask.frPyObjects({"size": given, "counts": runs.tolist()}, *given)
    return {"size": given, "counts": packed["counts"].decode("ascii")}


def _check_sum(runs: np.ndarray, pixels: int) -> None:
    """Raises ValueError when run lengths are negative or do not fill their mask."""
    low, total = int(runs.min()), sum(runs.tolist())
    if low < 0 or total != pixels:
        negative = f", one of them negative ({low})" if low < 0 else ""
        raise ValueError(f"an RLE has counts for {total} pixels{negative}, its image {pixels}.")


def read_counts(counts: str | bytes) -> np.ndarray | None:
    """The run lengths that compressed counts stand for, which may be negative; None when they are damaged.

    Numbers are written in groups of five bits from the low end, 48 added to each, 32 to all but the last; 16 in the
    last means negative. From the fourth on they are differences to the last but one.
    """
    content = counts if isinstance(counts, bytes) else counts.encode("utf-8", "replace")
    groups = np.frombuffer(content, dtype=np.uint8).astype(np.int64)  # a copy
    groups -= 48
    if not len(groups) or groups.min() < 0 or groups.max() > 63 or groups[-1] & 32:
        return None
    last = (groups & 32) == 0
    starts = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    place = np.arange(len(groups)) - np.repeat(starts, np.diff(np.append(starts, len(groups))))
    if place.max() > 5:  # 30 bits hold any run of MAX_PIXELS, and the C code shifts no further
        return None
    numbers = np.add.reduceat((groups & 31) << (5 * place), starts)
    numbers -= np.where(groups[last] & 16, 1 << (5 * (place[last] + 1)), 0)
    return np.concatenate([numbers[:1], numbers[1::2].cumsum(), numbers[2::2].cumsum()])
