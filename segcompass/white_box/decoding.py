"""Masks decoded again from kept states, with some of their concepts and no others.

`model.reason` generates once and keeps what `model.decode_masks` takes; here masks are decoded from it as often as an
examination needs. What is taken away is not replaced by the next concept in line. Needs no trainer, no processor and
no data set.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from segcompass.modeling_segcompass import SegCompassModel, SegCompassOutput
from segcompass.modeling_segcompass.states import ReasoningStates


def single_sample(states: ReasoningStates, sample: int) -> ReasoningStates:
    """The states of one sample; embeddings of an image that all questions share stay as they are.

    Args:
        states: of a batch.
        sample: its place in the batch.

    Returns:
        States of a batch of one.

    Raises:
        ValueError: there is no such sample.
    """
    batch = len(states.input_ids)
    if not 0 <= sample < batch:
        raise ValueError(f"sample {sample} is out of range; these states hold samples 0 to {batch - 1}.")
    return states.rows([sample])


@torch.no_grad()
def decode(
    model: SegCompassModel,
    states: ReasoningStates,
    query_source: str = "both",
    concept_scale: torch.Tensor | None = None,
) -> SegCompassOutput:
    """Masks from states once more, under other factors on the concepts.

    Args:
        model: in evaluation mode.
        states: of a batch.
        query_source: see `decode_masks`.
        concept_scale: float (B, d_sae), factors on h_j; None leaves them as they are.

    Returns:
        The decoded masks with their provenance.
    """
    return model.decode_masks(**states._asdict(), concept_scale=concept_scale, query_source=query_source)


def decode_with(
    model: SegCompassModel,
    states: ReasoningStates,
    indices: torch.Tensor,
    kept: Sequence[np.ndarray],
    slot: int,
    query_source: str = "both",
    batch_size: int = 32,
) -> torch.Tensor:
    """One slot's masks with nothing but some of its concepts.

    Args:
        model: in evaluation mode.
        states: of a single sample.
        indices: long (M,), the sample's concepts.
        kept: V integer arrays, places in `indices`: the concepts that each variant keeps.
        slot: k.
        query_source: see `decode_masks`.
        batch_size: variants decoded at a time.

    Returns:
        bool (V, 4h, 4w), on the frame of the mask logits.
    """
    masks = []
    for start in range(0, len(kept), batch_size):
        chosen = kept[start : start + batch_size]
        scale = states.z.new_zeros(len(chosen), model.config.sae_config.d_sae)  # (v, d_sae) 1 = keep
        for row, places in enumerate(chosen):
            scale[row, indices[torch.as_tensor(np.array(places), device=indices.device)]] = 1
        rows: dict[str, Any] = {  # views of the one sample, no copies
            name: value.expand(len(chosen), *value.shape[1:])
            for name, value in states._asdict().items()
            if value is not None
        }
        outputs: Any = decode(model, states._replace(**rows), query_source, scale)
        masks.append(outputs.pred_masks[:, slot] > 0)  # (v, 4h, 4w)
    return torch.cat(masks)


def overlap(masks: torch.Tensor, target: torch.Tensor) -> np.ndarray:
    """IoU of masks with a target; 1 where both are empty.

    Args:
        masks: bool (V, H, W).
        target: bool (H, W).

    Returns:
        float (V,).
    """
    both = (masks & target).flatten(1).sum(1)  # (V,) pixels
    either = (masks | target).flatten(1).sum(1)
    return torch.where(either == 0, 1.0, both / either.clamp_min(1)).double().cpu().numpy()
