"""Why a mask looks as it does: the concepts that made it, and the words and image patches they fired on.

`explain_slot` reads the provenance that every decoding leaves in its output; nothing is run again. `explanation_page`
renders what it returns. Knows nothing about weights; needs a processor only to turn token ids into words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .patch_boxes import has_area
from .token_layout import IMAGE, RESPONSE

if TYPE_CHECKING:
    import torch

    from .processing_segcompass import SegCompassProcessor

TOP_CONCEPTS = 8
"""How many concepts of a slot are listed where nobody says how many."""


@dataclass(frozen=True)
class HeavyConcept:
    """A concept that weighs much in a slot."""

    column: int
    """its place among the M concepts of its sample."""
    index: int
    """feature of the SAE."""
    weight: float
    """its share of the slot, in [0, 1]."""
    value: float
    """h_j, its greatest strength over the tokens."""


class TokenHit(NamedTuple):
    """A word piece that a concept fired on."""

    position: int
    """in the sequence, padding included."""
    part: str
    """"instruction" or "response"."""
    text: str
    """the piece; its token id in brackets when no processor was given."""
    strength: float
    """h_j there, above 0; what the word adds to the concept's logit, if the read-out is grounded."""
    phrase: str = ""
    """the words that were read together there, up to this one; "" unless the read-out is grounded."""


class PatchHit(NamedTuple):
    """An image patch that a concept fired on."""

    number: int
    """its place among the explanation's patches, from 0."""
    box: tuple[float, float, float, float]
    """(left, top, right, bottom) in fractions of the image's width and height."""
    strength: float
    """h_j there, above 0; what the concept adds to the heatmap there, if the read-out is grounded."""


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
    contribution: np.ndarray | None = None
    """float (h, w), what it adds to the heatmap's logits over the image; of a grounded read-out only."""
    lost: float | None = None
    """share of the mask that is gone without it, in [0, 1]; of a grounded read-out, when it was asked for."""


