"""Results that survive an interruption: one JSON line an item, in a folder that belongs to one run.

A script that is killed goes on where it was when it is started again with the same arguments.
"""

import json
from pathlib import Path


class Journal:
    """The items of a run that are done, on disk (`items.jsonl`) and in `records` by their `sample_id`.

    Args:
        folder: made if it does not exist; `run.json` in it says what the items are of.
        run: the arguments that the items depend on.

    Raises:
        SystemExit: the folder holds another run, or a damaged line.
    """

    def __init__(self, folder: Path, run: dict):
        folder.mkdir(parents=True, exist_ok=True)
        note, self.path = folder / "run.json", folder / "items.jsonl"
        run = json.loads(json.dumps(run))
        if note.exists():
            theirs = json.loads(note.read_text())
            for name in sorted(run.keys() | theirs.keys()):
                if theirs.get(name) != run.get(name):
                    raise SystemExit(
                        f"{folder} holds results made with {name}={theirs.get(name)!r}, this run has "
                        f"{run.get(name)!r}; choose another --output, or delete that folder."
                    )
        note.write_text(json.dumps(run, indent=2) + "\n")
        self.records = {record["sample_id"]: record for record in self._read()}

    def add(self, records):
        """Write records down and keep them."""
        with self.path.open("a") as file:
            for record in records:
                file.write(json.dumps(record) + "\n")
                self.records[record["sample_id"]] = record

    def _read(self):
        """The whole lines of the file; a last line that was cut off is removed from it."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise SystemExit(
                    f"{self.path}, line {number} is damaged ({error}); delete it and start again."
                ) from error


def weights_of(model: str) -> int | None:
    """When the weights in a folder last changed, so that a run knows its model; None for a Hub id."""
    return max((file.stat().st_mtime_ns for file in Path(model).glob("*.safetensors")), default=None)
