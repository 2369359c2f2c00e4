"""Why a mask is where it is: the words a slot read, the concepts they fired, the places these add, the mask.

Reads what the model's own `explain` says about a decoding and puts it into the units of the page: concepts that share a
name count as one. Knows nothing about visitors, the network or HTML.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from effects import HARDLY, NEEDED, Effect, effect, percent, said
from whereabouts import parts_of, place_name, whereabouts

TOP_CONCEPTS = 5
"""How many concepts of a slot are shown."""
MAX_SWAPS = 60
"""How many names are offered in a concept's place."""
FAINT = 0.05
"""Words on which a concept fires less than this share of its strongest are left out."""
FINE = 64
"""Cells along each side of a map of patches."""
LONGEST = 640
"""Pixels of the longest side of what the page shows, and of what it measures masks in."""

ALSO = 0.35
"""A concept that gives another place this share of what it gives the mask heats that place too."""

NOTHING = re.compile(r"\banswer:\s*(?:none|nothing)\b[^.<\n]*", re.IGNORECASE)
"""How a response answers that nothing fits."""
MARK = re.compile(r"[\W_]*|an?|and|are|as|at|be|by|for|from|in|is|it|of|on|or|than|that|the|this|to|was|with")
"""Marks and small words, which name nothing; "A" is a column of a board."""

Key = int | str
"""How a concept is called when it is changed: by its label, or by its number where it has none."""
Changes = dict[Key, float | str]
"""Concept -> its factor, or the concept in its place; the latest last."""


@dataclass(frozen=True)
class Concept:
    """What the features of one name do in a slot."""

    key: Key
    name: str
    """as it is shown."""
    kind: str
    """"look", "place", or "" where the read-out does not tell."""
    share: float
    """of all heat that the slot's concepts add over the image, in [0, 1]; of the slot's weights, in other read-outs."""
    words: dict[int, float]
    """place in `Why.words` -> how strongly it fires there, above 0."""
    heat: np.ndarray
    """float (h, w), at least 0: what it adds to the heatmap over the image; where it fires, in other read-outs."""
    about: str = ""
    """what its name stands for, in a sentence without its end."""
    off: Effect | None = None
    """what switching it off would do to the mask; None where that is not known."""


@dataclass(frozen=True)
class Slot:
    """One mask, or what would have become one, and why."""

    number: int
    confidence: float
    kept: bool
    mask: np.ndarray
    """bool (H, W), the longest side at most `LONGEST`."""
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
    board: bool = False
    """whether its places are called by the small model's board."""


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
    changes: Changes = field(default_factory=dict)
    names: dict[Key, str] = field(default_factory=dict)
    """how the concepts of `changes` are called, and those that may take a place and are called otherwise."""
    earlier: dict[int, Slot] = field(default_factory=dict)
    """number -> the same slot before the last of several changes; empty where there are not several."""
    stages: tuple[int, int] = (0, 0)
    """places in `words` where the reasoning goes from its first sentence to the next, and to its conclusion; equal
    where that is not known, or nothing lies between."""

    @property
    def now(self) -> list[Slot]:
        """The slots as they are after the changes, if there are any."""
        return [self.after.get(slot.number, slot) for slot in self.slots]

    @property
    def kept(self) -> list[Slot]:
        """The slots that became masks, as they are now."""
        return [slot for slot in self.now if slot.kept]

    @property
    def titles(self) -> dict[int, str]:
        """What each slot is called, by its number: those of the answer are counted, before any change."""
        kept = [slot.number for slot in self.slots if slot.kept]
        appeared = [slot.number for slot in self.now if slot.kept and slot.number not in kept]
        return {
            slot.number: f"mask {kept.index(slot.number) + 1}"
            if slot.number in kept
            else "new mask"
            if slot.number in appeared
            else "best guess"
            for slot in self.slots
        }

    def effect(self, slot: Slot) -> Effect:
        """What all changes together do to a slot's mask."""
        return effect_on(slot, self.after[slot.number], self.threshold)

    def moved(self, slot: Slot) -> str:
        """What became of a slot's mask, in a sentence for the last change, and one for all of them if they are more."""
        if slot.number not in self.after:
            return ""
        *_, (key, change) = self.changes.items()
        last = f"{self.names.get(key, key)} {self.said(change)}: "
        together = self.effect(slot)
        if slot.number not in self.earlier:
            return f"{last}{together.sentence}."
        step = effect_on(self.earlier[slot.number], self.after[slot.number], self.threshold)
        return f"{last}{step.sentence}." + ("" if step == together else f" All changes: {together.brief}.")

    def said(self, change: float | str) -> str:
        """A change in a word or two, such as "off" or "→ column A"."""
        return said(self.names.get(change, change) if isinstance(change, str) else change)

    @property
    def verdict(self) -> str:
        """The result in a sentence."""
        if not self.found:
            return "No mask: the response had no concentration tokens, which each mask needs."
        if self.after:
            titles = self.titles
            return f"After: {'; '.join(f'{titles[slot.number]}: {self.effect(slot).brief}' for slot in self.slots)}."
        if self.kept:
            share = percent(float(np.any([slot.mask for slot in self.kept], axis=0).mean()))
            count = len(self.kept)
            although = f", though it wrote “{self.none}”" if self.none else ""
            return f"{count} mask{'s' * (count > 1)}, {share} of the image{although}."
        enough = self.slots[0].confidence >= self.threshold
        sure = f"onfidence {confidence(self.slots[0].confidence)}"
        sure += " is enough, heat to draw a mask is missing." if enough else f", a mask needs {self.threshold:.2f}."
        if self.none:
            return f"No target: it answered that nothing fits (“{self.none}”), c{sure}"
        return f"No target: {f'c{sure}' if enough else f'not sure enough. C{sure}'} It looked here."

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


