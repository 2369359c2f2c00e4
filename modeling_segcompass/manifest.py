"""What a saved folder holds, signed: `manifest.json` lists every file with its size and SHA-256, and is written last.

A folder whose manifest is there was written to its end, and what differs from it was changed since. The README and
the manifest itself are left out, so that a card can be edited. This file knows nothing about models: whatever saves a
folder calls `sign`, whatever loads one calls `check`.
"""

import hashlib
import json
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Of a saved folder. Raised when an earlier version of the code cannot read what this one writes."""

MANIFEST = "manifest.json"
UNSIGNED = (MANIFEST, "README.md", ".gitattributes")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".npy")
"""Endings of files whose bytes become numbers: one that differs is an error."""

HASH_BELOW = 2**30
"""Bytes from which a loader leaves a weights file's hash to `segcompass verify` (a second per GiB or more)."""


def sign(folder: str | os.PathLike) -> None:
    """Write the folder's manifest, after everything else has been written.

    A file that is older than the manifest before, and of the size noted there, keeps the hash noted there: saving a
    processor beside a large model does not read the model again.

    Args:
        folder: a saved model, SAE, adapter or checkpoint.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    before, signed_at = {}, 0
    if path.exists():
        before, signed_at = _read(folder), path.stat().st_mtime_ns
    files = {}
    for name in _signed_names(folder):
        stat = (folder / name).stat()
        noted = before.get(name)
        known = noted is not None and noted["size"] == stat.st_size and stat.st_mtime_ns < signed_at
        files[name] = noted if known else {"size": stat.st_size, "sha256": sha256(folder / name)}
    text = json.dumps({"format_version": FORMAT_VERSION, "files": files}, indent=2) + "\n"
    beside = folder / f".{MANIFEST}.{os.getpid()}"
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def check(folder: str | os.PathLike) -> None:
    """Compare a folder with its manifest before its content is used; a folder without one is left to its readers.

    Sizes are compared always, hashes of everything below `HASH_BELOW` bytes.

    Args:
        folder: the folder that is about to be loaded. Files that are listed but absent matter when they are weights.

    Raises:
        ValueError: a weights file is missing, cut or changed, the manifest cannot be read, or the folder was written by
            a later version. Other files that differ are named in a warning.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        return
    broken, edited = [], []
    for name, finding in findings(folder, hash_below=HASH_BELOW):
        (broken if name.endswith(WEIGHTS) else edited).append(f"{name} ({finding})")
    if broken:
        raise ValueError(
            f"{folder} is not what was saved: {', '.join(broken)}. Nothing was loaded; fetch or copy the folder again, "
            f"or, if you changed it on purpose, sign it anew: segcompass verify {folder} --sign"
        )
    if edited:
        logger.warning(
            "%s was changed since it was saved: %s. If that was on purpose, sign it anew: segcompass verify %s --sign",
            folder,
            ", ".join(edited),
            folder,
        )


def findings(folder: str | os.PathLike, hash_below: float = float("inf")) -> list[tuple[str, str]]:
    """What differs between a folder and its manifest.

    Args:
        folder: a folder with a manifest.
        hash_below: files of so many bytes and more are compared by size alone.

    Returns:
        (file name relative to the folder, what is wrong with it), in the manifest's order; [] when all is as signed.

    Raises:
        ValueError: the manifest is missing, cannot be read, or is a later version's.
    """
    folder = Path(folder)
    wrong = []
    for name, noted in _read(folder).items():
        path = folder / name
        if not path.is_file():
            wrong.append((name, "missing"))
            continue
        size = path.stat().st_size
        if size != noted["size"]:
            wrong.append((name, f"{size} bytes, {noted['size']} were saved"))
        elif size < hash_below and sha256(path) != noted["sha256"]:
            wrong.append((name, "its content changed"))
    return wrong


def unlisted(folder: str | os.PathLike) -> list[str]:
    """Files of the folder that its manifest does not list, relative to the folder, sorted."""
    return sorted(set(_signed_names(Path(folder))) - set(_read(Path(folder))))


def sha256(path: str | os.PathLike) -> str:
    """The file's SHA-256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _signed_names(folder: Path) -> list[str]:
    """Every file below the folder but the unsigned ones, hidden ones and byte code, as posix paths, sorted."""
    names = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        names += [Path(root, name).relative_to(folder).as_posix() for name in files if not name.startswith(".")]
    return sorted(name for name in names if name not in UNSIGNED)


def _read(folder: Path) -> dict[str, dict]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = int(manifest["format_version"])
        files = {
            str(name): {"size": int(f["size"]), "sha256": str(f["sha256"])} for name, f in manifest["files"].items()
        }
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no {MANIFEST}; sign it with: segcompass verify {folder} --sign") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}); fetch or copy the folder again, or delete "
            f"{MANIFEST} and sign the folder anew: segcompass verify {folder} --sign"
        ) from error
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format version {version}, this segcompass reads up to {FORMAT_VERSION}; upgrade it "
            "(pip install -U segcompass), or load with trust_remote_code=True, which uses the code in the folder."
        )
    outside = [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise ValueError(f"{path} names files outside its folder ({', '.join(outside[:3])}); fetch the folder again.")
    return files
