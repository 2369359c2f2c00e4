"""Convert a data set once to parquet files that train, evaluate and travel: the other commands take their folder.

    segcompass prepare-data refcoco --root REFER --image-dir train2014 --output data/refcoco
    segcompass prepare-data reasonseg --root ReasonSeg --output data/reasonseg --images bytes
    segcompass prepare-data mine.jsonl --output data/mine
    segcompass prepare-data obelics --root OBELICS --image-dir pictures --download 1000 --output data/obelics

Prints a table of rows, no-target and multi-target samples with a check against the published sizes. Every image's size
is compared with its masks'. Repeat the command to resume an interrupted conversion.
"""

import argparse
from pathlib import Path

from . import options


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = options.command_parser("prepare-data", __doc__)
    parser.add_argument("dataset", help="a benchmark such as refcoco or reasonseg, obelics, or a .jsonl file")
    parser.add_argument("--root", help="the folder with the files its authors released")
    parser.add_argument("--image-dir", type=Path, help="COCO's train2014 images, or OBELICS' downloaded ones")
    parser.add_argument("--output", type=options.folder, required=True, help="folder of the parquet files")
    parser.add_argument(
        "--split", nargs="+", default=[], help="splits to convert; default: all that the data set or file has"
    )
    parser.add_argument("--split-by", help="of the RefCOCO family: unc, umd or google")
    parser.add_argument(
        "--unit",
        choices=["sentence", "ref", "merged"],
        default="sentence",
        help="what one row is; default: %(default)s",
    )
    parser.add_argument(
        "--images",
        choices=["paths", "bytes"],
        default="paths",
        help="refer to the images where they are, or hold them, once per row; default: %(default)s",
    )
    parser.add_argument(
        "--instances",
        action="store_true",
        help="of the RefCOCO family: also all annotated things of each image, for `segcompass white-box`",
    )
    parser.add_argument("--num-samples", type=options.positive, help="use only the first N rows of each split")
    parser.add_argument(
        "--rows-per-file", type=options.positive, default=1000, help="rows in each file; default: %(default)s"
    )
    parser.add_argument(
        "--download", type=options.positive, metavar="N", help="fetch the images of the first N OBELICS documents"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[dict]:
    """Run the command with these options (None takes the process's own) and return the table it prints."""
    args = parse(argv)
    from segcompass.preparation import Conversion, prepare_data

    return prepare_data(Conversion(**vars(args)))
