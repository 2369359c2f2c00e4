"""The overlay figure: what the model saw, which concepts it used, where each slot looked, and the masks it made.

Takes arrays and the dict that `segcompass segment` writes as result.json; knows nothing about models. Everything is
placed in pixels on a page 1600 pixels wide, so that it reads the same for one slot or six, wide images or tall. The
page of an evaluation's samples is gallery.py's.
"""

import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from segcompass.modeling_segcompass.palette import PAGE_COLOURS, css_colour, slot_colour
from segcompass.modeling_segcompass.patch_boxes import paint_boxes

PAGE, MARGIN, GAP, DPI = 1600, 36, 22, 100
HEADLINE, TITLE, LINE = 40, 32, 27  # heights of one line of each kind, pixels
MIN_PANEL, MAX_PANEL = 240, 520  # panel heights, pixels
MAX_HEADLINES, MAX_LINES = 3, 14
TILES, TILE, TILE_LINE = 5, 112, 23  # concepts in a row; heights of their pictures and lines, pixels
MAX_TILE_ROWS = 4  # slots whose concepts are shown
LONGEST_SIDE = 1000  # images are shown no larger, whatever their size
INK, SOFT, FRAME = (PAGE_COLOURS[name][0] for name in ("ink", "soft", "line"))


class Panel(NamedTuple):
    """One picture of the figure."""

    title: str
    draw: Callable[[Axes], None]
    """draws into axes whose units are the image's pixels."""
    colour: str | None = None
    """of the square beside the title."""


class ConceptTile(NamedTuple):
    """One concept's part in a slot."""

    name: str
    lines: tuple[str, ...]
    """what is said of it, at most three lines."""
    heat: np.ndarray
    """float (P,), at least 0, what it adds to the heatmap at each image patch where it fires."""
    boxes: np.ndarray
    """float (P, 4), the part of the image that each of them shows, in fractions of its width and height."""


def label_image(masks: np.ndarray, scores: list[float], slots: list[int]) -> Image.Image:
    """One paletted image: 0 is background, k + 1 is instance k; where two overlap the more confident one shows.

    Args:
        masks: bool (n, H, W), n at most 255.
        scores: n floats, the confidences.
        slots: n ints, which choose the colours.

    Returns:
        PIL image of mode "P" and size (W, H).
    """
    labels = np.zeros(masks.shape[1:], np.uint8)
    for index in np.argsort(scores):
        labels[masks[index]] = index + 1
    image = Image.fromarray(labels, "L")
    colours = [(0, 0, 0), *(slot_colour(slot) for slot in slots)]
    image.putpalette([part for colour in colours for part in colour])
    return image


