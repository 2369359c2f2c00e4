"""Which concepts detect which attributes: labels for the criteria and names for the dictionary, from what is true.

Reads reference reasoning. Thresholds are chosen on some images; F1 and lift are measured on others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.modeling_segcompass.token_layout import IMAGE, RESPONSE

from .criteria import Labels
from .detectors import Firings, best_of_firings, score_firings
from .dictionary_reader import TokenReader
from .image_truth import Truths, attributes_of, kinds_of, looks_of, patch_cover
from .scene_attributes import COVERED, NAMES_F1, NAMES_LIFT
from .shared_concepts import Sample, decoder_cosines, exchanged, identity, shared_detectors

READINGS = ("scene", "patch", "word", "phrase")
"""Where: those of `scene_attributes`, and words of the reasoning that describe an object which has the attribute."""
STEERS_F1, HANDS_F1, DETECTORS = 0.3, 0.5, 10


class Found(NamedTuple):
    """Labels, and how many concepts they rest on."""

    labels: Labels
    counts: dict[str, Any]
    """JSON: how many concepts name anything, and which attributes none names."""


@dataclass
class Evidence:
    """The concepts of some samples beside what is true of them. N samples, A attributes, K kinds of look."""

    firings: Firings
    """of N samples."""
    present: list[np.ndarray]
    """bool (n, A) each, N rows in all."""
    known: list[np.ndarray]
    """bool (n, K + 1) each: whether `present` knows the attributes of each kind, and, last, the places."""

    def add(self, activations: torch.Tensor, present: np.ndarray, known: np.ndarray) -> None:
        """Add n samples; `known` is bool (n, K), places are known of all."""
        self.firings.add(activations)
        self.present.append(present)
        self.known.append(np.concatenate([known, np.ones((len(known), 1), bool)], 1))

    def of_kind(self, kind: int, columns: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The samples that know a kind, long (N',), and bool (N', columns) of them."""
        rows = np.concatenate(self.known)[:, kind].nonzero()[0]
        return torch.from_numpy(rows), torch.from_numpy(np.concatenate(self.present)[np.ix_(rows, columns)])


def read_labelled(
    reader: TokenReader, truths: Truths, rows: Sequence[Any], batch_size: int, name: str, samples: list | None = None
) -> dict[str, Evidence]:
    """The concepts of rows beside what is true of them.

    Args:
        reader: of the model.
        truths: of the rows.
        rows: with a reasoning.
        batch_size: rows read at a time.
        name: of the progress bar.
        samples: gets a `shared_concepts.Sample` of each row; None leaves these out.

    Returns:
        An Evidence for each of `READINGS`.
    """
    d_sae = reader.model.config.sae_config.d_sae
    found = {reading: Evidence(Firings(d_sae), [], []) for reading in READINGS}
    place_of = {attribute: number for number, attribute in enumerate(attributes_of(truths))}
    kinds, ground = list(truths.kinds), np.array(list(truths.ground_known.values()), bool)  # (K,)
    usual = reader.model.sae.mean_active_activation.clamp_min(1e-6).cpu()
    for start in tqdm(range(0, len(rows), batch_size), unit="batch", desc=name, dynamic_ncols=True):
        batch = [rows[index] for index in range(start, min(start + batch_size, len(rows)))]
        for row, tokens in zip(batch, reader.read(batch), strict=True):
            truth = truths.of(row)
            has = np.zeros((len(truth.masks), len(place_of)), bool)  # (n, A)
            for thing in range(len(has)):
                has[thing, [place_of[attribute] for attribute in truth.attributes(thing)]] = True
            seen = np.array([[kind in mine for kind in kinds] for mine in truth.known], bool)
            seen = seen.reshape(len(has), len(kinds))
            cover = patch_cover(truth.masks, tokens.boxes)  # (n, patches)
            most, empty = cover.max(0, initial=0), cover.sum(0) == 0
            clear = (most >= COVERED) | empty
            if truth.unclear is not None:
                unclear = patch_cover(truth.unclear[None], tokens.boxes)[0]
                clear &= (unclear == 0) | (most >= COVERED)
            clear = clear.nonzero()[0]
            image = tokens.activations[tokens.types == IMAGE]  # (patches, d_sae)
            whole = np.asarray(seen.all(0) & ground) if truth.unclear is None else np.zeros_like(ground)  # (K,)
            found["scene"].add(image.amax(0, keepdim=True), np.asarray(has.any(0))[None], whole[None])
            on_patches = (cover.T @ seen >= COVERED) | (empty[:, None] & ground)  # (patches, K)
            found["patch"].add(image[clear].half(), (cover.T @ has)[clear] >= COVERED, on_patches[clear])
            text = (tokens.types != IMAGE).nonzero()[:, 0].tolist()
            written = (tokens.types[text] == RESPONSE).tolist()
            said = truths.said(reader, [tokens.ids[place] for place in text], written, row, truth)
            activations = tokens.activations[text].half()
            found["word"].add(activations, said.word, np.ones((len(text), len(kinds)), bool))
            found["phrase"].add(activations[torch.tensor(written)], said.phrase[written], said.known[written])
            if samples is not None:
                samples.append(
                    Sample(
                        patch_codes=(image / usual).to_sparse(),
                        patch_states=tokens.states[tokens.types == IMAGE],
                        word_codes=(tokens.activations[tokens.types == RESPONSE] / usual).to_sparse(),
                        word_states=tokens.states[tokens.types == RESPONSE],
                        words=[word for word, mine in zip(said.names, written, strict=True) if mine],
                        cover=cover,
                        has=has[:, : len(looks_of(truths))],
                    )
                )
    return found


