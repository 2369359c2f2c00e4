"""The overlay figure: what the model saw, which concepts it used, where each slot looked, and the masks it made.

Takes arrays and the dict that `segcompass segment` writes as result.json; knows nothing about models. Everything is
placed in pixels on a page 1600 pixels wide, so that it reads the same for one slot or six, wide images or tall. Pillow
draws all of it: matplotlib, whose font and colours these are, takes several times as long for the text alone.
The page of an evaluation's samples is gallery.py's.
"""

import textwrap
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from contourpy import contour_generator
from matplotlib import colormaps
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from segcompass.modeling_segcompass.palette import PAGE_COLOURS, css_colour, slot_colour
from segcompass.modeling_segcompass.patch_boxes import paint_boxes

PAGE, MARGIN, GAP = 1600, 36, 22
HEADLINE, TITLE, LINE = 40, 32, 27  # heights of one line of each kind, pixels
MIN_PANEL, MAX_PANEL = 240, 520  # panel heights, pixels
MAX_HEADLINES, MAX_LINES = 3, 14
TILES, TILE, TILE_LINE = 5, 112, 23  # concepts in a row; heights of their pictures and lines, pixels
MAX_TILE_ROWS = 4  # slots whose concepts are shown
LONGEST_SIDE = 1000  # images are shown no larger, whatever their size
INK, SOFT, FRAME = (PAGE_COLOURS[name][0] for name in ("ink", "soft", "line"))
TEXT, LARGE, SMALL = 18, 28, 15  # sizes of text, pixels
FINE = 4  # outlines are drawn so many times larger, then shrunk: their edges are soft
MAX_ROUNDED = 20_000  # points of an outline up to which its corners are rounded
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


Picture = Callable[[int, int], Image.Image]
"""(height, width) -> a picture of mode "RGB" of that size."""