def draw_overlay(
    image: np.ndarray,
    result: dict,
    reasoning: str,
    verdict: str,
    masks: np.ndarray,
    heatmaps: list[tuple[int, float, np.ndarray]],
    concepts: tuple[np.ndarray, np.ndarray] | None = None,
    tiles: dict[int, list[ConceptTile]] | None = None,
    prompts: list[dict] | None = None,
) -> Figure:
    """Image, concept activations, slot heatmaps and masks side by side, the instruction above, below them each slot's
    concepts and the reasoning.

    Args:
        image: uint8 (H, W, 3).
        result: has `instruction` and `instances`, each with `slot`, `score` and `box` (xyxy, pixels).
        reasoning: what the model wrote.
        verdict: one line, such as "2 instances" or "no target".
        masks: bool (n, H, W), one per instance.
        heatmaps: (slot, confidence, float (h, w) in [0, 1] that covers the image) of each slot to show.
        concepts: float (P,), at least 0, how strongly the concepts fire at each image patch; and the part of the image
            that each shows, float (P, 4), (left, top, right, bottom) in fractions of its width and height.
        tiles: slot -> its heaviest concepts, heaviest first, of which as many are shown as stand in a row.
        prompts: what the masks were asked for by, each with `slot`, and `box` (xyxy) or `point` (xy) in pixels.

    Returns:
        Figure: 1600 pixels wide at its own dpi.
    """
    height, width = image.shape[:2]
    frame = (0, width, height, 0)
    image = np.asarray(_shrink(Image.fromarray(image), Image.Resampling.LANCZOS)) / 255
    dark = _darkened(image)
    instances = result["instances"]
    kept = {instance["slot"] for instance in instances}

    panels = [Panel("image", lambda axes: _show(axes, image, frame))]
    if concepts is not None:
        panels.append(Panel("concepts by image patch", lambda axes: _show_patches(axes, dark, frame, *concepts)))
    if prompts is not None:
        panels.append(Panel("what the answer points at", lambda axes: _show_prompts(axes, image, frame, prompts)))
    for slot, confidence, heat in heatmaps:
        title = f"slot {slot}, confidence {confidence:.2f}" + ("" if slot in kept else " (not kept)")
        draw = lambda axes, heat=heat: _show(axes, _glow(dark, heat), frame)  # noqa: E731
        panels.append(Panel(title, draw, css_colour(slot_colour(slot)) if slot in kept else None))
    title = f"masks: {verdict}" if instances else "masks"
    panels.append(Panel(title, lambda axes: _show_masks(axes, image, frame, instances, masks, verdict)))

    headlines = _wrap(f"“{result['instruction']}”", 92, MAX_HEADLINES)
    lines = _wrap(reasoning, 154, MAX_LINES)
    columns, panel_width, panel_height = _panel_size(len(panels), width / height)
    rows = -(-len(panels) // columns)
    panels_top = MARGIN + len(headlines) * HEADLINE + 14
    tiles_top = panels_top + rows * (TITLE + panel_height + GAP)
    shown = list((tiles or {}).items())[:MAX_TILE_ROWS]
    text_top = tiles_top + len(shown) * (TITLE + TILE + GAP) + 6
    page = Page(text_top + (len(lines) + 1) * LINE + MARGIN - 8)

    for number, line in enumerate(headlines):
        page.write(MARGIN, MARGIN + number * HEADLINE, line, size=20, weight="bold")
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        left = MARGIN + column * (panel_width + GAP)
        top = panels_top + row * (TITLE + panel_height + GAP)
        if panel.colour:
            page.square(left, top + 3, 15, panel.colour)
        page.write(left + (23 if panel.colour else 0), top, panel.title, size=13)
        axes = page.axes(left, top + TITLE, panel_width, panel_height)
        panel.draw(axes)
        axes.set(xlim=frame[:2], ylim=frame[2:], xticks=[], yticks=[])
    for number, (slot, heaviest) in enumerate(shown):
        top = tiles_top + number * (TITLE + TILE + GAP)
        if slot in kept:
            page.square(MARGIN, top + 3, 15, css_colour(slot_colour(slot)))
        page.write(MARGIN + (23 if slot in kept else 0), top, f"slot {slot} is the sum of these concepts", size=13)
        _draw_tiles(page, top + TITLE, heaviest, dark, frame)
    page.write(MARGIN, text_top, "reasoning" if prompts is None else "answer", size=13, color=SOFT)
    for number, line in enumerate(lines, 1):
        page.write(MARGIN, text_top + number * LINE, line, size=13)
    return page.figure


# -- the page ----------------------------------------------------------------------------------------------------------


class Page:
    """A figure addressed in pixels from the top left.

    Args:
        height: of the page; its width is always the same.

    Example:
        page = Page(400)
        page.write(36, 36, "the mug", size=20)
        page.figure.savefig("page.png")
    """

    def __init__(self, height: float):
        self.height = height
        self.figure = Figure(figsize=(PAGE / DPI, height / DPI), dpi=DPI, facecolor="white")

    def write(self, left: float, top: float, text: str, **style: Any) -> None:
        """Write a text whose top left corner is there; `style` goes to matplotlib."""
        style = {"color": INK, "va": "top", "parse_math": False, **style}
        self.figure.text(left / PAGE, 1 - top / self.height, text, **style)

    def square(self, left: float, top: float, side: float, colour: str) -> None:
        """Fill a square."""
        corner = (left / PAGE, 1 - (top + side) / self.height)
        self.figure.add_artist(Rectangle(corner, side / PAGE, side / self.height, facecolor=colour))

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Framed axes for a picture."""
        corner = (left / PAGE, 1 - (top + height) / self.height)
        axes = self.figure.add_axes((*corner, width / PAGE, height / self.height))
        for spine in axes.spines.values():
            spine.set(color=FRAME, linewidth=0.8)
        return axes


def _draw_tiles(page: Page, top: float, row: list[ConceptTile], image: np.ndarray, frame: tuple):
    """A row of concepts, each a small picture with its lines beside it."""
    step = (PAGE - 2 * MARGIN + GAP) / TILES
    width = min(TILE * frame[1] / frame[2], 0.44 * (step - GAP))  # beside it stands "without it −100%" whole
    height = width * frame[2] / frame[1]
    letters = int((step - GAP - width - 12) / 8.6)
    for number, tile in enumerate(row[:TILES]):
        left = MARGIN + number * step
        axes = page.axes(left, top, width, height)
        _show_patches(axes, image, frame, tile.heat, tile.boxes)
        axes.set(xlim=frame[:2], ylim=frame[2:], xticks=[], yticks=[])
        for place, line in enumerate((tile.name, *tile.lines[:3])):
            style: dict[str, Any] = {"weight": "bold"} if place == 0 else {"color": SOFT}
            page.write(left + width + 12, top + 8 + place * TILE_LINE, _cut(line, letters), size=11, **style)


def _cut(line: str, letters: int) -> str:
    """The line, shortened where it is longer: within a quotation at its beginning, for the last word counts; else at
    its end."""
    if len(line) <= letters:
        return line
    before, quote, quoted = line.partition("“")
    if quote:
        return f"{before}“…{quoted[len(line) + 1 - letters :].lstrip()}"
    return line[: max(1, letters - 1)].rstrip() + "…"


def _panel_size(count: int, aspect: float) -> tuple[int, float, float]:
    """Columns, width and height of the panels: as few rows as leave them tall enough to read."""
    for rows in (1, 2, 3):
        columns = -(-count // rows)
        width = (PAGE - 2 * MARGIN - (columns - 1) * GAP) / columns
        height = min(width / aspect, MAX_PANEL)
        if height >= MIN_PANEL:
            break
    return columns, height * aspect, height


def _wrap(text: str, columns: int, lines: int) -> list[str]:
    return textwrap.wrap(text, columns, max_lines=lines, placeholder=" …") or ["(empty)"]


# -- the pictures ------------------------------------------------------------------------------------------------------


def _shrink(image: Image.Image, resample: Image.Resampling) -> Image.Image:
    scale = LONGEST_SIDE / max(image.size)
    if scale >= 1:
        return image
    return image.resize([max(1, round(side * scale)) for side in image.size], resample)


def _darkened(image: np.ndarray) -> np.ndarray:
    """A dim, nearly grey copy that colours stand out from."""
    grey = image @ np.array([0.299, 0.587, 0.114])
    return 0.5 * (0.75 * grey[..., None] + 0.25 * image)


def _glow(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Blend a heat in [0, 1] over an image, clear where it is 0."""
    resized = Image.fromarray(heat.astype(np.float32)).resize(image.shape[1::-1], Image.Resampling.BILINEAR)
    colours = _heat_colours(np.asarray(resized))
    return (1 - colours[..., 3:]) * image + colours[..., 3:] * colours[..., :3]


def _heat_colours(heat: np.ndarray) -> np.ndarray:
    """RGBA of a heat in [0, 1]."""
    colours = colormaps["inferno"](0.25 + 0.75 * heat)
    colours[..., 3] = 0.9 * np.clip(heat, 0, 1)
    return colours


def _show(axes: Axes, image: np.ndarray, frame: tuple):
    axes.imshow(np.clip(image, 0, 1), extent=frame, interpolation="bilinear", aspect="auto")


def _show_patches(axes: Axes, image: np.ndarray, frame: tuple, heat: np.ndarray, boxes: np.ndarray):
    _show(axes, image, frame)
    painted = paint_boxes(heat / max(heat.max(initial=0), 1e-9), boxes, *image.shape[:2])
    axes.imshow(_heat_colours(painted), extent=frame, interpolation="nearest", aspect="auto")


def _show_prompts(axes: Axes, image: np.ndarray, frame: tuple, prompts: list[dict]):
    _show(axes, image, frame)
    for prompt in prompts:
        colour = css_colour(slot_colour(prompt["slot"]))
        if prompt["box"]:
            left, top, right, bottom = prompt["box"]
            for edge, width in (("white", 4.5), (colour, 2.2)):
                axes.add_patch(
                    Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=edge, linewidth=width)
                )
        if prompt["point"]:
            axes.plot(*prompt["point"], "o", markersize=9, color=colour, markeredgecolor="white", markeredgewidth=1.5)


