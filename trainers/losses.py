"""The supervised terms of the joint objective (paper Eq. 6 and section 3.3).

`L = λ_s (L_BCE(heatmaps) + λ_D L_DICE(masks)) + λ_c L_CONF(confidences)`; the trainer adds the language term (GRPO, or
next-token prediction in the cold start). One matching, on the heatmaps, serves every term.

To add a term, edit this file: a weight in `LossWeights`, a function of `MatchedSlots`, and a line in `TERMS`. The
weight is then an option of both trainers, and both log the term under `seg/`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .matching import match_slots, pad_targets, valid_region

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
LOG_PREFIX = "seg/"  # of every part that `segmentation_loss` and `erasure_loss` return, in the log of both trainers


@dataclass
class LossWeights:
    """Weights of the supervised terms. The configs of both trainers inherit it, so each field is an option of both.

    Example:
        >>> weights = LossWeights(lambda_focal=5.0)
        >>> loss, parts = segmentation_loss(outputs, targets, extent, weights)
        >>> parts["mask_focal"]
    """

    lambda_s: float = field(default=1.0, metadata={"help": "Weight of the mask terms, L_SEG, in Eq. 6."})
    lambda_c: float = field(default=0.2, metadata={"help": "Weight of the confidence term, L_CONF, in Eq. 6."})
    lambda_d: float = field(default=0.6, metadata={"help": "Weight of mask dice within L_SEG."})
    lambda_focal: float = field(
        default=0.0, metadata={"help": "Weight of a focal loss on the masks within L_SEG. Not in the paper."}
    )
    lambda_heatmap_dice: float = field(
        default=0.0, metadata={"help": "Weight of a dice loss on the heatmaps within L_SEG. Not in the paper."}
    )


class SlotPredictions(Protocol):
    """What the terms read of a model's output. B samples, K = K_s slots, an h x w key grid."""

    @property
    def pred_masks(self) -> Tensor:
        """(B, K, H4, W4) mask logits; H4 and W4 are the same multiple of h and w."""

    @property
    def heatmaps(self) -> Tensor:
        """(B, K, h, w) heatmap logits."""

    @property
    def pred_logits(self) -> Tensor:
        """(B, K) confidence logits."""

    @property
    def slot_mask(self) -> Tensor:
        """(B, K) bool, True where the slot's concentration token was found. Other slots enter no term."""


class ErasedPredictions(SlotPredictions, Protocol):
    """A model's output with `num_erased_concepts`: also decoded without each slot's heaviest concepts."""

    @property
    def erased(self) -> SlotPredictions:
        """the second decoding, of the same shapes."""

    @property
    def erased_slots(self) -> Tensor:
        """(B, K) bool, the slots whose heaviest concepts `erased` lacks."""


class FrameTargets(NamedTuple):
    """The target masks on both maps, and the unpadded part of both. G = the most targets that a sample has."""

    masks: Tensor
    """(B, G, H4, W4) float32 in [0, 1] on the mask frame, 0 in the padding; empty where a sample has fewer."""
    mask_region: Tensor
    """(B, H4, W4) bool, True where the mask frame is not padding."""
    heatmaps: Tensor
    """(B, G, h, w) float32 in [0, 1], each cell the mean of the mask cells it covers that are not padding."""
    heatmap_region: Tensor
    """(B, h, w) bool, True where any part of the cell is not padding."""
    heatmap_extent: Tensor
    """(B, 2) long, (height, width) of that region."""
    counts: list[int]
    """B numbers of targets."""


class MatchedSlots(NamedTuple):
    """What a term sees: the matched slots of all samples beside their targets. P pairs of a slot and a target."""

    outputs: SlotPredictions
    """the model's output, whole."""
    heatmaps: Tensor
    """(P, h, w) float32 logits of the matched slots, 0 in the padding."""
    heatmap_targets: Tensor
    """(P, h, w) float32 in [0, 1]."""
    heatmap_region: Tensor
    """(P, h, w) bool, True where the map is not padding."""
    masks: Tensor
    """(P, H4, W4) float32 logits of the matched slots, 0 in the padding."""
    mask_targets: Tensor
    """(P, H4, W4) float32 in [0, 1], 0 in the padding."""
    mask_region: Tensor
    """(P, H4, W4) bool, True where the map is not padding."""
    probabilities: Tensor
    """(P, H4, W4) float32, the sigmoid of `masks`, 0 in the padding."""
    pair_weights: Tensor
    """(P,) float32, 1 / (pairs of the sample * samples with a pair)."""
    matched: Tensor
    """(B, K) float32, 1 where the slot has a target, else 0."""
    found: Tensor
    """(B, K) bool, True where the slot's concentration token was found."""

    def mean(self, losses: Tensor) -> Tensor:
        """Losses of the pairs, (P,), to their mean over each sample's pairs, then over the samples that have one."""
        return (self.pair_weights * losses).sum()


