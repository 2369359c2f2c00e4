"""The supervised terms of the joint objective (paper Eq. 6 and section 3.3).

`L = lambda_s (L_BCE(heatmaps) + lambda_D L_DICE(masks)) + lambda_c L_CONF(confidences)`; the language term (GRPO, or
next-token in supervised training) is added by the trainer. One matching, on the heatmaps, serves all three terms.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .matching import match_slots, pad_targets, valid_region

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0


def segmentation_loss(
    pred_masks: Tensor,
    heatmaps: Tensor,
    pred_logits: Tensor,
    slot_mask: Tensor,
    targets: Sequence[Tensor],
    valid: Tensor | Sequence[Sequence[int]],
    lambda_s: float = 1.0,
    lambda_c: float = 0.2,
    lambda_d: float = 0.6,
    focal: float = 0.0,
    heatmap_dice: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`lambda_s L_SEG + lambda_c L_CONF` of Eq. 6, in float32 whatever the autocast.

    Means are taken over the unpadded cells of a map, then over the matched pairs of a sample, then over the samples of
    this call that have a matched pair (each process of a distributed run divides by its own count). A sample without
    a pair (no target, or no slot found) gives no mask term. The confidence term is the mean over every found slot of
    the call, with target 1 if matched, else 0; so a sample without a target teaches all its slots to say 0.
    The dice term is 1 - (2 sum(p g) + 1) / (sum p + sum g + 1): first powers, and a unit of smoothing so that a target
    that vanishes on the map still has a gradient.

    Args:
        pred_masks: (B, K, H4, W4) mask logits.
        heatmaps: (B, K, h, w) heatmap logits; H4 and W4 are multiples of h and w.
        pred_logits: (B, K) confidence logits.
        slot_mask: (B, K) bool, True where the slot's concentration token was found. Other slots enter no term.
        targets: B tensors (G_i, H4, W4) in [0, 1] on the mask frame; G_i may be 0. The heatmap's target is their mean
            over the unpadded part of each grid cell.
        valid: (B, 2) integer extents (height, width) of the unpadded region, in cells of the mask frame, at least 1.
        lambda_s: weight of the mask terms.
        lambda_c: weight of the confidence term.
        lambda_d: weight of mask dice within the mask terms.
        focal: weight, within the mask terms, of a focal loss (alpha 0.25, gamma 2) on the masks. Not in the paper.
        heatmap_dice: weight, within the mask terms, of a dice loss on the heatmaps. Not in the paper.

    Returns:
        (total, parts): a float32 scalar, connected to the graph even when nothing matched; and detached float32
        scalars, unweighted: `heatmap_bce`, `mask_dice`, `conf_bce`, `matched_iou` (mean soft IoU of the matched masks,
        nan without a pair: average it with nanmean), `slots_found` (mean number of True in a row of slot_mask), and
        `mask_focal`, `heatmap_dice` where those weights are not 0.

    Raises:
        ValueError: shapes disagree, or a found slot's heatmap is not finite.
    """
    mask_size, grid_size = pred_masks.shape[-2:], heatmaps.shape[-2:]
    factor = mask_size[0] // grid_size[0]
    if mask_size != (factor * grid_size[0], factor * grid_size[1]):
        raise ValueError(
            f"pred_masks {tuple(mask_size)} must be a whole multiple of heatmaps {tuple(grid_size)}, the same in both "
            "directions, so that a grid cell covers a square of mask cells."
        )
    device = pred_masks.device
    with torch.autocast(device.type, enabled=False):
        valid = torch.as_tensor(valid, device=device)
        mask_region = valid_region(valid, mask_size, device)
        grid_valid = (valid + factor - 1) // factor  # a cell counts once any part of it is unpadded
        grid_region = valid_region(grid_valid, grid_size, device)

        mask_targets = torch.where(mask_region[:, None], pad_targets(targets, mask_size, device), 0.0)
        share = F.avg_pool2d(mask_region[:, None].float(), factor)
        # avg_pool2d refuses an empty channel dimension, which a batch without any target has.
        pooled = F.avg_pool2d(mask_targets.flatten(0, 1)[:, None], factor).reshape(*mask_targets.shape[:2], *grid_size)
        grid_targets = pooled / share.clamp_min(1.0 / factor**2)

        counts = [len(target) for target in targets]
        unpadded = [t[:n] for t, n in zip(grid_targets, counts, strict=True)]
        pairs = match_slots(heatmaps, unpadded, slot_mask, grid_valid, pred_logits)
        pair_counts = [len(slots) for slots, _ in pairs]
        samples_with_pairs = max(sum(count > 0 for count in pair_counts), 1)
        # One transfer for the index of every pair: rows are sample, slot, target.
        sample, slot, target = torch.stack(
            [
                torch.repeat_interleave(torch.arange(len(pairs)), torch.tensor(pair_counts)),
                torch.cat([slots for slots, _ in pairs]),
                torch.cat([chosen for _, chosen in pairs]),
            ]
        ).to(device)
        weight = torch.tensor([1.0 / (count * samples_with_pairs) for count in pair_counts for _ in range(count)])
        weight = weight.to(device)

        heat, heat_goal, heat_region = heatmaps[sample, slot].float(), grid_targets[sample, target], grid_region[sample]
        mask, mask_goal, region = pred_masks[sample, slot].float(), mask_targets[sample, target], mask_region[sample]
        # The padding is emptied before any arithmetic, so that not even a nan in it reaches a value or a gradient.
        heat = heat.masked_fill(~heat_region, 0.0)
        mask = mask.masked_fill(~region, 0.0)
        probability = mask.sigmoid() * region

        heat_bce = F.binary_cross_entropy_with_logits(heat, heat_goal, reduction="none")
        loss_heat = (weight * _region_mean(heat_bce, heat_region)).sum()
        loss_dice = (weight * _dice(probability, mask_goal)).sum()
        loss_seg = loss_heat + lambda_d * loss_dice
        parts = {"heatmap_bce": loss_heat, "mask_dice": loss_dice}
        if focal:
            parts["mask_focal"] = (weight * _region_mean(_focal(mask, mask_goal), region)).sum()
            loss_seg = loss_seg + focal * parts["mask_focal"]
        if heatmap_dice:
            parts["heatmap_dice"] = (weight * _dice(heat.sigmoid() * heat_region, heat_goal * heat_region)).sum()
            loss_seg = loss_seg + heatmap_dice * parts["heatmap_dice"]

        matched = torch.zeros_like(pred_logits, dtype=torch.float32)
        matched[sample, slot] = 1.0
        found = slot_mask.to(device=device, dtype=torch.bool)
        # An unfound slot's confidence may be anything; it is emptied, then left out of the mean.
        conf_bce = F.binary_cross_entropy_with_logits(
            pred_logits.float().masked_fill(~found, 0.0), matched, reduction="none"
        )
        parts["conf_bce"] = (conf_bce * found).sum() / found.sum().clamp_min(1)

        total = lambda_s * loss_seg + lambda_c * parts["conf_bce"]
        parts = {name: part.detach() for name, part in parts.items()}
        parts["matched_iou"] = _paired_soft_iou(probability.detach(), mask_goal).mean()
        parts["slots_found"] = found.sum(-1).float().mean()
        return total, parts


