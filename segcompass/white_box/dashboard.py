"""What each feature of an SAE does, on one page: where it fires, what it detects, what it steers, what it promotes.

A concept dictionary says where a feature fires, and scores on scenes what it detects. Two things are measured here:
what a mask loses when the concept is switched off, and which words the feature's direction makes likelier. The page
needs nothing but itself; `neuronpedia` writes the same as files.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.modeling_segcompass.explanation import heaviest_concepts
from segcompass.modeling_segcompass.report_page import page, text
from segcompass.modeling_segcompass.states import ReasoningStates

from .concept_dictionary import ConceptDictionary, ConceptEntry, Context
from .decoding import decode, single_sample

CONTEXTS = 4  # shown of each feature
WORDS = 8  # that a feature promotes, and as many that it makes less likely


@dataclass
class Steered:
    """What switching a concept off does to the masks it had a weight in."""

    masks: int
    """how many these were."""
    weight: float
    """its mean share of them."""
    lost: float
    """mean share of such a mask that is gone without it; 1 where the slot is no longer confident."""


@dataclass
class FeatureCard:
    """All that is known of one feature."""

    entry: ConceptEntry
    detects: list[dict[str, Any]] = field(default_factory=list)
    """best first: "attribute", "reading" ("scene", "patch" or "word"), "f1" and "lift", on held-out samples."""
    steered: Steered | None = None
    """None where it was among the heaviest concepts of no mask."""
    promotes: list[tuple[str, float]] = field(default_factory=list)
    """(word piece, what one unit of the feature adds to its logit), most first."""
    demotes: list[tuple[str, float]] = field(default_factory=list)
    """likewise, least first."""

    def summary(self) -> dict[str, Any]:
        """A line about it, as JSON."""
        best = self.detects[0] if self.detects else None
        return {
            "index": self.entry.index,
            "label": self.entry.label,
            "density": self.entry.density,
            "strength": self.entry.strength,
            "detects": best,
            "steers": asdict(self.steered) if self.steered else None,
        }


# -- what it steers ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def steered_masks(
    model: SegCompassModel,
    processor: SegCompassProcessor,
    rows: list[dict[str, Any]],
    threshold: float = 0.5,
    top: int = 6,
) -> Iterator[dict[str, Any]]:
    """Segment rows, and each mask again without each of its heaviest concepts.

    Args:
        model: in evaluation mode.
        processor: its processor.
        rows: with `sample_id`, `image` and `instruction`.
        threshold: confidence from which a slot has a mask.
        top: how many concepts of a mask are switched off, one at a time.

    Yields:
        For each row {"sample_id", "switched_off": [[feature, weight, share of the mask lost], ...]}.
    """
    inputs = processor(images=[row["image"] for row in rows], text=[row["instruction"] for row in rows])
    _, states = model.reason(**inputs.to(model.device))
    for place, row in enumerate(rows):
        alone = single_sample(states, place).trimmed()
        outputs: Any = decode(model, alone)
        confident = outputs.slot_mask[0] & (outputs.pred_logits[0].sigmoid() >= threshold)
        found = []
        for slot in confident.nonzero()[:, 0].tolist():
            concepts = heaviest_concepts(outputs, slot, count=top)
            before = outputs.pred_masks[0, slot] > 0
            if concepts and before.any():
                lost = _lost(model, alone, slot, before, [concept.index for concept in concepts], threshold)
                found += [[one.index, one.weight, share] for one, share in zip(concepts, lost, strict=True)]
        yield {"sample_id": row["sample_id"], "switched_off": found}


def _lost(
    model: SegCompassModel,
    alone: ReasoningStates,
    slot: int,
    before: torch.Tensor,
    indices: Sequence[int],
    threshold: float,
) -> list[float]:
    """The share of a mask that is gone without each of these features."""
    scale = alone.z.new_ones(len(indices), model.config.sae_config.d_sae)  # (V, d_sae)
    scale[torch.arange(len(indices)), torch.tensor(indices)] = 0
    expanded = {
        name: value.expand(len(indices), *value.shape[1:])
        for name, value in alone._asdict().items()
        if value is not None
    }
    outputs: Any = decode(model, alone._replace(**expanded), concept_scale=scale)
    gone = (before & ~(outputs.pred_masks[:, slot] > 0)).flatten(1).sum(1) / before.sum()
    gone[outputs.pred_logits[:, slot].sigmoid() < threshold] = 1
    return gone.tolist()


def summarise_steering(records: Iterable[Mapping[str, Any]]) -> dict[int, Steered]:
    """Means over masks.

    Args:
        records: of `steered_masks`.

    Returns:
        {feature: what switching it off does}.
    """
    found: dict[int, list[tuple[float, float]]] = {}
    for record in records:
        for index, weight, lost in record["switched_off"]:
            found.setdefault(int(index), []).append((weight, lost))
    return {
        index: Steered(len(seen), *(sum(values) / len(seen) for values in zip(*seen, strict=True)))
        for index, seen in found.items()
    }


# -- what it promotes --------------------------------------------------------------------------------------------------


@torch.no_grad()
def promoted_words(
    model: SegCompassModel, processor: SegCompassProcessor, indices: Sequence[int], count: int = WORDS
) -> dict[int, tuple[list[tuple[str, float]], list[tuple[str, float]]]]:
    """Which words a feature's direction makes likelier, if it went straight to the language head.

    Args:
        model: the model.
        processor: its processor.
        indices: features.
        count: how many words either way.

    Returns:
        {feature: (word pieces with what one unit of it adds to their logits, most first; the same, least first)}.
    """
    head: Any = model.get_output_embeddings()
    norm: Any = getattr(model.backbone.language_model(model.mllm), "norm", None)
    directions = model.sae.W_dec[list(indices)].float()  # (F, d_π)
    if getattr(norm, "weight", None) is not None:  # the last norm's gains, as they stand before the head
        directions = directions * norm.weight.float()
    logits = directions @ head.weight.float().T  # (F, vocabulary)
    logits = logits[:, : len(processor.tokenizer)]
    found = {}
    for row, index in enumerate(indices):
        sides = []
        for sign in (1, -1):
            values, tokens = (sign * logits[row]).topk(min(count, logits.shape[1]))
            texts = [processor.tokenizer.decode([token]) for token in tokens.tolist()]
            sides.append(list(zip(texts, (sign * values).tolist(), strict=True)))
        found[index] = (sides[0], sides[1])
    return found


def feature_cards(
    dictionary: ConceptDictionary,
    scores: Mapping[str, Mapping[str, Mapping[str, float]]] | None,
    steered: Mapping[int, Steered],
    limit: int,
) -> list[FeatureCard]:
    """The features to show: those that steer or detect something first, then the most frequent.

    Args:
        dictionary: of the SAE.
        scores: reading -> attribute -> the fields of its Detector, as `segcompass dictionary` writes them; or None.
        steered: of `summarise_steering`.
        limit: how many at most.

    Returns:
        The cards, without the words that features promote.
    """
    detects: dict[int, list[dict[str, Any]]] = {}
    for reading, found in (scores or {}).items():
        for attribute, detector in found.items():
            entry = {"attribute": attribute, "reading": reading, "f1": detector["f1"], "lift": detector["lift"]}
            detects.setdefault(int(detector["index"]), []).append(entry)
    cards = [
        FeatureCard(
            entry,
            sorted(detects.get(entry.index, []), key=lambda one: -one["lift"]),
            steered.get(entry.index),
        )
        for entry in dictionary.entries
        if entry.density > 0
    ]
    cards.sort(key=lambda card: (-(card.steered.masks if card.steered else 0), not card.detects, -card.entry.density))
    return cards[:limit]


# -- the page ----------------------------------------------------------------------------------------------------------

STYLE = """
#filter { font: inherit; padding: .4em .6em; width: 100%; margin: .5em 0 1em; border: 1px solid var(--control);
  background: var(--panel); color: inherit; border-radius: 3px }
