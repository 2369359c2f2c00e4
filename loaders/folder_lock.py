"""One writer to a folder: a second one is told who holds it, instead of mixing its files with the first one's.

The lock is the operating system's (`filelock`), so that it is gone with the process that held it, however that ended.
Beside it lies who holds it, for the second writer to read. Whoever takes a folder clears what killed runs left half
written in it (`whole_files.PART`).
"""

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

LOCK, HOLDER = ".writing.lock", ".writing.json"
PATIENCE = 0.2
"""Seconds to wait for a lock: long enough for one that is being given back."""

_held: dict[str, tuple[int, int, FileLock]] = {}  # folder -> its thread, how often it entered, the lock
_made: set[str] = set()  # folders that were made for a lock
_inherited: list[tuple[int, int, FileLock]] = []
_guard = threading.Lock()


class FolderHeldError(OSError):
    """Another run is writing into the folder.

    Example:
        try:
            with folder_lock("runs/test"):
                evaluate(run)
        except FolderHeldError as error:
            print(error)  # runs/test is being written by process 4711 on host … since …
    """


@contextmanager
def folder_lock(folder: str | os.PathLike) -> Iterator[None]:
    """Within it this process alone writes into a folder. Entered again within itself, it does nothing.

    Args:
        folder: of a run's results or of a cache; made if absent.

    Yields:
        None.

    Raises:
        FolderHeldError: another process, or another thread, is writing there; it is named.
        NotADirectoryError: a file has that name.

    Example:
        with folder_lock("runs/test"):
            write_results("runs/test")
    """
    take_folder(folder)
    try:
        yield
    finally:
        give_folder(folder)


def take_folder(folder: str | os.PathLike) -> None:
    """Begin to write into a folder; `give_folder` ends it, as does the end of the process.

    Args:
        folder: made if absent.

    Raises:
        FolderHeldError: another process, or another thread, is writing there; it is named.
        NotADirectoryError: a file has that name.
    """
    from segcompass.modeling_segcompass.whole_files import PART  # here, since its package brings torch along

    path = Path(os.path.realpath(folder))
    with _guard:
        if str(path) in _held:
            thread, times, lock = _held[str(path)]
            if thread != threading.get_ident():
                raise FolderHeldError(_refusal(path))
            _held[str(path)] = (thread, times + 1, lock)
            return
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"{path} is a file; name a folder to write into.")
        if not path.exists():
            path.mkdir(parents=True, exist_ok=True)
            _made.add(str(path))
        lock = FileLock(path / LOCK, timeout=PATIENCE, poll_interval=0.02)
        try:
            lock.acquire()
        except Timeout:
            raise FolderHeldError(_refusal(path)) from None
        _held[str(path)] = (threading.get_ident(), 1, lock)
        for unfinished in path.glob(f"{PART}*"):  # of a run that was killed: nobody else writes here
            with suppress(OSError):
                unfinished.unlink()
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        with suppress(OSError):  # on a full disk the lock holds without a name
            (path / HOLDER).write_text(json.dumps(holder), encoding="utf-8")


def give_folder(folder: str | os.PathLike) -> None:
    """End what `take_folder` began; nothing where it was not taken."""
    path = Path(os.path.realpath(folder))
    with _guard:
        if str(path) not in _held:
            return
        thread, times, lock = _held[str(path)]
        if times > 1:
            _held[str(path)] = (thread, times - 1, lock)
            return
        del _held[str(path)]
        with suppress(OSError):
            (path / HOLDER).unlink()
        with suppress(OSError):  # while it is held, so that whoever waits for it sees that it is gone
            (path / LOCK).unlink()
        lock.release()
        if str(path) in _made:  # a run that was refused leaves no empty folder
            _made.discard(str(path))
            with suppress(OSError):
                path.rmdir()


def _refusal(path: Path) -> str:
    holder: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        holder = json.loads((path / HOLDER).read_text(encoding="utf-8"))
    known = {name: holder.get(name, "?") for name in ("pid", "host", "since")} if isinstance(holder, dict) else {}
    return (
        f"{path} is being written by process {known.get('pid', '?')} on host {known.get('host', '?')} since "
        f"{known.get('since', '?')}; wait until it is done, stop it, or choose another folder."
    )


def _forget():
    """A forked child holds nothing: what it inherits is its parent's, and giving it back would be the parent's loss."""
    _inherited.extend(_held.values())
    _held.clear()
    _made.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
