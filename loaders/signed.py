"""Data sets whose folder was signed: what differs from the signature is refused before a row of it is read.

`segcompass verify FOLDER --sign` signs any folder, and `segcompass prepare-data` what it writes. A folder that nobody
signed is read as it is: nobody can tell what it held.
"""

from collections.abc import Iterable
from pathlib import Path

LEVELS = 4
"""How many folders above a file may hold the manifest that lists it."""


def _is_signed(manifest: Path) -> bool:
    """Whether a file is a manifest of ours, if a damaged one: other programs have files of this name, too."""
    return manifest.is_file() and b'"format_version"' in manifest.read_bytes()[:1000]


def _beside(name: str) -> tuple[str, str]:
    """What files of one kind share: a sample that was deleted is missed, the files of another split are not."""
    path = Path(name)
    return path.parent.as_posix(), path.stem if path.suffix == ".parquet" else path.suffix


def check_signed(files: Iterable[Path | str]) -> None:
    """Compare the files of a data set with the manifests of their folders, where there are any.

    Sizes are compared always, hashes where the files that a manifest lists have less than 1 GiB together.

    Args:
        files: what will be read.

    Raises:
        ValueError: a file is not the one that was signed, or the manifest cannot be read; it is named.
    """
    from segcompass.modeling_segcompass.manifest import (  # here, since its package brings torch along
        HASH_BELOW,
        MANIFEST,
        findings,
        listed,
    )

    asked: dict[Path, set[str]] = {}
    signed: dict[Path, Path | None] = {}  # a folder -> the one above it, or itself, that is signed
    for file in map(Path, files):
        file = file.absolute()
        if file.parent not in signed:
            above = [file.parent, *file.parent.parents][:LEVELS]
            signed[file.parent] = next((folder for folder in above if _is_signed(folder / MANIFEST)), None)
        folder = signed[file.parent]
        if folder is not None:
            asked.setdefault(folder, set()).add(file.relative_to(folder).as_posix())
    for folder, names in asked.items():
        known = [folder / name for name in listed(folder)]
        small = sum(path.stat().st_size for path in known if path.is_file()) < HASH_BELOW
        wrong = [
            (name, what)
            for name, what in findings(folder, HASH_BELOW if small else 0)
            if name in names or (what == "missing" and _beside(name) in map(_beside, names))
        ]
        if wrong:
            shown = ", ".join(f"{name} ({what})" for name, what in wrong[:3])
            raise ValueError(
                f"{folder} is not what was signed: {shown}. Fetch or make the files again, or, if they were changed on "
                f"purpose, sign the folder anew: segcompass verify {folder} --sign"
            )
