"""What an attacker may put into a file, a text or an address, each with the refusal that it must meet.

Each module of this folder holds one kind of attack and a function `attacks`, which yields them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OWNED = "owned"
"""The file that an attack makes, in the folder it runs in, if its code is ever executed."""


@dataclass
class Attack:
    """One attempt.

    Example:
        Attack("a pickle that calls", lambda folder: read_pickle(evil(folder)), "only plain data is admitted")
    """

    name: str
    run: Callable[[Path], Any]
    """gets an empty folder; what it returns is True where it was harmless without a refusal."""
    refusal: str = ""
    """a pattern that the error's text must match; "" where there is none because nothing happens."""


class Calls:
    """Makes a file when it is unpickled."""

    def __init__(self, folder: Path):
        self.path = str(folder / OWNED)

    def __reduce__(self):
        return open, (self.path, "w")