def find_labels(model: SegCompassModel, processor: SegCompassProcessor, truths: Truths, batch_size: int) -> Found:
    """Which concepts detect which attributes: thresholds on some rows, F1 and lift on others.

    Args:
        model: in evaluation mode.
        processor: the model's.
        truths: of the data set.
        batch_size: rows read at a time.

    Returns:
        The labels.
    """
    reader = TokenReader(model, processor)
    chosen, scored = truths.label_rows()
    samples: list[Sample] = []
    train = read_labelled(reader, truths, chosen, batch_size, "labels, thresholds")
    other = read_labelled(reader, truths, scored, batch_size, "labels, F1 and lift", samples)
    scores = {name: _score(train[name], other[name], truths, model.device) for name in READINGS}  # (A, d_sae) each
    good = torch.stack([(f1 >= NAMES_F1) & (lift >= NAMES_LIFT) for f1, lift in scores.values()]).any(0).numpy()
    f1, lift = scores["patch"]
    on_patches = torch.where(lift >= STEERS_F1, f1, 0)  # (A, d_sae)

    def detectors(row, least):
        best, places = on_patches[row].topk(min(DETECTORS, on_patches.shape[1]))
        return tuple(int(place) for place, value in zip(places, best, strict=True) if value >= least)

    names = looks_of(truths)
    looks = list(enumerate(names))
    said = torch.maximum(scores["word"][0], scores["phrase"][0])  # (A, d_sae)
    kinds = tuple(truths.kinds.values())
    shared = shared_detectors(f1[: len(names)], said[: len(names)], kinds)
    on_patch, on_word = decoder_cosines(samples, shared["best"], model.sae.W_dec.detach().float().cpu(), kinds)
    shared |= {
        "identity": identity(samples, kinds=kinds),
        "control identity": identity(samples, exchanged(kinds), kinds),
        "cosine on patches": on_patch,
        "cosine on words": on_word,
    }
    shared = {name: None if value != value else value for name, value in shared.items()}
    labels = Labels(
        names={name: good[row] for row, name in enumerate(attributes_of(truths))},
        steers={name: detectors(row, STEERS_F1) for row, name in looks},
        hands={name: detectors(row, HANDS_F1) for row, name in looks},
    )
    counts = {
        "concepts": good.shape[1],
        "name something": int(good.any(0).sum()),
        "name a look": int(good[: len(names)].any(0).sum()),
        "looks": len(names),
        "shared": shared,
        "looks without a name": [name for row, name in looks if not good[row].any()],
        "training scenes": len(chosen),
        "held-out scenes": len(scored),
        "missing": truths.missing,
    }
    return Found(labels, counts)


