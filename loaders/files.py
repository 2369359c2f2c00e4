"""Annotation files read with errors that say which file, and what to do about it. Pickles run no code."""

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def need(path: Path, where: str) -> Path:
    """The path, if something is there.

    Args:
        path: a file or a folder.
        where: the end of the error: where such a file is found.

    Returns:
        `path`.

    Raises:
        FileNotFoundError: nothing is there.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; {where}")
    return path


def read_json(path: Path) -> Any:
    """The content of a JSON file in UTF-8 or, as some annotation tools write it, in cp1252.

    Args:
        path: an existing file.

    Returns:
        What the file holds.

    Raises:
        ValueError: the file is truncated or no JSON.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is truncated or no JSON ({error}); download it again.") from error


def read_jsonl(path: Path, journal: bool = False, repair: bool = False) -> Iterator[tuple[int, dict]]:
    """The objects of a file with one JSON object per line. Blank lines are skipped.

    Args:
        path: an existing file in UTF-8.
        journal: the file is one that a run of ours appends to. A last line without its line end was being written when
            the run was killed, and is left out.
        repair: also remove that line from the journal, once all lines before it are read, so that the run can go on.

    Yields:
        (number of the line, from 1; the object).

    Raises:
        ValueError: a line is no JSON object; file and line are named.

    Example:
        >>> path = Path(tempfile.mkdtemp(), "a.jsonl")
        >>> _ = path.write_text('{"sample_id": "x"}' + chr(10) + '{"sample_')
        >>> list(read_jsonl(path, journal=True))
        [(1, {'sample_id': 'x'})]
    """
    read = 0  # bytes
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if journal and not line.endswith(b"\n"):
                break
            read += len(line)
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
                if not isinstance(row, dict):
                    raise ValueError(f"a line must be a JSON object; this one is a {type(row).__name__}")
            except ValueError as error:
                if journal:
                    message = f"{path}, line {number} is damaged ({error}); delete it and start again."
                else:
                    message = f"{path}, line {number}: {error}."
                raise ValueError(message) from error
            yield number, row
    if journal and repair and read < path.stat().st_size:
        os.truncate(path, read)


class _PlainUnpickler(pickle.Unpickler):
    """Builds dicts, lists, tuples, sets, strings and numbers, and nothing else."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, but only plain data is admitted")

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("it refers to objects outside the file, but only plain data is admitted")


def read_pickle(path: Path) -> Any:
    """The content of a pickle of plain data, as Python 2 or 3 wrote it. Nothing in the file is ever called.

    Args:
        path: an existing file.

    Returns:
        What the file holds: dicts, lists, tuples, sets, strings and numbers.

    Raises:
        ValueError: the file is truncated, no pickle, or holds anything but plain data.
    """
    failure: Exception | None = None
    for encoding in ("utf-8", "latin-1"):  # Python 2 strings are bytes
        try:
            with path.open("rb") as file:
                return _PlainUnpickler(file, encoding=encoding).load()
        except UnicodeDecodeError as error:
            failure = error
        except Exception as error:  # the format's machine fails in many ways on a damaged file
            failure = error
            break
    raise ValueError(f"{path} is truncated or no pickle of plain data: {failure}. Download it again.") from failure
