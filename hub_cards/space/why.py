"""Why a mask is where it is: the words a slot read, the concepts they fired, the places these add, the mask.

Reads what the model's own `explain` says about a decoding and puts it into the units of the page: concepts that share a
name count as one. Knows nothing about visitors, the network or HTML.
"""

import re
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

TOP_CONCEPTS = 5
"""How many concepts of a slot are shown."""
MAX_SWAPS = 60
"""How many names are offered in a concept's place."""
FAINT = 0.05
"""Words on which a concept fires less than this share of its strongest are left out."""
FINE = 64
"""Cells along each side of a map of patches."""
NEEDED = 0.3
"""A mask that loses this share without a concept needs it."""
STAYS = 0.98
"""Two masks that agree so far (intersection over union) are called the same."""

NOTHING = re.compile(r"\banswer:\s*(?:none|nothing)\b[^.<\n]*", re.IGNORECASE)
"""How a response answers that nothing fits."""
MARK = re.compile(r"[\W_]*|an?|and|are|as|at|be|by|for|from|in|is|it|of|on|or|than|that|the|this|to|was|with")
"""Marks and small words, which name nothing; "A" is a column of a board."""

Key = int | str
"""How a concept is called when it is changed: by its label, or by its number where it has none."""


@dataclass(frozen=True)
class Concept:
    """What the features of one name do in a slot."""

    key: Key
    name: str
    """as it is shown."""
    kind: str
    """"look", "place", or "" where the read-out does not tell."""
    share: float
    """of the slot, in [0, 1]."""
    words: dict[int, float]
    """place in `Why.words` -> how strongly it fires there, above 0."""
    heat: np.ndarray
    """float (h, w), at least 0: what it adds to the heatmap over the image; where it fires, in other read-outs."""
    lost: float | None = None
    """share of the mask that is gone without it, in [0, 1]; None where that is not known."""


@dataclass(frozen=True)
class Slot:
    """One mask, or what would have become one, and why."""

    number: int
    confidence: float
    kept: bool
    mask: np.ndarray
    """bool (H, W)."""
    heat: np.ndarray
    """float (h, w) in [0, 1], the heatmap over the image."""
    concepts: list[Concept] = field(default_factory=list)
    """heaviest first."""
    rest: float = 0.0
    """share of all others."""
    read: dict[int, float] = field(default_factory=dict)
    """place in `Why.words` -> how much of the slot comes from this word, in [0, 1]."""
    phrases: dict[int, str] = field(default_factory=dict)
    """place in `Why.words` -> the words that were read together there."""


@dataclass(frozen=True)
class Why:
    """All that the page shows of an answer."""

    words: list[str]
    """pieces of the response; joined they are the response."""
    slots: list[Slot]
    """the kept ones; the surest found one when none is kept."""
    found: int
    """how many slots the response had."""
    threshold: float
    additive: bool
    """whether the concepts' places add up to the heatmap."""
    after: dict[int, Slot] = field(default_factory=dict)
    """number -> the same slot after the visitor's changes, with its reasons; empty without any."""
    changes: dict[Key, float | str] = field(default_factory=dict)
    names: dict[Key, str] = field(default_factory=dict)
    """how the concepts of `changes` are called."""

    @property
    def now(self) -> list[Slot]:
        """The slots as they are after the changes, if there are any."""
        return [self.after.get(slot.number, slot) for slot in self.slots]

    @property
    def kept(self) -> list[Slot]:
        """The slots that became masks, as they are now."""
        return [slot for slot in self.now if slot.kept]

    @property
    def verdict(self) -> str:
        """The result in a sentence."""
        if not self.found:
            return "No mask: the response had no concentration tokens, which each mask needs."
        changed = "After the changes: " if self.after else ""
        if self.kept:
            pixels = int(np.any([slot.mask for slot in self.kept], axis=0).sum())
            count = len(self.kept)
            although = f", though it wrote “{self.none}”" if self.none else ""
            return f"{changed}{count} mask{'s' * (count > 1)}, {pixels:,} pixels{although}."
        if any(slot.kept for slot in self.slots):
            return f"{changed}no mask any more."
        sure = f"onfidence {confidence(self.slots[0].confidence)}, a mask needs {self.threshold:.2f}."
        if self.none:
            return f"No target: it answered that nothing fits (“{self.none}”), c{sure}"
        return f"No target: not sure enough. C{sure} It looked here."

    @property
    def none(self) -> str:
        """The response's words that nothing fits; empty where it has none."""
        said = NOTHING.findall("".join(self.words))
        return said[-1].strip() if said else ""


