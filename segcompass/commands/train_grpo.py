"""Joint training: GRPO on the reasoning and supervised losses on the masks, one backward pass (Eq. 6).

    segcompass train grpo --config mini/grpo
    accelerate launch -m segcompass train grpo --config RECIPE.yaml
    accelerate launch -m segcompass train grpo --config RECIPE.yaml --use-peft --lora-r 64
    accelerate launch -m segcompass train grpo --config RECIPE.yaml --use-peft --load-in-4bit      # QLoRA

A recipe is a YAML file, or a name that `segcompass recipes` lists; options replace its values. Repeat the command to
resume an interrupted run from its last checkpoint.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from trl import ModelConfig, get_quantization_config

from segcompass.loaders import load_rows
from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.recipes import parse_with_recipe
from segcompass.trainers import SegCompassGRPOConfig, SegCompassGRPOTrainer
from segcompass.trainers.checkpoints import last_checkpoint
from segcompass.trainers.policy import lora_config

from . import options


@dataclass
class GRPOArguments:
    """What to train, on what."""

    model: str = field(metadata={"help": "SegCompass folder or Hub id, after cold start and with a trained SAE"})
    dataset: str = field(default="scenes", metadata={"help": options.TRAINING_ROWS})
    split: str = field(default="train", metadata={"help": "split of the data set"})
    dataset_seed: int = field(default=0, metadata={"help": "seed of the procedural scenes, ignored for other data"})
    num_samples: int = field(default=10_000, metadata={"help": "use only the first N rows"})


LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora")
FOLLOWED = ("attn_implementation", "use_peft", *LORA, "load_in_8bit", "load_in_4bit")
FOLLOWED += ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")
"""Options of TRL's ModelConfig that this command follows."""


def check_model_options(given: ModelConfig) -> None:
    """Refuse options of TRL's ModelConfig that would change nothing here. Raises ValueError."""
    usual = ModelConfig()
    for option in fields(ModelConfig):
        name, value = option.name, getattr(given, option.name)
        if value == getattr(usual, name):
            continue
        if name not in FOLLOWED:
            raise ValueError(
                f"{name}={value!r} is not followed: the model is the SegCompass folder or Hub id of --model, loaded in "
                "float32, and its adapters are those of segcompass.trainers.policy.lora_config. Leave it out."
            )
        if name in LORA and not given.use_peft:
            raise ValueError(f"{name}={value!r} is given without use_peft, so there are no adapters; add --use-peft.")


def main(argv: list[str] | None = None) -> None:
    """Run the command with these options; None takes the process's own."""
    parser = options.recipe_parser("train grpo", __doc__, (GRPOArguments, SegCompassGRPOConfig, ModelConfig))
    arguments, training, extra = parse_with_recipe(parser, argv)
    check_model_options(extra)
    quantization = get_quantization_config(extra)
    if quantization is not None and extra.load_in_4bit and training.bf16:
        quantization.bnb_4bit_compute_dtype = torch.bfloat16  # TRL takes the weights' dtype, which is float32 here
    model = SegCompassModel.from_pretrained(arguments.model, dtype="float32", quantization_config=quantization)
    if extra.attn_implementation:
        model.set_attn_implementation(extra.attn_implementation)
    adapters = None
    if extra.use_peft:
        chosen = {"target_modules": extra.lora_target_modules} if extra.lora_target_modules else {}
        chosen |= {"use_rslora": extra.use_rslora, "use_dora": extra.use_dora}
        adapters = lora_config(
            model, r=extra.lora_r, lora_alpha=extra.lora_alpha, lora_dropout=extra.lora_dropout, **chosen
        )
    trainer = SegCompassGRPOTrainer(
        model,
        args=training,
        train_dataset=load_rows(arguments.dataset, arguments.split, arguments.dataset_seed, arguments.num_samples),
        processing_class=SegCompassProcessor.from_pretrained(arguments.model),
        peft_config=adapters,
    )
    Path(training.output_dir).mkdir(parents=True, exist_ok=True)
    trainer.train(training.resume_from_checkpoint or last_checkpoint(training.output_dir))
    trainer.save_model()
