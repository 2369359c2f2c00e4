"""Joint training: GRPO on the reasoning and supervised losses on the masks, one backward pass (Eq. 6).

    python examples/train_grpo.py --config examples/recipes/mini/grpo.yaml
    accelerate launch examples/train_grpo.py --config RECIPE.yaml
    accelerate launch examples/train_grpo.py --config RECIPE.yaml --use_peft --lora_r 64
    accelerate launch examples/train_grpo.py --config RECIPE.yaml --use_peft --load_in_4bit      # QLoRA

An interrupted run goes on from its last checkpoint when the command is repeated.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, TrlParser, get_quantization_config

from segcompass.loaders import load_rows
from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.trainers import SegCompassGRPOConfig, SegCompassGRPOTrainer
from segcompass.trainers.policy import lora_config


@dataclass
class ScriptArguments:
    """What to train, on what."""

    model: str = field(metadata={"help": "SegCompass folder or Hub id, after cold start and with a trained SAE"})
    dataset: str = field(default="scenes", metadata={"help": "'scenes' or a folder written by save_to_disk"})
    split: str = "train"
    dataset_seed: int = 0
    num_samples: int = 10_000


def main():
    parser = TrlParser((ScriptArguments, SegCompassGRPOConfig, ModelConfig))
    arguments, training, extra = parser.parse_args_and_config()
    quantization = get_quantization_config(extra)
    if extra.load_in_4bit and training.bf16:
        quantization.bnb_4bit_compute_dtype = torch.bfloat16  # TRL takes the weights' dtype, which is float32 here
    model = SegCompassModel.from_pretrained(arguments.model, dtype="float32", quantization_config=quantization)
    if extra.attn_implementation:
        model.set_attn_implementation(extra.attn_implementation)
    adapters = None
    if extra.use_peft:
        chosen = {"target_modules": extra.lora_target_modules} if extra.lora_target_modules else {}
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
    trainer.train(resume_from_checkpoint=get_last_checkpoint(training.output_dir))
    trainer.save_model()


if __name__ == "__main__":
    main()
