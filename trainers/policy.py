"""Which parts of a SegCompass model learn."""


def freeze(model, below_sae_layer=True, encoders=True):
    """Set `requires_grad` for training; the SAE and the positional code stay frozen always.

    Args:
        model: a SegCompassModel.
        below_sae_layer: freeze the decoder blocks 1 ... L whose output the SAE reads, so that it keeps fitting. The
            embeddings, among them the concentration token's row, learn in any case.
        encoders: freeze the MLLM's vision tower and SAM's encoder.
    """
    model.requires_grad_(True)
    model.freeze_encoders()
    model.sam.requires_grad_(not encoders)
    core = model.mllm.model
    vision = core.vision_tower if hasattr(core, "vision_tower") else core.visual
    vision.requires_grad_(not encoders)
    if below_sae_layer:
        for block in core.language_model.layers[: model.config.sae_config.layer]:
            block.requires_grad_(False)
