"""What a saved folder holds, signed: `manifest.json` lists every file with its size and SHA-256, and is written last.

A folder whose manifest is there was written to its end, and what differs from it was changed since. The README and
the manifest itself are left out, so that a card can be edited. This file knows nothing about models: whatever saves a
folder does so within `signing`, whatever loads one calls `check`.
"""

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .weights import check_safetensors

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Of a saved folder. Raised when an earlier version of the code cannot read what this one writes."""

MANIFEST = "manifest.json"
UNSIGNED = (MANIFEST, "README.md", ".gitattributes")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".npy")
"""Endings of files whose bytes become numbers: one that differs is an error."""

READ_BY_PROCESSORS = (".json", ".jinja", ".txt", ".model", ".py")
READ_BY_MODELS = (".safetensors", *READ_BY_PROCESSORS)
"""Endings of the files behind a model; what a trainer keeps beside them (an optimizer's state) is read by resuming."""

HASH_BELOW = 2**30
"""Bytes from which a loader leaves a file's hash to `segcompass verify`."""

_at_work = threading.local()


@contextmanager
def signing(folder: str | os.PathLike) -> Iterator[None]:
    """Sign a folder after everything within the block has been written.

    What the block wrote is signed as it is now. A file that it left alone keeps the signature it had, so that an edit
    is not signed by saving something beside it, and saving a processor does not read a large model again. Within a
    block of the same folder a further one does nothing: the manifest is written once, last. A block that fails leaves
    the manifest as it was.

    Args:
        folder: a saved model, SAE, adapter or checkpoint; made in the block if absent.

    Yields:
        None.
    """
    folder = Path(os.path.abspath(folder))
    open_folders = _at_work.__dict__.setdefault("folders", set())
    if folder in open_folders:
        yield
        return
    before, started = _stats(folder), time.time_ns()
    open_folders.add(folder)
    try:
        yield
    finally:
        open_folders.discard(folder)
    if not folder.is_dir():  # a process that does not write
        return
    kept = {}
    if (folder / MANIFEST).exists():
        # Two writes within a clock's tick look like one, so that what is this young is read again.
        untouched = {name for name, stat in before.items() if stat[0] < started - 2 * 10**9}
        try:
            noted = _read(folder)
        except ValueError:  # a manifest that is damaged, or of a later version, keeps nothing
            noted = {}
        now = _stats(folder)
        kept = {name: noted[name] for name in untouched & noted.keys() if before[name] == now.get(name)}
    _write(folder, kept)


def sign(folder: str | os.PathLike) -> None:
    """Write the folder's manifest from its files as they are now, all of them read anew.

    Args:
        folder: a saved model, SAE, adapter or checkpoint.
    """
    _write(Path(folder), {})


def check(
    folder: str | os.PathLike, endings: tuple[str, ...] = READ_BY_MODELS, whole: bool = True, missing: bool = True
) -> None:
    """Check a folder before its content is used: its manifest if it has one, and every safetensors file's header.

    Sizes are compared always, hashes of everything below `HASH_BELOW` bytes.

    Args:
        folder: the folder that is about to be loaded.
        endings: of the names of the files that will be read; others are not looked at.
        whole: whether to compare hashes at all.
        missing: whether a listed file that is absent is a finding; it is none in the Hub's cache, which holds what
            was asked for.

    Raises:
        ValueError: a weights file is missing, cut or changed or has a header that does not fit it, the manifest cannot
            be read, or the folder was written by a later version. Other files that differ are named in a warning.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        found = findings(folder, HASH_BELOW if whole else 0, endings, missing)
        broken = [f"{name} ({finding})" for name, finding in found if name.endswith(WEIGHTS)]
        edited = [f"{name} ({finding})" for name, finding in found if not name.endswith(WEIGHTS)]
        if edited:
            logger.warning(
                "%s was changed since it was saved: %s. If that was on purpose, sign it anew: segcompass verify %s "
                "--sign",
                folder,
                ", ".join(edited),
                folder,
            )
        if broken:
            raise ValueError(
                f"{folder} is not what was saved: {', '.join(broken)}. Nothing was loaded; fetch or copy the folder "
                f"again, or, if you changed it on purpose, sign it anew: segcompass verify {folder} --sign"
            )
    if ".safetensors" in endings:
        check_safetensors(folder)


def findings(
    folder: str | os.PathLike,
    hash_below: float = float("inf"),
    endings: tuple[str, ...] = ("",),
    missing: bool = True,
) -> list[tuple[str, str]]:
    """What differs between a folder and its manifest.

    Args:
        folder: a folder with a manifest.
        hash_below: files of so many bytes and more are compared by size alone.
        endings: of the names of the files to compare; all by default.
        missing: whether a listed file that is absent is a finding.

    Returns:
        (file name relative to the folder, what is wrong with it), in the manifest's order; [] when all is as signed.

    Raises:
        ValueError: the manifest is missing, cannot be read, or is a later version's.
    """
    folder = Path(folder)
    noted = {name: file for name, file in _read(folder).items() if name.endswith(endings)}

    def finding(name):
        path = folder / name
        if not path.is_file():
            return "missing" if missing else None
        size = path.stat().st_size
        if size != noted[name]["size"]:
            return f"{size} bytes, {noted[name]['size']} were saved"
        return "its content changed" if size < hash_below and sha256(path) != noted[name]["sha256"] else None

    with ThreadPoolExecutor() as pool:
        return [(name, wrong) for name, wrong in zip(noted, pool.map(finding, noted), strict=True) if wrong]


def unlisted(folder: str | os.PathLike) -> list[str]:
    """Files of the folder that its manifest does not list, relative to the folder, sorted."""
    return sorted(_stats(Path(folder)).keys() - _read(Path(folder)).keys())


def listed(folder: str | os.PathLike) -> list[str]:
    """Files that the folder's manifest lists; [] for a folder without one. Raises ValueError as `findings` does."""
    return list(noted_files(folder))


def noted_files(folder: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """What the folder's manifest notes: file -> {"size", "sha256"}; {} for a folder without one. Raises likewise."""
    return _read(Path(folder)) if (Path(folder) / MANIFEST).exists() else {}


def sha256(path: str | os.PathLike) -> str:
    """The file's SHA-256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stats(folder: Path) -> dict[str, tuple[int, int, int]]:
    """(mtime, size, inode) of every file that a manifest of this folder lists, by posix path, sorted.

    Left out are the unsigned ones, hidden ones and byte code, and folders that are signed on their own or will be: a
    trainer keeps its checkpoints below the model it saves.
    """
    stats = {}
    for root, folders, files in os.walk(folder):
        folders[:] = [
            name
            for name in folders
            if not name.startswith((".", "checkpoint-"))
            and name not in ("__pycache__", "runs", "completions")
            and not os.path.exists(os.path.join(root, name, MANIFEST))
        ]
        for name in files:
            path = Path(root, name).relative_to(folder).as_posix()
            if not name.startswith(".") and path not in UNSIGNED:
                stat = os.stat(os.path.join(root, name))
                stats[path] = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
    return dict(sorted(stats.items()))


def _write(folder: Path, kept: dict[str, dict[str, Any]]) -> None:
    names = list(_stats(folder))

    def entry(name):
        path = folder / name
        return kept.get(name) or {"size": path.stat().st_size, "sha256": sha256(path)}

    with ThreadPoolExecutor() as pool:
        files = dict(zip(names, pool.map(entry, names), strict=True))
    beside = folder / f".{MANIFEST}.{os.getpid()}"
    with open(beside, "w", encoding="utf-8", newline="\n") as file:
        file.write(_text(files))
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, folder / MANIFEST)


def _text(files: dict[str, dict[str, Any]]) -> str:
    """The manifest's text. Its last field is the hash of what stands before, so that no byte of it can change alone."""
    content: dict[str, Any] = {"format_version": FORMAT_VERSION, "files": files}
    content["sha256"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps(content, indent=2) + "\n"


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / MANIFEST
    try:
        text = path.read_bytes().decode("utf-8")
        manifest = json.loads(text)
        version = manifest["format_version"] + 0
        files = {str(name): {"size": f["size"], "sha256": f["sha256"]} for name, f in manifest["files"].items()}
        if version > FORMAT_VERSION:
            raise ValueError(
                f"{folder} has format version {version}, this segcompass reads up to {FORMAT_VERSION}; upgrade it "
                "(pip install -U segcompass), or load with trust_remote_code=True, which uses the code in the folder."
            )
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no {MANIFEST}; sign it with: segcompass verify {folder} --sign") from error
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if text != _text(files):
        raise _damaged(path, "it is not as it was written")
    outside = [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise ValueError(f"{path} names files outside its folder ({', '.join(outside[:3])}); fetch the folder again.")
    return files


def _damaged(path, why):
    return ValueError(
        f"{path} cannot be read ({why}); fetch or copy the folder again, or, if its files are right, sign it anew: "
        f"segcompass verify {path.parent} --sign"
    )