article { border-top: 1px solid var(--line); padding: .8em 0; display: grid; grid-template-columns: 25em 1fr;
  gap: .2em 1.5em; break-inside: avoid }
article h3 { grid-column: 1 / -1 } article dl { margin: 0; display: grid; grid-template-columns: auto 1fr; gap: 0 .7em;
  align-content: start } dt { color: var(--soft) } dd { margin: 0 }
article .bar { display: inline-block; height: .6em; margin: 0; background: var(--accent) }
.context { display: inline-flex; align-items: center; gap: .4em; margin: 0 .8em .4em 0; max-width: 100% }
.context img { height: 44px; border-radius: 3px }
.word { background: var(--panel); border-radius: 3px; padding: 0 .3em; white-space: pre }
article[hidden] { display: none }
@media (max-width: 45em) { article { grid-template-columns: 1fr } } @media print { #filter { display: none } }
"""
BODY = """{histogram}
<p class="soft">{key}</p>
<input id="filter" type="search" placeholder="a name, a word or a number" aria-label="show features with this text">
{cards}
<script>
const cards = [...document.querySelectorAll("article")], texts = cards.map(card => card.textContent.toLowerCase())
document.querySelector("#filter").addEventListener("input", event => {{
  const asked = event.target.value.trim().toLowerCase()
  cards.forEach((card, number) => {{ card.hidden = !texts[number].includes(asked) }})
}})
</script>"""
KEY = (
    "<b>Density</b>: share of tokens it fires on. <b>Detects</b>: how well its firing says that an attribute is there, "
    "on held-out scenes; lift is what F1 has above a feature that always fires, as a share of what is above that. "
    "<b>Steers</b>: the masks in which it is among the heaviest concepts, its mean share of them, and how much of them "
    "is gone when it alone is switched off. <b>Promotes</b>: word pieces that its direction makes likelier if it went "
    "straight to the language head. A label is a guess from the contexts, unless it is what the feature detects."
)


def dashboard_page(
    dictionary: ConceptDictionary,
    cards: Sequence[FeatureCard],
    title: str,
    steering_of: str = "",
    picture: Callable[[Context], str | None] | None = None,
) -> str:
    """The page.

    Args:
        dictionary: of the SAE.
        cards: the features to show, in their order.
        title: the page's heading.
        steering_of: what the masks were that concepts were switched off in; "" where this was not measured.
        picture: gives a context's picture as a data URL, or None.

    Returns:
        The text of an HTML file.
    """
    densities = [entry.density for entry in dictionary.entries if entry.density > 0]
    lead = (
        f"{len(densities):,} of {len(dictionary.entries):,} features fired on {dictionary.tokens:,} tokens of "
        f"{text(dictionary.source)}. Shown are {len(cards):,}: those that steer masks or detect something "
        f"first, then the most frequent. {text(steering_of)}"
    )
    most = max((card.entry.density for card in cards), default=1.0)
    shown = "\n".join(_article(card, most, picture) for card in cards)
    body = BODY.format(key=KEY, cards=shown, histogram=_density_histogram(densities))
    return page(title, body, lead, STYLE)


def _article(card: FeatureCard, most: float, picture: Callable[[Context], str | None] | None) -> str:
    entry = card.entry
    facts = {
        "density": f"{entry.density:.3%} <span class='bar' style='width:{6 * entry.density / most:.2f}em'></span>",
        "strength": f"{entry.strength:.2f} where it fires",
        "fires on": ", ".join(f"{text(kind)} {share:.0%}" for kind, share in entry.profile.items() if share),
    }
    if card.detects:
        facts["detects"] = "<br>".join(
            f"{text(one['attribute'])} ({one['reading']}): F1 {one['f1']:.2f}, lift {one['lift']:.2f}"
            for one in card.detects[:3]
        )
    if card.steered:
        steered = card.steered
        facts["steers"] = (
            f"{steered.masks} mask{'s' * (steered.masks > 1)}, share {steered.weight:.2f}; {steered.lost:.0%} gone "
            f"without it <span class='bar' style='width:{6 * steered.lost:.2f}em'></span>"
        )
    listed = "".join(f"<dt>{name}</dt><dd>{fact}</dd>" for name, fact in facts.items())
    contexts = []
    for context in entry.contexts[:CONTEXTS]:
        link = picture(context) if picture else None
        image = f'<img src="{text(link)}" alt="">' if link else ""
        words = f"<b>{text(context.text)}</b><span class='soft'>{text(context.around)}</span>"
        contexts.append(f"<div class='context'>{image}{words}<i class='soft'>{context.strength:.1f}</i></div>")
    words = "".join(
        f"<div>{name}: "
        + " ".join(f"<span class='word' title='{value:+.3f}'>{text(piece)}</span>" for piece, value in pieces)
        + "</div>"
        for name, pieces in (("promotes", card.promotes), ("makes less likely", card.demotes))
        if pieces
    )
    label = text(entry.label or "no label")
    return (
        f"<article id='f{entry.index}'><h3>{label} <span class='soft'>feature {entry.index}</span></h3>"
        f"<dl>{listed}</dl><div>{''.join(contexts)}{words}</div></article>"
    )


def _density_histogram(densities: Sequence[float], width: int = 480, height: int = 90) -> str:
    """How many features fire how often, by powers of ten, as SVG."""
    if not densities:
        return ""
    logs = [math.log10(density) for density in densities]
    low, high = math.floor(min(logs)), max(math.ceil(max(logs)), math.floor(min(logs)) + 1)
    bins = [0] * (4 * (high - low))
    for value in logs:
        bins[min(int((value - low) * 4), len(bins) - 1)] += 1
    step, top = width / len(bins), height - 18
    bars = "".join(
        f"<rect x='{number * step + 1:.1f}' y='{top - top * count / max(bins):.1f}' width='{step - 2:.1f}' "
        f"height='{top * count / max(bins):.1f}' fill='var(--accent)'><title>{count} features</title></rect>"
        for number, count in enumerate(bins)
    )
    marks = "".join(
        f"<text x='{min(max((power - low) * 4 * step, 24), width - 24):.0f}' y='{height - 4}' text-anchor='middle' "
        f"class='soft'>{f'{100 * 10.0**power:g}%'}</text>"
        for power in range(low, high + 1)
    )
    name = "How many features fire on which share of the tokens"
    return (
        f"<figure><svg viewBox='0 0 {width} {height}' width='{width}' style='max-width:100%' role='img' "
        f"aria-label='{name}'>{bars}{marks}</svg><figcaption>{name}</figcaption></figure>"
    )


def summaries(cards: Sequence[FeatureCard]) -> str:
    """The cards in short, as the text of a JSON file."""
    return json.dumps([card.summary() for card in cards], indent=1, ensure_ascii=False) + "\n"
