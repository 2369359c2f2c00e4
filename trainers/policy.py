"""Which parts of a SegCompass model learn."""

import re
from typing import Any

import torch

from segcompass.modeling_segcompass.backbone import backbone_of

from .optimization import ROWS_HOOKS, segmentation_modules


def freeze(
    model: Any,
    train_below_sae_layer: bool = False,
    train_vision_tower: bool = False,
    train_image_encoder: bool = False,
) -> None:
    """Freeze all but what is to learn: segmentation modules, decoder blocks above the SAE's layer, LM head.

    What an earlier call froze is free again first, so that a model can go through stages. The SAE and the positional
    code stay frozen always.

    Args:
        model: a SegCompassModel.
        train_below_sae_layer: also train what the SAE's input is made of, from which the SAE then drifts: the
            projector, the decoder blocks 1 ... L, and the embeddings. Without it the embeddings' rows of `</think>` and
            of the concentration token learn all the same, and no other row moves: the matrix sees no weight decay.
            Where the LM head is the same matrix, the row of `<think>` learns too, or it would never be written.
        train_vision_tower: also train the MLLM's vision tower.
        train_image_encoder: also train the image encoder F_enc.
    """
    model.requires_grad_(True)
    embeddings = model.get_input_embeddings()
    for hook in embeddings.__dict__.pop(ROWS_HOOKS, ()):
        hook.remove()
    model.freeze_encoders()
    model.image_encoder.requires_grad_(train_image_encoder)
    backbone = backbone_of(model)
    vision = backbone.vision_names(model.mllm)
    for name, weight in model.mllm.named_parameters():
        if name.startswith(vision):
            weight.requires_grad_(train_below_sae_layer)  # the projector, and what else lies between
    backbone.vision_tower(model.mllm).requires_grad_(train_vision_tower)  # with the projector, where it is a part of it
    if train_below_sae_layer:
        return
    for block in backbone.blocks(model.mllm)[: model.config.sae_config.layer]:
        block.requires_grad_(False)
    tokens = torch.tensor([model.config.think_end_id, model.config.ref_token_id])

    def detach_others(module, args, output):  # not a hook on the weight, which sharding replaces
        if torch.is_grad_enabled():
            learned = torch.isin(args[0], tokens.to(args[0].device))[..., None]
            return torch.where(learned, output, output.detach())

    hooks: list[Any] = [embeddings.register_forward_hook(detach_others)]
    setattr(embeddings, ROWS_HOOKS, hooks)
    if is_tied(model):
        rows = torch.zeros(len(embeddings.weight), 1)
        rows[learned_rows(model)] = 1
        hooks.append(embeddings.weight.register_hook(lambda gradient: gradient * rows.to(gradient)))


def is_tied(model: Any) -> bool:
    """Whether the MLLM's embedding and LM head are one matrix, with or without adapters around them."""
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    embedding, head = (getattr(part, "original_module", part) for part in parts)
    return embedding.weight is head.weight


def learned_rows(model: Any) -> list[int]:
    """The rows of the embeddings that learn where the others do not.

    Args:
        model: a SegCompassModel.

    Returns:
        ids of `</think>` and of the concentration token; where the LM head is the same matrix, also of `<think>`.

    Raises:
        ValueError: the configuration does not know `<think>`, which must be learned.
    """
    config = model.config
    rows = [config.think_end_id, config.ref_token_id]
    if not is_tied(model):
        return rows  # the head, which writes `<think>`, is trained whole
    if config.think_id is None:
        raise ValueError(
            "config.think_id is None, so that the row of <think> would not learn in this MLLM, whose embedding and LM "
            "head are one matrix; set model.config.think_id = processor.think_id."
        )
    return [config.think_id, *rows]


def lora_config(model: Any, **settings: Any) -> Any:
    """PEFT's LoraConfig with everything that must learn beside the adapters.

    Adapters go on the language model's linear layers. The segmentation modules and the LM head are trained whole, and
    so are the embedding rows of `</think>` and the concentration token. Where embedding and LM head are one matrix, its
    rows of these two and of `<think>` are trained instead of the head. Checkpoints then hold adapters only:
    `PeftModel.from_pretrained(model, folder).merge_and_unload().save_pretrained(out)` makes a SegCompass folder.

    Args:
        model: the SegCompassModel to be adapted.
        **settings: LoraConfig's fields (`r`, `lora_alpha`, `target_modules`, ...), which win over these.

    Returns:
        LoraConfig: for `get_peft_model` or a trainer's `peft_config`.
    """
    from peft import LoraConfig

    matrix = model.get_input_embeddings()
    embeddings = next(name.rpartition(".")[2] for name, module in model.named_modules() if module is matrix)
    defaults = {
        "target_modules": backbone_of(model).lora_targets(model.mllm),
        "modules_to_save": [*segmentation_modules(model), *([] if is_tied(model) else ["lm_head"])],
        "trainable_token_indices": {embeddings: learned_rows(model)},  # PEFT ties the head to them, if it was tied
    }
    return LoraConfig(**{**defaults, **settings})


def is_quantized(model: Any) -> bool:
    """Whether the MLLM's weights are of 4 or 8 bits; then only adapters can be trained."""
    return getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)


def restore_masters(model: torch.nn.Module, trained: dict[str, torch.Tensor]) -> None:
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
