"""How does the project hold under faults, load and abuse? All harnesses of this folder, one after the other.

    python benchmarks/reliability/run.py --quick     # a few cases of each, in about two minutes
    python benchmarks/reliability/run.py             # all of them; repeat the command to go on

Each harness is a command of its own (crash_states.py, kills.py, corruption.py, fuzz.py, attack.py, load.py), takes at
most --minutes, and notes its cases in --output, so that a repeated command goes on where it was. Prints the table of
docs/reliability.md (`python dev/measured.py reliability` keeps it there). Keys of RESULT:
crash_states, crash_exact, kills, kills_exact, corrupt_cases, corrupt_silent, errors, errors_naming_file, fuzz_cases,
fuzz_hangs, fuzz_crashes, fuzz_silent, attacks, attacks_through, sessions, session_bytes, serve_requests, serve_wrong.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

HARNESSES = ("crash_states", "kills", "corruption", "fuzz", "attack", "load")
KEYS = (
    *("crash_states", "crash_exact", "kills", "kills_exact", "corrupt_cases", "corrupt_silent", "errors"),
    *("errors_naming_file", "fuzz_cases", "fuzz_hangs", "fuzz_crashes", "fuzz_silent", "attacks", "attacks_through"),
    *("sessions", "session_bytes", "serve_requests", "serve_wrong"),
)
ROWS = (
    ("crash states", "crash_states", "{crash_exact} exact"),
    ("kills", "kills", "{kills_exact} exact"),
    ("corruption", "corrupt_cases", "{corrupt_silent} silent; {errors_naming_file} of {errors} errors name the file"),
    ("fuzz", "fuzz_cases", "{fuzz_hangs} hangs, {fuzz_crashes} crashes, {fuzz_silent} silent answers"),
    ("attacks", "attacks", "{attacks_through} through"),
    ("load: visitors' sessions", "sessions", "{session_bytes} bytes kept of each"),
    ("load: requests to the server", "serve_requests", "{serve_wrong} wrong"),
)
"""Harness, the key of its cases, what was found."""


def table(result: dict) -> str:
    """The totals as a Markdown table.

    Args:
        result: the object after RESULT; harnesses that did not run are left out.

    Returns:
        One row for each harness that ran.
    """
    ran = [row for row in ROWS if row[1] in result]
    rows = [f"| {name} | {result[cases]:,} | {found.format_map(result)} |" for name, cases, found in ran]
    return "\n".join(["| harness | cases | found |", "|---|---|---|", *rows])


def main(argv: list[str] | None = None) -> dict:
    """Run the harnesses and return what the last line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cases of each kind")
    parser.add_argument("--only", nargs="+", choices=HARNESSES, default=list(HARNESSES), help="some of the harnesses")
    parser.add_argument("--output", type=Path, default=Path("runs/reliability"), help="where cases are noted")
    parser.add_argument("--minutes", type=float, default=60.0, help="for each harness; default: %(default)s")
    args = parser.parse_args(argv)
    found: dict = {}
    for name in args.only:
        words = ["--output", str(args.output), "--minutes", str(args.minutes), *(["--quick"] if args.quick else [])]
        print(f"-- {name}", flush=True)
        found |= importlib.import_module(f"benchmarks.reliability.{name}").main(words)
    result = {key: found[key] for key in KEYS if key in found}
    print(table(result))
    print("RESULT", json.dumps(result))
    return result


if __name__ == "__main__":
    main()
