"""Cold start: teach a backbone to write reasoning traces and the segmentation modules to make masks of them.

    python examples/train_sft.py --config examples/recipes/mini/sft.yaml
    accelerate launch examples/train_sft.py --config RECIPE.yaml --learning_rate 1e-5

A recipe names either `model` (a SegCompass folder to go on from) or `mllm` and `image_encoder` (backbones to build one
from).
An interrupted run goes on from its last checkpoint when the command is repeated.
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint
from trl import TrlParser

from segcompass.loaders import load_rows
from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.trainers import SegCompassSFTConfig, SegCompassSFTTrainer


@dataclass
class ScriptArguments:
    """What to train, on what."""

    model: str | None = field(default=None, metadata={"help": "SegCompass folder or Hub id to go on from"})
    mllm: str | None = field(default=None, metadata={"help": "MLLM to build from; its folder holds a processor too"})
    image_encoder: str | None = field(default=None, metadata={"help": "SAM vision encoder to build from"})
    sae: str | None = field(default=None, metadata={"help": "SAE to put in (own repo or folder)"})
    model_config: dict | str | None = field(default=None, metadata={"help": "fields of SegCompassConfig"})
    dataset: str = field(default="scenes", metadata={"help": "'scenes' or a folder written by save_to_disk"})
    attn_implementation: str = field(default="sdpa", metadata={"help": "of the MLLM; 'eager' is faster on CPUs"})
    split: str = "train"
    dataset_seed: int = 0
    num_samples: int = 100_000


def build(arguments):
    """The model and processor a recipe names."""
    if arguments.model:
        processor = SegCompassProcessor.from_pretrained(arguments.model)
        model = SegCompassModel.from_pretrained(arguments.model, dtype="float32")
        return model, processor
    if not (arguments.mllm and arguments.image_encoder):
        raise ValueError("name either model, or mllm and image_encoder, in the recipe or on the command line.")
    processor = SegCompassProcessor.from_pretrained(arguments.mllm)
    model = SegCompassModel.from_backbones(
        arguments.mllm, arguments.image_encoder, arguments.sae, processor, **(arguments.model_config or {})
    )
    return model, processor


def main():
    arguments, training = TrlParser((ScriptArguments, SegCompassSFTConfig)).parse_args_and_config()
    model, processor = build(arguments)
    if arguments.model and arguments.sae:
        model.load_sae(arguments.sae)
    model.set_attn_implementation(arguments.attn_implementation)
    rows = load_rows(arguments.dataset, arguments.split, arguments.dataset_seed, arguments.num_samples, streaming=True)
    trainer = SegCompassSFTTrainer(model, training, processor, train_dataset=rows)
    Path(training.output_dir).mkdir(parents=True, exist_ok=True)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(training.output_dir))
    trainer.save_model()


if __name__ == "__main__":
    main()
