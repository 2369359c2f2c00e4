"""Converts a data set once to parquet files: the work of `segcompass prepare-data`.

Every image's size is compared with its masks', every count with the published one. An interrupted conversion resumes.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, islice
from pathlib import Path

import pyarrow.parquet as pq
from datasets import Dataset
from datasets.table import embed_table_storage
from PIL import Image
from tqdm import tqdm

from segcompass.journal import claim_folder
from segcompass.loaders import load_rows
from segcompass.loaders.folder_lock import folder_lock
from segcompass.loaders.identity import images_digest, rows_digest
from segcompass.loaders.jsonl import jsonl_splits
from segcompass.loaders.mixing import note_held_out
from segcompass.loaders.obelics import image_name, open_documents
from segcompass.loaders.published import SPLITS, compare
from segcompass.loaders.refcoco import SPLIT_BY
from segcompass.modeling_segcompass.images import upright_size
from segcompass.modeling_segcompass.manifest import signing
from segcompass.modeling_segcompass.web_images import fetch as fetch_file
from segcompass.modeling_segcompass.whole_files import write_whole

LARGEST = 20_000_000  # bytes of a downloaded image


@dataclass
class Conversion:
    """Which data set is converted, and into what.

    Raises:
        ValueError: a download for another data set than OBELICS, or without its folders; instances of a data set
            other than the RefCOCO family's.

    Example:
        table = prepare_data(Conversion("mine.jsonl", Path("data/mine")))
        print(table[0]["rows"], table[0]["check"])
    """

    dataset: str
    """a benchmark's name, "obelics" or a .jsonl file."""
    output: Path
    """folder of the parquet files."""
    split: list[str] = field(default_factory=list)
    """none converts all splits that the data set has."""
    root: str | None = None
    """see `load_rows`, as for the next four."""
    image_dir: Path | None = None
    split_by: str | None = None
    unit: str = "sentence"
    num_samples: int | None = None
    images: str = "paths"
    """"paths" refers to the images where they are, "bytes" holds them, once per row."""
    rows_per_file: int = 1000
    instances: bool = False
    """rows also carry all annotated things of their image, see `load_rows`."""
    download: int | None = None
    """fetch the images of the first so many OBELICS documents."""

    def __post_init__(self):
        if self.download is not None and (self.dataset != "obelics" or not (self.root and self.image_dir)):
            raise ValueError("--download is for obelics and needs --root and --image-dir.")
        if self.instances and self.dataset not in SPLIT_BY:
            raise ValueError(
                f"--instances is for {', '.join(SPLIT_BY)}; lines of a .jsonl file carry theirs under 'instances'."
            )
        if self.dataset in SPLIT_BY:
            self.split_by = self.split_by or SPLIT_BY[self.dataset][0]
        named = jsonl_splits(self.dataset) if self.dataset.endswith(".jsonl") and not self.split else []
        self.split = self.split or named or list(SPLITS.get((self.dataset, self.split_by), ["train"]))


def prepare_data(conversion: Conversion) -> list[dict]:
    """Convert the splits, sign the folder, and print a table of what they hold.

    Args:
        conversion: what to convert.

    Returns:
        The table: one dict per split.

    Raises:
        ValueError: a folder with another conversion, a data set that cannot be loaded, an image of another size
            than its masks, or a sample that two splits hold.
        OSError: a file that cannot be read or written, or another run that writes into the folder.
    """
    table = []
    with folder_lock(conversion.output), signing(conversion.output):
        claim_conversion(conversion)
        if conversion.download is not None and conversion.root and conversion.image_dir:
            download(conversion.root, conversion.image_dir, conversion.download)
        named = {name: getattr(conversion, name) for name in ("root", "split_by", "unit", "image_dir", "instances")}
        samples: dict[str, str] = {}  # sample id -> its split
        images: dict[str, set[str]] = {}  # split -> its images
        for split in conversion.split:
            rows = load_rows(conversion.dataset, split, 0, conversion.num_samples, **named)
            if conversion.dataset.endswith(".jsonl"):
                check_apart(conversion, split, rows, samples)
                images[split] = set(rows["image_id"])
            claim_split(conversion, split, rows)
            convert(rows, conversion.output, split, conversion.rows_per_file, conversion.images == "bytes")
            table.append(count(conversion, split, rows))
        if conversion.dataset in SPLIT_BY and conversion.root:
            note_held_out(conversion.output, conversion.dataset, conversion.root, conversion.split_by)
    report(table)
    tell_shared(images)
    return table


def check_apart(conversion: Conversion, split: str, rows: Dataset, samples: dict[str, str]) -> None:
    """Refuse a sample that an earlier split holds too.

    Args:
        conversion: what is converted.
        split: the split's name.
        rows: all rows of the split.
        samples: sample id -> split of the earlier splits; gets this one's.

    Raises:
        ValueError: there is one.
    """
    for name in rows["sample_id"]:
        if name in samples:
            raise ValueError(
                f"{samples[name]!r} and {split!r} of {conversion.dataset} both hold the sample {name!r}: what is "
                "trained on would be what is held out. Say on each line which 'split' it is of, and give samples ids "
                "of their own."
            )
    samples.update(dict.fromkeys(rows["sample_id"], split))


