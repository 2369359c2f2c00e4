"""Do the concepts that are said to have made a mask really make it? Take them away, or keep only them, and look.

Masks are decoded again from the states that `model.reason` kept; nothing is generated twice. A mask is measured with
the concepts it was made of and no others: what is taken away is not replaced by the next concept in line. Needs no
trainer, no processor and no data set.
"""

from typing import NamedTuple

import numpy as np
import torch

ORDERS = ("weight", "random", "reverse")
FRACTIONS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)


class SlotFaithfulness(NamedTuple):
    """What interventions do to one slot's mask. S shares of concepts; all values are IoU with the target in [0, 1]."""

    full: float
    """with all its concepts."""
    deletion: dict[str, np.ndarray]
    """float (S,) for each of ORDERS: without the first share of the concepts."""
    insertion: dict[str, np.ndarray]
    """float (S,) for each of ORDERS: with nothing but the first share of the concepts."""
    without_top: float
    """without the `top` heaviest concepts; `full` minus this is their comprehensiveness."""
    without_random: float
    """without `top` random active concepts, mean of the draws."""
    only_top: float
    """with nothing but the `top` heaviest; `full` minus this is their sufficiency (small is good)."""
    only_random: float
    """with nothing but `top` random active concepts, mean of the draws."""


def slot_faithfulness(
    model,
    states,
    slot,
    sample=0,
    target=None,
    weights=None,
    top=5,
    draws=8,
    fractions=FRACTIONS,
    query_source="both",
    batch_size=32,
    seed=0,
) -> SlotFaithfulness:
    """Measure one slot of one sample.

    Args:
        model: SegCompassModel in evaluation mode; states: what `model.reason` returned with the sequences.
        slot: k; sample: its place in the batch.
        target: bool (4h, 4w) on the frame of the mask logits, or None for the slot's own mask.
        weights: float (M,), ranks the concepts in place of the model's own weights, to judge another attribution.
        top: how many concepts the top-and-random comparison takes; draws: how often random ones are drawn.
        fractions: shares of the active concepts at which the curves are measured.
        query_source: see `decode_masks`. batch_size: variants decoded at a time.

    Raises:
        ValueError: no concepts are active, or the slot's concentration token is missing.
    """
    states = single_sample(states, sample)
    whole = decode(model, states, query_source)
    if whole.concept_weights is None or not whole.slot_mask[0, slot]:
        raise ValueError(
            f"slot {slot} of sample {sample} has no mask made of concepts; choose a found slot, and query_source "
            "'both' or 'concepts'."
        )
    active = (whole.concept_values[0] > 0).nonzero()[:, 0].cpu().numpy()
    if not len(active):
        raise ValueError(f"sample {sample} has no active concept, so there is nothing to take away.")
    weights = whole.concept_weights[0, slot] if weights is None else weights
    weights = torch.as_tensor(weights).detach().float().cpu().numpy()
    rng = np.random.default_rng(seed)
    heaviest = active[np.argsort(-weights[active], kind="stable")]
    orders = {"weight": heaviest, "random": rng.permutation(active), "reverse": heaviest[::-1]}
    top = min(top, len(active))
    counts = [round(share * len(active)) for share in fractions]
    kept = [active]
    for order in ORDERS:
        kept += [orders[order][count:] for count in counts]
        kept += [orders[order][:count] for count in counts]
    kept += [heaviest[top:], heaviest[:top]]
    for _ in range(draws):
        drawn = rng.permutation(active)
        kept += [drawn[top:], drawn[:top]]
    masks = decode_with(model, states, whole.concept_indices[0], kept, slot, query_source, batch_size)
    iou = overlap(masks, masks[0] if target is None else torch.as_tensor(target).to(masks.device))
    curves = iou[1 : 1 + 2 * len(ORDERS) * len(counts)].reshape(len(ORDERS), 2, len(counts))
    pairs = iou[1 + curves.size :].reshape(-1, 2)
    return SlotFaithfulness(
        full=float(iou[0]),
        deletion={order: curves[row, 0] for row, order in enumerate(ORDERS)},
        insertion={order: curves[row, 1] for row, order in enumerate(ORDERS)},
        without_top=float(pairs[0, 0]),
        without_random=float(pairs[1:, 0].mean()),
        only_top=float(pairs[0, 1]),
        only_random=float(pairs[1:, 1].mean()),
    )


def single_sample(states, sample):
    """The states of one sample; embeddings of an image that all questions share stay as they are."""
    batch = len(states["input_ids"])
    if not 0 <= sample < batch:
        raise ValueError(f"sample {sample} is out of range; these states hold samples 0 to {batch - 1}.")
    return {
        name: value if value is None or len(value) == 1 else value[sample : sample + 1]
        for name, value in states.items()
    }


@torch.no_grad()
def decode(model, states, query_source="both", concept_scale=None):
    """Masks from states once more, under other factors on the concepts: SegCompassOutput."""
    return model.decode_masks(**states, concept_scale=concept_scale, query_source=query_source)


def decode_with(model, states, indices, kept, slot, query_source="both", batch_size=32):
    """One slot's masks with nothing but some of its concepts: bool (V, 4h, 4w).

    Args:
        states: of a single sample; indices: long (M,), its concepts; kept: V integer arrays, places in `indices`.
    """
    masks = []
    for start in range(0, len(kept), batch_size):
        chosen = kept[start : start + batch_size]
        scale = states["z"].new_zeros(len(chosen), model.config.sae_config.d_sae)
        for row, places in enumerate(chosen):
            scale[row, indices[torch.as_tensor(np.array(places), device=indices.device)]] = 1
        rows = {
            name: value if value is None else value.expand(len(chosen), *value.shape[1:])
            for name, value in states.items()
        }
        masks.append(decode(model, rows, query_source, scale).pred_masks[:, slot] > 0)
    return torch.cat(masks)


def overlap(masks, target):
    """IoU of bool masks (V, H, W) with a target (H, W): float array (V,); 1 where both are empty."""
    both = (masks & target).flatten(1).sum(1)
    either = (masks | target).flatten(1).sum(1)
    return torch.where(either == 0, 1.0, both / either.clamp_min(1)).double().cpu().numpy()


def area_under(curve, fractions=FRACTIONS):
    """Area under a curve over the share of concepts, by the trapezoid rule."""
    return float(np.trapezoid(curve, fractions))


def bootstrap(values, statistic, groups=None, resamples=2000, seed=0):
    """A statistic with its 95 % percentile interval.

    Args:
        values: float (N, ...), one row an observation; statistic: rows -> float.
        groups: (N,), rows of one group (slots of one scene) are drawn together; None = each row by itself.

    Returns:
        (estimate, low, high).
    """
    values = np.asarray(values, dtype=float)
    if not len(values):
        raise ValueError("there is nothing to resample: no mask was measured.")
    groups = np.arange(len(values)) if groups is None else np.unique(groups, return_inverse=True)[1]
    members = [np.flatnonzero(groups == group) for group in range(groups.max() + 1)]
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        picked = rng.integers(len(members), size=len(members))
        drawn.append(statistic(values[np.concatenate([members[group] for group in picked])]))
    known = np.array(drawn)[~np.isnan(drawn)]
    # whole resamples, none in between: a ratio may be infinite
    low, high = np.percentile(known, [2.5, 97.5], method="nearest") if len(known) else (np.nan, np.nan)
    return float(statistic(values)), float(low), float(high)
