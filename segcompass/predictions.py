"""predictions.jsonl: one line per sample, written during a run, read again by a resumed run or from other models.

A line of any model's predictions is {"sample_id": str} with one of
    "masks"   list of COCO RLE dicts, compressed or not; their union is the prediction, [] is "nothing"
    "mask"    one RLE dict
    "slots"   list of {"segmentation": RLE dict}, as `segcompass evaluate` writes them
and may have "no_target" (bool: the answer of a separate "nothing there" output) and "text".
"""

import json
from pathlib import Path

from segcompass.journal import read_records, write_text
from segcompass.loaders.files import read_jsonl
from segcompass.loaders.masks import coco_rle

OWN, OTHERS = "predictions.jsonl", "predictions.rank*.jsonl"


def part_path(folder: Path, rank: int) -> Path:
    """The file that a process of a run appends to."""
    return folder / (OWN if rank == 0 else f"predictions.rank{rank}.jsonl")


def read_parts(folder: Path, repair: bool = False) -> dict[str, dict]:
    """The records that all processes of the runs so far have written, by sample_id. Raises ValueError."""
    records: dict[str, dict] = {}
    for path in sorted(folder.glob(OTHERS)):
        records |= read_records(path, repair)
    return records | read_records(folder / OWN, repair)


def merge_parts(folder: Path, names: list[str], records: dict[str, dict]) -> None:
    """Leave one predictions.jsonl with the records in the order of `names`."""
    if list(read_records(folder / OWN)) != names:
        write_text(folder / OWN, "".join(json.dumps(records[name]) + "\n" for name in names))
    for path in folder.glob(OTHERS):
        path.unlink()


def read_predictions(path: Path, names: list[str]) -> dict[str, dict]:
    """The predictions of any model, by sample_id.

    Args:
        path: a JSONL file.
        names: the sample ids of the rows to score.

    Returns:
        sample_id -> the line's object, for each of `names`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged line, samples without a prediction, predictions of unknown samples, or repeated ones.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; give a file with one JSON object per sample.")
    found: dict[str, dict] = {}
    wanted = set(names)
    for number, record in read_jsonl(path):
        if "sample_id" not in record:
            raise ValueError(f"{path}, line {number} is no prediction: it has no sample_id.")
        name = str(record["sample_id"])
        if name in found:
            raise ValueError(f"{path}, line {number}: the sample id {name!r} repeats.")
        found[name] = record
    for kind, odd in (("without a prediction", wanted - found.keys()), ("unknown", found.keys() - wanted)):
        if odd:
            raise ValueError(
                f"{path}: {len(odd)} of {len(wanted)} samples {kind}, the first {min(odd)!r}. Every sample needs one "
                'line ({"masks": []} for nothing) under the sample_id of the data set\'s rows.'
            )
    return found


def predicted_masks(record: dict, height: int, width: int) -> list[dict]:
    """A prediction's masks as compressed RLE; those without a pixel are left out.

    Args:
        record: a line of predictions.
        height: of the sample's image, in pixels.
        width: of the sample's image, in pixels.

    Returns:
        COCO RLE dicts whose union is the prediction.

    Raises:
        ValueError: no masks, masks in no known form, or of another size than the image.
    """
    keys = [key for key in ("masks", "mask", "slots") if key in record]
    if len(keys) != 1:
        raise ValueError(f"sample {record['sample_id']!r} needs one of masks, mask, slots; it has {keys or None}.")
    value = record[keys[0]]
    try:
        given = {"masks": list, "mask": lambda mask: [mask], "slots": lambda slots: [s["segmentation"] for s in slots]}
        rles = [coco_rle(rle, height, width) for rle in given[keys[0]](value)]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"sample {record['sample_id']!r}: {error}") from error
    return [rle for rle in rles if rle is not None]


def explicit_answer(record: dict) -> bool | None:
    """A prediction's own answer whether nothing is there; None without one. Raises ValueError if it is no bool."""
    answer = record.get("no_target")
    if not isinstance(answer, (bool, type(None))):
        raise ValueError(f"sample {record['sample_id']!r}: no_target is {answer!r}; write true, false or null.")
    return answer
