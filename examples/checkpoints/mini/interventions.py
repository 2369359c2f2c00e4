"""Interventions on what a mask is made of: factors on concepts, queries of one source, the heaviest concepts erased.

`Steering` is what concepts can be told besides: switched on, or replaced by others. It acts on the weights of grounded
slots, and, while the response is written, on the MLLM's hidden states.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from .concept_labels import concepts_named

QUERY_SOURCES = ("both", "tokens", "concepts")
MAX_ELEMENTS = 2**23  # about how many activations steering holds at once


def scale_vector(
    concept_scale: Mapping[int | str, float] | torch.Tensor | None,
    z: torch.Tensor,
    d_sae: int,
    labels: Mapping[int, str] | None = None,
) -> torch.Tensor | None:
    """A concept's factor for each feature of the SAE: 0 ablates it, below 1 weakens it, above 1 steers towards it.

    Args:
        concept_scale: {feature index or label: factor on h_j}, or all factors, float (d_sae,) or (B, d_sae), or None.
        z: float (B, T, d_π), for batch size, dtype and device.
        d_sae: the number of features.
        labels: {feature index: label}, for concepts named by their label.

    Returns:
        float (d_sae,) or (B, d_sae), 1 where nothing is changed; None when nothing is.

    Raises:
        ValueError: factors of another shape, negative or not finite; an index out of range; an unknown label.
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
    if concept_scale is not None and not isinstance(concept_scale, Mapping):
        raise ValueError(f"concept_scale is {concept_scale!r:.100}; give {{index or label: factor}}, or a tensor.")
    if not concept_scale:
        return None
    scale = z.new_ones(d_sae)
    for concept, factor in concept_scale.items():
        indices = concepts_named(concept, labels, d_sae)
        if not 0 <= factor < float("inf"):
            raise ValueError(f"the factor of concept {concept} is {factor}; it must be finite and at least 0.")
        scale[indices] = factor
    return scale


