"""What a SegCompass model returns: masks, and everything that led to them.

The fields are documented under their names. It knows nothing about how they are made: see `modeling_segcompass.py`.
"""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .grounded_reading import Grounding


@dataclass
class SegCompassOutput(ModelOutput):
    """What a forward pass or `segment` returns. B samples, K = K_s slots, T tokens, M concepts, an h x w key grid.

    Example:
        outputs = model.segment(**processor(images=image, text="the mug nearest the sink"))
        confidences = outputs.pred_logits.sigmoid()                     # (B, K)
        heaviest = outputs.concept_indices[0, outputs.concept_weights[0, 0].argmax()]
    """

    loss: torch.Tensor | None = None
    """language loss, a scalar, when labels were given."""
    loss_dict: dict | None = None
    """the parts of `loss` by name, detached."""
    logits: torch.Tensor | None = None
    """float (B, T, vocabulary)."""
    past_key_values: object | None = None
    """the MLLM's key-value cache."""
    hidden_states: tuple | None = None
    """the MLLM's hidden states, when `output_hidden_states=True`, as keyword or in the configuration."""
    pred_masks: torch.Tensor | None = None
    """float (B, K, 4h, 4w), mask logits on F_enc's square frame."""
    pred_logits: torch.Tensor | None = None
    """float (B, K), confidence logits c_k."""
    heatmaps: torch.Tensor | None = None
    """float (B, K, h, w), heatmap logits H_k."""
    slot_mask: torch.Tensor | None = None
    """bool (B, K), True where the slot's concentration token was found in the response."""
    concept_indices: torch.Tensor | None = None
    """long (B, M), the SAE features that became concept tokens."""
    concept_values: torch.Tensor | None = None
    """float (B, M), their values h_j, the maximum over tokens (grounded: over patches); 0 marks padding."""
    concept_weights: torch.Tensor | None = None
    """float (B, K, M), how much each concept weighs in each slot; a slot's weights sum to 1 (grounded: unless they were
    steered, or one of the two groups has no concept that fires)."""
    concept_activations: torch.Tensor | None = None
    """float (B, T, M), h_j at each token (grounded: at patches and the conclusion's words, nothing else is read)."""
    grounding: Grounding | None = None
    """with `concept_reading="grounded"`: the contributions whose sum the heatmaps are, and the words behind them."""
    token_types: torch.Tensor | None = None
    """long (B, T), IMAGE, INSTRUCTION or RESPONSE of `token_layout`; with concepts."""
    patch_boxes: torch.Tensor | None = None
    """float (B, P, 4), which part of the image each image token shows: (left, top, right, bottom) in fractions of its
    width and height, without area where it shows none; with concepts."""
    sequences: torch.Tensor | None = None
    """long (B, T), prompt and response; `segment` adds the last token it wrote."""
    prompt_length: int | None = None
    """number of prompt tokens (padding included) in `sequences`."""
    reshaped_input_sizes: torch.Tensor | None = None
    """long (B, 2), (H, W) of the image inside F_enc's frame."""
    erased: object | None = None
    """SegCompassOutput decoded without the heaviest concepts, with `num_erased_concepts`."""
    erased_slots: torch.Tensor | None = None
    """bool (B, K), the slots whose heaviest concepts `erased` lacks."""
    log_probs: torch.Tensor | None = None
    """float (B, T - 1), log-probabilities of the labels, with `fused_lm_head=True`."""
    entropy: torch.Tensor | None = None
    """float (B, T - 1), with `fused_lm_head=True`."""
    aux_loss: torch.Tensor | None = None
    """kept for trainers that ask for a router loss; always None."""
    attentions: tuple | None = None
    """the MLLM's attention weights, when `output_attentions=True`, as keyword or in the configuration."""