@dataclass(frozen=True)
class Explanation:
    """One slot of one sample, as `model.explain` returns it.

    Example:
        explanation = model.explain(model.segment(**inputs), slot=0, processor=processor)
        print([(concept.index, concept.weight) for concept in explanation.concepts])
        Path("why.html").write_text(explanation.to_html(image))
    """

    sample: int
    slot: int
    confidence: float
    """c_k as a probability."""
    concepts: list[ConceptShare]
    """the heaviest, heaviest first."""
    rest: float
    """weight of all other concepts: it and the concepts' weights sum to 1, or to what steering left of it."""
    heatmap: np.ndarray
    """float (h, w) in [0, 1], H_k over the image (the frame's padding cut off)."""
    patch_boxes: np.ndarray
    """float (P, 4), the part of the image that each patch shows: (left, top, right, bottom) in fractions of its width
    and height. Patches may overlap, where an MLLM sees the image whole and in tiles."""
    patch_map: np.ndarray
    """float (P,), at least 0: how strongly the slot's concepts fire at each patch, weighted by their
    weights. What a concept does everywhere says nothing about a place: its mean over the patches is taken off. If the
    read-out is grounded, this is the heatmap itself in patch positions, less its offset."""
    words: list[TokenHit]
    """all words of instruction and response in order; strength is the slot's weighted sum, or, if the read-out is
    grounded, the word's share of the slot."""

    def to_html(self, image: Any, mask: np.ndarray | None = None) -> str:
        """A page that needs nothing but itself, see `explanation_page.render_html`.

        Args:
            image: PIL image or uint8 (H, W, 3).
            mask: bool (H, W), or None.

        Returns:
            The text of an HTML file.
        """
        from .explanation_page import render_html

        return render_html([self], image, None if mask is None else [mask])

    def to_figure(self, image: Any, mask: np.ndarray | None = None, instruction: str | None = None) -> Any:
        """A matplotlib Figure, see `explanation_page.draw_figure`.

        Args:
            image: PIL image or uint8 (H, W, 3).
            mask: bool (H, W), or None.
            instruction: the title.

        Returns:
            The figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from .explanation_page import draw_figure

        return draw_figure(self, image, mask, instruction)


def heaviest_concepts(
    outputs: Any, slots: int | Sequence[int], sample: int = 0, count: int = TOP_CONCEPTS
) -> list[HeavyConcept]:
    """The concepts that weigh most in a slot, or in any of several slots, heaviest first.

    Args:
        outputs: SegCompassOutput of a forward pass or `segment`.
        slots: k, or several of them; a concept's weight is then its greatest among these slots.
        sample: the slots' place in the batch.
        count: how many at most.

    Returns:
        Concepts whose weight is above 0; [] when the queries were built without concepts, or no slot is given.
    """
    slots = [slots] if isinstance(slots, int) else list(slots)
    if outputs.concept_weights is None or not slots:
        return []
    weights = outputs.concept_weights[sample, slots].detach().float().amax(0)  # (M,)
    columns = weights.sort(descending=True, stable=True).indices[:count].tolist()
    indices = outputs.concept_indices[sample].tolist()
    values = outputs.concept_values[sample].tolist()
    return [
        HeavyConcept(column, indices[column], float(weights[column]), values[column])
        for column in columns
        if weights[column] > 0
    ]


def explain_slot(
    outputs: Any,
    slot: int = 0,
    sample: int = 0,
    top: int = 10,
    labels: Mapping[int, str] | None = None,
    processor: "SegCompassProcessor | None" = None,
    frame: int | None = None,
    lost: Mapping[int, float] | None = None,
    pad_token_id: int | None = None,
    phrase_window: int = 1,
) -> Explanation:
    """Read the explanation of a slot out of what `segment` or `forward` returned.

    Args:
        outputs: SegCompassOutput whose queries were built from concepts.
        slot: k, from 0.
        sample: its place in the batch.
        top: how many concepts to list.
        labels: {feature index: label}, such as `ConceptDictionary.labels`.
        processor: SegCompassProcessor, for the words' text.
        frame: side of the image encoder's frame in pixels, to cut its padding off the heatmap.
        lost: {feature index: share of the mask that is gone without it}, see `SegCompassModel.lost_without`.
        pad_token_id: of the padding, which is no word; None takes the processor's.
        phrase_window: how many words of the conclusion a grounded read-out reads together.

    Returns:
        The explanation.

    Raises:
        ValueError: outputs without concepts, slot or sample out of range, a slot without a concentration token, or
            top below 1.
    """
    check_request(outputs, slot, sample, top)
    weights = outputs.concept_weights[sample, slot].detach().float().cpu().numpy()  # (M,)
    activations = outputs.concept_activations[sample].detach().float().cpu().numpy()  # (T, M)
    types = outputs.token_types[sample].cpu().numpy()  # (T,)
    shows = has_area(outputs.patch_boxes[sample]).cpu().numpy()  # (P,)
    boxes = outputs.patch_boxes[sample].float().cpu().numpy()[shows]  # (patches, 4)
    on_image = activations[types == IMAGE]
    on_image = on_image[shows[: len(on_image)]]  # (patches, M)
    word_strengths, fired_words, fired_patches = activations @ weights, activations, on_image
    if outputs.grounding is not None:
        word_strengths, fired_words, fired_patches = _grounded_parts(outputs, sample, slot, len(boxes))
        on_keys = outputs.grounding.on_keys(sample, slot).detach().float().cpu().numpy()  # (M, h, w)
        height, width = _extent(outputs, sample, frame, on_keys.shape[1:])
    if processor is not None:
        pad_token_id = processor.tokenizer.pad_token_id
    words = _words(outputs.sequences[sample], types, word_strengths, processor, pad_token_id)
    if outputs.grounding is not None:
        read = outputs.grounding.word_positions[sample][outputs.grounding.word_mask[sample]].tolist()
        words = _with_phrases(words, read, phrase_window)
    concepts = []
    for heavy in heaviest_concepts(outputs, slot, sample, top):
        fired = fired_patches[:, heavy.column]  # (patches,)
        order = [int(number) for number in np.argsort(-fired) if fired[number] > 0]
        patches = [PatchHit(number, tuple(boxes[number].tolist()), float(fired[number])) for number in order]
        tokens = [
            word._replace(strength=float(fired_words[word.position, heavy.column]))
            for word in words
            if fired_words[word.position, heavy.column] > 0
        ]
        tokens.sort(key=lambda word: -word.strength)
        label = (labels or {}).get(heavy.index)
        concept = ConceptShare(heavy.index, label, heavy.weight, heavy.value, tokens, patches)
        if outputs.grounding is not None:
            contribution = on_keys[heavy.column, :height, :width]
            concept = replace(concept, contribution=contribution, lost=(lost or {}).get(heavy.index))
        concepts.append(concept)
    patch_map = np.zeros(len(boxes), np.float32)
    if outputs.grounding is not None:
        patch_map[:] = fired_patches.sum(1)
    else:
        patch_map[: len(on_image)] = np.maximum(on_image - on_image.mean(0), 0) @ weights if len(on_image) else 0
    return Explanation(
        sample=sample,
        slot=slot,
        confidence=float(outputs.pred_logits[sample, slot].float().sigmoid()),
        concepts=concepts,
        rest=max(0.0, float(weights.sum()) - sum(concept.weight for concept in concepts)),
        heatmap=_heatmap(outputs, sample, slot, frame),
        patch_boxes=boxes,
        patch_map=patch_map,
        words=words,
    )


def check_request(outputs: Any, slot: int, sample: int, top: int) -> None:
    """Refuse what cannot be explained.

    Args:
        outputs: see `explain_slot`.
        slot: likewise.
        sample: likewise.
        top: likewise.

    Raises:
        ValueError: as `explain_slot`.
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


