"""Draw what trainings logged, one or several over one another, as a page that needs no other file.

    segcompass curves runs/mini/sft
    segcompass curves runs/seed-1 runs/seed-2 --output runs/seeds

Reads the log in the newest checkpoint of each folder (or of a checkpoint or `trainer_state.json` that is named itself)
and writes into the output folder
    curves.html   one chart per value that was logged, in groups: losses, rewards, held-out rows
"""

import argparse
from pathlib import Path

from . import options


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = options.command_parser("curves", __doc__)
    parser.add_argument("runs", nargs="+", help="output folder of a training, a checkpoint, or a trainer_state.json")
    parser.add_argument(
        "--output", type=options.folder, default=Path("runs/curves"), help="folder for the page; default: %(default)s"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the command with these options; None takes the process's own."""
    args = parse(argv)
    from segcompass.modeling_segcompass.whole_files import write_whole
    from segcompass.training_curves import curves_page, read_run

    page = curves_page([read_run(run) for run in args.runs])
    args.output.mkdir(parents=True, exist_ok=True)
    write_whole(args.output / "curves.html", page)
    print(f"wrote curves.html to {args.output}")