def swap_names(labels: dict[int, str], is_place: list[bool], names: dict[str, str] | None = None) -> dict[str, str]:
    """The names that may stand in a concept's place: those of one plain word, and the places of a board.

    Args:
        labels: feature -> label.
        is_place: for each feature, whether it tells where a thing is.
        names: how labels are called on the page that are called otherwise, such as the columns of a board.

    Returns:
        Label -> "look" or "place"; looks first, each in alphabetical order.
    """
    kinds: dict[str, str] = {}
    for index, label in labels.items():
        name, kind = label.strip(), "place" if is_place[index] else "look"
        if plain(name) in (names or {}) and name.endswith("(word)"):
            kinds[name] = "place"
        elif name.replace(" ", "").replace("-", "").isalpha() and kinds.get(name) != "look":
            kinds[name] = kind
    ordered = sorted(kinds, key=lambda name: (kinds[name], shown_name(name, labels, names).casefold(), name))
    return {name: kinds[name] for name in ordered[:MAX_SWAPS]}


def account(
    model: Any,
    processor: Any,
    answer: Any,
    threshold: float,
    decode: Callable[[Changes], Any],
    names: dict[str, str] | None = None,
) -> Why:
    """Everything about an answer.

    Args:
        model: SegCompassModel.
        processor: its processor.
        answer: visitors.Answer, with states, outputs and changes.
        threshold: confidence from which a slot is kept, in [0, 1].
        decode: makes a SegCompassOutput of the same states with changes.
        names: how labels are called on the page that are called otherwise.

    Returns:
        Why.
    """
    outputs, names = answer.outputs, names or {}

    def slots_with(changes: Changes) -> dict[int, Slot]:
        return slots_of(processor, answer, decode(changes), threshold, bool(names))

    slots = slots_of(processor, answer, outputs, threshold, bool(names))
    changed = decode(answer.changes) if answer.changes else None
    after = {} if changed is None else slots_of(processor, answer, changed, threshold, bool(names))
    shown = [slot for slot in slots.values() if slot.kept or (slot.number in after and after[slot.number].kept)]
    shown = shown or sorted(slots.values(), key=lambda slot: -slot.confidence)[:1]
    after = {slot.number: after[slot.number] for slot in shown if slot.number in after}
    if outputs.concept_weights is not None:
        shown = [explained(model, processor, outputs, slot, names) for slot in shown]
        for before in shown if changed is not None else []:
            now = explained(model, processor, changed, after[before.number], names)
            after[before.number] = with_changed(now, before, answer.changes)
    if outputs.grounding is not None:
        found = forecast(after or {slot.number: slot for slot in shown}, answer.changes, threshold, slots_with)
        shown, after = (shown, found) if after else (list(found.values()), after)
    several = answer.earlier is not None and len(answer.changes) > 1
    earlier = slots_with(answer.earlier) if several else {}
    named = [*answer.changes, *(other for other in answer.changes.values() if isinstance(other, str))]
    named += [label.strip() for label in model.concept_labels.values() if plain(label.strip()) in names]
    return Why(
        words=response_words(processor, outputs),
        slots=shown,
        found=len(slots),
        threshold=threshold,
        additive=outputs.grounding is not None,
        after=after,
        changes=dict(answer.changes),
        names={key: shown_name(key, model.concept_labels, names) for key in named}
        | {concept.key: concept.name for slot in (*shown, *after.values()) for concept in slot.concepts},
        earlier={slot.number: earlier[slot.number] for slot in shown if earlier},
        stages=stages_of(processor, outputs),
    )


