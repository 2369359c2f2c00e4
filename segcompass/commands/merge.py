"""Merge trained adapters into the model that they were trained on: the result is a SegCompass folder like any other.

    segcompass merge runs/mine --model runs/llava-1.5-7b/sft --output runs/merged

The adapters' folder is what `segcompass train … --use_peft` wrote. The model is the one that this training began from,
with its weights as they are: a model that was trained on in 4 bits is merged in its own precision.
"""

import argparse
from pathlib import Path

from . import options


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = options.command_parser("merge", __doc__)
    parser.add_argument("adapters", type=Path, help="folder of the adapters")
    parser.add_argument("--model", required=True, help=f"{options.MODEL} that the training began from")
    parser.add_argument("--output", type=options.folder, required=True, help="folder of the merged model and processor")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the command with these options; None takes the process's own."""
    args = parse(argv)
    if not (args.adapters / "adapter_config.json").is_file():
        raise ValueError(
            f"{args.adapters} holds no adapters (adapter_config.json); name the output folder of a training with "
            "--use_peft, or one of its checkpoints."
        )
    from peft import PeftModel

    from segcompass.adapters import check_base
    from segcompass.loading import load

    check_base(args.adapters, args.model)
    model, processor = load(args.model, "cpu")
    merged = PeftModel.from_pretrained(model, str(args.adapters)).merge_and_unload()
    merged.save_pretrained(args.output)
    processor.save_pretrained(args.output)
    if model.concept_labels:
        print(
            f"The names of the concepts of {args.model} (concepts.json) are left out, since training may have moved "
            "what they mean; this names them anew: "
            f"segcompass dictionary --model {args.output} --dataset ROWS --output FOLDER --save-to {args.output}"
        )
    print(args.output)