class Term(NamedTuple):
    """One supervised term of Eq. 6."""

    name: str
    """its name in the log, behind `seg/`."""
    weights: tuple[str, ...]
    """fields of the weights that multiply it, its own last."""
    function: Callable[[MatchedSlots], Tensor]
    """the term, a float32 scalar, connected to the graph even without a pair."""
    optional: bool = False
    """whether it is neither computed nor logged where its own weight is 0."""


def heatmap_bce(slots: MatchedSlots) -> Tensor:
    """L_BCE of Eq. 6: the mean over the unpadded cells, of the matched slots' heatmaps."""
    bce = F.binary_cross_entropy_with_logits(slots.heatmaps, slots.heatmap_targets, reduction="none")
    return slots.mean(_region_mean(bce, slots.heatmap_region))


def mask_dice(slots: MatchedSlots) -> Tensor:
    """L_DICE of Eq. 6, of the matched slots' masks."""
    return slots.mean(_dice(slots.probabilities, slots.mask_targets))


def mask_focal(slots: MatchedSlots) -> Tensor:
    """A focal loss (alpha 0.25, gamma 2) on the matched slots' masks."""
    return slots.mean(_region_mean(_focal(slots.masks, slots.mask_targets), slots.mask_region))


def heatmap_dice(slots: MatchedSlots) -> Tensor:
    """A dice loss on the matched slots' heatmaps."""
    region = slots.heatmap_region
    return slots.mean(_dice(slots.heatmaps.sigmoid() * region, slots.heatmap_targets * region))


def conf_bce(slots: MatchedSlots) -> Tensor:
    """L_CONF of Eq. 6: the mean over every found slot, with target 1 if it is matched, else 0."""
    # An unfound slot's confidence may be anything; it is emptied, then left out of the mean.
    logits = slots.outputs.pred_logits.float().masked_fill(~slots.found, 0.0)
    bce = F.binary_cross_entropy_with_logits(logits, slots.matched, reduction="none")
    return (bce * slots.found).sum() / slots.found.sum().clamp_min(1)


TERMS = (
    Term("heatmap_bce", ("lambda_s",), heatmap_bce),
    Term("mask_dice", ("lambda_s", "lambda_d"), mask_dice),
    Term("mask_focal", ("lambda_s", "lambda_focal"), mask_focal, optional=True),
    Term("heatmap_dice", ("lambda_s", "lambda_heatmap_dice"), heatmap_dice, optional=True),
    Term("conf_bce", ("lambda_c",), conf_bce),
)