def confidence(value: float) -> str:
    """A confidence in two digits, but never 0.00 or 1.00 where it is neither."""
    if 0 < value < 0.005:
        return "below 0.01"
    if 0.995 <= value < 1:
        return "above 0.99"
    return f"{value:.2f}"


def swap_names(labels: dict[int, str], is_place: list[bool]) -> dict[str, str]:
    """The names that may stand in a concept's place: those of one plain word.

    Args:
        labels: feature -> label.
        is_place: for each feature, whether it tells where a thing is.

    Returns:
        Name -> "look" or "place"; looks first, each in alphabetical order.
    """
    kinds: dict[str, str] = {}
    for index, label in labels.items():
        name = label.strip()
        if name.replace(" ", "").replace("-", "").isalpha() and kinds.get(name) != "look":
            kinds[name] = "place" if is_place[index] else "look"
    ordered = sorted(kinds, key=lambda name: (kinds[name], name.casefold(), name))
    return {name: kinds[name] for name in ordered[:MAX_SWAPS]}


def account(model: Any, processor: Any, answer: Any, threshold: float, changed: Any = None) -> Why:
    """Everything about an answer.

    Args:
        model: SegCompassModel.
        processor: its processor.
        answer: visitors.Answer, with states and outputs.
        threshold: confidence from which a slot is kept, in [0, 1].
        changed: SegCompassOutput decoded with `answer.changes`, or None.

    Returns:
        Why.
    """
    outputs = answer.outputs
    additive = outputs.grounding is not None
    slots = slots_of(processor, answer, outputs, threshold)
    after = {} if changed is None else slots_of(processor, answer, changed, threshold)
    shown = [slot for slot in slots.values() if slot.kept or (slot.number in after and after[slot.number].kept)]
    shown = shown or sorted(slots.values(), key=lambda slot: -slot.confidence)[:1]
    words: list[str] = []
    after = {slot.number: after[slot.number] for slot in shown if slot.number in after}
    if outputs.concept_weights is not None:
        shown = [explained(model, processor, answer, outputs, slot) for slot in shown]
        for before in shown if changed is not None else []:
            now = explained(model, processor, answer, changed, after[before.number])
            after[before.number] = with_changed(now, before, answer.changes)
    words = response_words(processor, outputs)
    return Why(
        words=words,
        slots=shown,
        found=len(slots),
        threshold=threshold,
        additive=additive,
        after=after,
        changes=dict(answer.changes),
        names={key: shown_name(key, model.concept_labels) for key in answer.changes},
    )


def slots_of(processor: Any, answer: Any, outputs: Any, threshold: float) -> dict[int, Slot]:
    """The slots that the response has, by number, with masks and heatmaps and no reasons yet."""
    sizes = answer.inputs["original_sizes"]
    instances = processor.post_process_instance_segmentation(outputs, threshold, target_sizes=sizes)[0]
    kept = set(instances["slots"].tolist())
    masks = (processor.post_process_masks(outputs.pred_masks, sizes)[0] > 0).cpu().numpy()
    heats = processor.post_process_masks(outputs.heatmaps, coarse(answer.image.size))[0].sigmoid().cpu().numpy()
    confidences = outputs.pred_logits[0].float().sigmoid().tolist()
    return {
        number: Slot(number, confidences[number], number in kept, masks[number], heats[number])
        for number in outputs.slot_mask[0].nonzero()[:, 0].tolist()
    }


def coarse(size: tuple[int, int], longest: int = 96) -> list[tuple[int, int]]:
    """[(H, W)] of a small picture with an image's (W, H): heat is smooth, and a page is loaded over a network."""
    scale = min(1.0, longest / max(size))
    return [(max(1, round(size[1] * scale)), max(1, round(size[0] * scale)))]


def response_words(processor: Any, outputs: Any) -> list[str]:
    """The response in pieces, each with the space before it; special tokens are empty."""
    return [word for _, word in _positioned(processor, outputs)]


