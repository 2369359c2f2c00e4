"""Scenes drawn from signed distances: flat objects on a plain or patterned ground, with exact visible masks.

Some pairs of looks (a look is a colour and a shape) meet in one split only (`split_of_pair`), so the splits are
disjoint by construction and every scene of a held-out split shows a meeting that training never does.

An image may be wider than high, or higher than wide. Its unit is its longest side: objects, gaps and the cells of the
board scale with it, so a board's cells are squares and a wide image has fewer rows.

This module knows nothing about questions, rows or models.
"""

import math
import zlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
from PIL import Image as PILImage

SHAPES = ("ball", "box", "cone", "ring", "star", "moon")
"""The nouns."""

COLOURS = {
    "red": (212, 40, 40),
    "green": (40, 165, 65),
    "blue": (45, 90, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 190),
    "white": (243, 243, 243),
}
"""Colour names with their mean RGB value."""

SIZES = {"small": (28, 32), "large": (45, 51)}
"""Size names, in rising order, with their range of diameters in pixels of a 128-pixel image."""

SPLITS = ("train", "val", "test")

MIN_VISIBLE = 0.6
"""Every object shows at least this share of its area."""

BOARD = 4
"""A place is a square cell of a board that begins in the top left corner: this many cells are as long as the longest
side, in columns (A, B, ...) and rows (1, 2, ...)."""

LOOKS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
"""Every (colour, shape)."""

Size = int | tuple[int, int]
"""Side of a square image, or (height, width), in pixels."""

MIXED = "mixed"
"""The size that `choose_size` draws anew for each scene."""

_MIN_SIZE = 64
_MAX_RATIO = 2.0
_MIXED_SIDES = (96, 256)
# Pixels of a 128-pixel image: how far apart any two centres lie on each axis, and how far a centre keeps from the lines
# of the board.
_CENTRE_GAP = 10.0
_LINE_GAP = 3.0


@dataclass(frozen=True)
class SceneObject:
    """One drawn object."""

    shape: str
    """One of `SHAPES`."""
    colour: str
    """A key of `COLOURS`."""
    size: str
    """A key of `SIZES`."""
    place: str
    """Cell of the board that holds `centre`: column A-D from left to right, row 1-4 from top to bottom."""
    centre: tuple[float, float]
    """(x, y) in pixels: the centroid of the visible mask, pixel centres at half-integers."""


@dataclass(frozen=True)
class Scene:
    """A drawn scene."""

    image: np.ndarray
    """(H, W, 3) uint8."""
    objects: list[SceneObject]
    """Sorted by `centre` from left to right."""
    masks: np.ndarray
    """(n, H, W) bool visible masks in the order of `objects`; pairwise disjoint."""


_TILT = {"box": 10, "cone": 7, "star": 12, "moon": 20, "ball": 0, "ring": 0}


def height_and_width(size: Size) -> tuple[int, int]:
    """(height, width) of an image."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def check_split_and_size(split: str, size: Size | str) -> None:
    """Raises ValueError for an unknown split, or an image too small or too narrow for its shapes."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}; choose one of these.")
    if size == MIXED:
        return
    if isinstance(size, str):
        raise ValueError(f"size={size!r} is no size; give a number of pixels, (height, width), or {MIXED!r}.")
    sides = height_and_width(size)
    if max(sides) < _MIN_SIZE:
        raise ValueError(f"size={size} is below {_MIN_SIZE}, where small shapes blur; use {_MIN_SIZE} or more.")
    if max(sides) > _MAX_RATIO * min(sides):
        raise ValueError(
            f"size={size} is narrower than 1:{_MAX_RATIO:g}, where large shapes have no room; lengthen the short side."
        )


def choose_size(rng: np.random.Generator) -> tuple[int, int]:
    """(height, width) of one scene of size "mixed".

    Half of the images are 128 x 128. The others have a longest side of 96 to 256 pixels, and ratios from 1:2 to 2:1
    that are even on a logarithmic scale.

    Args:
        rng: source of all randomness.

    Returns:
        (height, width) in pixels.
    """
    if rng.random() < 0.5:
        return 128, 128
    longest = int(rng.integers(_MIXED_SIDES[0], _MIXED_SIDES[1] + 1))
    ratio = _MAX_RATIO ** rng.uniform(-1, 1)  # width / height
    shorter = math.ceil(longest * min(ratio, 1 / ratio))
    return (longest, shorter) if ratio < 1 else (shorter, longest)


