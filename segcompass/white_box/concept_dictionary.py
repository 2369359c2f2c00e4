"""A dictionary of an SAE's features: where each one fires, how often, how strongly, and a short name made from that.

`DictionaryBuilder` reads activations batch by batch and holds a few numbers per feature, never all activations;
`ConceptDictionary` is what comes out, saved as `concepts.json` beside the SAE or the model. Knows nothing about models
or images.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from segcompass.modeling_segcompass.manifest import MANIFEST, check, signing
from segcompass.modeling_segcompass.report_page import page, text
from segcompass.modeling_segcompass.token_layout import IMAGE, INSTRUCTION, RESPONSE
from segcompass.modeling_segcompass.whole_files import read_signed_json, signed_json, write_whole

FILE = "concepts.json"
TOKEN_KINDS = {IMAGE: "image", INSTRUCTION: "instruction", RESPONSE: "response"}
MAX_NAME = 24  # characters of a name made of texts that share nothing
HEADER = ("feature", "label", "density", "strength", "fires on", "strongest contexts")

STYLE = """
body { max-width: 100rem } .context { display: inline-block; margin-right: 1rem; color: var(--soft) }
.context b { color: var(--ink) } .context img { height: 48px; vertical-align: middle; margin-right: .3rem }
"""


@dataclass
class Context:
    """A place where a feature fires."""

    sample: str
    """the row's `sample_id`."""
    strength: float
    """the activation there, above 0."""
    part: str
    """one of the values of `TOKEN_KINDS`: "image", "instruction" or "response"."""
    text: str
    """the word piece; for an image patch what the data set knows of it ("" when nothing)."""
    around: str
    """the words around it, or where a patch is, such as "row r, column c"."""
    cell: list[int] | None = None
    """(row, column, rows, columns) of a patch in its grid, in dictionaries of earlier versions."""
    box: list[float] | None = None
    """the part of the image that a patch shows, (left, top, right, bottom) in fractions of its width and height; None
    for a word piece."""


@dataclass
class ConceptEntry:
    """What is known of one feature."""

    index: int
    """the feature's place in the SAE."""
    label: str | None
    """short name, None for a feature that never fired."""
    density: float
    """share of tokens it fires on."""
    strength: float
    """mean activation where it fires."""
    profile: dict[str, float]
    """token kind -> share of its firings there; sums to 1, or all 0."""
    contexts: list[Context]
    """strongest first."""


