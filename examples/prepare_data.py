"""Convert a data set once to parquet files that train, evaluate and travel: the other scripts take their folder.

    python examples/prepare_data.py refcoco --root REFER --image-dir train2014 --output data/refcoco
    python examples/prepare_data.py reasonseg --root ReasonSeg --output data/reasonseg --images bytes
    python examples/prepare_data.py mine.jsonl --output data/mine
    python examples/prepare_data.py obelics --root OBELICS --image-dir pictures --download 1000 --output data/obelics

Prints a table of rows, no-target and multi-target samples with a check against the published sizes. Every image's size
is compared with its masks'. An interrupted conversion goes on where it was when the command is repeated. With
`--images paths` (the default) the files refer to the images where they lie; with `bytes` they hold them, once a row.
"""

import argparse
import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
from datasets.table import embed_table_storage
from PIL import Image
from tqdm import tqdm

from segcompass.loaders import BENCHMARKS, load_rows
from segcompass.loaders.obelics import image_name, open_documents
from segcompass.journal import write_text
from segcompass.loaders.published import SPLITS, compare
from segcompass.loaders.reasonseg import upright_size
from segcompass.loaders.refcoco import SPLIT_BY

LARGEST = 20_000_000  # bytes of a downloaded image


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help=f"{', '.join(BENCHMARKS)}, obelics, or a .jsonl file")
    parser.add_argument("--root", help="the folder with the files its authors released")
    parser.add_argument("--image-dir", type=Path, help="COCO's train2014 images, or OBELICS' downloaded ones")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--split", nargs="+", help="default: all that the data set has")
    parser.add_argument("--split-by", help="of the RefCOCO family: unc, umd or google")
    parser.add_argument("--unit", choices=["sentence", "ref", "merged"], default="sentence")
    parser.add_argument("--images", choices=["paths", "bytes"], default="paths")
    parser.add_argument("--num-samples", type=int, help="the first so many of each split (default: all)")
    parser.add_argument("--rows-per-file", type=int, default=1000)
    parser.add_argument("--download", type=int, metavar="N", help="fetch the images of the first N OBELICS documents")
    args = parser.parse_args(argv)
    if args.rows_per_file < 1:
        parser.error(f"--rows-per-file is {args.rows_per_file}; it must be at least 1.")
    if args.download is not None and (args.dataset != "obelics" or not (args.root and args.image_dir)):
        parser.error("--download is of obelics and needs --root and --image-dir.")
    if args.dataset in SPLIT_BY:
        args.split_by = args.split_by or SPLIT_BY[args.dataset][0]
    args.split = args.split or list(SPLITS.get((args.dataset, args.split_by), ["train"]))
    return args


def main(argv=None):
    args = parse(argv)
    table = []
    try:
        check_conversion(args)
        if args.download is not None:
            download(args.root, args.image_dir, args.download)
        for split in args.split:
            rows = load_rows(
                *(args.dataset, split, 0, args.num_samples),
                **{name: getattr(args, name) for name in ("root", "split_by", "unit", "image_dir")},
            )
            convert(rows, args.output, split, args.rows_per_file, args.images == "bytes")
            table.append(count(args, split, rows))
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    report(table)
    return table


def check_conversion(args):
    """Note what is converted, or refuse a folder that holds another conversion. Raises ValueError."""
    args.output.mkdir(parents=True, exist_ok=True)
    names = ("dataset", "root", "image_dir", "split_by", "unit", "images", "num_samples", "rows_per_file")
    noted = {name: None if getattr(args, name) is None else str(getattr(args, name)) for name in names}
    path = args.output / "prepared.json"
    theirs = json.loads(path.read_text()) if path.exists() else noted
    for name in names:
        if theirs.get(name) != noted[name]:
            raise ValueError(
                f"{args.output} holds a conversion with {name}={theirs.get(name)!r}, this one has {noted[name]!r}; "
                "choose another --output, or delete that folder."
            )
    write_text(path, json.dumps(noted, indent=2) + "\n")


def convert(rows, folder, split, rows_per_file, embed):
    """Write the files of a split that are not there yet, each in one step."""
    files = -(-len(rows) // rows_per_file)
    arrow = rows.with_format("arrow")
    with tqdm(total=len(rows), unit="row", desc=split, dynamic_ncols=True) as bar:
        for number in range(files):
            start, stop = number * rows_per_file, min((number + 1) * rows_per_file, len(rows))
            path = folder / f"{split}-{number:05}-of-{files:05}.parquet"
            if not path.exists():
                table = arrow[start:stop]
                check_sizes(table.select(["image", "height", "width", "sample_id"]).to_pylist())
                if embed:
                    table = embed_table_storage(table)
                part = path.with_suffix(".part")
                pq.write_table(table, part)
                part.replace(path)
            bar.update(stop - start)


def check_sizes(rows):
    """Raises ValueError naming the first image of another size than its masks."""
    for row in {row["image"]["path"]: row for row in rows if row["image"] and row["image"]["path"]}.values():
        path, size = Path(row["image"]["path"]), (row["height"], row["width"])
        if row["image"]["bytes"] is None and upright_size(path) != size:
            raise ValueError(
                f"{path} has (height, width) {upright_size(path)}, the masks of sample {row['sample_id']!r} {size}; "
                "are these the images the annotations were made on?"
            )


def count(args, split, rows):
    """One line of the table."""
    masks, names = rows["masks"], rows["sample_id"]
    found = {
        "rows": len(rows),
        "refs": len({name.rsplit("-", 1)[0] for name in names}),
        "images": len(set(rows["image_id"])),
    }
    targets = [len(each) for each in masks]
    check = "a part" if args.num_samples else compare(args.dataset, args.split_by, split, args.unit, found)
    no_target, multi = sum(n == 0 for n in targets), sum(n > 1 for n in targets)
    return {"split": split, **found, "no target": no_target, "multi-target": multi, "check": check}


def report(table):
    columns = list(table[0])
    lines = [columns, *([str(row[name]) for name in columns] for row in table)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def download(root, folder, documents, workers=16):
    """Fetch the images of the first documents that are not there yet; dead addresses are counted."""
    folder.mkdir(parents=True, exist_ok=True)
    taken = islice(open_documents(root), documents)
    addresses = sorted({each for document in taken for each in document["images"] if isinstance(each, str)})
    wanted = [address for address in addresses if not (folder / image_name(address)).exists()]
    with ThreadPoolExecutor(workers) as pool:
        fetched = list(
            tqdm(
                pool.map(lambda address: fetch(address, folder), wanted), total=len(wanted), unit="image", desc="fetch"
            )
        )
    print(f"fetched {sum(fetched)} of {len(wanted)} images; {len(addresses) - len(wanted)} were there")


def fetch(address, folder):
    """Whether an image could be fetched; only what opens as an image is kept."""
    path = folder / image_name(address)
    part = path.with_suffix(".part")
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "Mozilla/5.0"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            content = answer.read(LARGEST + 1)
        part.write_bytes(content)
        with Image.open(part) as image:
            image.verify()
    except Exception:  # the web fails in every way
        part.unlink(missing_ok=True)
        return False
    if len(content) > LARGEST:
        part.unlink()
        return False
    part.replace(path)
    return True


if __name__ == "__main__":
    main()
