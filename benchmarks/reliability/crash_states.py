"""Every state that a crash can leave on the disk, of everything that writes files: does repeating the command mend it?

    python benchmarks/reliability/crash_states.py [--quick] [--sample 50] [--writers sft grpo]
    python benchmarks/reliability/crash_states.py --part 3/8    # every eighth state, from the third on
    python benchmarks/reliability/crash_states.py --minutes 0   # tries none: adds up what all parts have tried

A writer runs once while each of its openings, renamings and removals is watched; before each, what is on the disk is a
state that a kill leaves. What was written in between is also left out, cut to nothing and cut in half, with everything
later absent. A renaming happens or does not. Each state is laid out, the writer runs again, and what it leaves must be
the same bytes as without the crash. --sample takes so many of each writer's states, evenly spread over its run; without
it all are tried. Keys of RESULT: crash_states, crash_exact, and by writer [exact, tried, there are], of all parts that
were tried into the same --output.
"""

import hashlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.reliability import writers  # noqa: E402
from benchmarks.reliability.children import in_child, options, say, warm_up  # noqa: E402
from segcompass.journal import Journal, read_records  # noqa: E402

State = dict[str, str]
"""Relative path -> name of its content among the blobs."""


class Watch:
    """Notes what lies in a folder before each change of it, from the interpreter's own audit events.

    Args:
        folder: whose states are noted.
        blobs: where contents are kept, each once.
    """

    EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")

    def __init__(self, folder: Path, blobs: Path):
        self.folder, self.blobs = folder, blobs
        self.states: list[tuple[State, dict[str, int]]] = []
        self._known: dict[tuple, str] = {}
        self._looking = False
        sys.addaudithook(self._hear)

    def _hear(self, event, args):
        if self._looking or (event != "open" and event not in self.EVENTS):
            return
        if event == "open":
            path, mode, flags = args
            writes = any(letter in (mode or "") for letter in "wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
            if not writes or isinstance(path, int) or not str(os.fspath(path)).startswith(str(self.folder)):
                return
        self.look()

    def look(self) -> None:
        """Note the present state, if it is another than the last."""
        self._looking = True
        try:
            state, times = {}, {}
            for path in sorted(self.folder.rglob("*")) if self.folder.exists() else ():
                name = path.relative_to(self.folder).as_posix()
                if not path.is_file() or name.startswith(("runs/", ".writing.")):
                    continue
                stat = path.stat()
                key = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
                if key not in self._known:
                    content = path.read_bytes()
                    self._known[key] = hashlib.sha256(content).hexdigest()
                    (self.blobs / self._known[key]).write_bytes(content)
                state[name], times[name] = self._known[key], stat.st_mtime_ns
            if not self.states or self.states[-1][0] != state:
                self.states.append((state, times))
        finally:
            self._looking = False


def crash_states(seen: list[tuple[State, dict[str, int]]], blobs: Path) -> list[State]:
    """The states that a crash can leave, each once, from those that were seen.

    Args:
        seen: consecutive states, with the times of their files.
        blobs: the contents; halves are added.

    Returns:
        The states, in the order of the run.
    """
    found: list[State] = []

    def add(state):
        if state not in found:
            found.append(dict(state))

    for (before, _), (after, times) in zip(seen, seen[1:], strict=False):
        add(before)
        gone = {content for name, content in before.items() if after.get(name) != content}
        written = [name for name in after if before.get(name) != after[name] and after[name] not in gone]
        state = dict(before)
        for name in sorted(written, key=lambda name: times[name]):
            add(state)  # without it
            content, old = (blobs / after[name]).read_bytes(), b""
            if name in before:
                old = (blobs / before[name]).read_bytes()
            appended = bool(old) and content.startswith(old)
            cuts = [] if appended else [b""]
            cuts.append(content[: (len(old) if appended else 0) + (len(content) - len(old) * appended) // 2])
            for cut in cuts:
                number = hashlib.sha256(cut).hexdigest()
                (blobs / number).write_bytes(cut)
                add({**state, name: number})
            state[name] = after[name]
        add(after)
    return found


def lay_out(state: State, folder: Path, blobs: Path) -> None:
    """Make a folder hold a state and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in state.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(blobs / content, path)
        time.sleep(0)  # files of one state may share a time, as after a power cut


def examine(name: str, work: Path, journal: Journal, sample: int, end: float, part: tuple[int, int] = (1, 1)) -> None:
    """Crash states of one writer.

    Args:
        name: of the writer.
        work: folder to work in.
        journal: of the cases.
        sample: how many states, evenly spread; 0 takes all.
        end: when to stop, on the monotonic clock.
        part: of these states which, from 1, of how many: every n-th.
    """
    folder, blobs = work / name / "run", work / name / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)

    def watched():
        watch = Watch(folder, blobs)
        writers.run_quietly(name, folder)
        watch.look()
        return watch.states

    shutil.rmtree(folder, ignore_errors=True)
    warm_up(lambda: writers.run_quietly(name, folder))
    whole = writers.result(name, folder)
    shutil.copytree(folder, work / name / "first", dirs_exist_ok=True)
    shutil.rmtree(folder)
    outcome = in_child(watched)
    assert outcome.kind == "done", f"{name} does not run while it is watched: {outcome}"
    alike = writers.compared(name, [work / name / "first", folder])
    states = crash_states(outcome.value, blobs)
    for number in evenly(len(states), sample)[part[0] - 1 :: part[1]]:
        case, state = f"{name} {number}", states[number]
        if case in journal.records or time.monotonic() > end:
            continue
        lay_out(state, folder, blobs)
        outcome = in_child(lambda: writers.run_quietly(name, folder))
        left = writers.result(name, folder)
        wrong = sorted(path for path in alike if left.get(path) != whole[path])
        exact = outcome.kind == "done" and not wrong
        record = {"sample_id": case, "writer": name, "exact": exact, "of": len(states)}
        if not exact:
            last = sorted(state)[-3:]
            record |= {"how": outcome.kind, "said": outcome.text[:300], "wrong": wrong[:5], "state": last}
            print(f"NOT EXACT {case}: {outcome.kind} {outcome.text[:200]} {wrong[:5]}", flush=True)
        journal.add([record])
    print(f"{name}: {len(states)} states, {len(alike)} files compared", flush=True)


def evenly(count: int, sample: int) -> list[int]:
    """So many of `count` numbers from 0, evenly spread; all of them where sample is 0."""
    if not 0 < sample < count:
        return list(range(count))
    return [(2 * number + 1) * count // (2 * sample) for number in range(sample)]


def part_of(text: str) -> tuple[int, int]:
    """What --part says: "3/8" is (3, 8). Raises ValueError."""
    part, parts = map(int, text.split("/"))
    if not 1 <= part <= parts:
        raise ValueError(f"--part {text}: give i/n with i from 1 to n.")
    return part, parts


QUICK = ("sae", "evaluate", "feature_cache", "prepare", "converted_sae", "journal")
"""Writers of the quick form; the others' crash states are among tests/trainers/test_checkpoints.py."""


def main(argv: list[str] | None = None) -> dict:
    """Run the harness and return what its RESULT says."""
    sample = {"type": int, "default": 0, "help": "states of each writer, evenly spread; default: all"}
    part = {"type": part_of, "default": (1, 1), "help": "i/n: every n-th state from the i-th on; each in a process"}
    args = options(__doc__, argv, {"--sample": sample, "--writers": writers.CHOICE, "--part": part})
    place = args.output / ("crash_states_quick" if args.quick else "crash_states")
    if args.part != (1, 1):
        place = place.with_name(f"{place.name}_part_{args.part[0]}_of_{args.part[1]}")
    journal = Journal(place, {"quick": args.quick})
    with tempfile.TemporaryDirectory() as work:
        writers.work_in(Path(work))
        for name in args.writers or (QUICK if args.quick else writers.WRITERS):
            if time.monotonic() < args.end:
                examine(name, Path(work).resolve(), journal, 3 if args.quick else args.sample, args.end, args.part)
    found = dict(journal.records)
    if args.part == (1, 1):
        for path in sorted(args.output.glob(f"{place.name}_part_*/items.jsonl")):
            found = read_records(path) | found
    records = list(found.values())
    by = {}
    for name in writers.WRITERS:
        chosen = [record for record in records if record["writer"] == name]
        by[name] = [sum(r["exact"] for r in chosen), len(chosen), max((r["of"] for r in chosen), default=0)]
    exact = sum(record["exact"] for record in records)
    return say({"crash_states": len(records), "crash_exact": exact, "by_writer": by})


if __name__ == "__main__":
    main()
