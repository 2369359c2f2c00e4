"""The one row schema, and how the loaders fill it: `to_dataset` streams rows into the `datasets` cache."""

import hashlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Features, Image, IterableDataset, List, NamedSplit, Value

from .arrow_files import cached_rows, file_stamps
from .signed import check_signed

RLE = {"size": List(Value("int32"), length=2), "counts": Value("string")}
FEATURES = Features(
    {
        "image": Image(),
        "image_id": Value("string"),
        "sample_id": Value("string"),
        "dataset": Value("string"),
        "split": Value("string"),
        "instruction": Value("string"),
        "reasoning": Value("string"),
        "masks": List(RLE),
        "ignore": RLE,
        "height": Value("int32"),
        "width": Value("int32"),
        "kind": Value("string"),
    }
)
"""Columns of every data set: `masks` has one RLE per instance, [] for no target; `reasoning`, `ignore` and `kind` may
be None; `kind` groups samples in reports. An image may be None where only masks are needed."""

PHRASES = {"phrases": List({"text": Value("string"), "start": Value("int32"), "masks": List(RLE)})}
"""A further column that a data set may have: what the words of `reasoning` name. Each phrase has its text, where it
begins in `reasoning`, and the masks of what it names, whether that is asked for or not."""

INSTANCES = {
    "instances": List(
        {"category": Value("string"), "expressions": List(Value("string")), "crowd": Value("bool"), "mask": RLE}
    )
}
"""A further column that a data set may have: all annotated things in the row's image, whether it asks for them or not,
so that what is true of the image is known. Each has its category (None where nobody said), the expressions that mean it
alone, whether it is a crowd (a region of many, of which none is marked), and its mask."""

UNITS = ("sentence", "ref", "merged")
"""What one row of a benchmark is: a sentence, a referred object with its first sentence, or with all of them."""

NUM_SHARDS = 16
"""Shards of a streamed data set: the largest useful number of DataLoader workers."""


def target_kind(num_targets: int) -> str:
    """The `kind` of a row: "none", "single" or "multi", by its number of targets."""
    return ("none", "single", "multi")[min(num_targets, 2)]


def expressions(sentences: Iterable[tuple[str, str]], unit: str) -> list[tuple[str, str]]:
    """The samples that a referred object's sentences make.

    Args:
        sentences: (id, text) in order; blank texts are left out.
        unit: "sentence" (one sample each), "ref" (the first sentence alone) or "merged" (one sample that asks for the
            object meeting all sentences, in the words that HiMTok and PSALM use).

    Returns:
        (suffix of the sample id, instruction) of each sample.

    Raises:
        ValueError: unknown unit.

    Example:
        >>> expressions([("7", "the red one"), ("8", "left mug")], "merged")
        [('merged', 'Meet all the descriptions: 1. the red one. 2. left mug.')]
    """
    if unit not in UNITS:
        raise ValueError(f"unit={unit!r} is not one of {', '.join(UNITS)}.")
    spoken = [(name, text.strip()) for name, text in sentences if text.strip()]
    if unit == "sentence" or not spoken:
        return spoken
    if unit == "ref":
        return [("ref", spoken[0][1])]
    numbered = " ".join(f"{number}. {text}." for number, (_, text) in enumerate(spoken, 1))
    return [("merged", f"Meet all the descriptions: {numbered}")]


def reserved_token(text: str | None) -> str | None:
    """The first token of a response's frame that a text holds, or None.

    A reasoning trace is put between `<think>` and `</think>`, and `<REF_POS>` follows: one that holds them itself makes
    a response whose format is wrong.
    """
    from segcompass.modeling_segcompass.processing_segcompass import REF_TOKEN, THINK, THINK_END  # brings torch along

    return next((token for token in (THINK, THINK_END, REF_TOKEN) if token in (text or "")), None)


def check_reasoning(reasoning: str | None) -> None:
    """Refuse a reasoning trace that holds `<think>`, `</think>` or `<REF_POS>`. Raises ValueError."""
    token = reserved_token(reasoning) if reasoning else None
    if token:
        raise ValueError(
            f"the reasoning holds {token!r}, which the response around it gets by itself; give the trace alone."
        )


ARCHIVES = ("zip", "tar", "gzip", "bz2", "lz4", "xz", "zstd", "hf")
"""How `datasets` writes that a file lies within an archive; "hf" is the Hub's."""


def leave_images_encoded(rows: Any) -> Any:
    """The same rows, whose images are decoded where they are used: there an unreadable one is named by its sample.

    Args:
        rows: a Dataset, an IterableDataset, a dict of such, or None.

    Returns:
        The same with encoded images, where they are of datasets' own kind.
    """
    if isinstance(rows, dict):
        return {name: leave_images_encoded(part) for name, part in rows.items()}
    feature = (getattr(rows, "features", None) or {}).get("image")
    plain = getattr(rows, "format", None) is None or rows.format["type"] is None
    if isinstance(feature, Image) and feature.decode and plain:
        return rows.cast_column("image", Image(mode=feature.mode, decode=False))
    return rows