def erasure_loss(
    pred_masks: Tensor,
    erased_masks: Tensor,
    erased_heatmaps: Tensor,
    erased_logits: Tensor,
    slots: Tensor,
    valid: Tensor | Sequence[Sequence[int]],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Without its heaviest concepts a slot's mask should be gone: what makes concepts necessary. Not in the paper.

    For each slot that was erased: the heatmap's BCE against an empty one, the share of the mask (the cells the slot
    had lit with all its concepts) that is still lit, and the confidence's BCE against 0; the mean over these slots.
    What the erased pass shows is compared with the same slot's whole pass, never with the truth, so a slot is not
    rewarded for being wrong.

    Args:
        pred_masks: (B, K, H4, W4) mask logits with all concepts; only their sign is read.
        erased_masks, erased_heatmaps, erased_logits: as in `segmentation_loss`, without the heaviest concepts.
        slots: (B, K) bool, the slots whose concepts were taken away.
        valid: (B, 2) extents of the unpadded region in cells of the mask frame.

    Returns:
        (total, parts): a float32 scalar, connected to the graph even without a slot, and detached `still_there`, the
        mean share of the masks that is left (nan without a slot).
    """
    device = erased_masks.device
    mask_size, grid_size = erased_masks.shape[-2:], erased_heatmaps.shape[-2:]
    valid = torch.as_tensor(valid, device=device)
    factor = mask_size[0] // grid_size[0]
    region = valid_region(valid, mask_size, device)[:, None]
    grid_region = valid_region((valid + factor - 1) // factor, grid_size, device)[:, None]
    with torch.autocast(device.type, enabled=False):
        lit = (pred_masks.detach() > 0) & region
        left = (erased_masks.float().sigmoid() * lit).sum((-2, -1)) / lit.sum((-2, -1)).clamp_min(1)
        heat = F.softplus(erased_heatmaps.float()).masked_fill(~grid_region, 0.0)
        heat = heat.sum((-2, -1)) / grid_region.sum((-2, -1)).clamp_min(1)
        each = heat + left + F.softplus(erased_logits.float())
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
