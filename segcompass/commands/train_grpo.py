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
from segcompass.loaders import load_rows
from segcompass.modeling_segcompass import SegCompassProcessor
from segcompass.recipes import parse_with_recipe
from segcompass.trainers import SegCompassGRPOConfig, SegCompassGRPOTrainer
from segcompass.trainers.checkpoints import alone_in_output, last_checkpoint

from . import options


@dataclass
class GRPOArguments:
    """What to train, on what."""

    model: str = field(metadata={"help": "SegCompass folder or Hub id, after cold start and with a trained SAE"})
    dataset: str = field(default="scenes", metadata={"help": options.TRAINING_ROWS})
    split: str = field(default="train", metadata={"help": "split of the data set"})
    dataset_seed: int = field(default=0, metadata={"help": "seed of the procedural scenes, ignored for other data"})
    num_samples: int = field(default=10_000, metadata={"help": "use only the first N rows"})


def main(argv: list[str] | None = None) -> None:
    """Run the command with these options; None takes the process's own."""
    parser = options.recipe_parser("train grpo", __doc__, (GRPOArguments, SegCompassGRPOConfig, ModelConfig))
    arguments, training, extra = parse_with_recipe(parser, argv)
    check_model_options(extra)
    model = load_for_training(arguments.model, extra, training.bf16)
    processor = SegCompassProcessor.from_pretrained(arguments.model)
    if extra.attn_implementation:
        model.set_attn_implementation(extra.attn_implementation)
    trainer = SegCompassGRPOTrainer(
        model,
        args=training,
        train_dataset=load_rows(arguments.dataset, arguments.split, arguments.dataset_seed, arguments.num_samples),
        processing_class=processor,
        peft_config=adapters_for(model, processor, extra),
    )
    with alone_in_output(training):
        trainer.train(training.resume_from_checkpoint or last_checkpoint(training.output_dir))
        trainer.save_model()