def _heatmap(outputs: Any, sample: int, slot: int, frame: int | None) -> np.ndarray:
    heat = outputs.heatmaps[sample, slot].detach().float().sigmoid().cpu().numpy()  # (h, w)
    height, width = _extent(outputs, sample, frame, heat.shape)
    return heat[:height, :width]


def _extent(outputs: Any, sample: int, frame: int | None, grid: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of the key grid that show the image, rounded up; the whole grid when the frame is unknown."""
    if outputs.reshaped_input_sizes is None or frame is None:
        return grid[0], grid[1]
    sizes = [int(n) for n in outputs.reshaped_input_sizes[sample]]
    return -(-sizes[0] * grid[0] // frame), -(-sizes[1] * grid[1] // frame)


def _grounded_parts(outputs: Any, sample: int, slot: int, patches: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a grounded slot: each token's share (T,), what it adds to each concept's logit (T, M), and what each concept
    adds to the heatmap at each patch (patches, M)."""
    grounding = outputs.grounding
    found = grounding.word_mask[sample]
    positions = grounding.word_positions[sample][found].cpu().numpy()
    weights = grounding.weights[sample, slot].detach().float().cpu().numpy()  # (M,)
    shares = np.zeros(len(outputs.sequences[sample]), np.float32)
    logits = np.zeros((len(shares), len(weights)), np.float32)
    shares[positions] = grounding.word_shares[sample, slot][found].detach().float().cpu().numpy()
    logits[positions] = grounding.word_logits[sample, slot][found].detach().float().cpu().numpy()
    on_patches = np.zeros((patches, len(weights)), np.float32)
    parts = grounding.on_patches(sample, slot).detach().float().cpu().numpy().T[:patches]
    on_patches[: len(parts)] = parts
    return shares, logits, on_patches


def _with_phrases(words: list[TokenHit], read: list[int], window: int) -> list[TokenHit]:
    """The same words; those at the positions that were read know the phrase that ends with them."""
    texts = {word.position: word.text for word in words}
    phrases = {
        position: "".join(texts.get(earlier, "") for earlier in read[max(0, place + 1 - window) : place + 1])
        for place, position in enumerate(read)
    }
    return [word._replace(phrase=phrases.get(word.position, "").strip()) for word in words]


def _words(
    sequence: "torch.Tensor", types: np.ndarray, strengths: np.ndarray, processor: Any, padding: int | None
) -> list[TokenHit]:
    """Every text token but the padding as a TokenHit; its text is what it adds to its predecessor's, with spaces."""
    ids = sequence.tolist()
    kept = [position for position in range(len(types)) if ids[position] != padding]  # padding stands at the ends
    words = []
    for position in range(kept[0], kept[-1] + 1) if kept else ():
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