def _polygon_distance(x: np.ndarray, y: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Signed distance to a polygon (even-odd rule), negative inside. corners: (n, 2)."""
    squared = np.full(x.shape, np.inf, dtype=np.float32)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners.tolist(), np.roll(corners, -1, axis=0).tolist(), strict=True):
        ex, ey = bx - ax, by - ay
        px, py = x - ax, y - ay
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        np.minimum(squared, (px - along * ex) ** 2 + (py - along * ey) ** 2, out=squared)
        crosses = (ay > y) != (by > y)
        inside ^= crosses & (px * ey < py * ex if ey > 0 else px * ey > py * ex)
    distance = np.sqrt(squared)
    return np.where(inside, -distance, distance)


def _box_distance(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    """Signed distance to a centred rectangle."""
    dx, dy = np.abs(x) - half_width, np.abs(y) - half_height
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _star_corners(radius: float) -> np.ndarray:
    angles = np.arange(10) * math.pi / 5 - math.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, radius, 0.45 * radius)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)  # (10, 2)


def _shape_distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Signed distance in pixels, negative inside, of a shape of diameter 2r about the origin; y points down."""
    if shape == "ball":
        return np.hypot(x, y) - r
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.76 * r) - 0.24 * r
    if shape == "box":
        return _box_distance(x, y, 0.84 * r, 0.84 * r)
    if shape == "cone":
        return _polygon_distance(x, y, np.array([[0.0, -r], [0.9 * r, 0.85 * r], [-0.9 * r, 0.85 * r]]))
    if shape == "star":
        return _polygon_distance(x, y, _star_corners(1.05 * r))
    return np.maximum(np.hypot(x + 0.2 * r, y) - r, 0.85 * r - np.hypot(x - 0.38 * r, y))  # moon