def _show_masks(axes: Axes, image: np.ndarray, frame: tuple, instances: list[dict], masks: np.ndarray, verdict: str):
    picture = _darkened(image)
    shrunk = (_shrink(Image.fromarray(mask.astype(np.uint8) * 255), Image.Resampling.BOX) for mask in masks)
    small = [np.asarray(mask) / 255 for mask in shrunk]
    for instance, mask in zip(instances, small, strict=True):
        tint = 0.7 * image + 0.3 * np.array(slot_colour(instance["slot"])) / 255
        picture = np.where(mask[..., None] >= 0.5, tint, picture)
    _show(axes, picture, frame)
    for instance, mask in zip(instances, small, strict=True):
        _outline(axes, instance, mask, frame)
    if not instances:
        style: dict[str, Any] = {"ha": "center", "va": "center", "color": "white", "size": 13, "weight": "bold"}
        axes.text(0.5, 0.5, textwrap.fill(verdict, 22), transform=axes.transAxes, **style)


def _outline(axes: Axes, instance: dict, mask: np.ndarray, frame: tuple):
    """Contour, box and score of one instance."""
    _, width, height, _ = frame
    colour = css_colour(slot_colour(instance["slot"]))
    rows, columns = mask.shape
    x = (np.arange(-1, columns + 1) + 0.5) * width / columns
    y = (np.arange(-1, rows + 1) + 0.5) * height / rows
    axes.contour(x, y, np.pad(mask, 1), levels=[0.5], colors=[colour], linewidths=2.2)
    left, top, right, bottom = instance["box"]
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.2))
    at_right = left > 0.85 * width
    axes.annotate(
        f"{instance['score']:.2f}",
        (right if at_right else left, top),
        xytext=(-1 if at_right else 1, 2 if top > 0.1 * height else -2),
        textcoords="offset points",
        fontsize=11,
        color="white",
        weight="bold",
        ha="right" if at_right else "left",
        va="bottom" if top > 0.1 * height else "top",
        bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.5},
        annotation_clip=False,
    )
