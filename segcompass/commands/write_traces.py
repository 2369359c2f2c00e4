"""Write the reasoning traces that the cold start learns from, out of annotations or by a model that looks.

    segcompass write-traces refcoco --root REFER --image-dir train2014 --output data/refcoco-traces
    segcompass write-traces mine.jsonl --mllm Qwen/Qwen2.5-VL-3B-Instruct --output data/mine-traces
    segcompass write-traces reasonseg --root ReasonSeg --server http://localhost:8000/v1 \\
        --server-model Qwen/Qwen2.5-VL-7B-Instruct --output data/reasonseg-traces

Without a teacher the sentences come from category names, boxes and the other things in the image. A teacher (--mllm,
or --server with OpenAI's chat completions; its key is read from OPENAI_API_KEY) sees the image, the instruction and the
target with a line around it, and writes a trace. Kept are traces of the right form by which the teacher finds the
target in the plain image again. A row that has a trace keeps it.

Writes into the output folder
    SPLIT-*.parquet      the rows with their traces: a data set for `train sft`; images are named, not copied
    SPLIT-report.json    how many traces were kept, and why others were not
    SPLIT-gallery.html   kept and dropped traces beside their images
    traces/SPLIT         what became of each row; repeat the command to go on after an interruption
"""

import argparse

from . import options


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = options.command_parser("write-traces", __doc__)
    parser.add_argument("dataset", help=options.ROWS)
    parser.add_argument("--output", type=options.folder, required=True, help="folder that everything is written into")
    parser.add_argument("--split", default="train", help="split of the data set; default: %(default)s")
    options.add_benchmark(parser)
    parser.add_argument(
        "--unit",
        choices=["sentence", "ref", "merged"],
        default="sentence",
        help="of a benchmark: what one row is; default: %(default)s",
    )
    parser.add_argument("--num-samples", type=options.positive, help="how many rows, drawn by the seed; default: all")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the rows that are drawn and of the wordings; default: %(default)s"
    )
    parser.add_argument("--mllm", help="teacher: folder or Hub id of an MLLM to load")
    parser.add_argument("--server", help="teacher: address of a server with chat completions, up to /v1")
    parser.add_argument("--server-model", help="the name under which the server serves the model")
    parser.add_argument(
        "--check",
        choices=["position", "box"],
        default="position",
        help="what a teacher must find by its trace: a part of the image, or a box; default: %(default)s",
    )
    parser.add_argument(
        "--batch-size", type=options.positive, default=16, help="rows asked about at once; default: %(default)s"
    )
    parser.add_argument(
        "--timeout", type=float, default=120.0, help="seconds to wait for the server; default: %(default)g"
    )
    parser.add_argument(
        "--retries", type=int, default=3, help="how often a request that failed is repeated; default: %(default)s"
    )
    parser.add_argument(
        "--max-tokens", type=options.positive, default=300, help="longest answer of a teacher; default: %(default)s"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    """Run the command with these options (None takes the process's own) and return the report."""
    args = parse(argv)
    from segcompass.written_traces import Writing, write_traces

    report = write_traces(Writing(**vars(args)))
    print(f"{report['kept']:,} of {report['rows']:,} rows have a trace, by {report['teacher']}: {args.output}")
    for reason, count in report["dropped"].items():
        print(f"  {count:,} dropped: {reason}")
    if report["not answered"]:
        print(f"  {report['not answered']:,} not answered ({report['last failure']}); repeat the command to ask again")
    return report