def tell_shared(images: Mapping[str, set[str]]) -> None:
    """Print which splits share images.

    Args:
        images: split -> ids of its images.
    """
    for one, other in combinations(images, 2):
        if shared := sorted(images[one] & images[other]):
            names = ", ".join(shared[:3]) + (", …" if len(shared) > 3 else "")
            number = f"{len(shared)} image{'' if len(shared) == 1 else 's'}"
            print(
                f"{one} and {other} share {number} ({names}): results on {other} then are of images that training "
                "saw, with other questions. To measure new images, give each image one split."
            )


def claim_conversion(conversion: Conversion) -> None:
    """Note what is converted in prepared.json, or refuse a folder that holds another conversion. Raises ValueError."""
    conversion.output.mkdir(parents=True, exist_ok=True)
    names = ("dataset", "root", "image_dir", "split_by", "unit", "images", "num_samples", "rows_per_file")
    values = {name: getattr(conversion, name) for name in names}
    values |= {"instances": True} if conversion.instances else {}
    noted = {name: None if value is None else str(value) for name, value in values.items()}
    claim_folder(conversion.output, noted, "prepared.json", "a conversion")


def claim_split(conversion: Conversion, split: str, rows: Dataset) -> None:
    """Note in SPLIT.json which rows the split's files hold, or refuse files of other rows.

    Args:
        conversion: what is converted.
        split: the split's name.
        rows: all rows of the split.

    Raises:
        ValueError: the folder holds files made from other rows: the source has changed.
    """
    embedded = conversion.images == "bytes"
    content = rows_digest(rows, images=False) + (images_digest(rows) if embedded else "")
    note = f"{split}.json"
    if not (conversion.output / note).exists() and any(conversion.output.glob(f"{split}-*.parquet")):
        raise ValueError(
            f"{conversion.output} holds {split}-*.parquet but no {note} to say of which rows; choose another --output, "
            "or delete that folder."
        )
    noted = {"rows": len(rows), "content": content, "text": _texts_digest(rows)}
    claim_folder(conversion.output, noted, note, f"a conversion of {split!r}")


def _texts_digest(rows: Dataset) -> str:
    """A hash of the columns that no result is judged by, but training reads."""
    digest = hashlib.sha256()
    names = ["image_id", "dataset", "reasoning", "height", "width", "kind"]
    for row in rows.select_columns([*names, *(["instances"] if "instances" in rows.column_names else [])]):
        digest.update(json.dumps(list(row.values())).encode())
    return digest.hexdigest()


def convert(rows: Dataset, folder: Path, split: str, rows_per_file: int, embed: bool) -> None:
    """Write the files of a split that are not there yet, each in one step.

    Args:
        rows: all rows of the split.
        folder: where to write.
        split: the split's name.
        rows_per_file: rows in each file but the last.
        embed: hold the images' bytes instead of their paths.
    """
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
                write_whole(path, partial(pq.write_table, table))
            bar.update(stop - start)


def check_sizes(rows: list[dict]) -> None:
    """Raises ValueError naming the first image of another size than its masks."""
    for row in {row["image"]["path"]: row for row in rows if row["image"] and row["image"]["path"]}.values():
        path, size = Path(row["image"]["path"]), (row["height"], row["width"])
        if row["image"]["bytes"] is None and upright_size(path) != size:
            raise ValueError(
                f"{path} has (height, width) {upright_size(path)}, the masks of sample {row['sample_id']!r} {size}; "
                "are these the images the annotations were made on?"
            )


def count(conversion: Conversion, split: str, rows: Dataset) -> dict:
    """One line of the table."""
    masks, names = rows["masks"], rows["sample_id"]
    found = {"rows": len(rows)}
    if conversion.dataset in SPLIT_BY:  # whose sample ids end in the sentence
        found["refs"] = len({name.rsplit("-", 1)[0] for name in names})
    found["images"] = len(set(rows["image_id"]))
    targets = [len(each) for each in masks]
    published = (conversion.dataset, conversion.split_by, split, conversion.unit)
    check = "a part" if conversion.num_samples else compare(*published, found)
    no_target, multi = sum(n == 0 for n in targets), sum(n > 1 for n in targets)
    table = {"split": split, **found, "no target": no_target, "multi-target": multi}
    return table if conversion.dataset.endswith(".jsonl") else {**table, "check": check}


def report(table: list[dict]) -> None:
    """Print the table in columns."""
    columns = list(table[0])
    lines = [columns, *([str(row[name]) for name in columns] for row in table)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def download(root: str, folder: Path, documents: int, workers: int = 16) -> None:
    """Fetch the images of the first documents that are not there yet; dead addresses are counted.

    Args:
        root: folder with OBELICS' files.
        folder: where the images go.
        documents: how many documents.
        workers: how many images are fetched at once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken = islice(open_documents(root), documents)
    addresses = sorted({each for document in taken for each in document["images"] if isinstance(each, str)})
    wanted = [address for address in addresses if not (folder / image_name(address)).exists()]
    with ThreadPoolExecutor(workers) as pool:
        fetching = pool.map(lambda address: fetch(address, folder), wanted)
        fetched = list(tqdm(fetching, total=len(wanted), unit="image", desc="fetch"))
    print(f"fetched {sum(fetched)} of {len(wanted)} images; {len(addresses) - len(wanted)} were there")


def fetch(address: str, folder: Path) -> bool:
    """Whether an image could be fetched; only what opens as an image is kept."""
    try:
        content = fetch_file(address, max_bytes=LARGEST)
        with Image.open(io.BytesIO(content)) as image:
            image.verify()
    except Exception:  # the web fails in every way
        return False
    write_whole(folder / image_name(address), content)
    return True
