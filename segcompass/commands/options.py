"""Options that several commands share, so that they are spelled, checked and explained in one way."""

import argparse
from pathlib import Path
from typing import Any

from segcompass.routes import PHOTOGRAPH, ROUTES
from segcompass.shipped import MODEL as SHIPPED
from segcompass.shipped import default_scene

TRAINING_ROWS = (
    "'scenes', a .jsonl file, a folder of `segcompass prepare-data` or Dataset.save_to_disk, or the dotted path of a "
    "function that returns rows"
)
MIXED_ROWS = (
    f"{TRAINING_ROWS}; or a list of such, and of mappings with dataset and num_samples or weight, split, root, "
    "image_dir, split_by, unit (JSON on the command line)"
)
ROWS = f"a benchmark such as refcoco or reasonseg (with --root), {TRAINING_ROWS}"
TEXT_ROWS = (
    "'scenes', a .jsonl file, a folder of `segcompass prepare-data` or Dataset.save_to_disk, the dotted path of a "
    "function that returns rows, or a Hub id"
)
MODEL = "SegCompass folder or Hub id"


def command_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of a command, whose module's docstring is shown as it is written."""
    return argparse.ArgumentParser(
        prog=f"segcompass {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_image(parser: argparse.ArgumentParser, output: str, fate: str) -> None:
    """Add an image, an instruction, --model, --output and --threshold; see `fill_image` for the image's default.

    Args:
        parser: of the command.
        output: default of --output.
        fate: what happens to a slot that reaches the threshold.
    """
    parser.add_argument("image", nargs="?", help="file or URL; default: the scene that ships with the package")
    parser.add_argument("instruction", nargs="?", help="what to segment; required with an image of your own")
    parser.add_argument("--model", default=str(SHIPPED), help=f"{MODEL}; default: the small model that ships")
    parser.add_argument("--output", type=folder, default=Path(output), help="folder; default: %(default)s")
    parser.add_argument(
        "--threshold",
        type=probability,
        default=0.5,
        help=f"confidence from which a slot is {fate}; default: 0.5",
    )


def fill_image(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Put the shipped scene where no image is named; an image without an instruction ends the command."""
    if args.image is None:
        image, args.instruction = default_scene()
        args.image = str(image)
    elif args.instruction is None:
        parser.error(f'no instruction; say what to segment in {args.image}, e.g. "the mug nearest the sink".')


def add_route(parser: argparse.ArgumentParser) -> None:
    """Add --route, --mllm and --image-encoder; `check_route` says which go together."""
    parser.add_argument(
        "--route",
        choices=ROUTES,
        default="concepts",
        help="from the response to masks: by concepts, by the concentration tokens alone, or by boxes that an MLLM "
        "writes and SAM fills (docs/routes.md); default: %(default)s",
    )
    parser.add_argument("--mllm", help="of the boxes route: folder or Hub id of the MLLM that writes boxes")
    parser.add_argument("--image-encoder", help="of the boxes route: folder or Hub id of a whole SAM")


def check_route(parser: argparse.ArgumentParser, args: argparse.Namespace, model: str) -> None:
    """End the command where the options are another route's.

    Args:
        parser: of the command.
        args: parsed.
        model: the default of --model.
    """
    given = [name for name in ("mllm", "image_encoder") if getattr(args, name)]
    if args.route != "boxes":
        if given:
            parser.error(f"--{given[0].replace('_', '-')} is for --route boxes, but the route is {args.route}.")
    elif args.model != model:
        parser.error("--model is for the routes concepts and tokens; --route boxes takes --mllm and --image-encoder.")
    elif len(given) < 2:
        parser.error(f"--route boxes needs an MLLM and a SAM, such as {PHOTOGRAPH}.")


def add_rows(
    parser: argparse.ArgumentParser,
    split: str,
    num_samples: int | None,
    all_rows: str = "",
    seed: int = 0,
    dataset: str = TRAINING_ROWS,
    seed_of: str = "the procedural scenes, ignored for other data",
) -> None:
    """Add --dataset, --split, --dataset-seed (also --seed; `args.seed`) and --num-samples.

    Args:
        parser: of the command.
        split: default of --split.
        num_samples: default of --num-samples.
        all_rows: what the default of --num-samples means where it is None.
        seed: default of --dataset-seed.
        dataset: what --dataset may be.
        seed_of: what --dataset-seed is the seed of.
    """
    parser.add_argument("--dataset", default="scenes", help=f"{dataset}; default: %(default)s")
    parser.add_argument("--split", default=split, help="split of the data set; default: %(default)s")
    parser.add_argument(
        "--dataset-seed",
        "--seed",
        dest="seed",
        type=int,
        default=seed,
        help=f"seed of {seed_of}; default: %(default)s",
    )
    parser.add_argument(
        "--num-samples",
        type=positive,
        default=num_samples,
        help=f"use only the first N rows; default: {num_samples or all_rows}",
    )


def add_benchmark(parser: argparse.ArgumentParser) -> None:
    """Add --root, --image-dir and --split-by: where a benchmark's files are."""
    parser.add_argument("--root", help="of a benchmark: the folder with the files its authors released")
    parser.add_argument("--image-dir", help="of the RefCOCO family: COCO's train2014 images")
    parser.add_argument("--split-by", help="of the RefCOCO family: unc, umd or google")


def training_rows(arguments: Any, training: Any, streaming: bool = False) -> tuple[Any, Any]:
    """The rows that a training command trains on and those it holds out, and how they came about, printed.

    Args:
        arguments: has dataset, split, dataset_seed, num_samples, eval_dataset, eval_split and eval_num_samples.
        training: the trainer's settings; its `eval_masks` is set where rows are held out.
        streaming: see `mix_rows`.

    Returns:
        Rows to train on, and held-out rows or None.

    Raises:
        ValueError: rows that cannot be mixed, or an evaluation without rows, or rows without an evaluation.
    """
    from segcompass.loaders.mixing import mix_rows, report

    evaluates = training.eval_strategy != "no"
    if evaluates != bool(arguments.eval_dataset):
        raise ValueError(
            f"eval_strategy is {getattr(training.eval_strategy, 'value', training.eval_strategy)!r} and eval_dataset "
            f"is {arguments.eval_dataset!r}; give both (eval_strategy: steps, eval_steps: 500, eval_dataset: …) or "
            "neither."
        )
    held_out = None
    if evaluates:
        drawn = mix_rows(
            arguments.eval_dataset, arguments.eval_split, arguments.dataset_seed, arguments.eval_num_samples
        )
        held_out = drawn.rows
        training.eval_masks = True
    mixture = mix_rows(
        arguments.dataset, arguments.split, arguments.dataset_seed, arguments.num_samples, streaming, held_out
    )
    if training.process_index == 0:
        print("\n".join(report(mixture.table)), end="\n" if mixture.table else "")
    return mixture.rows, held_out


class RecipeHelp(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help of the commands that read a recipe: hundreds of options, each with its default."""


def recipe_parser(command: str, description: str | None, dataclasses: Any) -> Any:
    """The parser of a command that reads a recipe.

    Args:
        command: its name.
        description: its module's docstring, shown as it is written.
        dataclasses: whose fields are the options and the recipe's fields.

    Returns:
        A TrlParser.
    """
    from trl import TrlParser

    prog = f"segcompass {command}"
    usage = f"{prog} --config RECIPE [--option value …]"
    return TrlParser(dataclasses, prog=prog, usage=usage, description=description, formatter_class=RecipeHelp)


def folder(text: str) -> Path:
    """A folder to write into, as an option's type; it need not exist."""
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file; name a folder, which is made where there is none.")
    return Path(text)


def positive(text: str) -> int:
    """A whole number of at least 1, as an option's type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be a whole number of at least 1.")
    return int(text)


def probability(text: str) -> float:
    """A number from 0 to 1, as an option's type."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"it is {text!r}; it is a probability, choose a value from 0 to 1.")
    return value