@lru_cache(maxsize=4)
def _pixel_grid(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres in pixels: x (1, W) and y (H, 1), float32."""
    y, x = (np.arange(side, dtype=np.float32) + 0.5 for side in size)
    return x[None, :], y[:, None]


def _ground(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Background (H, W, 3) float32: two low-saturation mid tones mixed by a pattern."""
    x, y = _pixel_grid(size)
    (height, width), unit = size, max(size)
    first = rng.uniform(90, 150) + rng.uniform(-11, 11, 3)
    second = np.clip(first + rng.choice([-1, 1]) * rng.uniform(14, 38) + rng.uniform(-7, 7, 3), 75, 175)
    pattern = rng.integers(5)
    angle = rng.uniform(0, 2 * math.pi)
    along = (x * math.cos(angle) + y * math.sin(angle)) / unit
    if pattern == 0:  # plain
        mix = np.zeros(size, dtype=np.float32)
    elif pattern == 1:  # gradient
        mix = (along - along.min()) / (along.max() - along.min())
    elif pattern == 2:  # stripes
        mix = np.clip(0.5 + 2 * np.sin(2 * math.pi * rng.uniform(3, 9) * along), 0, 1)
    elif pattern == 3:  # checks
        across = (y * math.cos(angle) - x * math.sin(angle)) / unit
        waves = 2 * math.pi * rng.uniform(2, 5)
        mix = np.clip(0.5 + 4 * np.sin(waves * along) * np.sin(waves * across), 0, 1)
    else:  # blobs
        coarse = PILImage.fromarray(rng.random((6, 6), dtype=np.float32))
        mix = np.clip(np.asarray(coarse.resize((width, height), PILImage.Resampling.BICUBIC)), 0, 1)
    first, second = first.astype(np.float32), second.astype(np.float32)
    return first + mix[..., None].astype(np.float32) * (second - first)


@dataclass
class _Sprite:
    """An object before it is painted: its window of the image and its signed distance there."""

    shape: str
    colour: str
    size: str
    radius: float
    tilt: float
    flip: int

    def place(self, centre: tuple[float, float], size: tuple[int, int]) -> tuple[slice, slice, np.ndarray]:
        """The window (rows, columns) that holds the object and the signed distance (h, w) in it, float32."""
        x, y = _pixel_grid(size)
        reach = 1.15 * self.radius + 2
        cols, rows = (
            slice(max(0, int(c - reach)), min(side, int(c + reach) + 1))
            for c, side in zip(centre, size[::-1], strict=True)
        )
        dx, dy = x[:, cols] - np.float32(centre[0]), y[rows] - np.float32(centre[1])
        cos, sin = math.cos(self.tilt), math.sin(self.tilt)
        local_x, local_y = self.flip * (dx * cos + dy * sin), dy * cos - dx * sin
        return rows, cols, _shape_distance(self.shape, local_x, local_y, self.radius)


def split_of_pair(first: tuple[str, str], second: tuple[str, str]) -> str:
    """The split that may show two objects of these looks together.

    About a tenth of the pairs is left to "test" and a twentieth to "val"; equal looks may meet anywhere.

    Args:
        first: (colour, shape) of one object.
        second: (colour, shape) of the other.

    Returns:
        "train" (every split may show them), "val" or "test".
    """
    if first == second:
        return "train"
    number = zlib.crc32(" ".join(sorted((" ".join(first), " ".join(second)))).encode()) % 20
    return "test" if number < 2 else "val" if number == 2 else "train"


@lru_cache
def _held_out(split: str) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    return [pair for pair in combinations(LOOKS, 2) if split_of_pair(*pair) == split]


def _choose_looks(rng: np.random.Generator, split: str, count: int, twins: float) -> list[tuple[str, str]]:
    """(colour, shape) of each object of a scene; often two share a colour or a shape, to compare them.

    A further object repeats the look of an earlier one with probability `twins`, beside those that do so by chance.
    """
    looks = [] if split == "train" else list(_held_out(split)[rng.integers(len(_held_out(split)))])
    while len(looks) < count:
        pool = [look for look in LOOKS if all(split_of_pair(look, other) in ("train", split) for other in looks)]
        if looks and (draw := rng.random()) < 0.62:
            colour, shape = looks[rng.integers(len(looks))]
            alike = [look for look in pool if (look[0] == colour if draw < 0.31 else look[1] == shape)]
            pool = alike or pool
        if twins and looks and rng.random() < twins:
            pool = looks
        looks.append(pool[rng.integers(len(pool))])
    return [looks[index] for index in rng.permutation(count)]


def _sprites(rng: np.random.Generator, split: str, size: tuple[int, int], twins: float) -> list[_Sprite]:
    sprites = []
    for colour, shape in _choose_looks(rng, split, int(rng.integers(2, 4)), twins):
        name = list(SIZES)[rng.integers(len(SIZES))]
        radius = rng.uniform(*SIZES[name]) / 2 * max(size) / 128
        tilt = math.radians(rng.uniform(-1, 1) * _TILT[shape])
        flip = int(rng.choice([-1, 1])) if shape == "moon" else 1
        sprites.append(_Sprite(shape, colour, name, radius, tilt, flip))
    return sprites


def _apart(points: np.ndarray, gap: float) -> bool:
    """Whether all (n, 2) points differ pairwise by at least `gap` in x and in y."""
    ordered = np.sort(points, axis=0)
    return bool((ordered[1:] - ordered[:-1] >= gap).all())


def _to_lines(points: np.ndarray, unit: int) -> np.ndarray:
    """How far each coordinate lies from the nearest line of the board, in pixels."""
    cell = unit / BOARD
    return cell / 2 - np.abs(points % cell - cell / 2)


def _arrange(rng: np.random.Generator, sprites: list[_Sprite], size: tuple[int, int]):
    """Places for the sprites, later ones in front, or None when no good arrangement was found.

    Returns the windows [(rows, cols, distance)], visible masks (n, H, W) and their centroids (n, 2).
    """
    unit = max(size)
    gap, line_gap = _CENTRE_GAP * unit / 128, _LINE_GAP * unit / 128
    ends = np.array(size[::-1])  # of x and y
    radii = np.array([sprite.radius for sprite in sprites])[:, None]  # (n, 1)
    first, second = np.triu_indices(len(sprites), 1)  # every pair once
    for _ in range(60):
        centres = rng.uniform(1.03 * radii + 1, ends - 1.03 * radii - 1, (len(sprites), 2))
        reach = 0.72 * (radii[first] + radii[second])[:, 0]  # (pairs,)
        if not _apart(centres, gap) or (np.hypot(*(centres[first] - centres[second]).T) < reach).any():
            continue
        windows = [sprite.place((cx, cy), size) for sprite, (cx, cy) in zip(sprites, centres.tolist(), strict=True)]
        masks = np.zeros((len(sprites), *size), dtype=bool)
        areas = []
        for index, (rows, cols, distance) in enumerate(windows):
            inside = distance <= 0  # coverage >= 0.5
            masks[:index, rows, cols] &= ~inside
            masks[index, rows, cols] = inside
            areas.append(inside.sum())
        visible = masks.sum((1, 2))  # (n,)
        if (visible < MIN_VISIBLE * np.array(areas)).any():
            continue
        y, x = (np.arange(side) + 0.5 for side in size)
        centroids = np.stack([masks.sum(1) @ x, masks.sum(2) @ y], axis=1) / visible[:, None]  # (n, 2)
        cells = {(int(cx), int(cy)) for cx, cy in (centroids * BOARD / unit).tolist()}
        if _apart(centroids, gap) and len(cells) == len(sprites) and (_to_lines(centroids, unit) >= line_gap).all():
            return windows, masks, centroids
    return None


def _paint(rng: np.random.Generator, canvas: np.ndarray, sprite: _Sprite, window: tuple) -> None:
    """Blend a shaded object with a darker outline into the (H, W, 3) float32 canvas."""
    rows, cols, distance = window
    colour = np.array(COLOURS[sprite.colour]) * rng.uniform(0.92, 1.05) + rng.uniform(-10, 10, 3)
    outline = max(1.3, 0.075 * sprite.radius)
    edge = np.clip(distance + outline + 0.5, 0, 1)
    height, width = distance.shape
    slope = np.linspace(1.1, 0.9, height, dtype=np.float32)[:, None] * np.linspace(1.04, 0.96, width, dtype=np.float32)
    shade = slope * (1 - 0.62 * edge)
    alpha = np.clip(0.5 - distance, 0, 1)[..., None]  # (h, w, 1)
    patch = canvas[rows, cols]
    patch += alpha * (shade[..., None] * colour.astype(np.float32) - patch)


def draw_scene(rng: np.random.Generator, split: str, size: Size = 128, twins: float = 0.0) -> Scene:
    """Draw a scene.

    Args:
        rng: source of all randomness; the scene is a pure function of its state and the other arguments.
        split: "train", "val" or "test". All pairs of objects of a train scene are "train" by `split_of_pair`; a val
            (test) scene holds at least one "val" ("test") pair and no pair of the other.
        size: side of a square image, or (height, width), in pixels; the longest at least 64, at most twice the other.
            Objects and gaps scale with the longest.
        twins: probability in [0, 1] that an object after the first repeats the look of an earlier one; equal looks also
            meet by chance.

    Returns:
        Scene: image (H, W, 3) uint8 and two or three objects, each at least 60 % visible, whose centres differ
        pairwise by at least 10 pixels (where the longest side has 128) in x and in y, lie in different places of the
        board and keep 3 pixels from its lines. Narrow images have fewer and smaller objects, because they must fit.

    Raises:
        ValueError: an unknown split, a longest side below 64, or a ratio beyond 2.

    Example:
        >>> scene = draw_scene(np.random.default_rng(0), "train")
        >>> scene.image.shape, [thing.colour for thing in scene.objects]
        ((128, 128, 3), ['red', 'red', 'purple'])
    """
    check_split_and_size(split, size)
    sides = height_and_width(size)
    arranged = None
    while arranged is None:
        sprites = _sprites(rng, split, sides, twins)
        arranged = _arrange(rng, sprites, sides)
    windows, masks, centroids = arranged
    canvas = _ground(rng, sides)
    for sprite, window in zip(sprites, windows, strict=True):
        _paint(rng, canvas, sprite, window)
    canvas += rng.uniform(0, 9) * rng.standard_normal(canvas.shape, dtype=np.float32)
    order = np.argsort(centroids[:, 0])
    objects = []
    for index in order.tolist():
        cx, cy = centroids[index].tolist()
        place = "ABCD"[int(cx * BOARD / max(sides))] + str(int(cy * BOARD / max(sides)) + 1)
        sprite = sprites[index]
        objects.append(SceneObject(sprite.shape, sprite.colour, sprite.size, place, (cx, cy)))
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    return Scene(image, objects, masks[order])
