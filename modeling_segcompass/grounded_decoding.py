"""From hidden states to masks in the grounded read-out, in the order of its formulas: ĥ, α, t, s, w, H_k, A, F_dec.

`decode_grounded` is what `SegCompassModel.decode_masks` runs with `concept_reading="grounded"`; `lost_without` decodes
a mask again without each of its concepts. The formulas are in `grounded_reading.py`, steering in `interventions.py`.
Knows nothing about generation, training or names of concepts beyond those a caller steers by.
"""

from collections.abc import Mapping
from typing import Any

import torch

from .finite import refuse_non_finite
from .grounded_reading import DECODER_CONFIDENCE, Grounding
from .interventions import steer
from .outputs import SegCompassOutput
from .patch_boxes import boxes_of_tokens, has_area
from .states import ReasoningStates
from .token_layout import IMAGE, conclusion_mask, find_slots, gather_positions, token_types


def decode_grounded(
    model: Any,
    states: ReasoningStates,
    concept_scale: Mapping[int | str, float] | torch.Tensor | None = None,
    concept_add: Mapping[int | str, float] | None = None,
    concept_replace: Mapping[int | str, int | str] | None = None,
) -> SegCompassOutput:
    """From hidden states to masks, by the concepts' own places: the grounded form of `decode_masks`.

    Args:
        model: a SegCompassModel whose read-out is grounded.
        states: hidden states and image keys, with or without `patch_boxes`.
        concept_scale: see `SegCompassModel.decode_masks`.
        concept_add: see `SegCompassModel.decode_masks`.
        concept_replace: see `SegCompassModel.decode_masks`.

    Returns:
        SegCompassOutput: with `grounding`.

    Raises:
        ValueError: a sample without image tokens, steering that cannot be followed; NaN or infinity in masks.
    """
    reading, config = model.grounded_reading, model.config
    ids, d_sae = states.input_ids, config.sae_config.d_sae
    labels = model.labels_for(concept_scale, concept_add, concept_replace)
    steering = steer(concept_scale, concept_add, concept_replace, states.z, d_sae, labels)
    _, slot_mask = find_slots(ids, states.response_mask, config)  # (B, K_s)

    # what is read: the words of the conclusion, and the patches
    types = token_types(ids, states.response_mask, config.image_token_id)  # (B, T)
    conclusion = conclusion_mask(ids, states.attention_mask, states.response_mask, config)
    word_positions, word_mask = gather_positions(conclusion & (types != IMAGE))  # (B, R)
    given = states.patch_boxes
    if given is None:
        given = model.boxes_without_processor({"input_ids": ids}, states.reshaped_input_sizes)
    boxes = boxes_of_tokens(given, types == IMAGE)  # (B, T, 4)
    patch_positions, is_patch = gather_positions(has_area(boxes) & states.attention_mask.bool())  # (B, P)
    boxes = _rows_of(boxes, patch_positions) * is_patch[..., None]  # (B, P, 4)
    patch_xy, patch_size, patch_mask = config.frame.place_boxes(boxes, states.reshaped_input_sizes)
    if not patch_mask.any(1).all():
        raise ValueError(
            "a sample has no image token, and the grounded read-out is made of what image tokens show; give each "
            "sample one image."
        )

    # ĥ, α, t, s, w, H_k, c_k
    indices, confidences, activations, account = reading.ground(
        model.sae,
        _rows_of(states.z, word_positions),
        _rows_of(states.last_hidden, word_positions),
        word_mask,
        _rows_of(states.z, patch_positions),
        patch_mask,
        patch_xy,
        steering,
    )

    # K, A, H_k in the image encoder's grid
    dtype = reading.concept_bias.dtype
    keys = states.image_embeddings.to(dtype).expand(len(ids), -1, -1, -1)  # type: ignore[union-attr]  # (B, d_k, h, w)
    key_positions = model.key_positions(keys.shape[-2:]).to(dtype)  # (1, d_k, h, w)
    cell_mask = model.cell_mask(keys, states.reshaped_input_sizes)  # (B, h, w)
    upsampling = reading.upsampling(keys, patch_xy, patch_size, patch_mask)  # (B, h, w, P)
    heatmaps = reading.to_keys(account["patch_heatmaps"], upsampling).to(dtype)  # (B, K_s, h, w)

    # M̂ = F_dec(K, H_k); the confidence says whether a slot counts, not what it shows
    shown = torch.full_like(confidences, DECODER_CONFIDENCE)
    masks = model.mask_decoder(keys, key_positions, heatmaps, shown, cell_mask)  # (B, K_s, 4h, 4w)
    refuse_non_finite({"heatmaps": heatmaps, "pred_logits": confidences, "pred_masks": masks}, model)
    places = torch.cat([word_positions, patch_positions], 1)[..., None].expand_as(activations)  # (B, R + P, M)
    at_tokens = activations.new_zeros(*ids.shape, indices.shape[1])  # (B, T, M)
    weighs = account["weights"].detach().amax(1) > 0  # (B, M)
    return SegCompassOutput(
        pred_masks=masks,
        pred_logits=confidences,
        heatmaps=heatmaps,
        slot_mask=slot_mask,
        concept_indices=indices,
        concept_values=activations[:, word_positions.shape[1] :].amax(1) * weighs,
        concept_weights=account["weights"],
        concept_activations=at_tokens.scatter_add(1, places, activations),
        grounding=Grounding(patch_xy=patch_xy, upsampling=upsampling, word_positions=word_positions, **account),
        token_types=types,
        patch_boxes=given,
        sequences=ids,
        reshaped_input_sizes=states.reshaped_input_sizes,
    )


