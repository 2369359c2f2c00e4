"""Annotation files read with errors that say which file, and what to do about it. Pickles run no code."""

import json
import pickle
from pathlib import Path


def need(path: Path, where: str) -> Path:
    """`path`, if it exists. Raises FileNotFoundError that says where such a file is usually found."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; {where}")
    return path


def read_json(path: Path):
    """The content of a JSON file in UTF-8 or, as some annotation tools write it, in cp1252.

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


class _PlainUnpickler(pickle.Unpickler):
    """Builds dicts, lists, tuples, sets, strings and numbers, and nothing else."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, but only plain data is admitted")

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("it refers to objects outside the file, but only plain data is admitted")


def read_pickle(path: Path):
    """The content of a pickle of plain data, as Python 2 or 3 wrote it. Nothing in the file is ever called.

    Raises:
        ValueError: the file is truncated, no pickle, or holds anything but plain data.
    """
    failure = None
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