class Steering(NamedTuple):
    """What a user changes about concepts: replace first, then scale, then add. Made by `steer`.

    Example:
        steering = steer({"blue": 0}, None, {"box": "ball"}, like=z, d_sae=1024, labels=model.concept_labels)
        weights, strengths = steering.apply(weights, strengths, fires)
        steering.features_added  # how many more concepts may have a weight now
    """

    scale: torch.Tensor | None
    """float (d_sae,) or (B, d_sae), factors on the concepts' contributions."""
    add: list[tuple[list[int], float]]
    """features that get a weight, shared by those of them that fire on the image."""
    replace: list[tuple[list[int], list[int]]]
    """features whose weight goes to other features."""

    @property
    def features_added(self) -> int:
        """How many concepts may have a weight that had none."""
        return sum(len(new) for new, _ in self.add) + sum(len(new) for _, new in self.replace)

    def apply(
        self, weights: torch.Tensor, strengths: torch.Tensor, fires: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Change the weights; no other concept takes the place of one that is switched off.

        Args:
            weights: float (B, K, d_sae), w_kj.
            strengths: float (B, K, d_sae), t_kj, which the confidence reads.
            fires: bool (B, d_sae), the concepts that fire somewhere on the image.

        Returns:
            Weights and strengths under steering, same shapes. A label of several features shares its weight among those
            that fire on the image, or among all of them where none does.
        """
        weights, moved = weights.clone(), weights
        for old, new in self.replace:
            moved_weight = moved[..., old].sum(-1, keepdim=True)  # (B, K, 1)
            weights[..., old] -= moved[..., old]
            weights[..., new] += moved_weight * _shares(fires[:, new])[:, None]
        if self.scale is not None:
            scale = self.scale.to(weights.dtype)
            scale = scale if scale.dim() == 1 else scale[:, None]  # (d_sae,) or (B, 1, d_sae)
            weights, strengths = weights * scale, strengths * scale.to(strengths.dtype)
        for new, weight in self.add:
            weights[..., new] += weight * _shares(fires[:, new])[:, None]
        return weights, strengths

    @torch.no_grad()
    def on_states(self, sae: Any, z: torch.Tensor) -> torch.Tensor:
        """Change hidden states, so that the MLLM goes on as if its concepts fired otherwise.

        What the SAE leaves unexplained stays: only the difference between the changed and the found activations is
        decoded. A feature that takes over gets the greatest relative strength (activation / mean active activation) of
        those it replaces; what is added is in units of the mean active activation.

        Args:
            sae: the SparseAutoencoder of the layer that z comes from.
            z: float (B, T, d_π).

        Returns:
            float (B, T, d_π), of z's dtype.
        """
        usual = sae.mean_active_activation
        steered = z.clone()
        step = max(1, MAX_ELEMENTS // (len(z) * len(usual)))
        for start in range(0, z.shape[1], step):
            part = slice(start, start + step)
            h = sae.encode(z[:, part].to(sae.W_enc.device))  # (B, n, d_sae)
            changed = h.clone()
            for old, new in self.replace:
                strength = (h[..., old] / usual[old].clamp_min(1e-6)).amax(-1, keepdim=True)  # (B, n, 1)
                changed[..., old] = 0
                changed[..., new] = torch.maximum(changed[..., new], strength * usual[new])
            if self.scale is not None:
                changed *= self.scale if self.scale.dim() == 1 else self.scale[:, None]
            for new, weight in self.add:
                changed[..., new] += weight * usual[new]
            steered[:, part] += ((changed - h) @ sae.W_dec).to(z)
        return steered


def _shares(fires):
    """float (B, N): equal shares of the features that fire, or of all where none does; they sum to 1."""
    fires = fires | ~fires.any(-1, keepdim=True)
    return fires / fires.sum(-1, keepdim=True)


def steer(
    concept_scale: Mapping[int | str, float] | torch.Tensor | None,
    concept_add: Mapping[int | str, float] | None,
    concept_replace: Mapping[int | str, int | str] | None,
    like: torch.Tensor,
    d_sae: int,
    labels: Mapping[int, str] | None = None,
) -> Steering | None:
    """Check what a user asks for, and name its features.

    Args:
        concept_scale: {index or label: factor}, or all factors, see `scale_vector`; None leaves all.
        concept_add: {index or label: weight that every slot gets on top}; None adds none.
        concept_replace: {index or label: index or label that takes over its weight}; None replaces none.
        like: float (B, T, d_π), for batch size, dtype and device.
        d_sae: the number of features.
        labels: {feature index: label}.

    Returns:
        Steering, or None when nothing is asked for.

    Raises:
        ValueError: unknown labels, indices out of range, weights or factors that are negative or not finite, a concept
            that would replace itself.
    """
    scale = scale_vector(concept_scale, like, d_sae, labels)
    add = []
    for concept, weight in (concept_add or {}).items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"the weight to add for concept {concept} is {weight}; it must be finite and at least 0.")
        add.append((concepts_named(concept, labels, d_sae), float(weight)))
    replace = []
    for old, new in (concept_replace or {}).items():
        olds, news = concepts_named(old, labels, d_sae), concepts_named(new, labels, d_sae)
        if set(olds) & set(news):
            raise ValueError(f"concept {old} would be replaced by {new}, which is the same; name two concepts.")
        replace.append((olds, news))
    taken = [index for olds, _ in replace for index in olds]
    if len(taken) != len(set(taken)):
        raise ValueError("concept_replace names a concept twice (by index and by label); name each once.")
    return None if scale is None and not add and not replace else Steering(scale, add, replace)


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
    weights, heaviest = output.concept_weights.topk(min(count, output.concept_weights.shape[-1]), dim=-1)
    # from places among the M concepts to features of the SAE
    heaviest = output.concept_indices[:, None].expand_as(output.concept_weights).gather(2, heaviest)  # (B, K_s, count)
    erased = torch.zeros(*slots.shape, d_sae, device=slots.device)  # (B, K_s, d_sae), 1 = erase
    erased.scatter_(2, heaviest, (slots[..., None] & (weights > 0)).to(erased.dtype))
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