def forecast(
    slots: dict[int, Slot], changes: Changes, threshold: float, slots_with: Callable[[Changes], dict[int, Slot]]
) -> dict[int, Slot]:
    """The slots with what switching each of their concepts off would do to their masks, beside the changes in force.

    Args:
        slots: by number, explained, with the changes in force.
        changes: those in force.
        threshold: confidence from which a slot is kept.
        slots_with: all slots with changes, by number.

    Returns:
        The slots; those without a mask as they are.
    """
    keys = {concept.key for slot in slots.values() if slot.kept for concept in slot.concepts if concept.share > 0}
    without = {key: slots_with(with_change(changes, key, 0.0)) for key in keys}
    return {
        number: replace(
            slot,
            concepts=[
                replace(concept, off=effect_on(slot, without[concept.key][number], threshold))
                if slot.kept and concept.share > 0
                else concept
                for concept in slot.concepts
            ],
        )
        for number, slot in slots.items()
    }


def with_change(changes: Changes, key: Key, change: float | str) -> Changes:
    """The changes and one more, which is the last."""
    return {**{other: kept for other, kept in changes.items() if other != key}, key: change}


def effect_on(before: Slot, after: Slot, threshold: float) -> Effect:
    """What becomes of a slot's mask."""
    if after.confidence < threshold:
        reason = f"confidence {confidence(after.confidence)}, it needs {threshold:.2f}"
    else:
        reason = "too little heat"
    made = effect(before.mask if before.kept else None, after.mask if after.kept else None, reason)
    elsewhere = made.moved or (made.has and not made.had)
    return replace(made, to=whereabouts(after.mask, after.board)) if elsewhere else made


def slots_of(processor: Any, answer: Any, outputs: Any, threshold: float, board: bool = False) -> dict[int, Slot]:
    """The slots that the response has, by number, with masks and heatmaps and no reasons yet."""
    sizes = at_most(answer.image.size, LONGEST)
    instances = processor.post_process_instance_segmentation(outputs, threshold, target_sizes=sizes)[0]
    kept = set(instances["slots"].tolist())
    masks = (processor.post_process_masks(outputs.pred_masks, sizes)[0] > 0).cpu().numpy()  # also those not kept
    heats = processor.post_process_masks(outputs.heatmaps, at_most(answer.image.size, 96))[0].sigmoid().cpu().numpy()
    confidences = outputs.pred_logits[0].float().sigmoid().tolist()
    return {
        number: Slot(number, confidences[number], number in kept, masks[number], heats[number], board=board)
        for number in outputs.slot_mask[0].nonzero()[:, 0].tolist()
    }


def at_most(size: tuple[int, int], longest: int) -> list[tuple[int, int]]:
    """[(H, W)] of a copy of an image with this (W, H), as large as it is or smaller."""
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


def stages_of(processor: Any, outputs: Any) -> tuple[int, int]:
    """Where the reasoning goes from its first sentence to the next, and to its conclusion: see `Why.stages`."""
    if outputs.grounding is None or not outputs.grounding.word_mask[0].any():
        return 0, 0
    positioned = _positioned(processor, outputs)
    first = int(outputs.grounding.word_positions[0][outputs.grounding.word_mask[0]].min())
    begins = next((word for word, (place, _) in enumerate(positioned) if place == first), 0)
    ends = (word + 1 for word, (_, text) in enumerate(positioned) if text.rstrip(" ").endswith((".", "!", "?", "\n")))
    return min(next(ends, begins), begins), begins


def with_changed(now: Slot, before: Slot, changes: Changes) -> Slot:
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
    gone = [replace(concept, share=0.0, heat=np.zeros_like(concept.heat), off=None) for concept in gone]
    chosen = sorted([*now.concepts, *gone], key=lambda concept: (concept.key not in changes, -concept.share))
    concepts = sorted(chosen[:TOP_CONCEPTS], key=lambda concept: -concept.share)
    total = sum(concept.share for concept in concepts)
    return replace(now, concepts=concepts, rest=max(0.0, 1.0 - total) if total else 0.0)


