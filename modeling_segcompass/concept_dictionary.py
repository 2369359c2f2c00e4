"""A dictionary of an SAE's features: where each one fires, how often, how strongly, and a short name made from that.

`DictionaryBuilder` reads activations batch by batch and holds a few numbers a feature, never all activations;
`ConceptDictionary` is what comes out, saved as `concepts.json` beside the SAE or the model. `best_detectors` scores the
claim "the feature fires where the attribute is". Knows nothing about models or images.
"""

import html
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from .token_layout import IMAGE, INSTRUCTION, RESPONSE

FILE = "concepts.json"
PARTS = {IMAGE: "image", INSTRUCTION: "instruction", RESPONSE: "response"}


@dataclass
class Context:
    """A place where a feature fires."""

    sample: str
    """the row's `sample_id`."""
    strength: float
    part: str
    """"image", "instruction" or "response"."""
    text: str
    """the word piece; for an image patch what the data set knows of it ("" when nothing)."""
    around: str
    """the words about it, or "row r, column c" of a patch."""
    cell: list[int] | None = None
    """(row, column, rows, columns) of a patch in its grid."""


@dataclass
class ConceptEntry:
    """What is known of one feature."""

    index: int
    label: str | None
    """short name, None for a feature that never fired."""
    density: float
    """share of tokens it fires on."""
    strength: float
    """mean activation where it fires."""
    profile: dict[str, float]
    """part -> share of its firings there; sums to 1, or all 0."""
    contexts: list[Context]
    """strongest first."""


