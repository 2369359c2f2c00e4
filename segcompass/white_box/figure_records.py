"""What the paper's interpretability figures are drawn from: one record per sample.

The model writes its own reasoning, greedily. A record holds how many features fire on each kind of token (Figure 4),
how much of an instance the strongest image tokens cover (Figure 5), and the SAE's error beside the masks' (Figure 8).
"""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask

from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.modeling_segcompass.image_encoder import Frame
from segcompass.modeling_segcompass.token_layout import IMAGE, INSTRUCTION
from segcompass.trainers.losses import segmentation_loss
from segcompass.trainers.targets import mask_targets

from .decoding import decode, overlap

KINDS = ("question", "reasoning", "instance", "background")
LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""Figure 4's thresholds, in units of the SAE's mean active activation (its mean over the features)."""
SHARES = (5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
"""Figure 5's K, in percent of the image tokens."""
RANKINGS = ("activation", "concepts", "random")
INSTANCE_SHARE = 0.5  # a patch belongs to an instance from this share of it on


@torch.no_grad()
def measure(
    model: SegCompassModel, processor: SegCompassProcessor, rows: Sequence[dict[str, Any]], seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Measure one batch. A record depends on its row and the seed, not on the batch.

    Args:
        model: in evaluation mode.
        processor: the model's.
        rows: of a data set.
        seed: of the random ranking.

    Yields:
        One record per row, of types that JSON knows: `sample_id`; `tokens` and `active`, of each of `KINDS` how many
        tokens and, for each of `LEVELS`, how many features fire on them; `coverage`, see `coverage`; `sae_error`;
        `dice`, the mask dice loss or None; `pairs`, see `heatmap_pairs`.
    """
    inputs = processor(images=[row["image"] for row in rows], text=[row["instruction"] for row in rows])
    _, states = model.reason(**inputs.to(model.device))
    outputs: Any = decode(model, states)
    may_fire = model.concept_token_mask(states.input_ids, states.attention_mask)  # (B, T)
    sae: Any = model.sae
    unit = float(sae.mean_active_activation.float().mean())
    frame, side = model.config.frame, 4 * model.config.key_grid
    for place, row in enumerate(rows):
        z = states.z[place].float()  # (T, d_π)
        h = sae.encode(z).float() * may_fire[place][:, None]  # (T, d_sae)
        types = outputs.token_types[place]  # (T,)
        targets = mask_targets(row["masks"], row["height"], row["width"], frame, side).to(z.device)  # (G, 4h, 4w)
        instances = coco_mask.decode(row["masks"]).astype(bool).transpose(2, 0, 1) if row["masks"] else []  # (G, H, W)
        patch_of = patches_of_pixels(outputs.patch_boxes[place].cpu().numpy(), *row["image"].size)
        kinds = kinds_of_tokens(types, may_fire[place], instances, patch_of)
        chosen = [h[kinds == number] for number in range(len(KINDS))]
        error = (z - sae.decode(h)).square().sum(-1)  # (T,)
        random = np.random.default_rng([seed, zlib.crc32(row["sample_id"].encode())])
        record = {
            "sample_id": row["sample_id"],
            "tokens": {kind: len(tokens) for kind, tokens in zip(KINDS, chosen, strict=True)},
            "active": {
                kind: [int((tokens > level * unit).sum()) for level in LEVELS]
                for kind, tokens in zip(KINDS, chosen, strict=True)
            },
            "coverage": coverage(h, outputs, place, instances, patch_of, random),
            "sae_error": float(error[may_fire[place]].mean()),
            "dice": None,
            "pairs": [],
        }
        if len(targets) and outputs.slot_mask[place].any():
            record["dice"] = _dice_loss(outputs, place, targets, frame, side)
            record["pairs"] = heatmap_pairs(outputs, place, targets > 0.5)
        yield record


def patches_of_pixels(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """The image token that sees each pixel; of several the one that sees least beside it.

    Args:
        boxes: float (P, 4), the part of the image that each token shows, in fractions of its width and height.
        width: of the image in pixels.
        height: of the image in pixels.

    Returns:
        int (H, W), from 0 in the order of the tokens; -1 outside what the MLLM sees.
    """
    patch_of = np.full((height, width), -1)
    edges = np.ceil(boxes.astype(np.float64) * [width, height, width, height] - 0.5 - 1e-4).astype(int)
    edges = edges.clip(0, [width, height, width, height])  # a pixel belongs where its centre lies
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    for token in np.argsort(-areas, kind="stable"):
        left, top, right, bottom = edges[token]
        patch_of[top:bottom, left:right] = token
    return patch_of


def kinds_of_tokens(
    types: torch.Tensor, may_fire: torch.Tensor, instances: Sequence[np.ndarray], patch_of: np.ndarray
) -> torch.Tensor:
    """What Figure 4 counts each token as.

    Args:
        types: long (T,), IMAGE, INSTRUCTION or RESPONSE.
        may_fire: bool (T,), the tokens that may fire concepts.
        instances: bool (H, W) masks.
        patch_of: int (H, W), from `patches_of_pixels`.

    Returns:
        long (T,), places in `KINDS`; -1 for special tokens, padding and patches on an instance's edge.
    """
    kinds = torch.where(types == INSTRUCTION, 0, 1)
    count = int((types == IMAGE).sum())
    shown = np.bincount(patch_of[patch_of >= 0], minlength=count)  # (patches,) pixels
    union = np.any(instances, axis=0) & (patch_of >= 0) if len(instances) else np.zeros_like(patch_of, dtype=bool)
    share = np.bincount(patch_of[union], minlength=count) / np.maximum(shown, 1)
    patches = torch.from_numpy(np.where(share >= INSTANCE_SHARE, 2, np.where((share == 0) & (shown > 0), 3, -1)))
    kinds[types == IMAGE] = patches.to(kinds.device)
    return kinds.masked_fill(~may_fire, -1)


def coverage(
    h: torch.Tensor,
    outputs: Any,
    place: int,
    instances: Sequence[np.ndarray],
    patch_of: np.ndarray,
    random: np.random.Generator,
) -> dict[str, list[list[float]]]:
    """How much of each instance the first K % of the image tokens cover, under three rankings of these tokens.

    Args:
        h: float (T, d_sae), the SAE's activations.
        outputs: SegCompassOutput of the batch.
        place: the sample's place in it.
        instances: bool (H, W) masks.
        patch_of: int (H, W), from `patches_of_pixels`.
        random: draws the ranking that the others are compared with.

    Returns:
        ranking -> for each instance the shares of its pixels, one for each of `SHARES`.
    """
    is_image = outputs.token_types[place] == IMAGE  # (T,)
    found = outputs.slot_mask[place]  # (K,)
    kept = found & (outputs.pred_logits[place] >= 0)
    slots = kept if kept.any() else found
    activations = outputs.concept_activations[place][is_image].float()  # (patches, M)
    weights = outputs.concept_weights[place][slots].float().sum(0)  # (M,)
    by_concepts = (activations - activations.mean(0)).clamp_min(0) @ weights  # (patches,)
    scores = {
        "activation": h[is_image].sum(-1).cpu().numpy(),
        "concepts": by_concepts.cpu().numpy(),
        "random": random.random(int(is_image.sum())),
    }
    covered = {}
    for ranking in RANKINGS:
        order = np.argsort(-scores[ranking], kind="stable")
        rank = np.empty(len(order), int)
        rank[order] = np.arange(len(order))
        rank_at = np.where(patch_of >= 0, rank[patch_of], len(order))  # (H, W); out of view is never covered
        limits = [round(len(order) * share / 100) for share in SHARES]
        covered[ranking] = [[float((rank_at[mask] < limit).mean()) for limit in limits] for mask in instances]
    return covered


def heatmap_pairs(outputs: Any, place: int, targets: torch.Tensor) -> list[list[float]]:
    """Heatmap and mask beside each target, both of the slot whose mask overlaps it most.

    Args:
        outputs: SegCompassOutput of the batch.
        place: the sample's place in it.
        targets: bool (G, 4h, 4w).

    Returns:
        [heatmap IoU, mask IoU] of each target.
    """
    slots = outputs.slot_mask[place].nonzero()[:, 0]
    masks = outputs.pred_masks[place, slots] > 0  # (K, 4h, 4w)
    heat = torch.nn.functional.interpolate(
        outputs.heatmaps[place, slots][None].float(), masks.shape[-2:], mode="bilinear", align_corners=False
    )[0]  # (K, 4h, 4w)
    pairs = []
    for target in targets:
        ious = overlap(masks, target)
        best = int(ious.argmax())
        pairs.append([float(overlap(heat[best : best + 1] > 0, target)[0]), float(ious[best])])
    return pairs


SLOT_FIELDS = ("pred_masks", "heatmaps", "pred_logits", "slot_mask")


def _dice_loss(outputs: Any, place: int, targets: torch.Tensor, frame: Frame, side: int) -> float:
    one = slice(place, place + 1)
    _, parts = segmentation_loss(
        type(outputs)(**{name: outputs[name][one] for name in SLOT_FIELDS}),
        [targets],
        frame.valid_extent(outputs.reshaped_input_sizes[one], side),
    )
    return float(parts["mask_dice"])
