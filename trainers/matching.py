"""One-to-one matching of slots with target masks, shared by every supervised term of Eq. 6 and by the mask reward.

Only the unpadded region counts: an image is padded right and bottom to a square, and what a slot says there is never
looked at. The pairwise costs of a batch are one matrix product on the device and reach the host in one transfer; the
assignment itself (`scipy.optimize.linear_sum_assignment`) runs on the host, sample by sample.
"""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def valid_region(valid_extent: Tensor | Sequence[Sequence[int]], size: tuple[int, ...], device: torch.device) -> Tensor:
    """The unpadded cells of each map.

    Args:
        valid_extent: (B, 2) integer extents, (height, width) of the unpadded region, counted in cells of the map.
        size: (height, width) of the map.
        device: where the result lives.

    Returns:
        (B, height, width) bool, True inside the extent.

    Raises:
        ValueError: `valid_extent` is not (B, 2).
    """
    extent = torch.as_tensor(valid_extent, device=device)
    if extent.ndim != 2 or extent.shape[-1] != 2:
        raise ValueError(
            f"valid_extent must be (B, 2), (height, width) in cells of the map, got shape {tuple(extent.shape)}."
        )
    rows = torch.arange(size[0], device=device) < extent[:, :1]  # (B, height)
    columns = torch.arange(size[1], device=device) < extent[:, 1:]  # (B, width)
    return rows[:, :, None] & columns[:, None, :]  # (B, height, width)


def pad_targets(targets: Sequence[Tensor], size: tuple[int, ...], device: torch.device) -> Tensor:
    """Stack target masks, filling up with empty ones.

    Args:
        targets: B tensors (G_i, H, W), bool or numbers in [0, 1]; G_i may be 0.
        size: the (H, W) every target must have.
        device: where the result lives.

    Returns:
        (B, max G_i, H, W) float32.

    Raises:
        ValueError: a target is not (G_i, H, W) with that (H, W).
    """
    for index, target in enumerate(targets):
        if target.ndim != 3 or tuple(target.shape[1:]) != tuple(size):
            raise ValueError(
                f"targets[{index}] must be (G, {size[0]}, {size[1]}), the frame of the predictions, "
                f"got {tuple(target.shape)}; an image without a target takes a (0, {size[0]}, {size[1]}) tensor."
            )
    return pad_sequence([target.to(device=device, dtype=torch.float32) for target in targets], batch_first=True)


def soft_iou(probabilities: Tensor, targets: Tensor, valid_extent: Tensor | Sequence[Sequence[int]]) -> Tensor:
    """Pairwise soft IoU, sum(p g) / (sum p + sum g - sum(p g)), over the unpadded region, in float32.

    Args:
        probabilities: (B, K, H, W) in [0, 1].
        targets: (B, G, H, W) in [0, 1].
        valid_extent: (B, 2) integer extents (height, width) of the unpadded region in cells of the map.

    Returns:
        (B, K, G) float32 in [0, 1]; 0 where both maps are empty. No gradient: nan where both are empty.
    """
    region = valid_region(valid_extent, probabilities.shape[-2:], probabilities.device).unsqueeze(1)  # (B, 1, H, W)
    with torch.autocast(probabilities.device.type, enabled=False):
        # Selected rather than multiplied: 0 * nan would let the padding in.
        predicted = torch.where(region, probabilities.float(), 0.0).flatten(2)  # (B, K, H W)
        wanted = torch.where(region, targets.float(), 0.0).flatten(2)  # (B, G, H W)
        overlap = predicted @ wanted.transpose(1, 2)  # (B, K, G)
        union = predicted.sum(-1)[:, :, None] + wanted.sum(-1)[:, None, :] - overlap
        return torch.where(union == 0, 0.0, overlap / union)


def hungarian(iou: np.ndarray, eligible: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The one-to-one assignment of least total 1 - IoU.

    Args:
        iou: (K, G) overlaps.
        eligible: (K,) bool, the slots that may be matched.

    Returns:
        (slot indices, target indices), each (min(eligible slots, G),), slots ascending.

    Raises:
        ValueError: an eligible slot's overlap is not finite.
    """
    slots = np.flatnonzero(eligible)
    overlap = iou[slots]
    if not np.isfinite(overlap).all():
        raise ValueError(
            f"soft IoU of slots {slots[~np.isfinite(overlap).all(-1)].tolist()} is not finite: the predicted maps hold "
            "nan or inf. Lower the learning rate, clip gradients, or train in float32 or bfloat16, not float16."
        )
    rows, columns = linear_sum_assignment(1.0 - overlap)
    return slots[rows], columns


CONFIDENCE_WEIGHT = 0.2


@torch.no_grad()
def match_slots(
    heatmaps: Tensor,
    targets: Sequence[Tensor],
    slot_mask: Tensor,
    valid_extent: Tensor | Sequence[Sequence[int]],
    pred_logits: Tensor | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Match each sample's slots with its targets by the overlap of heatmap and target (paper section 3.3).

    Slots without a target have no heatmap to learn, so they repeat another slot's; which of the equals is matched
    would be chance, and their confidences could not be learned (dev/log.md). `pred_logits` settles it: the more
    confident slot wins ties, by `CONFIDENCE_WEIGHT` times its probability.

    Args:
        heatmaps: (B, K, h, w) logits.
        targets: B tensors (G_i, h, w) in [0, 1] on the same grid; G_i may be 0.
        slot_mask: (B, K) bool; a False slot is never matched.
        valid_extent: (B, 2) integer extents (height, width) of the unpadded region in cells of the grid.
        pred_logits: (B, K) confidence logits, to decide between slots of equal overlap; None leaves them out.

    Returns:
        B pairs (slot indices, target indices), int64 on the CPU, each (min(found slots, G_i),), slots ascending.

    Raises:
        ValueError: batch sizes differ, a target has another grid, or a found slot's heatmap is not finite.
    """
    if not len(heatmaps) == len(targets) == len(slot_mask) == len(valid_extent):
        raise ValueError(
            f"got {len(heatmaps)} heatmaps, {len(targets)} targets, {len(slot_mask)} rows of slot_mask and "
            f"{len(valid_extent)} extents; give one of each per sample."
        )
    padded = pad_targets(targets, heatmaps.shape[-2:], heatmaps.device)
    iou = soft_iou(heatmaps.float().sigmoid(), padded, valid_extent)  # (B, K, G)
    if pred_logits is not None:
        iou = iou + CONFIDENCE_WEIGHT * pred_logits.float().sigmoid().unsqueeze(-1)
    table = torch.cat([iou, slot_mask.unsqueeze(-1).to(iou)], dim=-1).cpu().numpy()  # (B, K, G + 1)
    pairs = [hungarian(row[:, : len(target)], row[:, -1] > 0) for row, target in zip(table, targets, strict=True)]
    return [(torch.from_numpy(slots), torch.from_numpy(chosen)) for slots, chosen in pairs]
