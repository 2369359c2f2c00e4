"""Which feature detects an attribute best? The claim "the feature fires where the attribute is", as a score.

Features and thresholds are chosen on some samples and scored on others. Knows nothing about models, images or where
the attributes come from.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

DENSE = 2**28
"""How many activations are dense at once."""


class Firings:
    """Activations of many samples, of which most are 0: stored sparse, dense for some features at a time.

    Args:
        features: d_sae.

    Example:
        firings = Firings(features=65536)
        firings.add(sae.encode(hidden_states))
        some = firings.dense(0, 100)
    """

    def __init__(self, features: int):
        self.features, self.samples = features, 0
        self._parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # samples, features, values
        self._packed = True

    def add(self, activations: torch.Tensor) -> None:
        """Add samples.

        Args:
            activations: float (n, d_sae), at least 0.
        """
        rows, columns = activations.nonzero(as_tuple=True)
        self._parts.append(((rows + self.samples).int(), columns.int(), activations[rows, columns]))
        self.samples += len(activations)
        self._packed = False

    def dense(self, start: int, stop: int, samples: torch.Tensor | None = None) -> torch.Tensor:
        """Some features' activations.

        Args:
            start: first feature.
            stop: after the last.
            samples: long (n,), which samples; None takes all.

        Returns:
            float (n, stop - start).
        """
        if not self._packed:  # by feature
            rows, columns, values = (torch.cat(part) for part in zip(*self._parts, strict=True))
            order = columns.argsort(stable=True)
            self._parts, self._packed = [(rows[order], columns[order], values[order])], True
        whole = torch.zeros(self.samples, stop - start)
        for rows, columns, values in self._parts:
            first, last = torch.searchsorted(columns, torch.tensor([start, stop], dtype=columns.dtype)).tolist()
            whole[rows[first:last].long(), columns[first:last].long() - start] = values[first:last].float()
        return whole if samples is None or len(samples) == self.samples else whole[samples]

    def steps(self, samples: int) -> range:
        """Where the runs of features begin that may be dense at once for so many samples."""
        return range(0, self.features, max(1, DENSE // max(1, samples)))


@dataclass(frozen=True)
class Detector:
    """The feature that detects an attribute best, and how well it does on samples it was not chosen on."""

    index: int
    """feature of the SAE."""
    threshold: float
    """"fires" means above this."""
    precision: float
    """share of its firings where the attribute is present."""
    recall: float
    """share of the attribute's samples on which it fires."""
    f1: float
    """harmonic mean of the two."""
    chosen_f1: float
    """the same on the samples it was chosen on."""
    lift: float
    """F1 above that of a feature that always fires, as a share of what is above it: 0 for that feature, 1 at most."""


def best_detectors(
    activations: torch.Tensor,
    attributes: Mapping[str, torch.Tensor],
    held_out: torch.Tensor,
    held_out_attributes: Mapping[str, torch.Tensor],
    thresholds: int = 24,
) -> dict[str, Detector]:
    """For each attribute the feature and threshold of the best F1, scored on held-out samples.

    Args:
        activations: float (N, d_sae) of the samples to choose on.
        attributes: name -> bool (N,), True where it is present.
        held_out: float (N', d_sae) of the samples to score on.
        held_out_attributes: name -> bool (N',).
        thresholds: how many levels to try of each feature: 0, and even quantiles of its firings.

    Returns:
        name -> its detector.

    Raises:
        ValueError: an attribute that is never, or always, present in either set, so that nothing can be learnt of it.
    """
    names = list(attributes)
    for samples, table in (("to choose on", attributes), ("held out", held_out_attributes)):
        for name in names:
            if table[name].all() or not table[name].any():
                raise ValueError(
                    f"attribute {name!r} is {'always' if table[name].all() else 'never'} present in the samples "
                    f"{samples}; take more samples, or leave it out."
                )
    present = torch.stack([attributes[name] for name in names]).float()  # (A, N)
    best, chosen = _best_levels(activations, present, thresholds)  # (A, d_sae)
    detectors = {}
    for row, name in enumerate(names):
        index = int(best[row].argmax())
        threshold = float(chosen[row, index])
        precision, recall, f1 = score(held_out[:, index] > threshold, held_out_attributes[name])
        gain = lift(f1, float(held_out_attributes[name].float().mean()))
        detectors[name] = Detector(index, threshold, precision, recall, f1, float(best[row, index]), gain)
    return detectors


def lift(f1: float, share: float) -> float:
    """How far a detector is above a feature that always fires.

    Such a feature has precision `share` and recall 1; where an attribute is common, its F1 is high and means nothing.

    Args:
        f1: of the detector, in [0, 1].
        share: of the samples in which the attribute is present, in [0, 1).

    Returns:
        (F1 - F1 of always) / (1 - F1 of always), at most 1; below 0 for what is worse than that.
    """
    always = 2 * share / (1 + share)
    return (f1 - always) / (1 - always)