class ConceptDictionary:
    """The entries of an SAE's features, in order of their index.

    Args:
        entries: one per feature.
        tokens: how many tokens were read.
        source: what they were read from.

    Example:
        dictionary = ConceptDictionary.from_pretrained("examples/checkpoints/mini")
        explanation = model.explain(outputs, labels=dictionary.labels)
        print([concept.label for concept in explanation.concepts])
    """

    def __init__(self, entries: Sequence[ConceptEntry], tokens: int, source: str):
        self.entries, self.tokens, self.source = list(entries), tokens, source

    @property
    def labels(self) -> dict[int, str]:
        """{feature index: label} of the features that fired, as `model.explain(labels=...)` takes them."""
        return {entry.index: entry.label for entry in self.entries if entry.label}

    def name(self, names: Mapping[int, str]) -> None:
        """Give features other labels.

        Args:
            names: {feature index: label}.
        """
        for index, label in names.items():
            self.entries[index].label = label

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `concepts.json` into the folder of an SAE or a model. Features that never fired are left out.

        Args:
            folder: made if it does not exist.
        """
        fired = [asdict(entry) for entry in self.entries if entry.density > 0]
        content = {"tokens": self.tokens, "source": self.source, "features": len(self.entries), "concepts": fired}
        Path(folder).mkdir(parents=True, exist_ok=True)
        signed = (Path(folder) / MANIFEST).exists()  # the folder of a model or an SAE
        with signing(folder) if signed else nullcontext():
            write_whole(Path(folder) / FILE, signed_json(content) + "\n")

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "ConceptDictionary | None":
        """Read it from a folder or a Hub repository.

        Args:
            source: folder or Hub id.

        Returns:
            The dictionary, or None when there is none.

        Raises:
            ValueError: the file is damaged.
        """
        from transformers.utils import cached_file

        path = cached_file(
            str(source),
            FILE,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        if path is None:
            return None
        check(Path(path).parent, (FILE,))
        try:
            content = read_signed_json(path)
            nowhere = dict.fromkeys(TOKEN_KINDS.values(), 0.0)
            entries = [ConceptEntry(index, None, 0.0, 0.0, nowhere, []) for index in range(content["features"])]
            for entry in content["concepts"]:
                contexts = [Context(**context) for context in entry.pop("contexts")]
                entries[entry["index"]] = ConceptEntry(**entry, contexts=contexts)
            return cls(entries, content["tokens"], content["source"])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path} is no concept dictionary ({error!r}); build it again.") from error

    def to_html(
        self,
        picture: Callable[[Context], str | None] | None = None,
        title: str = "Concept dictionary",
        scores: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
    ) -> str:
        """A page that needs nothing but itself, one row per feature that fired, the most frequent first.

        Args:
            picture: gives a context's picture as a data URL, or None.
            title: the page's heading.
            scores: reading -> attribute -> the fields of its Detector, shown above the features; None shows none.

        Returns:
            The text of an HTML file.
        """
        rows = []
        for entry in sorted(self.entries, key=lambda entry: -entry.density):
            if not entry.density:
                continue
            contexts = []
            for context in entry.contexts:
                link = picture(context) if picture else None
                image = f'<img src="{text(link)}" alt="">' if link else ""
                words = f"<b>{text(context.text)}</b> {text(context.around)} ({context.strength:.2f})"
                contexts.append(f"<span class='context'>{image}{words}</span>")
            profile = ", ".join(f"{text(kind)} {share:.0%}" for kind, share in entry.profile.items() if share)
            rows.append(
                f"<tr id='c{entry.index}'><td>{entry.index}</td><td>{text(entry.label or '')}</td>"
                f"<td>{entry.density:.3%}</td><td>{entry.strength:.2f}</td><td>{profile}</td>"
                f"<td>{''.join(contexts)}</td></tr>"
            )
        fired = len(rows)
        lead = f"{fired} of {len(self.entries)} features fired on {self.tokens} tokens of {text(self.source)}."
        table = _score_table(scores) if scores else ""
        header = "".join(f"<th>{name}</th>" for name in HEADER)
        listed = "\n".join(rows)
        features = f"<h2>Features</h2><div class='scroll'><table><tr>{header}</tr>\n{listed}\n</table></div>"
        return page(title, table + features, lead, STYLE)


def _score_table(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """The best detectors as an HTML table: F1, lift and feature of each attribute in each reading."""
    attributes = list(dict.fromkeys(name for found in scores.values() for name in found))
    columns = "".join(f"<th>{text(reading)}: F1</th><th>lift</th><th>feature</th>" for reading in scores)
    rows = [f"<tr><th>attribute</th>{columns}</tr>"]
    for name in attributes:
        cells = [f"<td>{text(name)}</td>"]
        for found in scores.values():
            detector = found.get(name)
            if detector is None:
                cells.append("<td>–</td>" * 3)
                continue
            index = int(detector["index"])
            link = f"<a href='#c{index}'>{index}</a>"
            cells.append(f"<td>{detector['f1']:.3f}</td><td>{detector['lift']:.2f}</td><td>{link}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    lead = "Lift is what F1 has above a feature that always fires, as a share of what is above that."
    return f"<p>{lead}</p><div class='scroll'><table id='scores'>{''.join(rows)}</table></div>\n"


class DictionaryBuilder:
    """Gathers statistics and strongest places of every feature, batch by batch.

    Args:
        features: d_sae.
        contexts: how many places to keep of each feature.

    Example:
        builder = DictionaryBuilder(features=sae.config.d_sae)
        builder.add(sae.encode(hidden_states), token_types)
        dictionary = builder.finish(describe, source="my scenes")
    """

    def __init__(self, features: int, contexts: int = 8):
        self.fired = torch.zeros(len(TOKEN_KINDS), features, dtype=torch.float64)
        self.total = torch.zeros(features, dtype=torch.float64)
        self.best = torch.zeros(contexts, features)
        self.places = torch.full((contexts, features), -1, dtype=torch.long)
        self.tokens = 0

    def add(self, activations: torch.Tensor, token_types: torch.Tensor) -> None:
        """Read tokens. Their places are numbered in the order they come, from 0.

        Args:
            activations: float (N, d_sae), at least 0.
            token_types: long (N,), IMAGE, INSTRUCTION or RESPONSE.
        """
        activations, token_types = activations.detach().float().cpu(), token_types.cpu()
        for kind in TOKEN_KINDS:
            self.fired[kind] += (activations[token_types == kind] > 0).sum(0)
        self.total += activations.sum(0, dtype=torch.float64)
        kept = min(len(self.best), len(activations))
        strongest, rows = activations.topk(kept, dim=0)  # (kept, d_sae)
        values = torch.cat([self.best, strongest])  # (contexts + kept, d_sae)
        places = torch.cat([self.places, rows + self.tokens])
        self.best, chosen = values.topk(len(self.best), dim=0)  # (contexts, d_sae)
        self.places = places.gather(0, chosen)
        self.tokens += len(activations)

    def state_dict(self) -> dict[str, torch.Tensor | int]:
        """All that was gathered, for `torch.save`."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, torch.Tensor | int]) -> None:
        """Go on from what another builder gathered.

        Args:
            state: of its `state_dict`.
        """
        vars(self).update(state)

    def finish(self, describe: Callable[[int], dict], source: str) -> ConceptDictionary:
        """Make the dictionary.

        Args:
            describe: place -> the fields of its Context but the strength.
            source: what was read.

        Returns:
            The dictionary, with an entry for every feature.
        """
        entries = []
        count = self.fired.sum(0)  # (d_sae,)
        for index in range(len(count)):
            times = float(count[index])
            contexts = [
                Context(strength=round(value, 4), **describe(place))
                for value, place in zip(self.best[:, index].tolist(), self.places[:, index].tolist(), strict=True)
                if value > 0
            ]
            entries.append(
                ConceptEntry(
                    index=index,
                    label=short_label(contexts) if contexts else None,
                    density=times / max(self.tokens, 1),
                    strength=float(self.total[index]) / max(times, 1),
                    profile={
                        name: float(self.fired[kind, index]) / max(times, 1) for kind, name in TOKEN_KINDS.items()
                    },
                    contexts=contexts,
                )
            )
        return ConceptDictionary(entries, self.tokens, source)


def short_label(contexts: Sequence[Context]) -> str:
    """A name from the strongest contexts: the words they share, and whether they are words or image patches.

    A text may hold several words, as a patch's "large red ball"; those that more than half of the contexts have make
    the name. When there are none, the texts themselves do, one after the other.

    Args:
        contexts: one or more, strongest first.

    Returns:
        The name, such as "red ball (patch)".
    """
    side = Counter("patch" if context.part == "image" else "word" for context in contexts).most_common(1)[0][0]
    same = [context for context in contexts if (context.part == "image") == (side == "patch")]
    counts = Counter(word for context in same for word in dict.fromkeys(context.text.split()))
    shared = [word for word, times in counts.most_common(3) if 2 * times > len(same)]
    if not shared:
        texts = dict.fromkeys(context.text.strip() for context in same if context.text.strip())
        shared = ["/".join(texts)[:MAX_NAME]]
    return f"{' '.join(shared)} ({side})".strip()
