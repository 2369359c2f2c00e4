"""Attacks, each with the refusal that it must meet; see the folder attacks/.

    python benchmarks/reliability/attack.py [--quick]

Each runs in a child process with limits of time and memory, in an empty folder. It got through if its code was run, if
it was not refused in the words that it must meet, if it was not harmless where nothing is refused, or if it took more
than 20 seconds or 1.5 GB. Keys of RESULT: attacks, attacks_through.
"""

import importlib
import os
import pkgutil
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.reliability import attacks, writers  # noqa: E402
from benchmarks.reliability.children import each_in_child, options, say  # noqa: E402
from segcompass.journal import Journal  # noqa: E402

SECONDS, MEGABYTES = 20.0, 1500.0


def all_attacks() -> list[attacks.Attack]:
    """Every attack of the folder, in the order of its modules."""
    found: list[attacks.Attack] = []
    for module in sorted(each.name for each in pkgutil.iter_modules(attacks.__path__)):
        found += importlib.import_module(f"benchmarks.reliability.attacks.{module}").attacks()
    return found


def main(argv: list[str] | None = None) -> dict:
    """Run the harness and return what its RESULT says."""
    args = options(__doc__, argv)
    journal = Journal(args.output / ("attacks_quick" if args.quick else "attacks"), {"quick": args.quick})
    todo = all_attacks()
    names = [attack.name for attack in todo]
    assert len(set(names)) == len(names), "two attacks have one name"
    todo = [attack for attack in todo[:: 8 if args.quick else 1] if attack.name not in journal.records]
    with tempfile.TemporaryDirectory() as work:
        writers.work_in(Path(work))
        folder = Path(work).resolve() / "attack"

        def work_of(attack):
            def run():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                os.chdir(folder)
                return bool(attack.run(folder))

            return run

        works = [(str(number), work_of(attack)) for number, attack in enumerate(todo)]
        for number, outcome in each_in_child(works, SECONDS * (3 if args.quick else 1), MEGABYTES):
            attack = todo[int(number)]
            owned = (folder / attacks.OWNED).exists()
            if attack.refusal:
                held = outcome.kind == "error" and bool(re.search(attack.refusal, outcome.text, re.S))
            else:
                held = outcome.kind == "done" and outcome.value
            held = held and not owned and outcome.error != "AssertionError"
            said = f"{outcome.kind} {outcome.error} {outcome.text}"[:300]
            journal.add([{"sample_id": attack.name, "through": not held, "said": said}])
            if not held:
                print(f"THROUGH: {attack.name}: {'its code ran; ' if owned else ''}{said}", flush=True)
            if time.monotonic() > args.end:
                break
    records = list(journal.records.values())
    return say({"attacks": len(records), "attacks_through": sum(record["through"] for record in records)})


if __name__ == "__main__":
    main()
