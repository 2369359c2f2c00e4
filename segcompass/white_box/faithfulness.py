"""Do the concepts that are said to have made a mask really make it? Take them away, or keep only them, and look.

A mask is measured with the concepts it was made of and no others. Needs no trainer, no processor and no data set;
`faithfulness_records` applies it to one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from segcompass.modeling_segcompass import SegCompassModel
from segcompass.modeling_segcompass.states import ReasoningStates

from .decoding import decode, decode_with, overlap, single_sample

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
    model: SegCompassModel,
    states: ReasoningStates,
    slot: int,
    sample: int = 0,
    target: Any | None = None,
    weights: Any | None = None,
    top: int = 5,
    draws: int = 8,
    fractions: Sequence[float] = FRACTIONS,
    query_source: str = "both",
    batch_size: int = 32,
    seed: int = 0,
) -> SlotFaithfulness:
    """Measure one slot of one sample.

    Args:
        model: SegCompassModel in evaluation mode.
        states: what `model.reason` returned with the sequences.
        slot: k.
        sample: its place in the batch.
        target: bool (4h, 4w) on the frame of the mask logits, or None for the slot's own mask.
        weights: float (M,), ranks the concepts in place of the model's own weights, to judge another attribution.
        top: how many concepts the comparison of the heaviest with random ones takes.
        draws: how often random ones are drawn.
        fractions: shares of the active concepts at which the curves are measured.
        query_source: see `decode_masks`.
        batch_size: variants decoded at a time.
        seed: of the random concepts.

    Returns:
        The measurements.

    Raises:
        ValueError: no concepts are active, or the slot's concentration token is missing.

    Example:
        sequences, states = model.reason(**inputs)
        measured = slot_faithfulness(model, states, slot=0)
        print(measured.full - measured.without_top, measured.full - measured.without_random)
    """
    states = single_sample(states, sample)  # a batch of one
    whole: Any = decode(model, states, query_source)
    if whole.concept_weights is None or not whole.slot_mask[0, slot]:
        raise ValueError(
            f"slot {slot} of sample {sample} has no mask made of concepts; choose a found slot, and query_source "
            "'both' or 'concepts'."
        )
    active = (whole.concept_values[0] > 0).nonzero()[:, 0].cpu().numpy()  # (A,) places among the M concepts
    if not len(active):
        raise ValueError(f"sample {sample} has no active concept, so there is nothing to take away.")
    weights = whole.concept_weights[0, slot] if weights is None else weights
    weights = torch.as_tensor(weights).detach().float().cpu().numpy()  # (M,)
    rng = np.random.default_rng(seed)
    heaviest = active[np.argsort(-weights[active], kind="stable")]  # (A,) heaviest first
    orders = {"weight": heaviest, "random": rng.permutation(active), "reverse": heaviest[::-1]}
    top = min(top, len(active))
    counts = [round(share * len(active)) for share in fractions]

    # the variants in one list: all concepts; the curves; without and with only the top, then random ones
    kept = [active]
    for order in ORDERS:
        kept += [orders[order][count:] for count in counts]
        kept += [orders[order][:count] for count in counts]
    kept += [heaviest[top:], heaviest[:top]]
    for _ in range(draws):
        drawn = rng.permutation(active)
        kept += [drawn[top:], drawn[:top]]
    masks = decode_with(model, states, whole.concept_indices[0], kept, slot, query_source, batch_size)  # (V, 4h, 4w)
    iou = overlap(masks, masks[0] if target is None else torch.as_tensor(target).to(masks.device))  # (V,)
    curves = iou[1 : 1 + 2 * len(ORDERS) * len(counts)].reshape(len(ORDERS), 2, len(counts))  # (3, 2, S)
    pairs = iou[1 + curves.size :].reshape(-1, 2)  # (1 + draws, 2) without, with only
    return SlotFaithfulness(
        full=float(iou[0]),
        deletion={order: curves[row, 0] for row, order in enumerate(ORDERS)},
        insertion={order: curves[row, 1] for row, order in enumerate(ORDERS)},
        without_top=float(pairs[0, 0]),
        without_random=float(pairs[1:, 0].mean()),
        only_top=float(pairs[0, 1]),
        only_random=float(pairs[1:, 1].mean()),
    )