@torch.no_grad()
def lost_without(model: Any, outputs: Any, slot: int, sample: int, image_embeddings: torch.Tensor) -> dict[int, float]:
    """What a grounded slot's mask loses when one of its concepts is taken out of the sum, and nothing put in.

    Args:
        model: the SegCompassModel that made them.
        outputs: SegCompassOutput of a grounded read-out.
        slot: k, from 0.
        sample: its place in the batch.
        image_embeddings: float (B, d_k, h, w) or (1, d_k, h, w) that the masks were decoded with.

    Returns:
        {feature index: share of the mask's pixels that are gone, in [0, 1]}; 0 where there was no mask.

    Raises:
        ValueError: outputs of another read-out.
    """
    grounding = outputs.grounding
    if grounding is None:
        raise ValueError(
            f"these outputs are not grounded (concept_reading is {model.config.concept_reading!r}), so their "
            "heatmap is no sum; decode again with decode_masks(..., concept_scale={index: 0}) and compare."
        )
    columns = grounding.weights[sample, slot].nonzero()[:, 0]  # (n,)
    if not len(columns):  # all of its concepts are switched off
        return {}
    heat = outputs.heatmaps[sample, slot]  # (h, w)
    kept = heat - grounding.on_keys(sample, slot)[columns].to(heat.dtype)  # (n, h, w)
    keys = image_embeddings[sample : sample + 1] if len(image_embeddings) > 1 else image_embeddings
    keys = keys.to(heat.device, heat.dtype)
    sizes = outputs.reshaped_input_sizes
    cell_mask = model.cell_mask(keys, None if sizes is None else sizes[sample : sample + 1])
    shown = heat.new_full((1, len(kept)), DECODER_CONFIDENCE)
    positions = model.key_positions(keys.shape[-2:]).to(heat.dtype)
    masks = model.mask_decoder(keys, positions, kept[None], shown, cell_mask)[0] > 0  # (n, 4h, 4w)
    whole = (outputs.pred_masks[sample, slot] > 0) & cell_mask[0].repeat_interleave(4, 0).repeat_interleave(4, 1)
    gone = (whole & ~masks).flatten(1).sum(1) / whole.sum().clamp_min(1)
    return dict(zip(outputs.concept_indices[sample, columns].tolist(), gone.tolist(), strict=True))


def _rows_of(values, positions):
    """The tokens at these positions: (B, T, ...) and long (B, N) -> (B, N, ...)."""
    rows = torch.arange(len(values), device=values.device)[:, None]
    return values[rows, positions]
