"""What `--use_peft` and `--load_in_4bit` ask for, the same in both trainings that have them.

The options are those of TRL's ModelConfig. Knows nothing about recipes or data.
"""

from pathlib import Path
from typing import Any

import torch
from trl import ModelConfig, get_quantization_config

from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.trainers.policy import lora_config


def load_for_training(path: str | Path, options: ModelConfig, bf16: bool) -> SegCompassModel:
    """A SegCompass model with float32 weights, its MLLM in 4 or 8 bits where that is asked for.

    Args:
        path: folder or Hub id.
        options: the command's.
        bf16: whether training computes in bfloat16.

    Returns:
        the model.
    """
    quantization = get_quantization_config(options)
    if quantization is not None and options.load_in_4bit and bf16:
        quantization.bnb_4bit_compute_dtype = torch.bfloat16  # TRL takes the weights' dtype, which is float32 here
    model: Any = SegCompassModel.from_pretrained(path, dtype="float32", quantization_config=quantization)
    return model


def adapters_for(model: SegCompassModel, processor: SegCompassProcessor, options: ModelConfig) -> Any:
    """PEFT's configuration of the adapters that are asked for.

    Args:
        model: what is to be adapted; one that was saved before `<think>`'s id was kept is told it.
        processor: the model's.
        options: the command's.

    Returns:
        LoraConfig, or None without `use_peft`.
    """
    if not options.use_peft:
        return None
    if model.config.think_id is None:
        model.config.think_id = processor.think_id
    chosen = {"target_modules": options.lora_target_modules} if options.lora_target_modules else {}
    return lora_config(
        model, r=options.lora_r, lora_alpha=options.lora_alpha, lora_dropout=options.lora_dropout, **chosen
    )
