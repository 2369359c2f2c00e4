"""Which parts of a SegCompass model learn."""

import torch


def freeze(model, below_sae_layer=True, vision_tower=True, sam=True):
    """Set `requires_grad` for training; the SAE and the positional code stay frozen always.

    Args:
        model: a SegCompassModel.
        below_sae_layer: freeze what the SAE's input is made of, so that the SAE keeps fitting: the projector, the
            decoder blocks 1 ... L, and the embeddings but for the rows of `</think>` and the concentration token,
            which learn in any case (the other rows of a tied embedding still see weight decay).
        vision_tower: freeze the MLLM's vision tower.
        sam: freeze SAM's encoder.
    """
    model.requires_grad_(True)
    model.freeze_encoders()
    model.sam.requires_grad_(not sam)
    core = model.mllm.model
    vision = core.vision_tower if hasattr(core, "vision_tower") else core.visual
    vision.requires_grad_(not vision_tower)
    if not below_sae_layer:
        return
    if hasattr(core, "multi_modal_projector"):
        core.multi_modal_projector.requires_grad_(False)
    for block in core.language_model.layers[: model.config.sae_config.layer]:
        block.requires_grad_(False)
    embeddings = model.get_input_embeddings().weight
    learned = torch.zeros(len(embeddings), 1)
    learned[[model.config.think_end_id, model.config.ref_token_id]] = 1
    embeddings.register_hook(lambda gradient: gradient * learned.to(gradient))
