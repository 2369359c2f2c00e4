"""Which image encoders work, and in what? Every kind, tiny, with random weights and transformers' real classes.

    python benchmarks/image_encoders.py                                # all: the table of docs/encoders.md
    python benchmarks/image_encoders.py --encoders "SAM 2" --checks frame

A column is a function of tests/support/encoders.py, which says what it asserts; the tests run some of them. Keys of
RESULT: encoders (how many were run), passed (how many passed every check), failed (which did not, and where).
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.support.encoders import CHECKS, TINY  # noqa: E402  # the folder above is no package


def check(name: str, column: str) -> str:
    """ "yes", or the error in one line."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            CHECKS[column](name, Path(folder))
        except Exception as error:  # whatever it is, it is what the table must say
            return f"no: {type(error).__name__}: {' '.join(str(error).split())[:150]}"
    return "yes"


def main() -> None:
    """Run the checks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", nargs="+", choices=TINY, default=list(TINY))
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS))
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # that untrained decoders start from nothing
    started, lines, failed = time.process_time(), [], {}
    for name in args.encoders:
        results = {column: check(name, column) for column in args.checks}
        failed |= {name: wrong} if (wrong := {c: r for c, r in results.items() if r != "yes"}) else {}
        lines.append(f"| {' | '.join([name, *(result.split(':')[0] for result in results.values())])} |")
    print(f"| {' | '.join(['', *args.checks])} |\n|{'---|' * (1 + len(args.checks))}")
    print("\n".join(lines))
    for name, wrong in failed.items():
        print(name, wrong)
    print(f"{time.process_time() - started:.0f} s of processor time")
    passed = len(args.encoders) - len(failed)
    print("RESULT", json.dumps({"encoders": len(args.encoders), "passed": passed, "failed": failed}))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
