"""Measure whether the concepts make the masks: take the heaviest away, keep only them, and compare with random ones.

    segcompass faithfulness --model PATH --num-samples 400 --output runs/faithfulness

The model writes its own reasoning, greedily; then each mask that is right (a slot of confidence 0.5 or more whose IoU
with a target reaches 0.5) is decoded again and again with some of its concepts switched off. Prints how much the IoU
falls without a slot's heaviest concepts and without random active ones, the deletion and insertion curves, and what
is left of the masks when the queries are built from the concentration tokens or the concepts alone. All intervals are
95 % bootstrap intervals over scenes. Writes into the output folder
    metrics.json   all of it
    curves.csv     IoU over the share of concepts taken away, or put in
    curves.png     the same as a plot
    items.jsonl    what was measured of each sample
Repeat the command to resume an interrupted run.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from . import options

SOURCE_NAMES = {"both": "e_k and r_k", "tokens": "e_k alone", "concepts": "r_k alone"}
ORDER_NAMES = {"weight": "heaviest first", "random": "random", "reverse": "lightest first"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = options.command_parser("faithfulness", __doc__)
    parser.add_argument("--model", required=True, help=options.MODEL)
    options.add_rows(parser, "test", 400, seed_of="the procedural scenes, the random concepts and the bootstrap")
    parser.add_argument(
        "--batch-size", type=options.positive, default=16, help="samples segmented at once; default: %(default)s"
    )
    parser.add_argument(
        "--top", type=options.positive, default=5, help="how many concepts are taken away; default: %(default)s"
    )
    parser.add_argument(
        "--draws",
        type=options.positive,
        default=8,
        help="how often random concepts are drawn per mask; default: %(default)s",
    )
    parser.add_argument(
        "--query-source",
        choices=["both", "concepts"],
        default="both",
        help="what the queries of the measured masks are built from: e_k and r_k, or r_k alone; default: %(default)s",
    )
    parser.add_argument("--output", type=options.folder, required=True, help="folder that the results are written into")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the command with these options (None takes the process's own) and return the content of metrics.json."""
    args = parse(argv)
    from segcompass.journal import Journal, weights_of
    from segcompass.loaders.identity import rows_digest
    from segcompass.loading import load
    from segcompass.modeling_segcompass.whole_files import write_whole
    from segcompass.white_box.examination import examine, read_rows
    from segcompass.white_box.faithfulness_records import measure, summarise_records

    rows = read_rows(args.dataset, args.split, args.seed, args.num_samples)
    run = {name: value for name, value in vars(args).items() if name not in ("output", "batch_size")}
    journal = Journal(args.output, {**run, "weights": weights_of(args.model), "rows": rows_digest(rows)})
    if any(name not in journal.records for name in rows["sample_id"]):
        model, processor = load(args.model)

    def measure_batch(batch):
        return measure(model, processor, batch, args.top, args.draws, args.query_source, args.seed)

    records = examine(journal, rows, measure_batch, args.batch_size)
    metrics = summarise_records(records, args.top, args.seed)
    report(metrics)
    if metrics["masks"]:
        write_curves(metrics, args.output)
    metrics = _finite(metrics)
    write_whole(args.output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def report(metrics: dict[str, Any]) -> None:
    """Print the metrics.

    Args:
        metrics: of `summarise_records`.
    """
    from segcompass.white_box.faithfulness import ORDERS

    top = metrics["top"]
    print(f"\n{metrics['scenes']} scenes; queries built from  gIoU    cIoU    N-acc   T-acc")
    names = SOURCE_NAMES if len(metrics["ablation"]) > 1 else {"both": "none: grounded"}
    for source, scores in metrics["ablation"].items():
        values = "  ".join("  –   " if score is None else f"{score:.4f}" for score in scores.values())
        print(f"  {names[source]:<32}{values}")
    print(f"\n{metrics['masks']} right masks in {metrics['scenes_with_masks']} scenes")
    if not metrics["masks"]:
        print(
            "No mask has a confidence of 0.5 or more and an IoU of 0.5 or more with a target, so there is nothing to "
            "take concepts from: no curves are written. Train on, or take other samples."
        )
        return
    print(f"  IoU with all concepts                  {_interval(metrics['full'])}")
    for name in ("median", "mean"):
        print(f"  {name} drop without the top {top:<12} {_interval(metrics[f'drop_top_{name}'])}")
        print(f"  {name} drop without {top} random active   {_interval(metrics[f'drop_random_{name}'])}")
        print(f"  ratio of {name}s                       {_interval(metrics[f'ratio_of_{name}s'], 2)}")
    print(f"  sufficiency, top (random)              {_interval(metrics['sufficiency'])}", end="")
    print(f"  ({_interval(metrics['sufficiency_random'])})")
    print("\narea under the curve     by weight               random                  lightest first")
    for name in ("deletion", "insertion"):
        print(f"  {name:<20}  " + "  ".join(_interval(metrics[name][order]["auc"]) for order in ORDERS))


def write_curves(metrics: dict[str, Any], folder: Path) -> None:
    """Write curves.csv and curves.png.

    Args:
        metrics: of `summarise_records`, with right masks.
        folder: where to write.
    """
    from matplotlib.figure import Figure

    from segcompass.modeling_segcompass.whole_files import write_whole
    from segcompass.white_box.faithfulness import FRACTIONS, ORDERS
    from segcompass.white_box.figures import write_csv

    lines = [
        [name, order, share, iou]
        for name in ("deletion", "insertion")
        for order in ORDERS
        for share, iou in zip(FRACTIONS, metrics[name][order]["curve"], strict=True)
    ]
    write_csv(folder / "curves.csv", ["curve", "order", "share_of_concepts", "iou"], lines)
    figure = Figure(figsize=(10, 4), layout="constrained")
    for ax, name in zip(figure.subplots(1, 2, sharey=True), ("deletion", "insertion"), strict=True):
        for order in ORDERS:
            ax.plot(FRACTIONS, metrics[name][order]["curve"], marker=".", label=ORDER_NAMES[order])
        ax.set(title=name, xlabel=f"share of concepts {'taken away' if name == 'deletion' else 'put in'}")
        ax.legend(frameon=False)
    figure.supylabel("IoU with the target", fontsize="medium")
    write_whole(folder / "curves.png", lambda part: figure.savefig(part, dpi=130))


def _interval(values: list[float], digits: int = 3) -> str:
    estimate, low, high = values
    return f"{estimate:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _finite(value: Any) -> Any:
    """JSON knows no infinity and no nan: they become null."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and value - value != 0 else value
