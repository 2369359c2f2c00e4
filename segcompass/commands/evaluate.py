"""Score a model on a data set: it writes its own reasoning, greedily, and its masks are compared with the true ones.

    segcompass evaluate --model PATH --dataset scenes --split test --output runs/test
    accelerate launch -m segcompass evaluate --model PATH --dataset refcoco --root REFER --image-dir train2014 \\
        --split testA --output runs/testA
    segcompass evaluate --route boxes --mllm Qwen/Qwen2.5-VL-7B-Instruct --image-encoder facebook/sam-vit-huge \\
        --dataset refcoco --root REFER --image-dir train2014 --split testA --output runs/boxes-testA
    segcompass evaluate --predictions THEIRS.jsonl --dataset reasonseg --root ReasonSeg --split val \\
        --protocol lisa --output runs/theirs

Writes into the output folder
    predictions.jsonl   one line per sample: what was written, the kept slots with their masks, the pixel counts
    metrics.json        the metrics of all samples, in [0, 1], and `by_kind` where the rows have a column `kind`
    model-index.yml     the same for a model card
    gallery.html        best, worst and random samples
    run.json            what was evaluated; predictions of another run are never mixed in
Repeat the command to resume an interrupted run, on as many processes as you like. Instead of a model, the predictions
of any model can be scored (docs/protocols.md has their format and what the protocols mean).
"""

import argparse
from pathlib import Path

from . import options


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = options.command_parser("evaluate", __doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", default="", help=options.MODEL)
    what.add_argument("--predictions", type=Path, help="JSONL of any model's predictions to score instead of a model")
    options.add_route(parser)
    options.add_rows(parser, "test", None, "all rows, and 500 of the scenes", dataset=options.ROWS)
    options.add_benchmark(parser)
    parser.add_argument(
        "--unit", choices=["sentence", "ref", "merged"], help="what one sample is; default: what the protocol counts"
    )
    parser.add_argument(
        "--protocol",
        default="rela",
        help="how metrics are counted, such as rela or lisa; an unknown name lists all; default: %(default)s",
    )
    parser.add_argument(
        "--batch-size", type=options.positive, default=32, help="samples segmented at once; default: %(default)s"
    )
    parser.add_argument(
        "--query-source",
        choices=["both", "tokens", "concepts"],
        help="what the slots' queries are built from; default: both, and tokens with --route tokens",
    )
    parser.add_argument(
        "--threshold",
        type=options.probability,
        help="confidence from which a slot is kept; default: 0.5, and 0 for the protocol segcompass_released and for "
        "--route boxes",
    )
    parser.add_argument("--image-features", help="folder that `segcompass precompute-features` wrote")
    parser.add_argument(
        "--close-response",
        action="store_true",
        help="close each response by force, for a model that was trained with close_response",
    )
    parser.add_argument("--output", type=options.folder, required=True, help="folder that the results are written into")
    args = parser.parse_args(argv)
    options.check_route(parser, args, "")
    if args.route != "boxes" and not args.model and args.predictions is None:
        parser.error("one of --model, --predictions and --route boxes is required.")
    return args


def main(argv: list[str] | None = None) -> dict:
    """Run the command with these options (None takes the process's own) and return the metrics."""
    args = parse(argv)
    from segcompass.evaluation import Evaluation, evaluate

    return evaluate(Evaluation(**vars(args)))
