"""Results that survive an interruption: one JSON line per item, in a folder that belongs to one run.

A command that is killed resumes where it was when it is started again with the same arguments. Knows nothing about
what the items are.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from transformers.utils import CONFIG_NAME, cached_file

from segcompass.loaders.files import read_jsonl
from segcompass.modeling_segcompass.concept_labels import DICTIONARY
from segcompass.modeling_segcompass.manifest import HASH_BELOW, MANIFEST, noted_files, sha256


class Journal:
    """The finished items of a run, on disk (`items.jsonl`) and in `records` by their `sample_id`.

    Args:
        folder: made if it does not exist; `run.json` in it says what the items are of.
        run: the arguments that the items depend on.

    Raises:
        ValueError: the folder holds another run, or a damaged line.

    Example:
        journal = Journal(Path("runs/curves"), {"model": "mini", "weights": weights_of("mini")})
        journal.add({"sample_id": name, "iou": 0.5} for name in names if name not in journal.records)
        mean = sum(record["iou"] for record in journal.records.values()) / len(journal.records)
    """

    def __init__(self, folder: Path, run: dict):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "items.jsonl"
        claim_folder(folder, run)
        self.records = read_records(self.path, repair=True)

    def add(self, records: Iterable[dict]) -> None:
        """Write records to the file and keep them."""
        with self.path.open("a") as file:
            for record in records:
                file.write(json.dumps(record) + "\n")
                self.records[record["sample_id"]] = record


def claim_folder(folder: Path, run: dict, file: str = "run.json", holds: str = "results made") -> None:
    """Note in a folder what its content is made from, or refuse a folder that notes something else.

    Args:
        folder: an existing folder.
        run: what the content depends on, in types that JSON knows.
        file: the note's name.
        holds: what the error calls the content.

    Raises:
        ValueError: the folder holds another run; the first different argument is named.
    """
    note = folder / file
    run = json.loads(json.dumps(run))
    if note.exists():
        theirs = json.loads(note.read_text())
        for name in run | theirs:
            if theirs.get(name) != run.get(name):
                raise ValueError(
                    f"{folder} holds {holds} with {name}={theirs.get(name)!r}, this run has {run.get(name)!r}; "
                    "choose another --output, or delete that folder."
                )
    write_text(note, json.dumps(run, indent=2) + "\n")


def read_records(path: Path, repair: bool = False) -> dict[str, dict]:
    """The records of a JSONL file by their sample_id. A last line that was cut off is left out.

    Args:
        path: the file; {} is returned when it does not exist.
        repair: remove the torn line from the file too, so that it can be appended to.

    Returns:
        sample_id -> record, in the file's order.

    Raises:
        ValueError: a damaged line, or one without sample_id; it is named.
    """
    records: dict[str, dict] = {}
    if path.exists():
        for number, record in read_jsonl(path, journal=True, repair=repair):
            if "sample_id" not in record:
                raise ValueError(f"{path}, line {number} is damaged (no sample_id); delete it and start again.")
            records[record["sample_id"]] = record
    return records


def write_text(path: Path, text: str) -> None:
    """Write a file in one step: a reader sees the old content or the new."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


READ = (".safetensors", ".json", ".jinja", ".txt", ".model")
"""Endings of the files that a model and its processor are made of; what else lies beside them changes no result."""


def weights_of(model: str) -> str | None:
    """What a model is, so that a run knows it again: its weights, its configuration and its processor, by content.

    Of files of 1 GiB and more whose size is that in the folder's manifest, the manifest's hash is taken.

    Args:
        model: folder or Hub id.

    Returns:
        64 hex digits of a folder, whenever its files were written; of a Hub id the commit that would be loaded now;
        None for neither.
    """
    if not os.path.isdir(model):
        lenient = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
        try:
            found = cached_file(model, CONFIG_NAME, **lenient)
        except (OSError, ValueError):  # no such repository: loading it says so
            return None
        commit = re.search(r"snapshots[/\\]([0-9a-f]{40})", str(found))
        return commit[1] if commit else None
    try:
        noted = noted_files(model)
    except ValueError:  # a damaged manifest, of which loading the model says more
        noted = {}
    digest = hashlib.sha256()
    for path in sorted(Path(model).iterdir()):
        if path.name.endswith(READ) and path.name not in (MANIFEST, DICTIONARY) and path.is_file():
            size, known = path.stat().st_size, noted.get(path.name, {})
            trusted = size >= HASH_BELOW and known.get("size") == size
            digest.update(f"{path.name} {size} {known['sha256'] if trusted else sha256(path)}\n".encode())
    return digest.hexdigest()