class ConceptDictionary:
    """The entries of an SAE's features, in order of their index.

    Args:
        entries: one a feature; tokens: how many tokens were read; source: what they were read from.
    """

    def __init__(self, entries: Sequence[ConceptEntry], tokens: int, source: str):
        self.entries, self.tokens, self.source = list(entries), tokens, source

    @property
    def labels(self) -> dict[int, str]:
        """{feature index: label} of the features that fired, as `model.explain(labels=...)` takes them."""
        return {entry.index: entry.label for entry in self.entries if entry.label}

    def save_pretrained(self, folder):
        """Write `concepts.json` into the folder of an SAE or a model. Features that never fired are left out."""
        live = [asdict(entry) for entry in self.entries if entry.density > 0]
        content = {"tokens": self.tokens, "source": self.source, "features": len(self.entries), "concepts": live}
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / FILE).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, source):
        """Read it from a folder or a Hub repository; None when there is no dictionary.

        Raises:
            ValueError: the file is damaged.
        """
        from transformers.utils import cached_file

        path = cached_file(
            source,
            FILE,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        if path is None:
            return None
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            silent = dict.fromkeys(PARTS.values(), 0.0)
            entries = [ConceptEntry(index, None, 0.0, 0.0, silent, []) for index in range(content["features"])]
            for entry in content["concepts"]:
                contexts = [Context(**context) for context in entry.pop("contexts")]
                entries[entry["index"]] = ConceptEntry(**entry, contexts=contexts)
            return cls(entries, content["tokens"], content["source"])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path} is no concept dictionary ({error!r}); build it again.") from error

    def to_html(self, picture: Callable[[Context], str | None] | None = None, title="Concept dictionary") -> str:
        """A self-contained page, one row a feature that fired, the most frequent first.

        Args:
            picture: gives a context's picture as a data URL, or None.
        """
        rows = []
        for entry in sorted(self.entries, key=lambda entry: -entry.density):
            if not entry.density:
                continue
            shown = []
            for context in entry.contexts:
                link = picture(context) if picture else None
                seen = f'<img src="{link}" alt="">' if link else ""
                told = f"<b>{html.escape(context.text)}</b> {html.escape(context.around)} ({context.strength:.2f})"
                shown.append(f"<span class='context'>{seen}{told}</span>")
            profile = ", ".join(f"{part} {share:.0%}" for part, share in entry.profile.items() if share)
            rows.append(
                f"<tr id='c{entry.index}'><td>{entry.index}</td><td>{html.escape(entry.label or '')}</td>"
                f"<td>{entry.density:.3%}</td><td>{entry.strength:.2f}</td><td>{profile}</td>"
                f"<td>{''.join(shown)}</td></tr>"
            )
        fired = len(rows)
        lead = f"{fired} of {len(self.entries)} features fired on {self.tokens} tokens of {html.escape(self.source)}."
        return PAGE.format(title=html.escape(title), lead=lead, rows="\n".join(rows))


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px/1.4 system-ui, sans-serif; color: #1b1f27; margin: 2em }}
td, th {{ border-top: 1px solid #c9ced6; padding: .3em .6em; text-align: left; vertical-align: top }}
.context {{ display: inline-block; margin-right: 1em; color: #5b6472 }} .context b {{ color: #1b1f27 }}
img {{ height: 48px; vertical-align: middle; margin-right: .3em }}
</style></head><body><h1>{title}</h1><p>{lead}</p>
<table><tr><th>feature<th>label<th>density<th>strength<th>fires on<th>strongest contexts</tr>
{rows}
</table></body></html>
"""


class DictionaryBuilder:
    """Gathers statistics and strongest places of every feature, batch by batch.

    Args:
        features: d_sae; contexts: how many places to keep of each.
    """

    def __init__(self, features: int, contexts: int = 8):
        self.fired = torch.zeros(len(PARTS), features, dtype=torch.float64)
        self.total = torch.zeros(features, dtype=torch.float64)
        self.best = torch.zeros(contexts, features)
        self.places = torch.full((contexts, features), -1, dtype=torch.long)
        self.tokens = 0

    def add(self, activations: torch.Tensor, parts: torch.Tensor):
        """Read tokens. Their places are numbered in the order they come, from 0.

        Args:
            activations: float (N, d_sae) at least 0; parts: long (N,), IMAGE, INSTRUCTION or RESPONSE.
        """
        activations, parts = activations.detach().float().cpu(), parts.cpu()
        for part in PARTS:
            self.fired[part] += (activations[parts == part] > 0).sum(0)
        self.total += activations.sum(0, dtype=torch.float64)
        kept = min(len(self.best), len(activations))
        strongest, rows = activations.topk(kept, dim=0)
        values = torch.cat([self.best, strongest])
        places = torch.cat([self.places, rows + self.tokens])
        self.best, chosen = values.topk(len(self.best), dim=0)
        self.places = places.gather(0, chosen)
        self.tokens += len(activations)

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        vars(self).update(state)

    def finish(self, describe: Callable[[int], dict], source: str) -> ConceptDictionary:
        """Make the dictionary.

        Args:
            describe: place -> the fields of its Context but the strength; source: what was read.
        """
        entries = []
        count = self.fired.sum(0)
        for index in range(len(count)):
            times = float(count[index])
            contexts = [
                Context(strength=round(value, 4), **describe(place))
                for value, place in zip(self.best[:, index].tolist(), self.places[:, index].tolist(), strict=True)
                if value > 0
            ]
            profile = {name: float(self.fired[part, index]) / max(times, 1) for part, name in PARTS.items()}
            entries.append(
                ConceptEntry(
                    index,
                    short_label(contexts) if contexts else None,
                    times / max(self.tokens, 1),
                    float(self.total[index]) / max(times, 1),
                    profile,
                    contexts,
                )
            )
        return ConceptDictionary(entries, self.tokens, source)


def short_label(contexts: Sequence[Context]) -> str:
    """A name from the strongest contexts: the words they share, and whether they are words or image patches.

    The commonest descriptions (a patch may have several, as "large red ball") that half of the contexts share; the
    two commonest texts when nothing is shared.
    """
    part = Counter("patch" if context.part == "image" else "word" for context in contexts).most_common(1)[0][0]
    same = [context for context in contexts if (context.part == "image") == (part == "patch")]
    heard = Counter(word for context in same for word in dict.fromkeys(context.text.split()))
    shared = [word for word, times in heard.most_common(3) if 2 * times > len(same)]
    if not shared:
        shared = ["/".join(dict.fromkeys(context.text.strip() for context in same if context.text.strip()))[:24]]
    return f"{' '.join(shared)} ({part})".strip()


# -- scoring -----------------------------------------------------------------------------------------------------------


class Detector(NamedTuple):
    """The feature that tells an attribute best, and how well it does on samples it was not chosen on."""

    index: int
    threshold: float
    """fires means above this."""
    precision: float
    recall: float
    f1: float
    chosen_f1: float
    """on the samples it was chosen on."""


def best_detectors(
    activations: torch.Tensor,
    attributes: Mapping[str, torch.Tensor],
    held_out: torch.Tensor,
    held_out_attributes: Mapping[str, torch.Tensor],
    thresholds: int = 24,
) -> dict[str, Detector]:
    """For each attribute the feature and threshold of the best F1, scored on held-out samples.

    Args:
        activations: float (N, d_sae) of the samples to choose on; attributes: name -> bool (N,).
        held_out: float (N', d_sae); held_out_attributes: name -> bool (N',).
        thresholds: how many levels to try of each feature, 0 among them, the others at even quantiles of its firings.

    Raises:
        ValueError: an attribute that is never, or always, present in either set: nothing can be told from it.
    """
    levels = _levels(activations, thresholds)
    detectors = {}
    names = list(attributes)
    for where, table in (("to choose on", attributes), ("held out", held_out_attributes)):
        for name in names:
            if table[name].all() or not table[name].any():
                raise ValueError(
                    f"attribute {name!r} is {'always' if table[name].all() else 'never'} present in the samples "
                    f"{where}; take more samples, or leave it out."
                )
    wanted = torch.stack([attributes[name] for name in names]).float()  # (A, N)
    best = torch.full((len(names), activations.shape[1]), -1.0)
    chosen = torch.zeros_like(best)
    for level in levels:
        fires = (activations > level).float()
        hits = wanted @ fires
        f1 = 2 * hits / (fires.sum(0) + wanted.sum(1, keepdim=True))
        better = f1 > best
        best = torch.where(better, f1, best)
        chosen = torch.where(better, level.expand_as(chosen), chosen)
    for row, name in enumerate(names):
        index = int(best[row].argmax())
        threshold = float(chosen[row, index])
        precision, recall, f1 = score(held_out[:, index] > threshold, held_out_attributes[name])
        detectors[name] = Detector(index, threshold, precision, recall, f1, float(best[row, index]))
    return detectors


def _levels(activations, thresholds):
    """(thresholds, d_sae): 0, then even quantiles of each feature's activations above 0."""
    ordered = activations.sort(0).values
    silent = (ordered == 0).sum(0)
    fired = len(ordered) - silent
    levels = [torch.zeros(activations.shape[1])]
    for step in range(1, thresholds):
        place = (silent + fired * step // thresholds).clamp_max(len(ordered) - 1)
        levels.append(ordered.gather(0, place[None])[0])
    return torch.stack(levels)


def score(fires: torch.Tensor, present: torch.Tensor) -> tuple[float, float, float]:
    """Precision, recall and F1 of "fires <=> present", bool (N,) each; 0 where there is nothing to divide by."""
    hits = float((fires & present).sum())
    precision, recall = hits / max(float(fires.sum()), 1), hits / max(float(present.sum()), 1)
    return precision, recall, 2 * hits / max(float(fires.sum() + present.sum()), 1)