def explained(model: Any, processor: Any, outputs: Any, slot: Slot, names: dict[str, str]) -> Slot:
    """The slot with its reasons.

    Args:
        model: SegCompassModel.
        processor: its processor.
        outputs: those of an answer, or with its changes.
        slot: one of the outputs' slots.
        names: how labels are called on the page that are called otherwise.

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
    heats = {key: heat_of(members, grounded) for key, members in groups.items()}
    if grounded:  # of all that its concepts add, over the image
        shares = {key: float(heat.sum()) for key, heat in heats.items()}
        height, width = next((heat.shape for heat in heats.values()), (0, 0))
        whole = float(outputs.grounding.on_keys(0, slot.number)[:, :height, :width].sum())
    else:
        shares, whole = {key: float(sum(each.weight for each in members)) for key, members in groups.items()}, 1.0
    concepts = []
    for key in sorted(groups, key=lambda key: -shares[key])[:TOP_CONCEPTS]:
        members = groups[key]
        words: dict[int, float] = {}
        for token in (token for member in members for token in member.tokens if token.position in number):
            words[number[token.position]] = words.get(number[token.position], 0.0) + token.strength
        words = {word: strength for word, strength in words.items() if strength >= FAINT * max(words.values())}
        kind = "" if is_place is None else "place" if is_place[members[0].index] else "look"
        called = {} if kind == "look" else names  # the board's words name places
        name, about = shown_name(key, labels, called), about_name(key, kind, called)
        concepts.append(Concept(key, name, kind, shares[key] / max(whole, 1e-9), words, heats[key], about))
    read = {number[word.position]: word.strength for word in report.words if word.position in number}
    read = {word: strength for word, strength in read.items() if strength > 0}
    if not grounded:  # sums of strengths, which are no shares
        strongest = max(read.values(), default=1.0)
        read = {word: strength / strongest for word, strength in read.items()}
    rest = max(0.0, 1.0 - sum(concept.share for concept in concepts))
    phrases = {number[word.position]: word.phrase for word in report.words if word.position in number}
    return replace(slot, concepts=concepts, rest=rest, read=read, phrases=phrases)


def heat_of(members: list[Any], grounded: bool) -> np.ndarray:
    """What the features of one name add to the heatmap over the image; where they fire, in other read-outs."""
    if grounded:
        return sum(member.contribution for member in members)  # type: ignore[return-value]
    return heat_of_patches([patch for member in members for patch in member.patches])


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


def shown_name(key: Key, labels: dict[int, str], names: dict[str, str] | None = None) -> str:
    """The name that a visitor reads: a label without the note that says what it was found on.

    Words that it fires at are no name for what it finds: they are quoted. A label of marks and small words alone tells
    even less; such a concept is called by number.

    Args:
        key: how the concept is called when it is changed.
        labels: feature -> label.
        names: how labels are called that are called otherwise, such as the columns of a board.

    Returns:
        Such as "purple", "column C", "words “large”, “4”", "unnamed 7" or "unnamed 7 (at “,”)", with the first of
        its features' numbers.
    """
    if isinstance(key, int):
        return f"unnamed {key}"
    name = plain(key)
    if names and name in names:
        return names[name]
    if not all(MARK.fullmatch(part) for part in name.split("/")):
        return f"word{'s' * ('/' in name)} {quoted(name)}" if key.endswith("(word)") else name
    number = min(index for index, label in labels.items() if label.strip() == key)
    return f"unnamed {number} (at “{name}”)" if name else f"unnamed {number}"


def quoted(name: str) -> str:
    """The words of a label, each in quotes."""
    return ", ".join(f"“{part}”" for part in name.split("/") if part)


def plain(label: str) -> str:
    """A label without the note that says what it was found on."""
    return label.removesuffix("(word)").removesuffix("(patch)").strip()


KINDS = {"look": "how a thing looks", "place": "where a thing is"}
"""The two sorts of concepts."""


def about_name(key: Key, kind: str, names: dict[str, str]) -> str:
    """What a concept's name stands for, in a sentence without its end."""
    says = f"It says {KINDS[kind]}; it" if kind else "It"
    if isinstance(key, int):
        return f"{says} has no name: nothing was found that it stands for"
    fires = quoted(plain(key))
    if not fires:
        return f"{says} has no name: it fires at what is no word"
    if all(MARK.fullmatch(part) for part in plain(key).split("/")) and plain(key) not in names:
        return f"{says} has no name: it fires at {fires}, which tells nothing"
    if key.endswith("(word)"):
        return f"{says} is named after the words it fires at most: {fires}"
    if key.endswith("(patch)"):
        return f"{says} is named after the places in images it fires at most: {fires}"
    return f"{says} is named after what it was found to detect in images"