def row_image(row: Mapping[str, Any]) -> Any:
    """The image of a row, in any form that `read_image` reads.

    Args:
        row: a row of the shared schema; without `height` and `width` the image's size is not compared.

    Returns:
        PIL image of mode "RGB", upright.

    Raises:
        OSError: it cannot be read; the sample is named, as below.
        ValueError: there is none, it means several things, or it has another size than the row says.
    """
    from segcompass.modeling_segcompass.images import read_image  # here, since it brings torch along

    image, name = row["image"], f"the image of sample {row.get('sample_id')!r}"
    if image is None:
        raise ValueError(f"sample {row.get('sample_id')!r} has no image; give --image-dir.")
    if isinstance(image, Mapping) and image.get("bytes") is None and "::" in str(image.get("path")):
        for part in str(image["path"]).split("::"):
            if "://" in part and part.split("://")[0] not in ARCHIVES:
                raise ValueError(
                    f"{name} ({image['path']!r:.200}) lies within an archive at an address; download the archive first."
                )
        try:
            image = Image().decode_example(dict(image))  # within an archive, which `datasets` opens
        except Exception as error:
            raise OSError(f"{name} ({image['path']!r:.200}) cannot be read: {str(error)[:300]}") from error
    read = read_image(image, name)
    height, width = row.get("height"), row.get("width")
    if height is not None and width is not None and read.size != (width, height):
        raise ValueError(
            f"{name} has (width, height) {read.size}, but its row says {(width, height)}, the size of its masks; are "
            "these the images the annotations were made on?"
        )
    return read


class LeftOut:
    """Counts what a loader could not use, and says so in one warning per reason.

    Example:
        left_out = LeftOut()
        left_out.add("blank expressions", "ref 7")
        left_out.warn()
    """

    def __init__(self) -> None:
        self.cases: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """Count one thing that cannot be used."""
        self.cases.setdefault(reason, []).append(name)

    def warn(self) -> None:
        """Warn of everything counted."""
        for reason, names in self.cases.items():
            more = ", ..." if len(names) > 3 else ""
            warnings.warn(f"{len(names)} left out, {reason}: {', '.join(names[:3])}{more}", stacklevel=2)


def to_dataset(
    make_rows: Callable[..., Iterator[dict]],
    arguments: dict,
    files: Iterable[Path],
    split: str,
    num_samples: int | None,
    where: str = "Put them back, or load the data set from where they are.",
    streaming: bool = False,
    features: Features = FEATURES,
) -> Dataset | IterableDataset:
    """Stream rows into the `datasets` cache, once for the same arguments, source files and code.

    Args:
        make_rows: a module's generator of rows (dicts of `FEATURES`).
        arguments: its keyword arguments.
        files: what it reads; when one has changed (its times or size), all rows are made again.
        split: name of the split.
        num_samples: take the first so many, or None for all.
        where: the end of an error about missing images: where they are found.
        streaming: make the rows while they are read instead; a missing image is then an error when its row is read.
        features: the columns, where rows have more than those of `FEATURES`.

    Returns:
        The rows, with these columns.

    Raises:
        FileNotFoundError: images of the rows are not on disk; they are named.
        ValueError: num_samples < 1, a sample id repeats, there are no rows, or a file is not the one that was signed.
        Exception: whatever `make_rows` raises.
    """
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples={num_samples} is below 1; ask for at least one row, or None for all.")
    files = list(files)
    check_signed(files)
    here = Path(__file__).parent
    readers = {*here.glob("*.py"), *here.glob("reasoning_segmentation/run_lengths.py"), _image_reader()}
    readers.add(Path(inspect.getfile(make_rows)))
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(readers))).hexdigest()
    given = {
        "make_rows": make_rows,
        "arguments": arguments,
        "num_samples": num_samples,
        "stamp": (file_stamps(files), code),
    }
    if streaming:
        return IterableDataset.from_generator(_checked, features=features, gen_kwargs=given, split=NamedSplit(split))
    rows = cached_rows(partial(_checked, **given), features, split, given)
    _check_images(rows, where)
    return rows


def _image_reader() -> Path:
    """The file of the image reader, whose rules the rows' sizes follow."""
    import segcompass.modeling_segcompass.images as images

    return Path(images.__file__)


def _check_images(rows: Dataset, where: str) -> None:
    """Raises FileNotFoundError that names the images of the rows that are not on disk."""
    images = rows.data.column("image").combine_chunks()
    by_path = images.filter(pc.is_null(pc.struct_field(images, "bytes")))
    paths = [Path(path) for path in pc.unique(pc.struct_field(by_path, "path")).to_pylist() if path is not None]
    missing = sorted(path for path in paths if not path.exists())
    if missing:
        shown = ", ".join(path.name for path in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} images are not in {missing[0].parent}: {shown}. {where}"
        )


def _checked(make_rows, arguments, num_samples, stamp) -> Iterator[dict]:
    rows = islice(make_rows(**arguments), num_samples)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"no usable rows with {arguments}.")
    seen = set()
    for row in chain([first], rows):
        if row["sample_id"] in seen:
            raise ValueError(f"the sample id {row['sample_id']!r} repeats; make the ids of the source unique.")
        try:
            check_reasoning(row["reasoning"])
        except ValueError as error:
            raise ValueError(f"sample {row['sample_id']!r}: {error}") from error
        seen.add(row["sample_id"])
        yield row
