"""What the grounded read-out learns from beside masks: another's words show another thing, and weights bear names.

Every term is a function of a `PatchReading` (`modeling_segcompass.grounded_reading`) and of pairs of a slot and a
target, which the Hungarian matching of `matching.py` makes. Nothing here knows tokens or attributes; the names of
concepts come from phrases and masks (`word_detectors`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segcompass.modeling_segcompass.grounded_reading import GroundedReading

from .matching import match_slots

OTHER_LOOK = 0.5  # cosine of two slots' look weights from which they may mean equal-looking things
NAME_FLOOR = 1e-2  # a weight's share below which its name costs no more


class PatchPairs(NamedTuple):
    """Matched slots and targets of a batch. P pairs."""

    samples: Tensor
    """(P,) long."""
    slots: Tensor
    """(P,) long."""
    targets: Tensor
    """(P,) long, place among the sample's targets."""
    coverage: Tensor
    """(P, patches) float in [0, 1], the target's."""


class HandOver(NamedTuple):
    """Slots with the looks of another slot on the same image and their own places. n of them."""

    weights: Tensor
    """(n, d_sae)."""
    givers: Tensor
    """(n,) long, the pair whose looks they have and whose thing they must show."""


@contextmanager
def shared_slots(model: nn.Module, shared: bool) -> Iterator[None]:
    """Within it every concept that fires shares a slot of a grounded read-out, where `shared`.

    Args:
        model: a SegCompassModel, maybe inside a wrapper.
        shared: whether.

    Example:
        >>> with shared_slots(model, step < 100):
        ...     outputs = model(**inputs)
    """
    # PEFT keeps a trained copy beside the first
    readings = [module for module in model.modules() if shared and isinstance(module, GroundedReading)]
    for reading in readings:
        reading.soft = True
    try:
        yield
    finally:
        for reading in readings:
            reading.soft = False


def match_patches(heatmaps: Tensor, confidences: Tensor, targets: Sequence[Tensor], patch_mask: Tensor) -> PatchPairs:
    """Match slots with targets by the overlap of patch heatmap and coverage, as `match_slots` does on a grid.

    Args:
        heatmaps: float (B, K, P) logits.
        confidences: float (B, K) logits.
        targets: B tensors (G_i, P) in [0, 1], coverage of each patch.
        patch_mask: bool (B, P), the patches that lie on the image.

    Returns:
        The pairs, on the device of the heatmaps.
    """
    device = heatmaps.device
    rows = heatmaps.detach().float().masked_fill(~patch_mask[:, None], -50.0)[:, :, None]  # (B, K, 1, P)
    found = torch.ones(heatmaps.shape[:2], dtype=torch.bool, device=device)
    extent = [(1, heatmaps.shape[-1])] * len(heatmaps)
    pairs = match_slots(rows, [target[:, None].to(device) for target in targets], found, extent, confidences.detach())
    samples = torch.cat([torch.full_like(slots, index) for index, (slots, _) in enumerate(pairs)])
    chosen = [target[places] for target, (_, places) in zip(targets, pairs, strict=True)]
    return PatchPairs(
        samples.to(device),
        torch.cat([slots for slots, _ in pairs]).to(device),
        torch.cat([places for _, places in pairs]).to(device),
        torch.cat(chosen).to(device),
    )


def patch_loss(heatmaps: Tensor, coverage: Tensor, patch_mask: Tensor) -> Tensor:
    """BCE plus 0.3 dice over the image's patches, the mean over n heatmaps; 0 without any.

    Args:
        heatmaps: float (n, P) logits.
        coverage: float (n, P) in [0, 1].
        patch_mask: bool (n, P).

    Returns:
        A scalar.
    """
    if not len(heatmaps):
        return heatmaps.sum()
    inside = patch_mask.float()
    bce = F.binary_cross_entropy_with_logits(heatmaps, coverage, reduction="none") * inside
    probability, coverage = heatmaps.sigmoid() * inside, coverage * inside
    dice = 1 - (2 * (probability * coverage).sum(-1) + 1) / (probability.sum(-1) + coverage.sum(-1) + 1)
    return (bce.sum(-1) / inside.sum(-1) + 0.3 * dice).mean()


def confidence_loss(confidences: Tensor, pairs: PatchPairs) -> Tensor:
    """BCE of every slot's confidence: 1 where it is matched, else 0.

    Args:
        confidences: float (B, K) logits.
        pairs: the matched slots.

    Returns:
        A scalar.
    """
    matched = torch.zeros_like(confidences)
    matched[pairs.samples, pairs.slots] = 1.0
    return F.binary_cross_entropy_with_logits(confidences, matched)


