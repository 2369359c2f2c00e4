"""Explanations as a page and as a figure: HTML that needs nothing but itself, or a matplotlib figure.

Whoever renders imports this file; a model that only runs never does. On the page a slot has its colour of the palette.
Knows nothing about models; draws what `explanation.explain_slot` read.
"""

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .palette import Colour, css_colour, slot_colour
from .patch_boxes import paint_boxes
from .report_page import page, text

if TYPE_CHECKING:
    from .explanation import ConceptShare, Explanation, TokenHit

WORDS_LISTED = 8  # of each concept
LEAST_WORD = 0.01  # of a concept's strongest word; what is weaker is not listed
LEAST_PHRASE = 0.05  # share of a slot from which the phrase is named that it read
WORDS_IN_NAME = 3  # of a concept without a label
UNUSED_PATCHES = (
    "Activated tokens show where the concepts fire, not what the mask was made from: in this read-out the concepts act "
    "by what they are, and on the small model masks stay the same without anything that fires on the image. "
    "<code>segcompass white-box</code> measures a model."
)

ADDED_UP = (
    "The heatmap is the sum of what the concepts below add to it, each at its own place. A concept's picture is "
    "brightest where it adds most."
)
STYLE = """
.layers { display: grid; grid-template-columns: repeat(4, minmax(0, 15.5rem)); gap: 1rem } .layers svg { width: 100% }
.item svg { width: 9.5rem; flex: none } .layers svg, .item svg { background: #222 }
.word { border-radius: 3px; print-color-adjust: exact }
@media (max-width: 32rem) { .layers { grid-template-columns: 1fr 1fr } .item svg { width: 6.5rem } }
"""


def render_html(
    explanations: "Sequence[Explanation]",
    image: Any,
    masks: Sequence[np.ndarray] | np.ndarray | None = None,
    title: str = "Why this mask",
) -> str:
    """A page that shows slots with their heatmaps, masks and concepts, with nothing outside the file itself.

    Args:
        explanations: of one image's slots.
        image: PIL image or uint8 (H, W, 3).
        masks: bool (H, W) arrays, one per slot, or None.
        title: heading, such as the instruction.

    Returns:
        The text of an HTML file.
    """
    picture = np.asarray(image)
    height, width = picture.shape[:2]
    body = [
        f'<svg width="0" height="0" style="position:absolute"><defs><image id="photo" width="{width}" '
        f'height="{height}" href="{_png(picture)}"/></defs></svg>'
    ]
    for number, explanation in enumerate(explanations):
        colour = slot_colour(explanation.slot)
        heatmap = _pixel_layer(explanation.heatmap, width, height, colour)
        layers = [
            ("image", ""),
            (
                _patches_title(explanation),
                _patch_layer(explanation.patch_map, explanation.patch_boxes, width, height, colour),
            ),
            (f"heatmap, confidence {explanation.confidence:.2f}", heatmap),
        ]
        if masks is not None:
            layers.append(("mask", _pixel_layer(np.asarray(masks[number], np.float32), width, height, colour)))
        swatch = f"<span class='swatch' style='background:{css_colour(colour)}'></span>"
        body.append(f"<h2>{swatch} slot {explanation.slot}</h2><div class='layers'>")
        body += [
            f"<figure>{_svg(layer, width, height, name)}<figcaption>{name}</figcaption></figure>"
            for name, layer in layers
        ]
        body.append("</div>")
        body.append(_spoken(explanation.words, colour))
        summed = _is_sum(explanation)
        body.append(f"<p class='soft'>{ADDED_UP if summed else UNUSED_PATCHES}</p>")
        heaviest = max((concept.weight for concept in explanation.concepts), default=1)
        for concept in explanation.concepts:
            strengths = np.array([hit.strength for hit in concept.patches])
            boxes = np.array([hit.box for hit in concept.patches]).reshape(-1, 4)
            fired = _patch_layer(strengths, boxes, width, height, colour)
            picture_ = _svg(fired, width, height, f"where concept {concept.index} fires")
            body.append(_concept_row(concept, heaviest, colour, picture_))
        body.append(f"<p class='soft'>all other concepts together: {explanation.rest:.3f}</p>")
    return page(title, "\n".join(body), style=STYLE)


