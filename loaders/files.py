"""Annotation files read with errors that say which file, and what to do about it. Pickles run no code."""

import codecs
import json
import os
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
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


def inside_folder(folder: Path, given: str) -> Path:
    """The path of a file that a data set names, which must not lead out of the data set's folder.

    Links within the folder are followed: whoever owns the folder made them.

    Args:
        folder: of the data set.
        given: the path, relative to the folder or absolute.

    Returns:
        The file's path; it need not exist.

    Raises:
        ValueError: the path leads out of the folder.

    Example:
        >>> inside_folder(Path("/data/mine"), "images/a.jpg")
        PosixPath('/data/mine/images/a.jpg')
    """
    root = os.path.abspath(folder)
    path = Path(os.path.normpath(os.path.join(root, given)))
    if not path.is_relative_to(root):
        raise ValueError(
            f"{given[:200]!r} lies outside {root}, the folder that paths must stay in; move the file there, or name a "
            "folder that holds all files with --image-dir (image_dir=)."
        )
    return path


def check_shards(files: Iterable[Path | str]) -> None:
    """Refuse files named NAME-00000-of-00012 unless all twelve are there, and of one division.

    Args:
        files: paths; those without such a name are not looked at.

    Raises:
        ValueError: shards are missing, or two divisions lie side by side.
    """
    found: dict[str, dict[int, set[int]]] = {}
    folder, ending = Path(), ""
    for file in map(Path, files):
        if match := re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})", file.stem):
            found.setdefault(match[1], {}).setdefault(int(match[3]), set()).add(int(match[2]))
            folder, ending = file.parent, file.suffix
    for name, divisions in found.items():
        if len(divisions) > 1:
            shown = " and ".join(map(str, sorted(divisions)))
            raise ValueError(
                f"{folder} holds files of {name!r} from divisions into {shown}: two conversions. Delete one of them."
            )
        ((total, there),) = divisions.items()
        if len(there) != total:
            absent = [f"{name}-{number:05}-of-{total:05}{ending}" for number in range(total) if number not in there]
            raise ValueError(
                f"{folder} holds {len(there)} of the {total} files {name}-*-of-{total:05}: a part would pass for the "
                f"whole. Add {', '.join(absent[:3])}{' ...' if len(absent) > 3 else ''}, or finish the conversion."
            )


def read_json(path: Path, keep: Callable[[dict], Any] | None = None) -> Any:
    """The content of a JSON file in UTF-8, with or without a BOM, or, as some annotation tools write it, in cp1252.

    Args:
        path: an existing file.
        keep: what to keep of each object, which it gets as soon as that is read; None keeps all. A file of annotations
            takes a multiple of its size once it is Python's objects.

    Returns:
        What the file holds.

    Raises:
        ValueError: the file is truncated, no JSON, or in another encoding.
    """
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path} is in UTF-16; save it as UTF-8.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        try:
            text = content.decode("cp1252")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is neither UTF-8 nor cp1252 ({error}); save it as UTF-8.") from error
    del content  # a hundred megabytes less while the objects are made
    try:
        return json.loads(text, object_hook=keep)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or no JSON ({error}); download it again.") from error


def read_jsonl(path: Path, journal: bool = False, repair: bool = False) -> Iterator[tuple[int, dict]]:
    """The objects of a file with one JSON object per line. Blank lines are skipped.

    Args:
        path: an existing file in UTF-8, with or without a BOM.
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
            if number == 1:
                if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise ValueError(f"{path}, line 1: the file is in UTF-16; save it as UTF-8.")
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                row = json.loads(_utf8(line), object_pairs_hook=None if journal else _without_repeats)
                if not isinstance(row, dict):
                    raise ValueError(f"a line must be a JSON object; this one is a {type(row).__name__}")
            except (ValueError, RecursionError) as error:
                if journal:
                    message = f"{path}, line {number} is damaged ({error}); delete it and start again."
                elif isinstance(error, json.JSONDecodeError):
                    why = f"{error.msg} at character {error.pos + 1}"
                    message = f"{path}, line {number}: {why}; each line is one whole JSON object and nothing after it."
                else:
                    message = f"{path}, line {number}: {error}."
                raise ValueError(message) from error
            yield number, row
    if journal and repair and read < path.stat().st_size:
        os.truncate(path, read)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of which no key repeats: Python would keep the last one's value alone. Raises ValueError."""
    made = dict(pairs)
    if len(made) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {repeated!r} repeats; give it once, with a list where there are several values")
    return made


def _utf8(line: bytes) -> str:
    """A line as text. Raises ValueError."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the line is not UTF-8 (byte {line[error.start]:#04x} after {error.start} bytes); save the file as UTF-8"
        ) from error


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