def _score(
    chosen: Evidence, other: Evidence, truths: Truths, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """F1 and lift of every concept for every attribute, float (A, d_sae) each, kind by kind on what knows the kind."""
    kinds = kinds_of(truths)
    scores = [torch.zeros(len(kinds), chosen.firings.features) for _ in range(2)]
    for kind in np.unique(kinds):
        columns = (kinds == kind).nonzero()[0]
        measured = score_firings(
            chosen.firings,
            *chosen.of_kind(kind, columns),
            other.firings,
            *other.of_kind(kind, columns),
            device,
        )
        for table, part in zip(scores, measured, strict=True):
            table[columns] = part
    return scores[0], scores[1]


def score_looks(
    chosen: dict[str, Evidence], other: dict[str, Evidence], truths: Truths
) -> tuple[dict[str, dict[str, dict[str, float]]], dict[int, str]]:
    """The best detector of each look, and the looks that name concepts. What is never, or always, there is left out.

    Args:
        chosen: rows that features and thresholds are chosen on, see `read_labelled`.
        other: rows that they are scored on.
        truths: of both.

    Returns:
        reading -> look -> the fields of a Detector, for all of `READINGS` but the phrases; and {feature: look} of F1 ≥
        0.8 and lift ≥ 0.5, where patches count before words.
    """
    names, kinds = attributes_of(truths), kinds_of(truths)
    scores: dict[str, dict[str, dict[str, float]]] = {reading: {} for reading in READINGS[:3]}
    found: dict[int, str] = {}
    for reading, table in scores.items():
        for kind, of_kind in enumerate(truths.kinds.values()):
            columns = (kinds == kind).nonzero()[0]
            rows, present = chosen[reading].of_kind(kind, columns)
            other_rows, there = other[reading].of_kind(kind, columns)
            varies = [
                all(0 < part.float().mean() < 1 for part in pair) for pair in zip(present.T, there.T, strict=True)
            ]
            mine, theirs = (
                {name: column for name, column, use in zip(of_kind, part.T, varies, strict=True) if use}
                for part in (present, there)
            )
            if mine:
                best = best_of_firings(chosen[reading].firings, rows, mine, other[reading].firings, other_rows, theirs)
                table |= {name: asdict(detector) for name, detector in best.items()}
    for reading in ("patch", "word"):
        f1, lift = _score(chosen[reading], other[reading], truths, torch.device("cpu"))
        good = torch.where((f1 >= NAMES_F1) & (lift >= NAMES_LIFT), f1, 0)[: len(looks_of(truths))]  # (looks, d_sae)
        for index in good.any(0).nonzero()[:, 0].tolist():
            found.setdefault(index, names[int(good[:, index].argmax())])
    return scores, found


def reference_batches(
    model: SegCompassModel, processor: SegCompassProcessor, truths: Truths, batch_size: int
) -> Iterator[dict[str, Any]]:
    """The rows that thresholds are chosen on, with their reference reasoning, as inputs of the model's forward.

    Args:
        model: for its device.
        processor: the model's.
        truths: of the data set.
        batch_size: rows at a time.

    Yields:
        One batch.
    """
    rows, _ = truths.label_rows()
    for start in tqdm(range(0, len(rows), batch_size), unit="batch", desc="mean contents", dynamic_ncols=True):
        batch = [rows[index] for index in range(start, min(start + batch_size, len(rows)))]
        inputs = processor(
            images=[row["image"] for row in batch],
            text=[row["instruction"] for row in batch],
            response=[processor.format_response(row["reasoning"]) for row in batch],
        )
        yield {**inputs.to(model.device), "skip_lm_head": True}