def needed(slot: Slot, threshold: float) -> str:
    """Which concept the mask needs most, in a sentence; without a mask, what is missing."""
    known = [(concept.name, concept.off) for concept in slot.concepts if concept.off is not None]
    if slot.confidence < threshold:
        return (
            "There is no mask to move: confidence is missing, which comes mostly from the words. Ask otherwise, or "
            "lower “Confidence needed”."
        )
    if not slot.kept:
        return "There is no mask to move: heat is missing. Undo a change, double a concept, or swap one."
    if not known:
        return ""
    name, most = max(known, key=lambda each: each[1].size)
    if most.size >= NEEDED:
        return f"This mask needs {mention(name)}. Without it, {most.sentence}."
    if most.size < HARDLY:
        return f"No single concept holds this mask: without any one of them, {most.sentence} at most."
    return f"No single concept holds this mask: even without {mention(name)}, only {most.sentence}."


def apart(slot: Slot) -> str:
    """Why a mask is where it is and not at the next hottest place, in a sentence; "" where nothing else is hot.

    What concepts add at a place is what its heat is the sum of, so the difference between two places is theirs too.

    Args:
        slot: with its concepts, of a grounded read-out.

    Returns:
        Such as "“purple” and “box” heat B4 too; “column C” makes the difference."
    """
    concepts = [concept for concept in slot.concepts if concept.kind and concept.share > 0]
    if not slot.kept or not concepts:
        return ""
    heats = np.stack([concept.heat for concept in concepts])  # (concepts, h, w)
    cells = mask_cells(slot.mask, heats.shape[1:])
    around = np.pad(cells, 1)
    height, width = cells.shape
    near = np.any([around[y : y + height, x : x + width] for y in range(3) for x in range(3)], axis=0)
    if near.all():
        return ""
    total = heats.sum(0)
    here = np.unravel_index(np.where(cells, total, -1).argmax(), total.shape)
    there = np.unravel_index(np.where(near, -1, total).argmax(), total.shape)
    own, others = heats[:, here[0], here[1]], heats[:, there[0], there[1]]
    also = (others >= ALSO * own) & (others >= 0.05 * own.sum())
    if not also.any() or others.sum() >= own.sum():
        return ""
    gains = own - others
    decide = (gains >= 0.2 * gains[gains > 0].sum()) & ~also
    theirs = np.where(near, 0, heats[also].sum(0))
    hot = parts_of(theirs >= 0.5 * theirs[there])
    middle = np.mean(next(part for part in hot if tuple(map(int, there)) in part), axis=0) + 0.5
    place = place_name(middle[0] / height, middle[1] / width, slot.mask.shape, slot.board)
    heat = "heat" if also.sum() > 1 else "heats"
    said = f"{listed(concepts, also)} {heat} {place} too"
    if not decide.any():
        return f"{said}, but less."
    make = "make" if decide.sum() > 1 else "makes"
    return f"{said}; {listed(concepts, decide)} {make} the difference."


def mask_cells(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The cells of a heat (h, w) in which a mask (H, W) has a pixel: bool (h, w)."""
    cells = np.zeros(shape, bool)
    rows, columns = mask.nonzero()
    cells[rows * shape[0] // mask.shape[0], columns * shape[1] // mask.shape[1]] = True
    return cells


def mention(name: str) -> str:
    """A concept's name inside a sentence: in quotes, unless it has some."""
    return name if "“" in name else f"“{name}”"


def listed(concepts: list[Concept], chosen: np.ndarray) -> str:
    """The names of some concepts, in quotes."""
    *others, last = (mention(concept.name) for concept, taken in zip(concepts, chosen, strict=True) if taken)
    return f"{', '.join(others)} and {last}" if others else last


def foretold(
    slots: dict[int, Slot], changed: list[tuple[float | str, dict[int, Slot]]], threshold: float
) -> dict[int, list]:
    """What changes to a concept would do to each mask, those together that do the same, and those that do little.

    Args:
        slots: by number, with the changes in force.
        changed: what the concept would be changed to, and all slots then.
        threshold: confidence from which a slot is kept.

    Returns:
        Number of each slot -> [[effect in a few words, [changes]]], what moves it most first.
    """
    told: dict[int, list] = {}
    for number, slot in slots.items():
        groups: dict[str, tuple[float, list[float | str]]] = {}
        for name, after in changed:
            made = effect_on(slot, after[number], threshold)
            little = made.had and made.has and made.size < NEEDED
            told_as = f"under {NEEDED:.0%} changes" if little and len(changed) > 1 else made.brief
            _, names = groups.setdefault(told_as, (0.0 if little else float(made.moved) + made.size, []))
            names.append(name)
        told[number] = [[brief, names] for brief, (_, names) in sorted(groups.items(), key=lambda each: -each[1][0])]
    return told
