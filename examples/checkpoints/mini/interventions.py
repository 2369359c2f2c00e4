"""Interventions on what a mask is made of: factors on concepts, queries of one source, the heaviest concepts erased."""

from collections.abc import Mapping
from typing import Any

import torch

QUERY_SOURCES = ("both", "tokens", "concepts")


def scale_vector(
    concept_scale: Mapping[int, float] | torch.Tensor | None, z: torch.Tensor, d_sae: int
) -> torch.Tensor | None:
    """A concept's factor for each feature of the SAE: 0 ablates it, below 1 weakens it, above 1 steers towards it.

    Args:
        concept_scale: {feature index: factor on h_j}, or all factors, float (d_sae,) or (B, d_sae), or None.
        z: float (B, T, d_π), for batch size, dtype and device.
        d_sae: the number of features.

    Returns:
        float (d_sae,) or (B, d_sae), 1 where nothing is changed; None when nothing is.

    Raises:
        ValueError: factors of another shape, negative or not finite; an index out of range.
    """
    if isinstance(concept_scale, torch.Tensor):
        if concept_scale.shape not in ((d_sae,), (len(z), d_sae)):
            raise ValueError(
                f"concept_scale has shape {tuple(concept_scale.shape)}; it holds a factor of each of the "
                f"{d_sae} concepts, ({d_sae},) or ({len(z)}, {d_sae}), or is a dict {{index: factor}}."
            )
        if not (concept_scale.isfinite() & (concept_scale >= 0)).all():
            raise ValueError("concept_scale holds factors that are negative or not finite; use 0 or more.")
        return concept_scale.to(z.device, z.dtype)
    if not concept_scale:
        return None
    scale = z.new_ones(d_sae)
    for index, factor in concept_scale.items():
        if not 0 <= index < d_sae:
            raise ValueError(f"concept {index} is out of range; this SAE has concepts 0 to {d_sae - 1}.")
        if not 0 <= factor < float("inf"):
            raise ValueError(f"the factor of concept {index} is {factor}; it must be finite and at least 0.")
        scale[index] = factor
    return scale


@torch.no_grad()
def without_heaviest(output: Any, count: int, d_sae: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors that switch off each confident slot's heaviest concepts (of the most confident slot, when none is).

    Args:
        output: SegCompassOutput whose queries were built from concepts.
        count: how many concepts of each slot.
        d_sae: the number of the SAE's features.

    Returns:
        tuple: factors, float (B, d_sae), 0 or 1, and the slots they were taken from, bool (B, K_s).

    Raises:
        ValueError: the output has no concepts.
    """
    if output.concept_weights is None:
        raise ValueError("num_erased_concepts needs concepts; use query_source='both' or 'concepts'.")
    confidence = output.pred_logits.masked_fill(~output.slot_mask, float("-inf"))
    slots = (confidence >= 0) | (confidence == confidence.amax(1, keepdim=True))
    slots = slots & output.slot_mask  # (B, K_s)
    heaviest = output.concept_weights.topk(min(count, output.concept_weights.shape[-1]), dim=-1).indices
    # from places among the M concepts to features of the SAE
    heaviest = output.concept_indices[:, None].expand_as(output.concept_weights).gather(2, heaviest)  # (B, K_s, count)
    erased = torch.zeros(*slots.shape, d_sae, device=slots.device)  # (B, K_s, d_sae), 1 = erase
    erased.scatter_(2, heaviest, slots[..., None].expand_as(heaviest).to(erased.dtype))
    return 1 - erased.amax(1), slots


def kept_sources(
    query_source: str, like: torch.Tensor, dropout: float = 0.0
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Which of e_k and r_k enter each sample's queries.

    Args:
        query_source: one of QUERY_SOURCES.
        like: float (B, ...), for batch size, dtype and device.
        dropout: probability that a sample's e_k is left out, with "both" only.

    Returns:
        tuple: for e_k and for r_k, float (B,), 0 = left out; None = kept in every sample.
    """
    batch = len(like)
    if query_source != "both":
        kept = like.new_full((batch,), 1.0)
        return (kept, kept * 0) if query_source == "tokens" else (kept * 0, kept)
    if dropout > 0:
        return (torch.rand(batch, device=like.device) >= dropout).to(like.dtype), None
    return None, None