def segmentation_loss(
    outputs: SlotPredictions,
    targets: Sequence[Tensor],
    valid_extent: Tensor | Sequence[Sequence[int]],
    weights: LossWeights | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`λ_s L_SEG + λ_c L_CONF` of Eq. 6, in float32 whatever the autocast.

    Means are taken over the unpadded cells of a map, then over the matched pairs of a sample, then over the samples of
    this call that have a matched pair (each process of a distributed run divides by its own count). A sample without
    a pair (no target, or no slot found) gives no mask term. The confidence term is the mean over every found slot of
    the call, with target 1 if matched, else 0; so a sample without a target teaches all its slots to say 0.
    The dice term is 1 - (2 sum(p g) + 1) / (sum p + sum g + 1): first powers, and a unit of smoothing so that a target
    that vanishes on the map still has a gradient.

    Args:
        outputs: the model's SegCompassOutput, or anything with its pred_masks, heatmaps, pred_logits and slot_mask.
        targets: B tensors (G_i, H4, W4) in [0, 1] on the mask frame; G_i may be 0. The heatmap's target is their mean
            over the unpadded part of each grid cell.
        valid_extent: (B, 2) integer extents (height, width) of the unpadded region, in cells of the mask frame, at
            least 1.
        weights: of the terms, for example a trainer's arguments; None takes the paper's.

    Returns:
        (total, parts): a float32 scalar, connected to the graph even when nothing matched; and detached float32
        scalars, unweighted: each term of `TERMS` by its name, an optional one only where its weight is not 0;
        `matched_iou` (mean soft IoU of the matched masks, nan without a pair: average it with nanmean); and
        `slots_found` (mean number of True in a row of slot_mask).

    Raises:
        ValueError: shapes disagree, or a found slot's heatmap is not finite.
    """
    weights = LossWeights() if weights is None else weights
    device = outputs.pred_masks.device
    with torch.autocast(device.type, enabled=False):
        frame = frame_targets(outputs, targets, valid_extent)
        slots = gather_pairs(outputs, frame)
        total, parts = torch.zeros((), device=device), {}
        for term in TERMS:
            factors = [getattr(weights, name) for name in term.weights]
            if term.optional and factors[-1] == 0:
                continue
            value = term.function(slots)
            total = total + math.prod(factors) * value
            parts[term.name] = value.detach()
        parts["matched_iou"] = _paired_soft_iou(slots.probabilities.detach(), slots.mask_targets).mean()
        parts["slots_found"] = slots.found.sum(-1).float().mean()
        return total, parts


def frame_targets(
    outputs: SlotPredictions, targets: Sequence[Tensor], valid_extent: Tensor | Sequence[Sequence[int]]
) -> FrameTargets:
    """First step of `segmentation_loss`: the targets of masks and heatmaps, emptied in the padding.

    Args:
        outputs: see `segmentation_loss`; only shapes are read.
        targets: see `segmentation_loss`.
        valid_extent: see `segmentation_loss`.

    Returns:
        The targets on both maps, on the device of the masks.

    Raises:
        ValueError: the masks are not a whole multiple of the heatmaps, or a target lies on another frame.
    """
    device = outputs.pred_masks.device
    mask_size, grid_size = outputs.pred_masks.shape[-2:], outputs.heatmaps.shape[-2:]
    factor = mask_size[0] // grid_size[0]
    if mask_size != (factor * grid_size[0], factor * grid_size[1]):
        raise ValueError(
            f"pred_masks {tuple(mask_size)} must be a whole multiple of heatmaps {tuple(grid_size)}, the same in both "
            "directions, so that a grid cell covers a square of mask cells."
        )
    extent = torch.as_tensor(valid_extent, device=device)
    region = valid_region(extent, mask_size, device)  # (B, H4, W4)
    grid_extent = (extent + factor - 1) // factor  # a cell counts once any part of it is unpadded

    masks = torch.where(region[:, None], pad_targets(targets, mask_size, device), 0.0)  # (B, G, H4, W4)
    share = F.avg_pool2d(region[:, None].float(), factor)  # (B, 1, h, w), how much of each cell is unpadded
    # avg_pool2d refuses an empty channel dimension, which a batch without any target has.
    pooled = F.avg_pool2d(masks.flatten(0, 1)[:, None], factor).reshape(*masks.shape[:2], *grid_size)  # (B, G, h, w)
    return FrameTargets(
        masks=masks,
        mask_region=region,
        heatmaps=pooled / share.clamp_min(1.0 / factor**2),
        heatmap_region=valid_region(grid_extent, grid_size, device),
        heatmap_extent=grid_extent,
        counts=[len(target) for target in targets],
    )


def gather_pairs(outputs: SlotPredictions, frame: FrameTargets) -> MatchedSlots:
    """Second step of `segmentation_loss`: match slots with targets and lay the pairs of all samples side by side.

    Args:
        outputs: see `segmentation_loss`.
        frame: what `frame_targets` returned.

    Returns:
        The pairs, on the device of the masks.

    Raises:
        ValueError: a found slot's heatmap is not finite.
    """
    device = outputs.pred_masks.device
    unpadded = [target[:count] for target, count in zip(frame.heatmaps, frame.counts, strict=True)]  # B of (G_i, h, w)
    pairs = match_slots(outputs.heatmaps, unpadded, outputs.slot_mask, frame.heatmap_extent, outputs.pred_logits)
    pair_counts = [len(slots) for slots, _ in pairs]
    samples_with_pairs = max(sum(count > 0 for count in pair_counts), 1)
    # One transfer for the index of every pair: rows are sample, slot, target.
    sample, slot, target = torch.stack(
        [
            torch.repeat_interleave(torch.arange(len(pairs)), torch.tensor(pair_counts)),
            torch.cat([slots for slots, _ in pairs]),
            torch.cat([chosen for _, chosen in pairs]),
        ]
    ).to(device)  # (3, P)
    pair_weights = torch.tensor([1.0 / (count * samples_with_pairs) for count in pair_counts for _ in range(count)])

    heatmap_region, mask_region = frame.heatmap_region[sample], frame.mask_region[sample]  # (P, h, w), (P, H4, W4)
    # The padding is emptied before any arithmetic, so that not even a nan in it reaches a value or a gradient.
    heatmaps = outputs.heatmaps[sample, slot].float().masked_fill(~heatmap_region, 0.0)  # (P, h, w)
    masks = outputs.pred_masks[sample, slot].float().masked_fill(~mask_region, 0.0)  # (P, H4, W4)
    matched = torch.zeros_like(outputs.pred_logits, dtype=torch.float32)  # (B, K)
    matched[sample, slot] = 1.0
    return MatchedSlots(
        outputs=outputs,
        heatmaps=heatmaps,
        heatmap_targets=frame.heatmaps[sample, target],
        heatmap_region=heatmap_region,
        masks=masks,
        mask_targets=frame.masks[sample, target],
        mask_region=mask_region,
        probabilities=masks.sigmoid() * mask_region,
        pair_weights=pair_weights.to(device),
        matched=matched,
        found=outputs.slot_mask.to(device=device, dtype=torch.bool),
    )


def erasure_loss(
    outputs: ErasedPredictions, valid_extent: Tensor | Sequence[Sequence[int]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Without its heaviest concepts a slot's mask should be gone: what makes concepts necessary. Not in the paper.

    For each slot that was erased: the heatmap's BCE against an empty one, the share of the mask (the cells the slot
    had lit with all its concepts) that is still lit, and the confidence's BCE against 0; the mean over these slots.
    What the erased pass shows is compared with the same slot's whole pass, never with the truth, so a slot is not
    rewarded for being wrong.

    Args:
        outputs: the model's output with `num_erased_concepts`. Of the masks with all concepts only the sign is read.
        valid_extent: (B, 2) integer extents (height, width) of the unpadded region in cells of the mask frame.

    Returns:
        (total, parts): a float32 scalar, connected to the graph even without a slot, and detached `still_there`, the
        mean share of the masks that is left (nan without a slot).
    """
    erased, slots = outputs.erased, outputs.erased_slots
    device = erased.pred_masks.device
    mask_size, grid_size = erased.pred_masks.shape[-2:], erased.heatmaps.shape[-2:]
    extent = torch.as_tensor(valid_extent, device=device)
    factor = mask_size[0] // grid_size[0]
    region = valid_region(extent, mask_size, device)[:, None]  # (B, 1, H4, W4)
    grid_region = valid_region((extent + factor - 1) // factor, grid_size, device)[:, None]  # (B, 1, h, w)
    with torch.autocast(device.type, enabled=False):
        lit = (outputs.pred_masks.detach() > 0) & region  # (B, K, H4, W4)
        left = (erased.pred_masks.float().sigmoid() * lit).sum((-2, -1)) / lit.sum((-2, -1)).clamp_min(1)  # (B, K)
        heat = F.softplus(erased.heatmaps.float()).masked_fill(~grid_region, 0.0)  # (B, K, h, w)
        heat = heat.sum((-2, -1)) / grid_region.sum((-2, -1)).clamp_min(1)  # (B, K)
        each = heat + left + F.softplus(erased.pred_logits.float())
        total = each.masked_fill(~slots, 0.0).sum() / slots.sum().clamp_min(1)
    drawn = slots & lit.flatten(2).any(-1)
    return total, {"still_there": left[drawn].detach().mean()}


def _region_mean(values: Tensor, region: Tensor) -> Tensor:
    """(P, H, W) values and bool region to their (P,) means over the region."""
    return (values * region).sum((-2, -1)) / region.sum((-2, -1)).clamp_min(1)


def _dice(probability: Tensor, goal: Tensor) -> Tensor:
    """(P, H, W) maps, zero in the padding, to (P,) dice losses in [0, 1]."""
    overlap = (probability * goal).sum((-2, -1))
    return 1.0 - (2.0 * overlap + 1.0) / (probability.sum((-2, -1)) + goal.sum((-2, -1)) + 1.0)


def _focal(logits: Tensor, goal: Tensor) -> Tensor:
    """Focal loss of each cell (Lin et al. 2017, Eq. 5), for goals in [0, 1]."""
    probability = logits.sigmoid()
    miss = probability * (1.0 - goal) + (1.0 - probability) * goal
    alpha = FOCAL_ALPHA * goal + (1.0 - FOCAL_ALPHA) * (1.0 - goal)
    return alpha * miss**FOCAL_GAMMA * F.binary_cross_entropy_with_logits(logits, goal, reduction="none")


def _paired_soft_iou(probability: Tensor, goal: Tensor) -> Tensor:
    """(P, H, W) maps, zero in the padding, to (P,) soft IoU; 0 where both are empty."""
    overlap = (probability * goal).sum((-2, -1))
    union = probability.sum((-2, -1)) + goal.sum((-2, -1)) - overlap
    return torch.where(union == 0, 0.0, overlap / union)
