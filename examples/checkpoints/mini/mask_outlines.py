"""Masks as JSON: COCO's compressed run lengths, and polygons along the edges of pixels, both exact.

Written with numpy alone, because the served folder has no pycocotools; what `loaders/masks.py` reads is what this file
writes. Knows nothing about models.
"""

from typing import Any

import numpy as np

Ring = list[list[int]]
"""[[x, y], ...], corners of pixels, without the first repeated at the end."""


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """A mask as COCO's compressed run lengths.

    Args:
        mask: bool (H, W).

    Returns:
        {"size": [H, W], "counts": str}.

    Example:
        >>> run_lengths(np.eye(2, dtype=bool))
        {'size': [2, 2], 'counts': '0120'}
    """
    cells = np.asarray(mask, bool).ravel(order="F")  # column by column, beginning with a run outside
    changes = np.flatnonzero(cells[1:] != cells[:-1]) + 1
    runs = np.diff(np.concatenate([[0], changes, [cells.size]]))
    if cells.size and cells[0]:
        runs = np.concatenate([[0], runs])
    left = runs.astype(np.int64)
    left[3:] -= runs[1:-2]  # from the fourth on: what differs from the last but one
    written: list[np.ndarray] = []  # five bits of every number, from the low end
    going = np.ones(len(left), bool)
    while going.any():
        bits = left & 31
        left = left >> 5
        more = going & (left != np.where(bits & 16, -1, 0))
        written.append(np.where(going, bits + np.where(more, 32, 0) + 48, 0))
        going = more
    characters = np.stack(written, 1).ravel()
    counts = characters[characters > 0].astype(np.uint8).tobytes().decode("ascii")
    return {"size": [int(side) for side in mask.shape], "counts": counts}


def outlines(mask: np.ndarray) -> list[list[Ring]]:
    """A mask's outlines along the edges of its pixels: inside them are the centres of these pixels and no others.

    Args:
        mask: bool (H, W). Pixels that touch at a corner alone belong to two polygons.

    Returns:
        One polygon per connected part, as in GeoJSON's MultiPolygon: the outer ring first, then the rings of its holes.

    Example:
        >>> outlines(np.ones((1, 2), dtype=bool))
        [[[[0, 0], [2, 0], [2, 1], [0, 1]]]]
    """
    rows, columns = (np.flatnonzero(np.asarray(mask).any(axis)) for axis in (1, 0))
    if not len(rows):
        return []
    top, left = int(rows[0]), int(columns[0])
    inside = np.pad(np.asarray(mask, bool)[top : rows[-1] + 1, left : columns[-1] + 1], 1)
    rings, is_hole = _rings(inside)
    edges = np.full(inside.shape, -1, np.int32)  # at each pixel whose left edge is an outline's: which ring
    for number, ring in enumerate(rings):
        for (x, y), (next_x, next_y) in zip(ring, [*ring[1:], ring[0]], strict=True):
            if x == next_x:
                edges[min(y, next_y) : max(y, next_y), x] = number
    polygons = {number: [ring] for number, ring in enumerate(rings) if not is_hole[number]}
    outer = {number: number for number in polygons}  # ring -> the outer ring of the part it bounds
    for number in sorted(np.flatnonzero(is_hole).tolist(), key=lambda ring: rings[ring][0][1]):
        x, y = rings[number][0]  # its highest corner; the pixels above it are inside, up to an outline on their left
        crossed = edges[y - 1, : x + 1]
        outer[number] = outer[int(crossed[np.flatnonzero(crossed >= 0)[-1]])]
        polygons[outer[number]].append(rings[number])
    shift = (left - 1, top - 1)
    return [[[[x + shift[0], y + shift[1]] for x, y in ring] for ring in rings] for rings in polygons.values()]


def _rings(inside: np.ndarray) -> tuple[list[list[tuple[int, int]]], np.ndarray]:
    """The rings of a mask with an empty border, each from its highest corner (of these the leftmost), and which of
    them are holes: bool (rings,).

    A corner lies where one or three of four pixels are inside, and belongs to the odd one out; where two touch at a
    corner alone it belongs to each of the two. From a corner the outline leads on towards its pixel's side: a sorted
    row of corners pairs into horizontal edges, and a column into vertical ones.
    """
    four = inside[:-1, :-1], inside[:-1, 1:], inside[1:, :-1], inside[1:, 1:]  # each (H + 1, W + 1)
    touching = (four[0] == four[3]) & (four[1] == four[2]) & (four[0] != four[1])
    y, x = np.nonzero(four[0] ^ four[1] ^ four[2] ^ four[3] | touching)
    around = np.stack([pixels[y, x] for pixels in four], 1)  # (corners, 4)
    count = around.sum(1)
    corner, quadrant = np.nonzero(np.where(count[:, None] == 3, ~around, around))  # one, or two of those that touch
    y, x, concave = y[corner] + 1, x[corner] + 1, count[corner] == 3  # it is the upper left corner of pixel (x, y)
    right, below = quadrant % 2, quadrant // 2
    partners = []
    for along, across, side in ((x, y, right), (y, x, below)):
        order = np.lexsort((side, along, across)).reshape(-1, 2)
        partner = np.empty(len(x), np.int64)
        partner[order[:, 0]], partner[order[:, 1]] = order[:, 1], order[:, 0]
        partners.append(partner)
    horizontal, vertical = (partner.tolist() for partner in partners)
    points = list(zip(x.tolist(), y.tolist(), strict=True))
    rings, holes, seen = [], [], np.zeros(len(x), bool)
    for start in np.lexsort((x, y)).tolist():
        if seen[start]:
            continue
        ring, corner = [], start
        while True:
            for neighbour in (horizontal, vertical):
                seen[corner] = True
                ring.append(points[corner])
                corner = neighbour[corner]
            if corner == start:
                break
        rings.append(ring)
        holes.append(bool(concave[start]))
    return rings, np.array(holes)
