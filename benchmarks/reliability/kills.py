"""Real kills at random moments of everything that writes files; then the command is repeated until it is done.

    python benchmarks/reliability/kills.py [--quick] [--writers sft grpo]

A writer runs in a process of its own, which is killed with -9 after a random part of the time that it takes; up to
three times, then it may finish. What it leaves must be the same bytes as without the kills. Keys of RESULT: kills,
kills_exact, and both by writer.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.reliability import writers  # noqa: E402
from benchmarks.reliability.children import in_child, options, say, warm_up  # noqa: E402
from segcompass.journal import Journal  # noqa: E402

ROUNDS = {"full": 4, "quick": 1}
"""How often each writer is begun anew; it is killed up to three times in each."""
QUICK = ("sae", "feature_cache", "prepare", "journal")


def killed(name: str, folder: Path, seconds: float) -> bool:
    """Start a writer and kill it after so many seconds; whether it was still at work."""
    child = os.fork()
    if not child:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        code = 1
        try:
            writers.run_quietly(name, folder)
            code = 0
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return False
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def examine(name: str, work: Path, journal: Journal, rounds: int, end: float) -> None:
    """Some rounds of kills of one writer.

    Args:
        name: of the writer.
        work: folder to work in.
        journal: of the cases.
        rounds: how many.
        end: when to stop, on the monotonic clock.
    """
    folder, took = work / name / "run", 0.0
    warm_up(lambda: writers.run_quietly(name, folder))
    for number in range(2):
        shutil.rmtree(folder, ignore_errors=True)
        outcome = in_child(lambda: writers.run_quietly(name, folder), 300)
        assert outcome.kind == "done", f"{name} does not run: {outcome}"
        took = max(took, outcome.seconds)
        shutil.copytree(folder, work / name / str(number), dirs_exist_ok=True)
    whole = writers.result(name, folder)
    alike = writers.compared(name, [work / name / "0", work / name / "1"])
    for number in range(rounds):
        case = f"{name} {number}"
        if case in journal.records or time.monotonic() > end:
            continue
        draw = random.Random(case)
        shutil.rmtree(folder, ignore_errors=True)
        kills = 0
        for _ in range(8):
            kills += killed(name, folder, draw.uniform(0.02, 0.95) * took)
            if kills == 3:
                break
        outcome = in_child(lambda: writers.run_quietly(name, folder), 300)
        left = writers.result(name, folder)
        wrong = sorted(path for path in alike if left.get(path) != whole[path])
        exact = outcome.kind == "done" and not wrong
        if not exact:
            print(f"NOT EXACT {case}: {outcome.kind} {outcome.text[:200]} {wrong[:5]}", flush=True)
        journal.add([{"sample_id": case, "writer": name, "kills": kills, "exact": exact, "said": outcome.text[:300]}])
    print(f"{name}: takes {took:.2f} s", flush=True)


def main(argv: list[str] | None = None) -> dict:
    """Run the harness and return what its RESULT says."""
    args = options(__doc__, argv, {"--writers": writers.CHOICE})
    form = "quick" if args.quick else "full"
    journal = Journal(args.output / f"kills_{form}", {"quick": args.quick})
    with tempfile.TemporaryDirectory() as work:
        writers.work_in(Path(work))
        for name in args.writers or (QUICK if args.quick else writers.WRITERS):
            if time.monotonic() < args.end:
                examine(name, Path(work).resolve(), journal, ROUNDS[form], args.end)
    records = list(journal.records.values())
    by = {
        name: [sum(r["kills"] for r in records if r["writer"] == name and (r["exact"] or all_)) for all_ in (0, 1)]
        for name in writers.WRITERS
    }
    kills = sum(record["kills"] for record in records)
    exact = sum(record["kills"] for record in records if record["exact"])
    return say({"kills": kills, "kills_exact": exact, "by_writer": by})


if __name__ == "__main__":
    main()