def draw_figure(
    explanation: "Explanation",
    image: Any,
    mask: np.ndarray | None = None,
    instruction: str | None = None,
) -> Any:
    """A slot in one row: image, activated tokens, heatmap, mask, and the concepts with their words.

    Args:
        explanation: of the slot.
        image: PIL image or uint8 (H, W, 3).
        mask: bool (H, W), or None.
        instruction: the title.

    Returns:
        A matplotlib Figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:  # in a try block, so that a model served from the Hub does not ask for matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("to_figure draws with matplotlib: pip install matplotlib, or use to_html.") from error

    figure = Figure(figsize=(17, 4), layout="constrained")
    axes = figure.subplots(1, 5, width_ratios=[1, 1, 1, 1, 1.5])
    draw_panels(axes[:4], explanation, image, mask)
    titles = ("image", _patches_title(explanation), f"heatmap, confidence {explanation.confidence:.2f}", "mask")
    for ax, title in zip(axes, titles, strict=False):
        ax.set(title=title, xticks=[], yticks=[])
    names = [_concept_name(concept) for concept in explanation.concepts]
    weights = [concept.weight for concept in explanation.concepts]
    axes[4].barh(range(len(names)), weights, color=css_colour(slot_colour(explanation.slot)))
    axes[4].set_yticks(range(len(names)), names, fontsize=9)
    axes[4].invert_yaxis()
    axes[4].set(title=f"concepts of slot {explanation.slot} (others {explanation.rest:.2f})", xlabel="weight")
    losses = [concept.lost for concept in explanation.concepts]
    if any(lost is not None for lost in losses):
        for place, (weight, lost) in enumerate(zip(weights, losses, strict=True)):
            note = "" if lost is None else f" without it {'−' if lost >= 0.005 else '±'}{lost:.0%}"
            axes[4].annotate(note, (weight, place), va="center", fontsize=9)
        axes[4].set_xlim(0, 1.4 * max(weights, default=1))
    if instruction:
        figure.suptitle(f"“{instruction}”", parse_math=False)
    return figure


def draw_panels(
    axes: Sequence[Any],
    explanation: "Explanation",
    image: Any,
    mask: np.ndarray | None = None,
) -> None:
    """Draw image, activated tokens, heatmap and mask of a slot (the last four columns of the paper's Figure 9).

    Args:
        axes: four matplotlib Axes.
        explanation: of the slot.
        image: PIL image or uint8 (H, W, 3).
        mask: bool (H, W), or None for the image alone.
    """
    picture = np.asarray(image)
    height, width = picture.shape[:2]
    fired = paint_boxes(explanation.patch_map, explanation.patch_boxes, height, width)
    whole = (0, width, height, 0)  # as imshow wants it: left, right, bottom, top
    layers = [
        None,
        fired / max(fired.max(), 1e-9),
        explanation.heatmap,
        None if mask is None else np.asarray(mask, np.float32),
    ]
    for ax, layer in zip(axes, layers, strict=True):
        ax.imshow(picture, extent=whole, alpha=1 if layer is None else 0.6)
        if layer is not None:
            ax.imshow(layer, extent=whole, cmap="inferno", vmin=0, vmax=1, alpha=0.85 * np.clip(layer, 0, 1))
        ax.set(xlim=(0, width), ylim=(height, 0))


def _is_sum(explanation: "Explanation") -> bool:
    """Whether the heatmap is the sum of what the concepts add to it."""
    return any(concept.contribution is not None for concept in explanation.concepts)


def _patches_title(explanation: "Explanation") -> str:
    return "its concepts, added up" if _is_sum(explanation) else "activated tokens"


def _concept_name(concept: "ConceptShare") -> str:
    if concept.label:
        return f"{concept.label}, {concept.index}"
    words = list(dict.fromkeys(word.text.strip() for word in concept.tokens))[:WORDS_IN_NAME]
    return f"{concept.index}" + (f" ({', '.join(words)})" if words else "")


def _concept_row(concept: "ConceptShare", heaviest: float, colour: Colour, picture: str) -> str:
    least = LEAST_WORD * max((word.strength for word in concept.tokens), default=0)
    words = ", ".join(
        f"“{text(word.phrase or word.text.strip() or '␣')}” "
        f"<span class='soft'>({'' if word.phrase else f'{word.part}, '}{word.strength:.2f})</span>"
        for word in concept.tokens[:WORDS_LISTED]
        if word.strength >= least
    )
    lost = "" if concept.lost is None else f"; <b>without it the mask loses {concept.lost:.0%}</b>"
    number = f"concept {concept.index}"
    name = f"{text(concept.label)} <span class='soft'>{number}</span>" if concept.label else number
    bar = f"width:{100 * concept.weight / heaviest:.1f}%;background:{css_colour(colour)}"
    return (
        f"<div class='item'>{picture}<div><h3>{name}</h3><span class='bar' style='{bar}'></span>"
        f"weight {concept.weight:.3f}{lost}<br><span class='soft'>strength {concept.value:.2f}, on "
        f"{len(concept.patches)} patches</span><br>words: {words or 'none'}</div></div>"
    )


def _spoken(words: "Sequence[TokenHit]", colour: Colour) -> str:
    """Instruction and response, each word as bright as the slot's concepts are strong there; the phrases it read."""
    strongest = max((word.strength for word in words), default=0) or 1
    red, green, blue = colour
    parts = []
    for part in ("instruction", "response"):
        pieces = "".join(
            f"<span class='word' style='background:rgba({red},{green},{blue},{0.7 * word.strength / strongest:.2f})'>"
            f"{text(word.text)}</span>"
            for word in words
            if word.part == part
        )
        parts.append(f"<p><span class='soft'>{part}: </span>{pieces}</p>")
    read = sorted((word for word in words if word.phrase and word.strength >= LEAST_PHRASE), key=lambda w: -w.strength)
    if read:
        phrases = ", ".join(f"“{text(word.phrase)}” {word.strength:.0%}" for word in read)
        parts.append(f"<p><span class='soft'>read in the conclusion: </span>{phrases}</p>")
    return "".join(parts)


def _svg(layer: str, width: int, height: int, name: str) -> str:
    shade = f'<rect width="{width}" height="{height}" fill-opacity=".5"/>' if layer else ""
    view = f'role="img" aria-label="{text(name)}" viewBox="0 0 {width} {height}"'
    return f'<svg {view}><use href="#photo"/>{shade}{layer}</svg>'


def _patch_layer(values: np.ndarray, boxes: np.ndarray, width: int, height: int, colour: Colour) -> str:
    """Squares over the patches, as opaque as the values float (P,) are large; boxes float (P, 4) are fractions."""
    strongest = float(values.max(initial=0)) or 1.0
    fill = css_colour(colour)
    squares = []
    for value, (left, top, right, bottom) in zip(values, boxes * [width, height, width, height], strict=True):
        if value > 0:
            squares.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" '
                f'fill="{fill}" fill-opacity="{0.75 * value / strongest:.2f}"/>'
            )
    return "".join(squares)


def _pixel_layer(values: np.ndarray, width: int, height: int, colour: Colour) -> str:
    """A picture stretched over the image, as opaque as the values float (h, w) in [0, 1] are large."""
    pixels = np.zeros((*values.shape, 4), np.uint8)  # (h, w, 4) red, green, blue, opacity
    pixels[..., :3] = colour
    pixels[..., 3] = (200 * np.clip(values, 0, 1)).astype(np.uint8)
    return f'<image width="{width}" height="{height}" preserveAspectRatio="none" href="{_png(pixels)}"/>'


def _png(pixels: np.ndarray) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
