"""Draw the paper's interpretability figures of a model on a data set: Figures 4, 5, 8 and 9.

    segcompass interpret --model PATH --dataset scenes --output runs/interpret

The model writes its own reasoning, greedily. Each figure is written as data (CSV) and as a plot (PNG):
    figure4   active features per token, by the kind of token: question, reasoning, instance patch, background patch
    figure5   share of an instance's pixels under the K % of image tokens that fire most, or that the slots' concepts
              fire on most, compared with K % random ones
    figure8   left: SAE error against mask dice loss, one point per 8 samples; right: heatmap IoU against mask IoU, one
              point per instance; regression line with the 95 % band of the mean, r and p
    figure9   instruction, image, activated tokens, heatmap, mask of the first samples that have a target (plot only)
The summary of the first three is printed. Repeat the command to resume an interrupted run.
"""

import argparse
from typing import Any

from . import options


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = options.command_parser("interpret", __doc__)
    parser.add_argument("--model", required=True, help=options.MODEL)
    options.add_rows(parser, "test", 400, seed_of="the procedural scenes and of the random image tokens")
    parser.add_argument(
        "--batch-size", type=options.positive, default=16, help="samples segmented at once; default: %(default)s"
    )
    parser.add_argument(
        "--panels", type=options.positive, default=6, help="samples shown in Figure 9; default: %(default)s"
    )
    parser.add_argument("--output", type=options.folder, required=True, help="folder that the figures are written into")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the command with these options (None takes the process's own) and return the summary of Figures 4, 5, 8."""
    args = parse(argv)
    from segcompass.journal import Journal, weights_of
    from segcompass.loaders.identity import rows_digest
    from segcompass.loading import load
    from segcompass.white_box.examination import examine, read_rows
    from segcompass.white_box.figure_records import measure
    from segcompass.white_box.figures import figure4, figure5, figure8, figure9

    rows = read_rows(args.dataset, args.split, args.seed, args.num_samples)
    run = {name: getattr(args, name) for name in ("model", "dataset", "split", "seed", "num_samples")}
    journal = Journal(args.output, {**run, "weights": weights_of(args.model), "rows": rows_digest(rows)})
    model, processor = load(args.model)
    records = examine(journal, rows, lambda batch: measure(model, processor, batch, args.seed), args.batch_size)
    summary = {
        "figure4": figure4(records, args.output),
        "figure5": figure5(records, args.output),
        "figure8": figure8(records, args.output),
    }
    report(summary, instances=sum(len(record["coverage"]["random"]) for record in records))
    if not figure9(model, processor, rows, args.output / "figure9.png", args.panels):
        print("\nFigure 9: no sample with a target has a slot")
    print(f"wrote the figures and their data to {args.output}")
    return summary


def report(summary: dict[str, Any], instances: int) -> None:
    """Print what the figures show.

    Args:
        summary: what `figure4`, `figure5` and `figure8` returned.
        instances: how many instances Figure 5 is about.
    """
    from segcompass.white_box.figure_records import LEVELS, SHARES

    print("\nFigure 4: active features per token, by threshold")
    print(f"{'':<12}" + "".join(f"{level:>8.2f}" for level in LEVELS))
    for kind, values in summary["figure4"].items():
        print(f"{kind:<12}" + "".join(f"{value:>8.2f}" for value in values))
    if summary["figure5"]:
        print(f"\nFigure 5: coverage of {instances} instances by the top K % of image tokens")
        print(f"{'K':<12}" + "".join(f"{share:>7}" for share in SHARES))
    else:
        print("\nFigure 5: no sample has a target")
    for ranking, values in summary["figure5"].items():
        print(f"{ranking:<12}" + "".join(f"{value:>7.3f}" for value in values))
    print("\nFigure 8: correlations")
    for name in ("sae", "heatmap"):
        if name not in summary["figure8"]:
            print(f"{name:<12}not measured: fewer than three points, or all alike")
    for name, line in summary["figure8"].items():
        print(f"{name:<12}r {line['r']:+.3f}   p {line['p']:.2e}   slope {line['slope']:+.4g}   n {line['n']}")
