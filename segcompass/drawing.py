"""The overlay figure: what the model saw, which concepts it used, where each slot looked, and the masks it made.

Takes arrays and the dict that `segcompass segment` writes as result.json; knows nothing about models. Everything is
placed in pixels on a page 1600 pixels wide, so that it reads the same for one slot or six, wide images or tall. The
pictures are pasted; matplotlib writes the text and the outlines, for each of its axes costs as much as ten pictures.
The page of an evaluation's samples is gallery.py's.
"""

import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw

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


Picture = Callable[[int, int], np.ndarray]
"""(height, width) -> float (height, width, 3) in [0, 1]."""


class Panel(NamedTuple):
    """One picture of the figure."""

    title: str
    picture: Picture
    colour: str | None = None
    """of the square beside the title."""
    draw: Callable[[Axes], None] | None = None
    """draws over the picture, into axes whose units are the image's pixels."""


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
) -> Image.Image:
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
        PIL image of mode "RGB", 1600 pixels wide.
    """
    height, width = image.shape[:2]
    frame = (0, width, height, 0)
    image = np.asarray(_shrink(Image.fromarray(image), Image.Resampling.LANCZOS)) / 255
    dark = _darkened(image)
    instances = result["instances"]
    kept = {instance["slot"] for instance in instances}

    panels = [Panel("image", _resized(image))]
    if concepts is not None:
        panels.append(Panel("concepts by image patch", _patches(dark, *concepts)))
    if prompts is not None:
        outlines = partial(_show_prompts, prompts=prompts)
        panels.append(Panel("what the answer points at", _resized(image), draw=outlines))
    for slot, confidence, heat in heatmaps:
        title = f"slot {slot}, confidence {confidence:.2f}" + ("" if slot in kept else " (not kept)")
        panels.append(Panel(title, _glow(dark, heat), css_colour(slot_colour(slot)) if slot in kept else None))
    title = f"masks: {verdict}" if instances else "masks"
    pictures = [_shrink(Image.fromarray(mask.astype(np.uint8) * 255), Image.Resampling.BOX) for mask in masks]
    small = [np.asarray(picture) / 255 for picture in pictures]
    outlines = partial(_show_masks, frame=frame, instances=instances, masks=small, verdict=verdict)
    panels.append(Panel(title, _tinted(image, instances, small), draw=outlines))

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
        page.paste(left, top + TITLE, panel_width, panel_height, panel.picture)
        if panel.draw is not None:
            panel.draw(page.axes(left, top + TITLE, panel_width, panel_height, frame))
    for number, (slot, heaviest) in enumerate(shown):
        top = tiles_top + number * (TITLE + TILE + GAP)
        if slot in kept:
            page.square(MARGIN, top + 3, 15, css_colour(slot_colour(slot)))
        page.write(MARGIN + (23 if slot in kept else 0), top, f"slot {slot} is the sum of these concepts", size=13)
        _draw_tiles(page, top + TITLE, heaviest, dark, width / height)
    page.write(MARGIN, text_top, "reasoning" if prompts is None else "answer", size=13, color=SOFT)
    for number, line in enumerate(lines, 1):
        page.write(MARGIN, text_top + number * LINE, line, size=13)
    return page.finish()


# -- the page ----------------------------------------------------------------------------------------------------------


class Page:
    """A page addressed in pixels from the top left.

    Args:
        height: of the page; its width is always the same.

    Example:
        page = Page(400)
        page.write(36, 36, "the mug", size=20)
        page.finish().save("page.png")
    """

    def __init__(self, height: float):
        self.height = height = round(height)
        self.pictures = Image.new("RGB", (PAGE, height), "white")
        self.figure = Figure(figsize=(PAGE / DPI, height / DPI), dpi=DPI, facecolor="none")

    def write(self, left: float, top: float, text: str, **style: Any) -> None:
        """Write a text whose top left corner is there; `style` goes to matplotlib."""
        style = {"color": INK, "va": "top", "parse_math": False, **style}
        self.figure.text(left / PAGE, 1 - top / self.height, text, **style)

    def square(self, left: float, top: float, side: float, colour: str) -> None:
        """Fill a square."""
        corner = (left / PAGE, 1 - (top + side) / self.height)
        self.figure.add_artist(Rectangle(corner, side / PAGE, side / self.height, facecolor=colour))

    def paste(self, left: float, top: float, width: float, height: float, picture: Picture) -> None:
        """Put a picture there, in a frame."""
        first, upper, last, lower = (round(edge) for edge in (left, top, left + width, top + height))
        pixels = picture(lower - upper, last - first)
        self.pictures.paste(Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)), (first, upper))
        ImageDraw.Draw(self.pictures).rectangle((first, upper, last - 1, lower - 1), outline=FRAME)

    def axes(self, left: float, top: float, width: float, height: float, frame: tuple) -> Axes:
        """Axes to draw over a picture, without ticks and see-through; `frame` is (left, right, bottom, top) in them."""
        corner = (left / PAGE, 1 - (top + height) / self.height)
        axes = self.figure.add_axes((*corner, width / PAGE, height / self.height), frameon=False)
        axes.set(xlim=frame[:2], ylim=frame[2:], xticks=[], yticks=[])
        return axes

    def finish(self) -> Image.Image:
        """The page as one picture, text and outlines over the pictures."""
        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        drawn = Image.fromarray(np.asarray(canvas.buffer_rgba()))
        self.pictures.paste(drawn, mask=drawn.getchannel("A"))
        return self.pictures


def _draw_tiles(page: Page, top: float, row: list[ConceptTile], image: np.ndarray, aspect: float):
    """A row of concepts, each a small picture with its lines beside it."""
    step = (PAGE - 2 * MARGIN + GAP) / TILES
    width = min(TILE * aspect, 0.44 * (step - GAP))  # beside it stands "without it −100%" whole
    height = width / aspect
    letters = int((step - GAP - width - 12) / 8.6)
    for number, tile in enumerate(row[:TILES]):
        left = MARGIN + number * step
        page.paste(left, top, width, height, _patches(image, tile.heat, tile.boxes))
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


def _resized(image: np.ndarray) -> Picture:
    """An image, smoothly."""
    pixels = Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8))
    return lambda height, width: np.asarray(pixels.resize((width, height), Image.Resampling.BILINEAR)) / 255


def _glow(image: np.ndarray, heat: np.ndarray) -> Picture:
    """Blend a heat in [0, 1] over an image, clear where it is 0."""
    behind, glowing = _resized(image), Image.fromarray(heat.astype(np.float32))
    return lambda height, width: _over(
        behind(height, width), np.asarray(glowing.resize((width, height), Image.Resampling.BILINEAR))
    )


def _patches(image: np.ndarray, heat: np.ndarray, boxes: np.ndarray) -> Picture:
    """Likewise, of a heat by image patch, each with its own edges."""
    behind, heat = _resized(image), heat / max(heat.max(initial=0), 1e-9)
    return lambda height, width: _over(behind(height, width), paint_boxes(heat, boxes, height, width))


def _tinted(image: np.ndarray, instances: list[dict], masks: list[np.ndarray]) -> Picture:
    """The image where a mask is, in its slot's colour, and dim elsewhere."""
    picture = _darkened(image)
    for instance, mask in zip(instances, masks, strict=True):
        tint = 0.7 * image + 0.3 * np.array(slot_colour(instance["slot"])) / 255
        picture = np.where(mask[..., None] >= 0.5, tint, picture)
    return _resized(picture)


def _over(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    colours = _heat_colours(heat)
    return (1 - colours[..., 3:]) * image + colours[..., 3:] * colours[..., :3]


def _heat_colours(heat: np.ndarray) -> np.ndarray:
    """RGBA of a heat in [0, 1]."""
    colours = colormaps["inferno"](0.25 + 0.75 * heat)
    colours[..., 3] = 0.9 * np.clip(heat, 0, 1)
    return colours


def _show_prompts(axes: Axes, prompts: list[dict]):
    """What the masks were asked for by."""
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


def _show_masks(axes: Axes, frame: tuple, instances: list[dict], masks: list[np.ndarray], verdict: str):
    """The instances' outlines, or why there are none."""
    for instance, mask in zip(instances, masks, strict=True):
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