class Panel(NamedTuple):
    """One picture of the figure."""

    title: str
    picture: Picture
    colour: str | None = None
    """of the square beside the title."""
    draw: "Callable[[Canvas], None] | None" = None
    """draws over the picture, in the image's pixels."""


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
    image: Image.Image,
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
        image: PIL image of mode "RGB" and size (W, H).
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
    width, height = image.size
    shown_image = _shrink(image, Image.Resampling.LANCZOS)
    dark = _darkened(shown_image)
    behind = _resized(dark)  # of all panels and tiles, which have one size each
    instances = result["instances"]
    kept = {instance["slot"] for instance in instances}

    panels = [Panel("image", _resized(shown_image))]
    if concepts is not None:
        panels.append(Panel("concepts by image patch", _patches(behind, *concepts)))
    if prompts is not None:
        outlines = partial(_show_prompts, prompts=prompts)
        panels.append(Panel("what the answer points at", _resized(shown_image), draw=outlines))
    for slot, confidence, heat in heatmaps:
        title = f"slot {slot}, confidence {confidence:.2f}" + ("" if slot in kept else " (not kept)")
        panels.append(Panel(title, _glow(behind, heat), css_colour(slot_colour(slot)) if slot in kept else None))
    title = f"masks: {verdict}"
    widest = max(_font(TEXT, False).getlength(text) for text in (title, *(panel.title for panel in panels))) + 23
    columns, panel_width, panel_height = _panel_size(len(panels) + 1, width / height, widest)
    narrow = panel_width < widest / 2  # a word does not fit into the picture
    title = title if instances or narrow else "masks"
    pictures = [_shrink(Image.fromarray(mask * np.uint8(255)), Image.Resampling.BOX) for mask in masks]
    outlines = partial(_show_masks, instances=instances, masks=pictures, verdict="" if narrow else verdict)
    panels.append(Panel(title, _tinted(shown_image, dark, instances, pictures), draw=outlines))

    headlines = _wrap(f"“{legible(result['instruction'])}”", 92, MAX_HEADLINES)
    lines = _wrap(legible(reasoning), 154, MAX_LINES)
    rows = -(-len(panels) // columns)
    panels_top = MARGIN + len(headlines) * HEADLINE + 14
    tiles_top = panels_top + rows * (TITLE + panel_height + GAP)
    shown = list((tiles or {}).items())[:MAX_TILE_ROWS]
    text_top = tiles_top + len(shown) * (TITLE + TILE + GAP) + 6
    page = Page(text_top + (len(lines) + 1) * LINE + MARGIN - 8)

    for number, line in enumerate(headlines):
        page.write(MARGIN, MARGIN + number * HEADLINE, line, size=LARGE, bold=True)
    for number, panel in enumerate(panels):
        row, place = divmod(number, columns)
        left = MARGIN + place * (max(panel_width, widest - GAP) + GAP)
        top = panels_top + row * (TITLE + panel_height + GAP)
        if panel.colour:
            page.square(left, top + 3, 15, panel.colour)
        page.write(left + (23 if panel.colour else 0), top, panel.title)
        page.paste(left, top + TITLE, panel_width, panel_height, panel.picture)
        if panel.draw is not None:
            panel.draw(Canvas(page, left, top + TITLE, panel_width / width, panel_height / height, (width, height)))
    for number, (slot, heaviest) in enumerate(shown):
        top = tiles_top + number * (TITLE + TILE + GAP)
        if slot in kept:
            page.square(MARGIN, top + 3, 15, css_colour(slot_colour(slot)))
        page.write(MARGIN + (23 if slot in kept else 0), top, f"slot {slot} is the sum of these concepts")
        _draw_tiles(page, top + TITLE, heaviest, behind, width / height)
    page.write(MARGIN, text_top, "reasoning" if prompts is None else "answer", colour=SOFT)
    for number, line in enumerate(lines, 1):
        page.write(MARGIN, text_top + number * LINE, line)
    return page.picture


# -- the page ----------------------------------------------------------------------------------------------------------


class Page:
    """A page addressed in pixels from the top left.

    Args:
        height: of the page; its width is always the same.

    Example:
        page = Page(400)
        page.write(36, 36, "the mug", size=28)
        page.picture.save("page.png")
    """

    def __init__(self, height: float):
        self.picture = Image.new("RGB", (PAGE, round(height)), "white")
        self.pen = ImageDraw.Draw(self.picture)

    def write(
        self, left: float, top: float, text: str, size: int = TEXT, colour: str = INK, bold: bool = False
    ) -> None:
        """Write one line of text whose top left corner is there."""
        line, baseline = " ".join(text.splitlines()), round(top + 0.77 * size)
        self.pen.text((round(left), baseline), line, fill=colour, font=_font(size, bold), anchor="ls")

    def square(self, left: float, top: float, side: float, colour: str) -> None:
        """Fill a square."""
        first, upper = round(left), round(top)
        self.pen.rectangle((first, upper, first + round(side) - 1, upper + round(side) - 1), fill=colour)

    def paste(self, left: float, top: float, width: float, height: float, picture: Picture) -> None:
        """Put a picture there, in a frame."""
        first, upper, last, lower = (round(edge) for edge in (left, top, left + width, top + height))
        last, lower = max(last, first + 1), max(lower, upper + 1)  # of an image a hundred times as long as wide
        self.picture.paste(picture(lower - upper, last - first), (first, upper))
        self.pen.rectangle((first, upper, last - 1, lower - 1), outline=FRAME)


class Canvas(NamedTuple):
    """The part of a page that a picture covers, addressed in the pixels of the image that it shows.

    Example:
        canvas = Canvas(page, 36, 100, 0.5, 0.5, (640, 480))
        canvas.rectangle((10, 10, 90, 60), "#e63c32", width=1.7)
    """

    page: Page
    left: float
    top: float
    across: float
    """pixels of the page for one of the image, in width."""
    down: float
    """likewise in height."""
    size: tuple[int, int]
    """(width, height) of the image."""

    def places(self, points: np.ndarray) -> np.ndarray:
        """Where points (n, 2) of the image are on the page, float (n, 2)."""
        return np.asarray(points, float) * (self.across, self.down) + (self.left, self.top)

    def rectangle(self, box: tuple[float, float, float, float] | list, colour: str, width: float) -> None:
        """Draw the outline of a box (left, top, right, bottom); `width` in pixels of the page."""
        edges = self.places(np.reshape(box, (2, 2))) + np.array([[-width / 2], [width / 2]])
        with self._fine(colour, edges) as (pen, at):
            (left, top), (right, bottom) = at(edges)
            pen.rectangle((left, top, right - 1, bottom - 1), outline=255, width=round(width * FINE))

    def lines(self, lines: list[np.ndarray], colour: str, width: float) -> None:
        """Draw lines, each through points (n, 2); `width` in pixels of the page."""
        if not lines:
            return
        placed = [self.places(points) for points in lines]
        # of a mask of specks rounding the corners alone would take seconds
        joint = "curve" if sum(map(len, placed)) <= MAX_ROUNDED else None
        first, last = (np.array([side(points, 0) for points in placed]) for side in (np.min, np.max))
        with self._fine(colour, np.array([first.min(0) - width, last.max(0) + width])) as (pen, at):
            for points in placed:
                pen.line(at(points).flatten().tolist(), fill=255, width=round(width * FINE), joint=joint)

    def dot(self, point: tuple[float, float] | list, colour: str, diameter: float) -> None:
        """Draw a disc around a point."""
        edges = self.places(np.reshape(point, (1, 2))) + np.array([[-diameter / 2], [diameter / 2]])
        with self._fine(colour, edges) as (pen, at):
            pen.ellipse(at(edges).flatten().tolist(), fill=255)

    @contextmanager
    def _fine(self, colour: str, edges: np.ndarray) -> Iterator[tuple]:
        """A pen on a finer grid, and what takes places of the page to it; what it draws comes onto the page.

        `edges` holds the first and the last place that is drawn on. What lies outside the picture is left out.
        """
        corners = np.rint(self.places(np.array([(0, 0), self.size]))).astype(int)
        first = np.maximum(np.floor(edges[0]).astype(int), corners[0])
        size = np.maximum(np.minimum(np.ceil(edges[1]).astype(int), corners[1]) - first, 0)
        fine = Image.new("L", tuple((size * FINE).tolist()))
        yield ImageDraw.Draw(fine), lambda places: (places - first) * FINE
        if size.all():
            self.page.picture.paste(colour, tuple(first.tolist()), fine.reduce(FINE))


def _draw_tiles(page: Page, top: float, row: list[ConceptTile], behind: Picture, aspect: float):
    """A row of concepts, each a small picture with its lines beside it."""
    step = (PAGE - 2 * MARGIN + GAP) / TILES
    width = min(TILE * aspect, 0.44 * (step - GAP))  # beside it stands "without it −100%" whole
    height = width / aspect
    letters = int((step - GAP - width - 12) / 8.6)
    for number, tile in enumerate(row[:TILES]):
        left = MARGIN + number * step
        page.paste(left, top, width, height, _patches(behind, tile.heat, tile.boxes))
        for place, line in enumerate((tile.name, *tile.lines[:3])):
            style = (INK, True) if place == 0 else (SOFT, False)
            page.write(left + width + 12, top + 8 + place * TILE_LINE, _cut(legible(line), letters), SMALL, *style)


def _cut(line: str, letters: int) -> str:
    """The line, shortened where it is longer: within a quotation at its beginning, for the last word counts; else at
    its end."""
    if len(line) <= letters:
        return line
    before, quote, quoted = line.partition("“")
    if quote:
        return f"{before}“…{quoted[len(line) + 1 - letters :].lstrip()}"
    return line[: max(1, letters - 1)].rstrip() + "…"


def _panel_size(count: int, aspect: float, widest: float) -> tuple[int, float, float]:
    """Columns, width and height of the panels: as few rows as leave them tall enough to see, and titles room."""
    for rows in (1, 2, 3):
        columns = -(-count // rows)
        width = (PAGE - 2 * MARGIN - (columns - 1) * GAP) / columns
        height = min(width / aspect, MAX_PANEL)
        if height >= MIN_PANEL and width + GAP >= widest:
            break
    return columns, height * aspect, height


def legible(text: str) -> str:
    """The text, or in its place that a picture cannot show it.

    Args:
        text: in any script.

    Returns:
        The text as it is, unless more than a tenth of its letters are missing from the font, which draws a box for
        each, or some are written from right to left.
    """
    missing = sum(ord(letter) not in _letters() for letter in text if not letter.isspace())
    if missing > len(text) / 10 or any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in text):
        return f"({len(text)} letters that this picture's font cannot show; result.json has them)"
    return text


@cache
def _letters() -> set[int]:
    """The code points that the font can show."""
    return set(FT2Font(str(FONT / "DejaVuSans.ttf")).get_charmap())


def _wrap(text: str, columns: int, lines: int) -> list[str]:
    return textwrap.wrap(text, columns, max_lines=lines, placeholder=" …") or ["(empty)"]


# -- the pictures ------------------------------------------------------------------------------------------------------


def _shrink(image: Image.Image, resample: Image.Resampling) -> Image.Image:
    """To the longest side that is shown, by a whole number first: as far as that goes if `resample` is a mean."""
    scale = LONGEST_SIDE / max(image.size)
    if scale >= 1:
        return image
    size = [max(1, round(side * scale)) for side in image.size]
    return image.resize(size, resample, reducing_gap=1.0 if resample == Image.Resampling.BOX else 2.0)


def _darkened(image: Image.Image) -> Image.Image:
    """A dim, nearly grey copy that colours stand out from."""
    return Image.blend(image.convert("L").convert("RGB"), image, 0.25).point([level // 2 for level in range(256)] * 3)


def _resized(image: Image.Image) -> Picture:
    """An image, smoothly; what is asked for again is there already, and is not to be drawn on."""
    return cache(lambda height, width: image.resize((width, height), Image.Resampling.BILINEAR))


def _glow(behind: Picture, heat: np.ndarray) -> Picture:
    """Blend a heat in [0, 1] over a picture, clear where it is 0."""
    glowing = Image.fromarray(heat.astype(np.float32))
    return lambda height, width: _over(
        behind(height, width), np.asarray(glowing.resize((width, height), Image.Resampling.BILINEAR))
    )


def _patches(behind: Picture, heat: np.ndarray, boxes: np.ndarray) -> Picture:
    """Likewise, of a heat by image patch, each with its own edges."""
    heat = heat / max(heat.max(initial=0), 1e-9)
    return lambda height, width: _over(behind(height, width), paint_boxes(heat, boxes, height, width))


def _tinted(image: Image.Image, dark: Image.Image, instances: list[dict], masks: list[Image.Image]) -> Picture:
    """The image where a mask is, in its slot's colour, and dim elsewhere."""
    picture = dark.copy()
    for instance, mask in zip(instances, masks, strict=True):
        tint = Image.blend(image, Image.new("RGB", image.size, slot_colour(instance["slot"])), 0.3)
        picture.paste(tint, mask=mask.point([255 * (level >= 128) for level in range(256)]))
    return _resized(picture)


def _over(image: Image.Image, heat: np.ndarray) -> Image.Image:
    levels = Image.fromarray((np.clip(heat, 0, 1) * 255).round().astype(np.uint8))
    colours, opacity = _heat_colours()
    glow = levels.copy()
    glow.putpalette(colours)
    return Image.composite(glow.convert("RGB"), image, levels.point(opacity))


@cache
def _heat_colours() -> tuple[list[int], list[int]]:
    """The colours of a heat's 256 levels, r, g, b, r, …, and their opacities, all 0 to 255."""
    levels = np.linspace(0, 1, 256)
    colours = colormaps["inferno"](0.25 + 0.75 * levels, bytes=True)[:, :3]
    return colours.flatten().tolist(), (0.9 * 255 * levels).round().astype(int).tolist()


@cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    """DejaVu Sans of a size in pixels; letters are set one after another, the same on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(FONT / name), size, layout_engine=ImageFont.Layout.BASIC)


def _show_prompts(canvas: Canvas, prompts: list[dict]):
    """What the masks were asked for by."""
    for prompt in prompts:
        colour = css_colour(slot_colour(prompt["slot"]))
        if prompt["box"]:
            canvas.rectangle(prompt["box"], "white", 6.2)
            canvas.rectangle(prompt["box"], colour, 3)
        if prompt["point"]:
            canvas.dot(prompt["point"], "white", 14.6)
            canvas.dot(prompt["point"], colour, 10.4)


def _show_masks(canvas: Canvas, instances: list[dict], masks: list[Image.Image], verdict: str):
    """The instances' outlines, or why there are none."""
    for instance, mask in zip(instances, masks, strict=True):
        _outline(canvas, instance, np.asarray(mask) / 255)
    if not instances:
        ((x, y),) = canvas.places(np.array([canvas.size]) / 2)
        canvas.page.pen.multiline_text(
            (x, y), textwrap.fill(verdict, 22), fill="white", font=_font(TEXT, True), anchor="mm", align="center"
        )


def _outline(canvas: Canvas, instance: dict, mask: np.ndarray):
    """Contour, box and score of one instance."""
    width, height = canvas.size
    colour = css_colour(slot_colour(instance["slot"]))
    rows, columns = mask.shape
    x = (np.arange(-1, columns + 1) + 0.5) * width / columns
    y = (np.arange(-1, rows + 1) + 0.5) * height / rows
    contours = contour_generator(x, y, np.pad(mask, 1)).lines(0.5)
    canvas.lines([np.asarray(line) for line in contours], colour, 3)
    canvas.rectangle(instance["box"], colour, 1.7)

    left, top, right, _ = instance["box"]
    at_right, below = left > 0.85 * width, top <= 0.1 * height
    ((x, y),) = canvas.places(np.array([[right if at_right else left, top]]))
    font, score = _font(SMALL, True), f"{instance['score']:.2f}"
    first = round(x - font.getlength(score) - 1 if at_right else x + 1)
    _, above, _, under = font.getbbox("lp0", anchor="ls")
    base = round(y + 3 - above if below else y - 3 - under)
    canvas.page.pen.rectangle(
        (first - 2, base + above - 2, first + font.getlength(score) + 1, base + under + 1), colour
    )
    canvas.page.pen.text((first, base), score, fill="white", font=font, anchor="ls")
