"""Where things are, in words: a mask's parts by the board's cells or by the sides of the image.

Knows nothing about where masks come from or about HTML.
"""

import numpy as np

CELLS = 4
"""Cells of the small model's board along an image's longest side."""
GRID = 64
"""Points along the longest side on which parts of a mask are told apart."""
A_PART = 0.15
"""Share of a mask below which a part of it is not named."""
MOST_PARTS = 3
"""How many parts are named."""


def whereabouts(mask: np.ndarray, board: bool) -> str:
    """Where a mask is.

    Args:
        mask: bool (H, W).
        board: whether places are called by the board's cells; else by the sides of the image.

    Returns:
        Such as "B2", "B2 and C4" or "the upper left", the largest part first; "" for an empty mask.
    """
    step = max(1, -(-max(mask.shape) // GRID))
    small = mask[step // 2 :: step, step // 2 :: step]
    small = small if small.any() else mask
    parts = sorted(parts_of(small), key=len, reverse=True)
    whole = sum(map(len, parts))
    named = []
    for part in parts[:MOST_PARTS]:
        if len(part) >= A_PART * whole:
            down, right = (np.mean(part, axis=0) + 0.5) / small.shape
            named.append(place_name(down, right, mask.shape, board))
    *others, last = dict.fromkeys(named) or [""]
    return f"{', '.join(others)} and {last}" if others else last


def place_name(down: float, right: float, size: tuple[int, ...], board: bool) -> str:
    """How a place is called.

    Args:
        down: from the top, in [0, 1] of the height.
        right: from the left, in [0, 1] of the width.
        size: (H, W) of the image.
        board: see `whereabouts`.

    Returns:
        Such as "B2" or "the upper left".
    """
    if board:
        cell = max(size) / CELLS
        return f"{'ABCD'[min(3, int(right * size[1] / cell))]}{min(4, int(down * size[0] / cell) + 1)}"
    level, side = ("upper", "", "lower")[min(2, int(3 * down))], ("left", "", "right")[min(2, int(3 * right))]
    return f"the {' '.join(filter(None, (level, side)))}" if level and side else _edge_name(level, side)


def _edge_name(level: str, side: str) -> str:
    return {"upper": "the top", "lower": "the bottom"}.get(level, f"the {side}" if side else "the middle")


def parts_of(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """The connected parts of a mask.

    Args:
        mask: bool (H, W), small.

    Returns:
        (row, column) of the points of each part; corners connect.
    """
    left = {(int(row), int(column)) for row, column in zip(*mask.nonzero(), strict=True)}
    parts = []
    while left:
        begun = [left.pop()]
        for row, column in begun:  # grows while it is read
            near = {(row + down, column + right) for down in (-1, 0, 1) for right in (-1, 0, 1)} & left
            left -= near
            begun.extend(near)
        parts.append(begun)
    return parts
