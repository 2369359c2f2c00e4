"""Joint training: GRPO on the reasoning and supervised losses on the masks, one backward pass (Eq. 6).

    segcompass train grpo --config mini/grpo
    accelerate launch -m segcompass train grpo --config RECIPE.yaml
    accelerate launch -m segcompass train grpo --config RECIPE.yaml --use-peft --lora-r 64
    accelerate launch -m segcompass train grpo --config RECIPE.yaml --use-peft --load-in-4bit      # QLoRA

A recipe is a YAML file, or a name that `segcompass recipes` lists; options replace its values. Repeat the command to
resume an interrupted run from its last checkpoint.
"""

from dataclasses import dataclass, field

from trl import ModelConfig

from segcompass.adapters import adapters_for, check_model_options, load_for_training
from segcompass.modeling_segcompass import SegCompassProcessor
from segcompass.recipes import parse_with_recipe
from segcompass.trainers import SegCompassGRPOConfig, SegCompassGRPOTrainer
from segcompass.trainers.checkpoints import alone_in_output, last_checkpoint

from . import options


@dataclass
class GRPOArguments:
    """What to train, on what."""

    model: str = field(metadata={"help": "SegCompass folder or Hub id, after cold start and with a trained SAE"})
    dataset: list | str | None = field(default="scenes", metadata={"help": options.MIXED_ROWS})
    split: str = field(default="train", metadata={"help": "split of the data set"})
    dataset_seed: int = field(default=0, metadata={"help": "seed of which rows are drawn, and of procedural scenes"})
    num_samples: int | None = field(
        default=10_000, metadata={"help": "how many rows, drawn by the seed; null takes all of them"}
    )
    eval_dataset: list | str | None = field(
        default=None,
        metadata={"help": "held-out rows that are segmented every eval_steps; their images are never trained on"},
    )
    eval_split: str = field(default="val", metadata={"help": "split of eval_dataset"})
    eval_num_samples: int = field(default=200, metadata={"help": "how many rows of it, drawn by the seed"})


def main(argv: list[str] | None = None) -> None:
    """Run the command with these options; None takes the process's own."""
    parser = options.recipe_parser("train grpo", __doc__, (GRPOArguments, SegCompassGRPOConfig, ModelConfig))
    arguments, training, extra = parse_with_recipe(parser, argv)
    check_model_options(extra)
    rows, held_out = options.training_rows(arguments, training)
    model = load_for_training(arguments.model, extra, training.bf16)
    processor = SegCompassProcessor.from_pretrained(arguments.model)
    if extra.attn_implementation:
        model.set_attn_implementation(extra.attn_implementation)
    trainer = SegCompassGRPOTrainer(
        model,
        args=training,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=processor,
        peft_config=adapters_for(model, processor, extra),
    )
    with alone_in_output(training):
        trainer.train(training.resume_from_checkpoint or last_checkpoint(training.output_dir))
        trainer.save_model()
