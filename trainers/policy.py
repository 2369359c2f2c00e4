"""Which parts of a SegCompass model learn."""

import re

import torch

LANGUAGE_LINEAR = r".*mllm\.model\.language_model\..*\.(q|k|v|o|gate|up|down)_proj"


def freeze(model, below_sae_layer=True, vision_tower=True, image_encoder=True):
    """Set `requires_grad` for training; the SAE and the positional code stay frozen always.

    Args:
        model: a SegCompassModel.
        below_sae_layer: freeze what the SAE's input is made of, so that the SAE keeps fitting: the projector, the
            decoder blocks 1 ... L, and the embeddings but for the rows of `</think>` and the concentration token,
            which learn in any case (the other rows of a tied embedding still see weight decay).
        vision_tower: freeze the MLLM's vision tower.
        image_encoder: freeze SAM's encoder.
    """
    model.requires_grad_(True)
    model.freeze_encoders()
    model.image_encoder.requires_grad_(not image_encoder)
    core = model.mllm.model
    vision = core.vision_tower if hasattr(core, "vision_tower") else core.visual
    vision.requires_grad_(not vision_tower)
    if not below_sae_layer:
        return
    if hasattr(core, "multi_modal_projector"):
        core.multi_modal_projector.requires_grad_(False)
    for block in core.language_model.layers[: model.config.sae_config.layer]:
        block.requires_grad_(False)
    embeddings = model.get_input_embeddings()
    tokens = torch.tensor([model.config.think_end_id, model.config.ref_token_id])

    def detach_others(module, args, output):  # not a hook on the weight, which sharding replaces
        if torch.is_grad_enabled():
            learned = torch.isin(args[0], tokens.to(args[0].device))[..., None]
            return torch.where(learned, output, output.detach())

    embeddings.register_forward_hook(detach_others)
    if model.get_output_embeddings().weight is embeddings.weight:
        rows = torch.zeros(len(embeddings.weight), 1)
        rows[tokens] = 1
        embeddings.weight.register_hook(lambda gradient: gradient * rows.to(gradient))


def lora_config(model, **settings):
    """PEFT's LoraConfig with everything that must learn beside the adapters.

    Adapters go on the language model's linear layers. The segmentation modules and the LM head are trained whole, and
    so are the embedding rows of `</think>` and the concentration token. Checkpoints then hold adapters only:
    `PeftModel.from_pretrained(model, folder).merge_and_unload().save_pretrained(out)` makes a SegCompass folder.

    Args:
        model: the SegCompassModel to be adapted.
        settings: LoraConfig's fields (`r`, `lora_alpha`, `target_modules`, ...), which win over these.

    Raises:
        ValueError: the MLLM's embedding and LM head are one matrix, whose rows cannot be trained beside adapters.
    """
    from peft import LoraConfig

    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        raise ValueError(
            "this MLLM's embedding and LM head are one matrix (tie_word_embeddings), so that adapters cannot "
            "leave the concentration token's rows free; train without adapters."
        )
    tokens = [model.config.think_end_id, model.config.ref_token_id]
    defaults = {
        "target_modules": LANGUAGE_LINEAR,
        "modules_to_save": ["query_codebook", "slot_mapper", "mask_decoder", "lm_head"],
        "trainable_token_indices": {"embed_tokens": tokens},
    }
    return LoraConfig(**{**defaults, **settings})


def is_quantized(model):
    """Whether the MLLM's weights are of 4 or 8 bits, which adapters only can train."""
    return getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)


def restore_masters(model, trained):
    """Give what learns beside a quantised MLLM its float32 weights back, unrounded: TRL casts it to bfloat16.

    Args:
        model: the PeftModel, after TRL's trainer took it.
        trained: {name: weight} of what it trained before that; {} if TRL made the adapters. What PEFT copied is then
            read off the originals, and LoRA's matrices, random or zero, are taken as they are.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or parameter.dtype != torch.bfloat16:
            continue
        value = trained.get(name, parameter)
        if not trained and ".modules_to_save." in name:
            value = model.get_parameter(re.sub(r"\.modules_to_save\.[^.]+\.", ".original_module.", name))
        elif not trained and ".trainable_tokens_delta." in name:
            value = model.get_buffer(name.replace("trainable_tokens_delta", "trainable_tokens_original"))
        parameter.data = value.detach().float().clone()
