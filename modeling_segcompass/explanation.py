"""Why a mask looks as it does: the concepts that made it, and the words and image patches they fired on.

`explain_slot` reads the provenance that every decoding leaves in its output; nothing is run again. An `Explanation`
renders itself to HTML without scripts or links, and to a matplotlib figure. Knows nothing about weights; needs a
processor only to turn token ids into words.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .token_layout import IMAGE, RESPONSE


class TokenHit(NamedTuple):
    """A word piece that a concept fired on."""

    position: int
    """in the sequence, padding included."""
    part: str
    """"instruction" or "response"."""
    text: str
    """the piece; its token id in brackets when no processor was given."""
    strength: float
    """h_j there, above 0."""


class PatchHit(NamedTuple):
    """An image patch that a concept fired on."""

    row: int
    column: int
    strength: float
    """h_j there, above 0."""


@dataclass(frozen=True)
class ConceptShare:
    """One concept's part in a slot."""

    index: int
    """feature of the SAE."""
    label: str | None
    """what the dictionary calls it, None when unknown."""
    weight: float
    """its share of the slot, in [0, 1]."""
    value: float
    """h_j, its greatest strength over the tokens."""
    tokens: list[TokenHit]
    """words of instruction and response it fired on, strongest first."""
    patches: list[PatchHit]
    """image patches it fired on, strongest first."""


