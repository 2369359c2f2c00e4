"""Which feature detects an attribute best? The claim "the feature fires where the attribute is", as a score.

Features and thresholds are chosen on some samples and scored on others. Knows nothing about models, images or where
the attributes come from.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


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
    best = torch.full((len(names), activations.shape[1]), -1.0)  # (A, d_sae) F1 at the best level so far
    chosen = torch.zeros_like(best)  # (A, d_sae) that level
    for level in _levels(activations, thresholds):
        fires = (activations > level).float()  # (N, d_sae)
        hits = present @ fires  # (A, d_sae)
        f1 = 2 * hits / (fires.sum(0) + present.sum(1, keepdim=True))
        better = f1 > best
        best = torch.where(better, f1, best)
        chosen = torch.where(better, level.expand_as(chosen), chosen)
    detectors = {}
    for row, name in enumerate(names):
        index = int(best[row].argmax())
        threshold = float(chosen[row, index])
        precision, recall, f1 = score(held_out[:, index] > threshold, held_out_attributes[name])
        detectors[name] = Detector(index, threshold, precision, recall, f1, float(best[row, index]))
    return detectors


def _levels(activations: torch.Tensor, thresholds: int) -> torch.Tensor:
    """(thresholds, d_sae): 0, then even quantiles of each feature's activations above 0."""
    ordered = activations.sort(0).values  # (N, d_sae)
    silent = (ordered == 0).sum(0)  # (d_sae,)
    fired = len(ordered) - silent
    levels = [torch.zeros(activations.shape[1])]
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