def _positioned(processor: Any, outputs: Any) -> list[tuple[int, str]]:
    ids = outputs.sequences[0].tolist()
    types = outputs.token_types[0].tolist() if outputs.token_types is not None else []
    response = max(types, default=0)  # RESPONSE is the last of the kinds
    decode = processor.tokenizer.decode
    places = [place for place, kind in enumerate(types) if kind == response]
    words = []
    for place in places:
        pair, before = ids[max(place - 1, 0) : place + 1], ids[max(place - 1, 0) : place]
        text = decode(pair, skip_special_tokens=True)[len(decode(before, skip_special_tokens=True)) :]
        words.append((place, text))
    return words


def with_changed(now: Slot, before: Slot, changes: dict[Key, float | str]) -> Slot:
    """A slot after changes with the concepts that were changed among its own, also those of which nothing is left.

    Args:
        now: the slot after the changes, explained.
        before: the same before.
        changes: key -> change.

    Returns:
        Slot, heaviest concepts first.
    """
    present = {concept.key for concept in now.concepts}
    gone = [concept for concept in before.concepts if concept.key in changes and concept.key not in present]
    gone = [replace(concept, share=0.0, heat=np.zeros_like(concept.heat), lost=None) for concept in gone]
    chosen = sorted([*now.concepts, *gone], key=lambda concept: (concept.key not in changes, -concept.share))
    concepts = sorted(chosen[:TOP_CONCEPTS], key=lambda concept: -concept.share)
    total = sum(concept.share for concept in concepts)
    return replace(now, concepts=concepts, rest=max(0.0, 1.0 - total) if total else 0.0)


def explained(model: Any, processor: Any, answer: Any, outputs: Any, slot: Slot) -> Slot:
    """The slot with its reasons.

    Args:
        model: SegCompassModel.
        processor: its processor.
        answer: visitors.Answer.
        outputs: its outputs, or those with its changes.
        slot: one of the outputs' slots.

    Returns:
        Slot.
    """
    labels = model.concept_labels
    number = {place: word for word, (place, _) in enumerate(_positioned(processor, outputs))}
    report = model.explain(outputs, slot=slot.number, labels=labels, processor=processor, top=4 * TOP_CONCEPTS)
    grounded = outputs.grounding is not None
    is_place = model.grounded_reading.is_place.tolist() if grounded else None
    groups: dict[Key, list[Any]] = {}
    for concept in report.concepts:
        groups.setdefault(key_of(concept.index, labels), []).append(concept)
    heaviest = sorted(groups.items(), key=lambda item: -sum(each.weight for each in item[1]))[:TOP_CONCEPTS]
    whole = float(outputs.grounding.weights[0, slot.number].sum()) if grounded else 1.0  # not 1 after changes
    lost = lost_by_name(model, answer, outputs, slot.number, heaviest) if grounded and slot.kept else {}
    concepts = []
    for key, members in heaviest:
        words: dict[int, float] = {}
        for token in (token for member in members for token in member.tokens if token.position in number):
            words[number[token.position]] = words.get(number[token.position], 0.0) + token.strength
        words = {word: strength for word, strength in words.items() if strength >= FAINT * max(words.values())}
        if grounded:
            heat = sum(member.contribution for member in members)
        else:
            heat = heat_of_patches([patch for member in members for patch in member.patches])
        kind = "" if is_place is None else "place" if is_place[members[0].index] else "look"
        share = float(sum(member.weight for member in members)) / max(whole, 1e-9)
        concepts.append(Concept(key, shown_name(key, labels), kind, share, words, heat, lost.get(key)))
    read = {number[word.position]: word.strength for word in report.words if word.position in number}
    read = {word: strength for word, strength in read.items() if strength > 0}
    if not grounded:  # sums of strengths, which are no shares
        strongest = max(read.values(), default=1.0)
        read = {word: strength / strongest for word, strength in read.items()}
    rest = max(0.0, 1.0 - sum(concept.share for concept in concepts))
    phrases = {number[word.position]: word.phrase for word in report.words if word.position in number}
    return replace(slot, concepts=concepts, rest=rest, read=read, phrases=phrases)