@dataclass(frozen=True)
class Explanation:
    """What `model.explain` returns: one slot of one sample."""

    sample: int
    slot: int
    confidence: float
    """c_k as a probability."""
    concepts: list[ConceptShare]
    """the heaviest, heaviest first."""
    rest: float
    """weight of all other concepts: it and the concepts' weights sum to 1."""
    heatmap: np.ndarray
    """float (h, w) in [0, 1], H_k over the image (SAM's padding cut off)."""
    patch_grid: tuple[int, int]
    """(rows, columns) of image patches."""
    patch_map: np.ndarray
    """float (rows, columns), at least 0: how strongly the slot's concepts fire at each patch, weighted by their
    weights. What a concept does everywhere says nothing about a place: its mean over the patches is taken off."""
    words: list[TokenHit]
    """all words of instruction and response in order; strength is the slot's weighted sum."""

    def to_html(self, image, mask=None, extent=None) -> str:
        """A self-contained page, see `render_html`."""
        return render_html([self], image, None if mask is None else [mask], extent)

    def to_figure(self, image, mask=None, instruction=None, extent=None):
        """A matplotlib Figure: image, activated tokens, heatmap, mask, and the concepts with their words.

        Args:
            image: PIL image or uint8 (H, W, 3); mask: bool (H, W); instruction: the title.
            extent: (left, top, right, bottom) in pixels of what the image patches cover; None = the whole image.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:  # in a try block, so that a model served from the Hub does not ask for matplotlib
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("to_figure draws with matplotlib: pip install matplotlib, or use to_html.") from error

        image = np.asarray(image)
        height, width = image.shape[:2]
        figure = Figure(figsize=(17, 4), layout="constrained")
        axes = figure.subplots(1, 5, width_ratios=[1, 1, 1, 1, 1.5])
        left, top, right, bottom = extent or (0, 0, width, height)
        shown = [
            ("image", None, None),
            ("activated tokens", self.patch_map / max(self.patch_map.max(), 1e-9), (left, right, bottom, top)),
            (f"heatmap, confidence {self.confidence:.2f}", self.heatmap, (0, width, height, 0)),
            ("mask", None if mask is None else np.float32(mask), (0, width, height, 0)),
        ]
        for ax, (title, layer, area) in zip(axes, shown, strict=False):
            ax.imshow(image, extent=(0, width, height, 0), alpha=1 if layer is None else 0.6)
            if layer is not None:
                ax.imshow(layer, extent=area, cmap="inferno", vmin=0, vmax=1, alpha=0.85 * np.clip(layer, 0, 1))
            ax.set(title=title, xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
        names = [_concept_name(concept) for concept in self.concepts]
        axes[4].barh(range(len(names)), [concept.weight for concept in self.concepts], color="#ff6b1a")
        axes[4].set_yticks(range(len(names)), names, fontsize=8)
        axes[4].invert_yaxis()
        axes[4].set(title=f"concepts of slot {self.slot} (others {self.rest:.2f})", xlabel="weight")
        if instruction:
            figure.suptitle(f"“{instruction}”", parse_math=False)
        return figure


def explain_slot(
    outputs, slot=0, sample=0, top=10, labels: Mapping[int, str] | None = None, processor=None, frame=None
) -> Explanation:
    """Read the explanation of a slot out of what `segment` or `forward` returned.

    Args:
        outputs: SegCompassOutput whose queries were built from concepts.
        slot: k, from 0; sample: its place in the batch.
        top: how many concepts to list.
        labels: {feature index: label}, such as `ConceptDictionary.labels`.
        processor: SegCompassProcessor, for the words' text.
        frame: side of SAM's frame in pixels, to cut its padding off the heatmap.

    Raises:
        ValueError: outputs without concepts, slot or sample out of range, a slot without a concentration token, or
            top below 1.
    """
    if outputs.concept_weights is None:
        raise ValueError(
            "these outputs have no concepts: they were decoded with query_source='tokens', or hold no masks; call "
            "segment(...), or forward(...) with encoder_pixel_values, and query_source 'both' or 'concepts'."
        )
    samples, slots = outputs.slot_mask.shape
    for name, value, limit in (("sample", sample, samples), ("slot", slot, slots)):
        if not 0 <= value < limit:
            raise ValueError(f"{name} {value} is out of range; these outputs have {name}s 0 to {limit - 1}.")
    if top < 1:
        raise ValueError(f"top is {top}; at least 1 concept must be listed.")
    if not outputs.slot_mask[sample, slot]:
        found = outputs.slot_mask[sample].nonzero()[:, 0].tolist()
        raise ValueError(
            f"slot {slot} made no mask, because its concentration token is missing from the response; slots with a "
            f"token: {found}."
        )
    weights = outputs.concept_weights[sample, slot].detach().float().cpu().numpy()
    activations = outputs.concept_activations[sample].detach().float().cpu().numpy()  # (T, M)
    indices = outputs.concept_indices[sample].tolist()
    values = outputs.concept_values[sample].tolist()
    types = outputs.token_types[sample].cpu().numpy()
    rows, columns = outputs.patch_grid[sample].tolist()
    on_image = activations[types == IMAGE][: rows * columns]
    words = _words(outputs.sequences[sample], types, activations @ weights, processor)
    order = [column for column in np.argsort(-weights, kind="stable")[:top].tolist() if weights[column] > 0]
    concepts = []
    for column in order:
        fired = on_image[:, column]
        patches = [PatchHit(p // columns, p % columns, float(fired[p])) for p in np.argsort(-fired) if fired[p] > 0]
        tokens = [
            word._replace(strength=float(activations[word.position, column]))
            for word in words
            if activations[word.position, column] > 0
        ]
        tokens.sort(key=lambda word: -word.strength)
        label = (labels or {}).get(indices[column])
        concepts.append(ConceptShare(indices[column], label, float(weights[column]), values[column], tokens, patches))
    patch_map = np.zeros(rows * columns, np.float32)
    patch_map[: len(on_image)] = np.maximum(on_image - on_image.mean(0), 0) @ weights if len(on_image) else 0
    return Explanation(
        sample=sample,
        slot=slot,
        confidence=float(outputs.pred_logits[sample, slot].float().sigmoid()),
        concepts=concepts,
        rest=max(0.0, 1.0 - sum(concept.weight for concept in concepts)),
        heatmap=_heatmap(outputs, sample, slot, frame),
        patch_grid=(rows, columns),
        patch_map=patch_map.reshape(rows, columns),
        words=words,
    )


def _heatmap(outputs, sample, slot, frame):
    heat = outputs.heatmaps[sample, slot].detach().float().sigmoid().cpu().numpy()
    if outputs.reshaped_input_sizes is None or frame is None:
        return heat
    sizes = outputs.reshaped_input_sizes[sample]
    height, width = (-(-int(n) * side // frame) for n, side in zip(sizes, heat.shape, strict=True))
    return heat[:height, :width]


def _words(ids, types, strengths, processor):
    """Every text token as a TokenHit; a piece's text is what it adds to its predecessor's, spaces included."""
    ids = ids.tolist()
    words = []
    for position in range(len(types)):
        if types[position] == IMAGE:
            continue
        if processor is None:
            text = f"[{ids[position]}]"
        else:
            decode = processor.tokenizer.decode
            before = decode(ids[position - 1 : position]) if position else ""
            text = decode(ids[max(position - 1, 0) : position + 1])[len(before) :]
        part = "response" if types[position] == RESPONSE else "instruction"
        words.append(TokenHit(position, part, text, float(strengths[position])))
    return words


def _concept_name(concept):
    if concept.label:
        return f"{concept.index} {concept.label}"
    heard = list(dict.fromkeys(word.text.strip() for word in concept.tokens))[:3]
    return f"{concept.index}" + (f" ({', '.join(heard)})" if heard else "")


# -- the page ----------------------------------------------------------------------------------------------------------

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1b1f27; max-width: 1200px; margin: 2em auto; padding: 0 1em }}
.row {{ display: flex; flex-wrap: wrap; gap: 1em }} figure {{ margin: 0 }} figcaption {{ color: #5b6472 }}
svg {{ width: 260px; background: #222 }} .concept svg {{ width: 150px }}
.concept {{ border-top: 1px solid #c9ced6; padding: .6em 0; display: flex; gap: 1em }}
.bar {{ height: .5em; background: #ff6b1a; display: block; margin: .2em 0 }} .word {{ border-radius: 3px }}
.part {{ color: #5b6472 }} b {{ font-weight: 600 }}
</style></head><body>
<svg style="display:none"><defs><image id="photo" width="{width}" height="{height}" href="{photo}"/></defs></svg>
<h1>{title}</h1>
{body}
</body></html>
"""