def score_all(
    activations: torch.Tensor,
    present: torch.Tensor,
    held_out: torch.Tensor,
    held_out_present: torch.Tensor,
    thresholds: int = 24,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every feature as a detector of every attribute: threshold from some samples, F1 and lift on others.

    Args:
        activations: float (N, d_sae) of the samples to choose thresholds on.
        present: bool (N, A).
        held_out: float (N', d_sae) of the samples to score on.
        held_out_present: bool (N', A).
        thresholds: how many levels to try of each feature.

    Returns:
        F1 and lift, float (A, d_sae) each; 0 for an attribute that is never, or always, present in either set.
    """
    _, chosen = _best_levels(activations, present.T.float(), thresholds)  # (A, d_sae)
    f1, gain = torch.zeros_like(chosen), torch.zeros_like(chosen)
    for row in range(len(chosen)):
        there = held_out_present[:, row].float()  # (N',)
        if not (0 < there.mean() < 1 and 0 < present[:, row].float().mean() < 1):
            continue
        fires = (held_out > chosen[row]).float()  # (N', d_sae)
        f1[row] = 2 * (there @ fires) / (fires.sum(0) + there.sum())
        always = float(2 * there.mean() / (1 + there.mean()))
        gain[row] = (f1[row] - always) / (1 - always)
    return f1, gain


def score_firings(
    chosen: Firings,
    rows: torch.Tensor,
    present: torch.Tensor,
    held_out: Firings,
    held_out_rows: torch.Tensor,
    held_out_present: torch.Tensor,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`score_all` of some samples' firings, a run of features at a time.

    Args:
        chosen: of the samples to choose thresholds on.
        rows: long (N,), which of them.
        present: bool (N, A).
        held_out: of the samples to score on.
        held_out_rows: long (N',), which of them.
        held_out_present: bool (N', A).
        device: that computes.

    Returns:
        F1 and lift, float (A, d_sae) each, on the CPU.
    """
    scores = [torch.zeros(present.shape[1], chosen.features) for _ in range(2)]
    if not len(rows) or not len(held_out_rows):
        return scores[0], scores[1]
    steps = chosen.steps(max(len(rows), len(held_out_rows)))
    for start in steps:
        stop = min(start + steps.step, chosen.features)
        mine = chosen.dense(start, stop, rows).to(device)
        theirs = held_out.dense(start, stop, held_out_rows).to(device)
        measured = score_all(mine, present.to(device), theirs, held_out_present.to(device))
        for table, part in zip(scores, measured, strict=True):
            table[:, start:stop] = part.cpu()
    return scores[0], scores[1]


def best_of_firings(
    chosen: Firings,
    rows: torch.Tensor,
    attributes: Mapping[str, torch.Tensor],
    held_out: Firings,
    held_out_rows: torch.Tensor,
    held_out_attributes: Mapping[str, torch.Tensor],
) -> dict[str, Detector]:
    """`best_detectors` of some samples' firings, a run of features at a time.

    Args:
        chosen: of the samples to choose on.
        rows: long (N,), which of them.
        attributes: name -> bool (N,).
        held_out: of the samples to score on.
        held_out_rows: long (N',), which of them.
        held_out_attributes: name -> bool (N',).

    Returns:
        name -> its detector.

    Raises:
        ValueError: see `best_detectors`.
    """
    best: dict[str, Detector] = {}
    steps = chosen.steps(max(len(rows), len(held_out_rows)))
    for start in steps:
        stop = min(start + steps.step, chosen.features)
        mine, theirs = chosen.dense(start, stop, rows), held_out.dense(start, stop, held_out_rows)
        for name, found in best_detectors(mine, attributes, theirs, held_out_attributes).items():
            if name not in best or found.chosen_f1 > best[name].chosen_f1:
                best[name] = replace(found, index=start + found.index)
    return best


def _best_levels(
    activations: torch.Tensor, present: torch.Tensor, thresholds: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best F1 of each feature for each attribute, and the level it is reached at: float (A, d_sae) each."""
    best = torch.full((len(present), activations.shape[1]), -1.0, device=activations.device)
    chosen = torch.zeros_like(best)
    for level in _levels(activations, thresholds):
        fires = (activations > level).float()  # (N, d_sae)
        f1 = 2 * (present @ fires) / (fires.sum(0) + present.sum(1, keepdim=True)).clamp_min(1)
        better = f1 > best
        best = torch.where(better, f1, best)
        chosen = torch.where(better, level.expand_as(chosen), chosen)
    return best, chosen


def _levels(activations: torch.Tensor, thresholds: int) -> torch.Tensor:
    """(thresholds, d_sae): 0, then even quantiles of each feature's activations above 0."""
    ordered = activations.sort(0).values  # (N, d_sae)
    silent = (ordered == 0).sum(0)  # (d_sae,)
    fired = len(ordered) - silent
    levels = [torch.zeros(activations.shape[1], device=activations.device)]
    for step in range(1, thresholds):
        place = (silent + fired * step // thresholds).clamp_max(len(ordered) - 1)
        levels.append(ordered.gather(0, place[None])[0])
    return torch.stack(levels)


def score(fires: torch.Tensor, present: torch.Tensor) -> tuple[float, float, float]:
    """How well "fires <=> present" holds.

    Args:
        fires: bool (N,).
        present: bool (N,).

    Returns:
        precision, recall and F1; 0 where there is nothing to divide by.
    """
    hits = float((fires & present).sum())
    precision, recall = hits / max(float(fires.sum()), 1), hits / max(float(present.sum()), 1)
    return precision, recall, 2 * hits / max(float(fires.sum() + present.sum()), 1)
