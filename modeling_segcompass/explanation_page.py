"""Explanations as a page and as a figure: HTML that needs nothing but itself, or a matplotlib figure.

Whoever renders imports this file; a model that only runs never does. On the page a slot has its colour of the palette.
Knows nothing about models; draws what `explanation.explain_slot` read.
"""

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .palette import Colour, css_colour, slot_colour
from .patch_boxes import paint_boxes

if TYPE_CHECKING:
    from .explanation import ConceptShare, Explanation, TokenHit

WORDS_LISTED = 8  # of each concept
WORDS_IN_NAME = 3  # of a concept without a label
UNUSED_PATCHES = (
    "Activated tokens show where the concepts fire, not what the mask was made from: in this read-out the concepts act "
    "by what they are, and on the small model masks stay the same without anything that fires on the image. "
    "<code>segcompass white-box</code> measures a model."
)

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1b1f27; max-width: 1200px; margin: 2em auto; padding: 0 1em }}
.row {{ display: flex; flex-wrap: wrap; gap: 1em }} figure {{ margin: 0 }} figcaption {{ color: #5b6472 }}
svg {{ width: 260px; background: #222 }} .concept svg {{ width: 150px }}
.concept {{ border-top: 1px solid #c9ced6; padding: .6em 0; display: flex; gap: 1em }}
.bar {{ height: .5em; display: block; margin: .2em 0 }} .word {{ border-radius: 3px }}
.part {{ color: #5b6472 }} b {{ font-weight: 600 }}
</style></head><body>
<svg style="display:none"><defs><image id="photo" width="{width}" height="{height}" href="{photo}"/></defs></svg>
<h1>{title}</h1>
{body}
</body></html>
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
    body = []
    for number, explanation in enumerate(explanations):
        colour = slot_colour(explanation.slot)
        heatmap = _pixel_layer(explanation.heatmap, width, height, colour)
        layers = [
            ("image", ""),
            ("activated tokens", _patch_layer(explanation.patch_map, explanation.patch_boxes, width, height, colour)),
            (f"heatmap, confidence {explanation.confidence:.2f}", heatmap),
        ]
        if masks is not None:
            layers.append(("mask", _pixel_layer(np.asarray(masks[number], np.float32), width, height, colour)))
        body.append(f"<h2>slot {explanation.slot}</h2><div class='row'>")
        body += [
            f"<figure>{_svg(layer, width, height)}<figcaption>{name}</figcaption></figure>" for name, layer in layers
        ]
        body.append("</div>")
        if all(concept.contribution is None for concept in explanation.concepts):  # the heatmap is no sum of theirs
            body.append(f"<p class='part'>{UNUSED_PATCHES}</p>")
        body.append(_text(explanation.words, colour))
        heaviest = max((concept.weight for concept in explanation.concepts), default=1)
        for concept in explanation.concepts:
            strengths = np.array([hit.strength for hit in concept.patches])
            boxes = np.array([hit.box for hit in concept.patches]).reshape(-1, 4)
            fired = _patch_layer(strengths, boxes, width, height, colour)
            body.append(_concept_row(concept, heaviest, colour, _svg(fired, width, height)))
        body.append(f"<p class='part'>all other concepts together: {explanation.rest:.3f}</p>")
    return PAGE.format(title=html.escape(title), width=width, height=height, photo=_png(picture), body="\n".join(body))


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
    titles = ("image", "activated tokens", f"heatmap, confidence {explanation.confidence:.2f}", "mask")
    for ax, title in zip(axes, titles, strict=False):
        ax.set(title=title, xticks=[], yticks=[])
    names = [_concept_name(concept) for concept in explanation.concepts]
    weights = [concept.weight for concept in explanation.concepts]
    axes[4].barh(range(len(names)), weights, color=css_colour(slot_colour(explanation.slot)))
    axes[4].set_yticks(range(len(names)), names, fontsize=8)
    axes[4].invert_yaxis()
    axes[4].set(title=f"concepts of slot {explanation.slot} (others {explanation.rest:.2f})", xlabel="weight")
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


def _concept_name(concept: "ConceptShare") -> str:
    if concept.label:
        return f"{concept.index} {concept.label}"
    words = list(dict.fromkeys(word.text.strip() for word in concept.tokens))[:WORDS_IN_NAME]
    return f"{concept.index}" + (f" ({', '.join(words)})" if words else "")


def _concept_row(concept: "ConceptShare", heaviest: float, colour: Colour, picture: str) -> str:
    words = ", ".join(
        f"“{html.escape(word.text.strip() or '␣')}” <span class='part'>({word.part}, {word.strength:.2f})</span>"
        for word in concept.tokens[:WORDS_LISTED]
    )
    lost = "" if concept.lost is None else f"; without it the mask loses {concept.lost:.0%}"
    bar = f"width:{100 * concept.weight / heaviest:.1f}%;background:{css_colour(colour)}"
    return (
        f"<div class='concept'>{picture}<div style='flex:1'>"
        f"<b>concept {concept.index}</b> {html.escape(concept.label or '')}<span class='bar' style='{bar}'></span>"
        f"weight {concept.weight:.3f}, strength {concept.value:.2f}, {len(concept.patches)} patches{lost}<br>"
        f"words: {words or 'none'}</div></div>"
    )


def _text(words: "Sequence[TokenHit]", colour: Colour) -> str:
    """Instruction and response, each word as bright as the slot's concepts are strong there."""
    strongest = max((word.strength for word in words), default=0) or 1
    red, green, blue = colour
    parts = []
    for part in ("instruction", "response"):
        pieces = "".join(
            f"<span class='word' style='background:rgba({red},{green},{blue},{word.strength / strongest:.2f})'>"
            f"{html.escape(word.text)}</span>"
            for word in words
            if word.part == part
        )
        parts.append(f"<p><span class='part'>{part}: </span>{pieces}</p>")
    return "".join(parts)


def _svg(layer: str, width: int, height: int) -> str:
    shade = f'<rect width="{width}" height="{height}" fill-opacity=".5"/>' if layer else ""
    return f'<svg viewBox="0 0 {width} {height}"><use href="#photo"/>{shade}{layer}</svg>'


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
