"""Cold start: teach a backbone to write reasoning traces and the segmentation modules to turn them into masks.

    segcompass train sft --config mini/masks
    accelerate launch -m segcompass train sft --config RECIPE.yaml --learning-rate 1e-5

A recipe is a YAML file, or a name that `segcompass recipes` lists; options replace its values. It names either `model`
(a SegCompass model to continue from) or `mllm` and `image_encoder` (backbones to build one from). Repeat the command to
resume an interrupted run from its last checkpoint.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from segcompass.loaders import load_rows
from segcompass.loading import load
from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.recipes import parse_with_recipe
from segcompass.trainers import SegCompassSFTConfig, SegCompassSFTTrainer
from segcompass.trainers.checkpoints import last_checkpoint

from . import options


@dataclass
class SFTArguments:
    """What to train, on what."""

    model: str | None = field(default=None, metadata={"help": "SegCompass folder or Hub id to continue from"})
    mllm: str | None = field(default=None, metadata={"help": "MLLM to build from; its folder holds a processor too"})
    image_encoder: str | None = field(default=None, metadata={"help": "image encoder to build from (docs/encoders.md)"})
    sae: str | None = field(default=None, metadata={"help": "SAE folder or Hub id to put into the model"})
    model_config: dict | str | None = field(
        default=None, metadata={"help": "fields of SegCompassConfig (JSON), for a model built from backbones"}
    )
    dataset: str = field(default="scenes", metadata={"help": options.TRAINING_ROWS})
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "attention of the MLLM; 'eager' is faster on CPUs"}
    )
    split: str = field(default="train", metadata={"help": "split of the data set"})
    dataset_seed: int = field(default=0, metadata={"help": "seed of the procedural scenes, ignored for other data"})
    num_samples: int = field(default=100_000, metadata={"help": "use only the first N rows"})


def build(arguments: SFTArguments) -> tuple[SegCompassModel, SegCompassProcessor]:
    """The model and processor that a recipe names. Raises ValueError when it names none."""
    if arguments.model:
        return load(arguments.model, "cpu")
    if not (arguments.mllm and arguments.image_encoder):
        raise ValueError("name either model, or mllm and image_encoder, in the recipe or on the command line.")
    processor = SegCompassProcessor.from_pretrained(arguments.mllm)
    fields = arguments.model_config or {}
    fields = json.loads(fields) if isinstance(fields, str) else fields
    model = SegCompassModel.from_backbones(arguments.mllm, arguments.image_encoder, arguments.sae, processor, **fields)
    return model, processor


def main(argv: list[str] | None = None) -> None:
    """Run the command with these options; None takes the process's own."""
    parser = options.recipe_parser("train sft", __doc__, (SFTArguments, SegCompassSFTConfig))
    arguments, training = parse_with_recipe(parser, argv)
    model, processor = build(arguments)
    if arguments.model and arguments.sae:
        model.load_sae(arguments.sae)
    model.set_attn_implementation(arguments.attn_implementation)
    rows = load_rows(arguments.dataset, arguments.split, arguments.dataset_seed, arguments.num_samples, streaming=True)
    trainer = SegCompassSFTTrainer(model, training, processor, train_dataset=rows)
    Path(training.output_dir).mkdir(parents=True, exist_ok=True)
    trainer.train(training.resume_from_checkpoint or last_checkpoint(training.output_dir))
    trainer.save_model()
