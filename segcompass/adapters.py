"""What `--use_peft` and `--load_in_4bit` ask for, the same in both trainings that have them.

The options are those of TRL's ModelConfig. Knows nothing about recipes or data.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from trl import ModelConfig, get_quantization_config

from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.trainers.adapter_base import trained_on, weights_of
from segcompass.trainers.policy import lora_config

LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora")
FOLLOWED: tuple[str, ...] = ("attn_implementation", "use_peft", *LORA, "load_in_8bit", "load_in_4bit")
FOLLOWED += ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")
"""Options of TRL's ModelConfig that the commands follow."""


def check_model_options(given: ModelConfig) -> None:
    """Refuse options of TRL's ModelConfig that would change nothing here, or cannot be.

    Args:
        given: the command's.

    Raises:
        ValueError: naming the option.
    """
    usual = ModelConfig()
    for option in fields(ModelConfig):
        name, value = option.name, getattr(given, option.name)
        if value == getattr(usual, name):
            continue
        if name not in FOLLOWED:
            raise ValueError(
                f"{name}={value!r} is not followed: the model is that of --model, or made of the backbones, in "
                "float32, and its adapters are those of segcompass.trainers.policy.lora_config. Leave it out."
            )
        if name in LORA and not given.use_peft:
            raise ValueError(f"{name}={value!r} is given without use_peft, so there are no adapters; add --use-peft.")
    if (given.load_in_4bit or given.load_in_8bit) and not given.use_peft:
        raise ValueError("weights of 4 or 8 bits cannot be trained; add --use-peft, or leave out --load-in-4bit.")


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


def check_base(adapters: Path, model: str) -> None:
    """Refuse a model that adapters were not trained on: merged into other weights they give garbage.

    Prints a line where it cannot be told, because nobody noted the weights, or these are not of a signed folder.

    Args:
        adapters: their folder.
        model: folder or Hub id.

    Raises:
        ValueError: its weights are others than those that the adapters were trained on.
    """
    name, weights = trained_on(adapters)
    given = weights_of(model)
    if weights is None or given is None:
        if name != model:
            print(f"{adapters} were trained on {name or 'an unnamed model'}; whether {model} is that one is not known.")
    elif weights != given:
        raise ValueError(
            f"{adapters} were trained on {name} as it was then, and {model} has other weights, into which they do not "
            "fit; pass --model with the folder that the training began from."
        )


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
    chosen: dict[str, Any] = {"target_modules": options.lora_target_modules} if options.lora_target_modules else {}
    chosen |= {"use_rslora": options.use_rslora, "use_dora": options.use_dora}
    return lora_config(
        model, r=options.lora_r, lora_alpha=options.lora_alpha, lora_dropout=options.lora_dropout, **chosen
    )