def heat_of_patches(patches: list[Any]) -> np.ndarray:
    """Where patches fire, over the image.

    Args:
        patches: PatchHits, each with its box in fractions of the image.

    Returns:
        float (FINE, FINE); where patches overlap, the strongest.
    """
    heat = np.zeros((FINE, FINE), np.float32)
    for patch in patches:
        left, top, right, bottom = (round(FINE * edge) for edge in patch.box)
        area = heat[top : max(bottom, top + 1), left : max(right, left + 1)]
        np.maximum(area, patch.strength, out=area)
    return heat


def key_of(index: int, labels: dict[int, str]) -> Key:
    """How a feature is called when it is changed."""
    return labels[index].strip() if index in labels else index


def shown_name(key: Key, labels: dict[int, str]) -> str:
    """The name that a visitor reads: a label without the note that says what it was found on.

    A label of marks and small words alone tells where the concept fires and not what it means; it is called by number.

    Args:
        key: how the concept is called when it is changed.
        labels: feature -> label.

    Returns:
        Such as "purple", "concept 7" or "concept 7 (at “,”)", with the first of its features' numbers.
    """
    if isinstance(key, int):
        return f"concept {key}"
    name = key.removesuffix("(word)").removesuffix("(patch)").strip()
    if not all(MARK.fullmatch(part) for part in name.split("/")):
        return name
    number = min(index for index, label in labels.items() if label.strip() == key)
    return f"concept {number} (at “{name}”)" if name else f"concept {number}"


def lost_by_name(
    model: Any, answer: Any, outputs: Any, slot: int, groups: list[tuple[Key, list[Any]]]
) -> dict[Key, float]:
    """Which share of the mask is gone without the features of each name.

    The model says it for each of its concepts; here the features of a name are put together as if they were one.
    """
    grounding, indices = outputs.grounding, outputs.concept_indices[0].tolist()
    maps = []
    for _, members in groups:
        columns = [indices.index(member.index) for member in members]
        maps.append(grounding.on_patches(0, slot)[columns].sum(0))  # (P,)
    together = grounding.maps.new_tensor(np.stack([each.float().cpu().numpy() for each in maps], -1))[None]  # (1, P, n)
    weights = together.new_ones(1, grounding.weights.shape[1], len(groups))
    merged = type(outputs)(**dict(outputs))
    merged.grounding = grounding._replace(weights=weights, maps=together)
    merged.concept_indices = outputs.concept_indices.new_tensor([list(range(len(groups)))])
    lost = model.lost_without(merged, slot, 0, answer.states.image_embeddings)
    return {key: lost.get(place, 0.0) for place, (key, _) in enumerate(groups)}


def needed(slot: Slot) -> str:
    """Which concept the mask needs most, in a sentence."""
    known = [concept for concept in slot.concepts if concept.lost is not None]
    if not slot.kept:
        return "There is no mask to move. Would one appear? Double a concept, or put another in its place."
    if not known:
        return ""
    most = max(known, key=lambda concept: concept.lost or 0)
    if (most.lost or 0) >= NEEDED:
        return f"This mask needs “{most.name}”: without it {most.lost:.0%} of it goes."
    return (
        f"No single concept holds this mask: even without “{most.name}” {1 - (most.lost or 0):.0%} of it stays. Swap "
        "one, or switch several off."
    )


def moved(before: Slot, after: Slot, threshold: float) -> str:
    """What became of a mask, in a sentence."""
    sure = f"confidence {confidence(before.confidence)} → {confidence(after.confidence)}"
    if not after.kept:
        gone = "No mask any more" if before.kept else "Still no mask"
        why = "nothing of it is left" if after.confidence >= threshold else f"a mask needs {threshold:.2f}"
        return f"{gone}: {sure}, {why}."
    if not before.kept:
        return f"Now there is a mask: {int(after.mask.sum()):,} pixels, {sure}."
    both, either = (before.mask & after.mask).sum(), (before.mask | after.mask).sum()
    if both >= STAYS * max(either, 1):
        return f"The mask stays where it was ({sure})."
    stays = both / max(before.mask.sum(), 1)
    new = int(after.mask.sum() - both)
    if stays < 0.01:
        return f"The mask has moved away: all of its {new:,} pixels are new ({sure})."
    return f"{stays:.0%} of the mask stays, {new:,} pixels are new ({sure})."
