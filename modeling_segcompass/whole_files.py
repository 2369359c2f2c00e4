"""Files that are there entirely or not at all, however their writing ends, on Linux, macOS and Windows alike.

A file is written beside its place, flushed to the disk, and renamed. A reader sees the old content or the new; a full
disk or a kill leaves the old one. JSON that is read again can carry the checksum of its own content (`signed_json`), so
that no byte of it changes unnoticed. Knows nothing about what the files hold.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

PART = ".part-"
"""Begins the name of a file that is being written; what a killed run left there is no content."""

CHECKSUM = "checksum"
"""The last field of signed JSON: the hash of what stands before it."""

_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))


def write_whole(path: str | os.PathLike, content: str | bytes | Callable[[Path], Any]) -> None:
    """Write a file in one step.

    Args:
        path: the file; its folder exists.
        content: text (as UTF-8, line ends as they are), bytes, or a function that writes to the path it is given, which
            ends as `path` does.

    Raises:
        OSError: the disk is full, or the file cannot be written; it is named, and what was there before is still there.
    """
    path = Path(path)
    part = path.with_name(f"{PART}{os.getpid()}-{path.name}")
    try:
        if callable(content):
            content(part)
        else:
            part.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        flush(part)
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        if is_full(error):
            raise _full(path) from error
        raise
    _flush_folder(path.parent)


def append_whole(path: str | os.PathLike, text: str) -> None:
    """Add lines to a file, all of them or, where that fails, none.

    Args:
        path: the file; made if absent.
        text: what to add, with its line ends.

    Raises:
        OSError: the disk is full, or the file cannot be written; it is named, and ends as it did before.
    """
    with open(path, "ab", buffering=0) as file:
        before, left = file.seek(0, os.SEEK_END), memoryview(text.encode("utf-8"))
        try:
            while left:
                left = left[file.write(left) :]
        except OSError as error:
            with suppress(OSError):
                os.truncate(path, before)
            if is_full(error):
                raise _full(path) from error
            raise


def flush(path: str | os.PathLike) -> None:
    """See to it that a file's content is on the disk before anything refers to it."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, says that there is no room; torch and safetensors say it in words."""
    while error is not None:
        text = str(error)
        if getattr(error, "errno", None) in _FULL or "No space left" in text or "File too large" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


def signed_json(content: dict[str, Any]) -> str:
    """JSON text of a dict, with the checksum of its content as the last field.

    Args:
        content: without a field `checksum` of its own; keys are text.

    Returns:
        One line of text, without a line end.
    """
    return json.dumps({**content, CHECKSUM: _checksum(content)})


def read_signed_json(path: str | os.PathLike) -> dict[str, Any]:
    """The content of a file of signed JSON, or of JSON that earlier versions wrote without a checksum.

    Args:
        path: an existing file.

    Returns:
        The content, without the checksum.

    Raises:
        ValueError: the file is cut, no JSON object, or not as it was written; it is named.
    """
    try:
        content = json.loads(Path(path).read_bytes().decode("utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
        return unsigned(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it, or fetch or make it again.") from error


def unsigned(content: dict[str, Any]) -> dict[str, Any]:
    """A dict without its checksum, which is compared. Raises ValueError when it is not as it was written."""
    if CHECKSUM not in content:
        last = next(reversed(content.values()), None)
        if isinstance(last, str) and re.fullmatch("[0-9a-f]{16}", last):
            raise ValueError(f"it is not as it was written: its last field is not called {CHECKSUM!r}")
        return content
    rest = {name: value for name, value in content.items() if name != CHECKSUM}
    if content[CHECKSUM] != _checksum(rest):
        raise ValueError("it is not as it was written: its checksum differs")
    return rest


def _full(path):
    return OSError(
        errno.ENOSPC,
        f"the disk is full while writing {path} (or a quota is); what was written before is kept: make room, and "
        "repeat the command to resume",
    )


def _checksum(content):
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _flush_folder(folder):
    """A rename is on the disk once its folder is; Windows knows no such thing."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
