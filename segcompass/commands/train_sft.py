"""Cold start: teach a backbone to write reasoning traces and the segmentation modules to turn them into masks.

    segcompass train sft --config mini/masks
    accelerate launch -m segcompass train sft --config RECIPE.yaml --learning-rate 1e-5
    accelerate launch -m segcompass train sft --config RECIPE.yaml --use-peft --load-in-4bit      # QLoRA

A recipe is a YAML file, or a name that `segcompass recipes` lists; options replace its values. It names either `model`
(a SegCompass model to continue from) or `mllm` and `image_encoder` (backbones to build one from). Repeat the command to
resume an interrupted run from its last checkpoint.
"""

import difflib
import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from trl import ModelConfig

from segcompass.adapters import adapters_for, check_model_options, load_for_training
from segcompass.loading import load
from segcompass.modeling_segcompass import SegCompassConfig, SegCompassModel, SegCompassProcessor
from segcompass.modeling_segcompass.old_names import OLD_FIELDS
from segcompass.recipes import parse_with_recipe
from segcompass.trainers import SegCompassSFTConfig, SegCompassSFTTrainer
from segcompass.trainers.checkpoints import alone_in_output, last_checkpoint
from segcompass.trainers.checks import check_traces

from . import options


@dataclass
class SFTArguments:
    """What to train, on what."""

    model: str | None = field(default=None, metadata={"help": "SegCompass folder or Hub id to continue from"})
    mllm: str | None = field(default=None, metadata={"help": "MLLM to build from: folder or Hub id"})
    image_encoder: str | None = field(default=None, metadata={"help": "image encoder to build from (docs/encoders.md)"})
    sae: str | None = field(default=None, metadata={"help": "SAE folder or Hub id to put into the model"})
    model_config: dict | str | None = field(
        default=None, metadata={"help": "fields of SegCompassConfig (JSON), for a model built from backbones"}
    )
    processor_config: dict | str | None = field(
        default=None,
        metadata={"help": "arguments of SegCompassProcessor.from_backbones (JSON), for a model built from backbones"},
    )
    dataset: list | str | None = field(default="scenes", metadata={"help": options.MIXED_ROWS})
    split: str = field(default="train", metadata={"help": "split of the data set"})
    dataset_seed: int = field(default=0, metadata={"help": "seed of which rows are drawn, and of procedural scenes"})
    num_samples: int | None = field(
        default=100_000, metadata={"help": "how many rows, drawn by the seed; null takes all of them"}
    )
    eval_dataset: list | str | None = field(
        default=None,
        metadata={"help": "held-out rows that are segmented every eval_steps; their images are never trained on"},
    )
    eval_split: str = field(default="val", metadata={"help": "split of eval_dataset"})
    eval_num_samples: int = field(default=200, metadata={"help": "how many rows of it, drawn by the seed"})


def build(arguments: SFTArguments) -> tuple[SegCompassModel, SegCompassProcessor]:
    """The model and processor that a recipe names.

    Args:
        arguments: the command's.

    Returns:
        both.

    Raises:
        ValueError: no model is named, or `model_config` has what is no field, or is said otherwise elsewhere.
    """
    if arguments.model:
        return load(arguments.model, "cpu")
    if not (arguments.mllm and arguments.image_encoder):
        raise ValueError("name either model, or mllm and image_encoder, in the recipe or on the command line.")
    fields, settings = (
        json.loads(given) if isinstance(given, str) else given or {}
        for given in (arguments.model_config, arguments.processor_config)
    )
    check_fields(fields)
    processor = SegCompassProcessor.from_backbones(arguments.mllm, arguments.image_encoder, **settings)
    model = SegCompassModel.from_backbones(arguments.mllm, arguments.image_encoder, arguments.sae, processor, **fields)
    return model, processor


def check_fields(given: dict) -> None:
    """Refuse what is no field of SegCompassConfig, or is an option of the training.

    Args:
        given: `model_config`.

    Raises:
        ValueError: naming the field, and a like one.
    """
    known = set(inspect.signature(SegCompassConfig).parameters) - {"kwargs"} | set(OLD_FIELDS)
    for name in given:
        if name not in known:
            like = difflib.get_close_matches(name, known, 1)
            raise ValueError(
                f"model_config has {name!r}, which is no field of SegCompassConfig"
                f"{f'; {like[0]!r} is' if like else ', whose docstring lists them'}."
            )
    if given.get("token_dropout"):
        raise ValueError(
            f"model_config has token_dropout={given['token_dropout']!r}, but training sets it from the option of that "
            "name; pass --token-dropout."
        )


def start(
    arguments: SFTArguments, training: SegCompassSFTConfig, extra: ModelConfig
) -> tuple[SegCompassModel, SegCompassProcessor]:
    """The model to train, in 4 or 8 bits where that is asked for, and its processor.

    Args:
        arguments: the command's options.
        training: the trainer's.
        extra: those of adapters.

    Returns:
        both. What is built for adapters is kept in `base` in the output folder, because they are merged into these very
        weights, of which some are random; a resumed training goes on from there.

    Raises:
        ValueError: neither a model nor backbones are named, a quantised MLLM is to be trained without adapters, or
            adapters with another SAE than the model's.
    """
    output = Path(training.output_dir or "")
    path, quantized = arguments.model, extra.load_in_4bit or extra.load_in_8bit
    check_model_options(extra)
    if path:
        building = ("mllm", "image_encoder", "model_config", "processor_config")
        if unused := [name for name in building if getattr(arguments, name)]:
            print(f"training goes on from model={path!r} as it is; not followed: {', '.join(unused)}")
    if path and arguments.sae and extra.use_peft:
        raise ValueError(
            f"sae={arguments.sae!r} would go into model={path!r} while adapters are trained, but they are merged into "
            "that model as it is saved, with its own SAE; leave sae out, or save the model with that SAE first."
        )
    if extra.use_peft and not path:
        path = str(output / "base")
        state = PartialState()
        with state.main_process_first():
            if state.is_main_process and last_checkpoint(output) is None:
                model, processor = build(arguments)
                model.save_pretrained(path)
                processor.save_pretrained(path)
    elif not path or not quantized:
        model, processor = build(arguments)
        if path and arguments.sae:
            model.load_sae(arguments.sae)
        return model, processor
    model = load_for_training(path, extra, training.bf16)
    if arguments.model and arguments.sae:
        model.load_sae(arguments.sae)
    return model, SegCompassProcessor.from_pretrained(path)


def main(argv: list[str] | None = None) -> None:
    """Run the command with these options; None takes the process's own."""
    parser = options.recipe_parser("train sft", __doc__, (SFTArguments, SegCompassSFTConfig, ModelConfig))
    arguments, training, extra = parse_with_recipe(parser, argv)
    rows, held_out = options.training_rows(arguments, training, streaming=True)
    check_traces(rows)
    model, processor = start(arguments, training, extra)
    model.set_attn_implementation(extra.attn_implementation or "sdpa")
    trainer = SegCompassSFTTrainer(
        model,
        training,
        processor,
        peft_config=adapters_for(model, processor, extra),
        train_dataset=rows,
        eval_dataset=held_out,
    )
    with alone_in_output(training):
        trainer.train(training.resume_from_checkpoint or last_checkpoint(training.output_dir))
        trainer.save_model()
