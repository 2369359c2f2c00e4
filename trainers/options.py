"""Options of transformers' and TRL's configs that the trainers cannot honour: refused by name before the first step.

What is not listed works as transformers and TRL document it; `python -m pytest tests/trainers/test_trl_options.py
--all-options` tries it. Silence is neither, so an option that would be dropped without a word belongs here. A test
(`tests/trainers/test_every_option.py`) says of each field of both configs where it belongs, and notices new ones.
"""

from collections.abc import Mapping
from typing import Any

OPTIONS = {
    "remove_unused_columns": "the trainer reads image, instruction and masks from the rows",
    "label_smoothing_factor": "the loss is this trainer's own, and smooths no labels",
    "use_liger_kernel": "its fused loss passes over the forward that makes the masks",
    "torch_compile": "shapes change with every batch, and compiling did not end within minutes",
    "auto_find_batch_size": "it repeats a step with other batches after the first ran out of memory",
    "bf16_full_eval": "it would leave the weights that are trained rounded; with bf16=True evaluation runs in bf16 too",
    "fp16_full_eval": "it would leave the weights that are trained rounded; with fp16=True evaluation runs in fp16 too",
    "optim_target_modules": "it is for optimizers with parameter groups of their own, not the components' rates",
    "label_names": "the loss reads the labels that the trainer makes, under their own names",
}
"""{option: why} of both trainers; each is off by default."""

GRPO_OPTIONS = {
    "sync_ref_model": "the reference is a bare MLLM, not a second SegCompass model",
    "cast_lm_head_to_fp32": "the LM head belongs to model.mllm, which TRL does not look into",
    "model_init_kwargs": "the model is passed loaded; give these to SegCompassModel.from_pretrained",
    "router_aux_loss_coef": "the supported MLLMs have no experts to balance",
    "use_transformers_continuous_batching": "it leaves no hidden states to decode masks from",
    "chat_template_kwargs": "prompts would differ from those the model is used with; set them in the chat template",
    "data_seed": "TRL shuffles rows by seed",
    "train_sampling_strategy": "TRL repeats each prompt for its group; shuffle_dataset says in which order",
    "enable_jit_checkpoint": "it saves in the middle of a step, and rollouts are resumed at whole steps",
}
"""{option: why} of joint training."""

SAE_OPTIONS = {
    "label_smoothing_factor": "the loss is Eq. 7, and there are no labels",
    "per_device_train_batch_size": "a step's tokens are a batch of the dataset (tokens_per_batch of the command)",
    "auto_find_batch_size": "the dataset makes the batches",
    "train_sampling_strategy": "the dataset says in which order its batches come",
    "bf16_full_eval": "the SAE is evaluated as it is",
    "fp16_full_eval": "the SAE is evaluated as it is",
}
"""{option: why} of the training of sparse autoencoders."""

NEUTRAL: dict[str, tuple] = {
    "data_seed": (None,),
    "train_sampling_strategy": ("random",),
    "per_device_train_batch_size": (8,),
}
"""{option: values that change nothing}, where these are other than False, 0, None and empty."""

TRAINER_OPTIONS = {
    "quantization_config": "the model is passed loaded; give it to SegCompassModel.from_pretrained",
    "environment_factory": "a row's image and masks are the environment",
    "tools": "masks are decoded from the states of one response, not of several turns",
}
"""{argument of GRPOTrainer: why} for joint training."""

GENERATION_OPTIONS: dict[str, tuple[tuple, str]] = {
    "return_dict_in_generate": ((None, False), "the trainer takes the sequences themselves"),
    "max_length": ((None,), "max_completion_length sets how long a response may be"),
}
"""{key of generation_kwargs: (values that change nothing, why others are refused)}, beside those that masks cannot
follow (`modeling_segcompass.generation_options.NOT_FOLLOWED`)."""


def refuse_options(args: Any, options: Mapping[str, str]) -> None:
    """Refuse options that are set but cannot be honoured.

    Args:
        args: the settings.
        options: {option: why}; what an args has not is passed over.

    Raises:
        ValueError: naming the option, its value, why, and what to set.
    """
    for name, reason in options.items():
        value = getattr(args, name, None)
        harmless = NEUTRAL.get(name, ())
        if value not in harmless if harmless else value:
            neutral = harmless[0] if harmless else False if value is True else 0.0 if isinstance(value, float) else None
            raise ValueError(f"{name}={value!r} is not supported: {reason}. Set {name}={neutral!r}.")


def refuse_generation_options(kwargs: Mapping[str, Any] | None) -> None:
    """Refuse keys of `generation_kwargs` that the trainer cannot honour.

    Args:
        kwargs: `args.generation_kwargs`.

    Raises:
        ValueError: naming the key, its value and why.
    """
    for name, value in (kwargs or {}).items():
        neutral, reason = GENERATION_OPTIONS.get(name, ((value,), ""))
        if value not in neutral:
            raise ValueError(
                f"generation_kwargs sets {name}={value!r}, which is not supported: {reason}. Leave it out."
            )
