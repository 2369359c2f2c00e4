"""How does the project hold under faults, load and abuse? All harnesses of this folder, one after the other.

    python benchmarks/reliability/run.py --quick     # a few cases of each, in about two minutes
    python benchmarks/reliability/run.py             # all of them; repeat the command to go on

Each harness is a command of its own (crash_states.py, kills.py, corruption.py, fuzz.py, attack.py, load.py), takes at
most --minutes, and notes its cases in --output, so that a repeated command goes on where it was. Keys of RESULT:
crash_states, crash_exact, kills, kills_exact, corrupt_cases, corrupt_silent, errors, errors_naming_file, fuzz_cases,
fuzz_hangs, fuzz_crashes, fuzz_silent, attacks, attacks_through, sessions, session_bytes.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

HARNESSES = ("crash_states", "kills", "corruption", "fuzz", "attack", "load")
KEYS = (
    *("crash_states", "crash_exact", "kills", "kills_exact", "corrupt_cases", "corrupt_silent", "errors"),
    *("errors_naming_file", "fuzz_cases", "fuzz_hangs", "fuzz_crashes", "fuzz_silent", "attacks", "attacks_through"),
    *("sessions", "session_bytes"),
)


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
        command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), "--output", str(args.output)]
        command += ["--minutes", str(args.minutes), *(["--quick"] if args.quick else [])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(f"{name}: {line}", end="", flush=True)
                if line.startswith("RESULT "):
                    found |= json.loads(line.removeprefix("RESULT "))
        if process.returncode:
            raise SystemExit(f"{name} ended with status {process.returncode}")
    result = {key: found[key] for key in KEYS if key in found}
    print("RESULT", json.dumps(result))
    return result


if __name__ == "__main__":
    main()