def render_html(explanations: Sequence[Explanation], image, masks=None, extent=None, title="Why this mask") -> str:
    """A page that shows slots with their heatmaps, masks and concepts, with nothing outside the file itself.

    Args:
        explanations: of one image's slots; image: PIL image or uint8 (H, W, 3).
        masks: bool (H, W) arrays, one a slot, or None.
        extent: (left, top, right, bottom) in pixels of what the image patches cover; None = the whole image.
        title: heading, such as the instruction.
    """
    picture = np.asarray(image)
    height, width = picture.shape[:2]
    area = extent or (0, 0, width, height)
    body = []
    for number, told in enumerate(explanations):
        layers = [("image", ""), ("activated tokens", _patch_layer(told.patch_map, area))]
        layers.append((f"heatmap, confidence {told.confidence:.2f}", _heat_layer(told.heatmap, width, height)))
        if masks is not None:
            layers.append(("mask", _heat_layer(np.float32(masks[number]), width, height)))
        body.append(f"<h2>slot {told.slot}</h2><div class='row'>")
        body += [
            f"<figure>{_svg(layer, width, height)}<figcaption>{name}</figcaption></figure>" for name, layer in layers
        ]
        body.append("</div>" + _text(told.words))
        heaviest = max((concept.weight for concept in told.concepts), default=1)
        body += [_concept_row(concept, heaviest, told.patch_grid, area, width, height) for concept in told.concepts]
        body.append(f"<p class='part'>all other concepts together: {told.rest:.3f}</p>")
    return PAGE.format(title=html.escape(title), width=width, height=height, photo=_png(picture), body="\n".join(body))


def _concept_row(concept, heaviest, grid, area, width, height):
    fired = np.zeros(grid, np.float32)
    for row, column, strength in concept.patches:
        fired[row, column] = strength
    words = ", ".join(
        f"“{html.escape(word.text.strip() or '␣')}” <span class='part'>({word.part}, {word.strength:.2f})</span>"
        for word in concept.tokens[:8]
    )
    return (
        f"<div class='concept'>{_svg(_patch_layer(fired, area), width, height)}<div style='flex:1'>"
        f"<b>concept {concept.index}</b> {html.escape(concept.label or '')}"
        f"<span class='bar' style='width:{100 * concept.weight / heaviest:.1f}%'></span>"
        f"weight {concept.weight:.3f}, strength {concept.value:.2f}, {len(concept.patches)} patches<br>"
        f"words: {words or 'none'}</div></div>"
    )


def _text(words):
    """Instruction and response, each word as bright as the slot's concepts are strong there."""
    strongest = max((word.strength for word in words), default=0) or 1
    parts = []
    for part in ("instruction", "response"):
        pieces = "".join(
            f"<span class='word' style='background:rgba(255,107,26,{word.strength / strongest:.2f})'>"
            f"{html.escape(word.text)}</span>"
            for word in words
            if word.part == part
        )
        parts.append(f"<p><span class='part'>{part}: </span>{pieces}</p>")
    return "".join(parts)


def _svg(layer, width, height):
    shade = f'<rect width="{width}" height="{height}" fill-opacity=".5"/>' if layer else ""
    return f'<svg viewBox="0 0 {width} {height}"><use href="#photo"/>{shade}{layer}</svg>'


def _patch_layer(values, area):
    """Squares over the patches, as opaque as the values are large."""
    left, top, right, bottom = area
    rows, columns = values.shape
    step_x, step_y = (right - left) / columns, (bottom - top) / rows
    strongest = float(values.max()) or 1.0
    squares = [
        f'<rect x="{left + column * step_x:.1f}" y="{top + row * step_y:.1f}" width="{step_x:.1f}" '
        f'height="{step_y:.1f}" fill="#ff6b1a" fill-opacity="{0.75 * values[row, column] / strongest:.2f}"/>'
        for row, column in zip(*np.nonzero(values > 0), strict=True)
    ]
    return "".join(squares)


def _heat_layer(heat, width, height):
    colours = np.zeros((*heat.shape, 4), np.uint8)
    colours[..., :3] = (255, 107, 26)
    colours[..., 3] = (200 * np.clip(heat, 0, 1)).astype(np.uint8)
    return f'<image width="{width}" height="{height}" preserveAspectRatio="none" href="{_png(colours)}"/>'


def _png(pixels):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