def hand_over(
    reading: Any,
    read: Any,
    pairs: PatchPairs,
    images: Sequence[Any],
    things: Sequence[Any],
    generator: torch.Generator,
    limit: int = 48,
) -> HandOver:
    """Give slots the looks of another slot on the same image, which is matched to another thing.

    What a slot shows must then be the other thing: its words decide, whoever's slot they are in. Pairs whose look
    weights are alike are left out, because the other's looks may be both things'.

    Args:
        reading: a GroundedReading.
        read: the batch's PatchReading.
        pairs: P matched slots and targets.
        images: of each sample, which image it shows.
        things: of each pair, which thing of its image it is; equal for two questions about one thing.
        generator: chooses among the partners.
        limit: most slots to make.

    Returns:
        The slots with their new weights.
    """
    partners = []
    where = [images[sample] for sample in pairs.samples.tolist()]
    for first in range(len(where)):
        others = [n for n in range(len(where)) if where[n] == where[first] and things[n] != things[first]]
        if others:
            partners.append((first, others[int(torch.randint(len(others), (), generator=generator))]))
    order = torch.randperm(len(partners), generator=generator)[:limit].tolist()
    own, giver = torch.tensor([partners[index] for index in order], dtype=torch.long).view(-1, 2).T
    looks = (read.weights * ~reading.is_place)[pairs.samples, pairs.slots]  # (P, d_sae)
    differ = F.cosine_similarity(looks[own], looks[giver], dim=-1) < OTHER_LOOK
    own, giver = own[differ], giver[differ]
    logits = read.logits[pairs.samples, pairs.slots]  # (P, d_sae)
    fires = (read.maps[pairs.samples[giver]] > 0).any(1)  # (n, d_sae)
    return HandOver(reading.weigh(logits[giver], fires, place_logits=logits[own]), giver)


def without_looks(reading: Any, weights: Tensor) -> Tensor:
    """The same slots without their looks: their masks should be gone (`left_over`).

    Args:
        reading: a GroundedReading.
        weights: float (n, d_sae).

    Returns:
        float (n, d_sae), the weights of places alone.
    """
    return weights * reading.is_place


def left_over(probabilities: Tensor, targets: Tensor) -> Tensor:
    """How much of its target each mask still shows, the mean; 0 without any.

    Args:
        probabilities: float (n, s, s) in [0, 1].
        targets: float (n, s, s) in [0, 1].

    Returns:
        A scalar in [0, 1].
    """
    if not len(probabilities):
        return probabilities.sum()
    return ((probabilities * targets).sum((1, 2)) / targets.sum((1, 2)).clamp_min(1)).mean()


def name_loss(weights: Tensor, fires: Tensor, names: Tensor, detectors: Tensor) -> Tensor:
    """The mean, over the words that name the slots' targets, of -log of the weight on the word's detectors.

    A word without a detector that fires on the image asks for nothing.

    Args:
        weights: float (n, d_sae), of matched slots.
        fires: bool (n, d_sae), the concepts that fire on the slot's image.
        names: float (n, W), how much each word counts at each slot, 0 where it does not name the target.
        detectors: bool (W, d_sae), from `word_detectors`.

    Returns:
        A scalar, 0 and connected where no word asks for anything.
    """
    there = detectors.float() @ fires.float().mT > 0  # (W, n)
    on_names = (weights * fires) @ detectors.float().mT  # (n, W)
    counts = names * there.mT
    return -(counts * (on_names + NAME_FLOOR).log()).sum() / counts.sum().clamp_min(1)


@torch.no_grad()
def word_detectors(
    codes: Tensor, shown: Tensor, held_out: Sequence[int] = (), threshold: float = 0.7, levels: int = 24
) -> Tensor:
    """Which concepts say each word, by the patches that phrases and masks call so.

    Args:
        codes: float (N, d_sae), relative strengths at patches.
        shown: bool (N, W), whether the patch shows what the word is said of.
        held_out: words whose row stays empty, so that their naming can be measured untaught.
        threshold: least F1 of a detector, at its own best level of strength.
        levels: how many levels are tried.

    Returns:
        bool (W, d_sae).
    """
    wanted = shown.float()  # (N, W)
    best = codes.new_zeros(shown.shape[1], codes.shape[1])
    highest = codes.amax(0)
    for level in torch.linspace(0, 0.9, levels).tolist():
        fires = (codes > level * highest).float()
        best = torch.maximum(best, 2 * wanted.T @ fires / (wanted.sum(0)[:, None] + fires.sum(0)).clamp_min(1))
    detectors = best >= threshold
    detectors[list(held_out)] = False
    return detectors
