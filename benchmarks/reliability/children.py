"""Work in a child process with limits: it may hang, crash or eat memory, and the harness goes on and counts it.

A child is forked, so that everything imported is there at once. Linux and macOS; Windows has no fork.
"""

import argparse
import gc
import json
import os
import pickle
import resource
import select
import signal
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads of the parent are not there in a fork
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # where torch sees a GPU, no backward pass runs in a fork
PATIENCE = 20
HANG, CRASH, MEMORY, DONE, ERROR = "hang", "crash", "memory", "done", "error"


@dataclass
class Outcome:
    """How a piece of work ended."""

    kind: str
    """"done", "error" (an exception), "hang" (killed at its limit), "crash" (the interpreter ended) or "memory"."""
    value: Any = None
    """what was returned."""
    error: str = ""
    """the exception's class, or the signal."""
    text: str = ""
    """the exception's message."""
    seconds: float = 0.0
    megabytes: float = 0.0
    """by which the child's memory grew at most."""


def attempt(work: Callable[[], Any]) -> Outcome:
    """Do work here, and say how it ended unless it ends the process."""
    began, before = time.monotonic(), _peak()
    try:
        outcome = Outcome(DONE, work())
    except MemoryError as error:
        outcome = Outcome(MEMORY, None, "MemoryError", str(error))
    except BaseException as error:  # SystemExit is an answer too
        text = str(error) + "".join(f" {note}" for note in getattr(error, "__notes__", ()))
        outcome = Outcome(ERROR, None, type(error).__name__, text)
    outcome.seconds, outcome.megabytes = time.monotonic() - began, max(0.0, _peak() - before)
    return outcome


def each_in_child(
    works: Iterable[tuple[str, Callable[[], Any]]], seconds: float = 20.0, megabytes: float = 2000.0
) -> Iterator[tuple[str, Outcome]]:
    """Do each piece of work in a child, many in one, a new one after each that ended its child.

    Args:
        works: (name, function of nothing); what it returns can be pickled.
        seconds: of the processor after which a piece counts as hanging; or so many times `PATIENCE` on the clock, on
            which a loaded machine takes longer.
        megabytes: by which a child may grow; allocations beyond it fail.

    Yields:
        (name, how it ended), in their order.
    """
    left = list(works)
    while left:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            _serve(left, writing, megabytes)
        os.close(writing)
        done = 0
        try:
            while done < len(left):
                message = _receive(reading, child, seconds)
                if message is None:
                    break
                yield left[done][0], pickle.loads(message)
                done += 1
        finally:
            hanging = os.waitpid(child, os.WNOHANG) == (0, 0)
            if hanging:
                time.sleep(0.05)  # one that has just ended is no hang
                ended = os.waitpid(child, os.WNOHANG)
            if hanging and ended == (0, 0):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            os.close(reading)
        if done < len(left):
            timed_out = hanging and ended == (0, 0)
            yield left[done][0], Outcome(HANG if timed_out else CRASH, seconds=seconds)
            done += 1
        left = left[done:]


def warm_up(work: Callable[[], Any]) -> None:
    """Do a piece of work here once, so that children forked later find everything imported, and no garbage to look at.

    Args:
        work: what children will do again and again.
    """
    work()
    gc.collect()
    gc.freeze()


def in_child(work: Callable[[], Any], seconds: float = 120.0, megabytes: float = 4000.0) -> Outcome:
    """Do one piece of work in a child of its own."""
    return next(iter(list(each_in_child([("", work)], seconds, megabytes))))[1]


def _serve(works, writing, megabytes):
    try:
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        limit = int(now + megabytes * 1e6)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except OSError:  # not Linux: memory is measured, not limited
        pass
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for _, work in works:
        outcome = attempt(work)
        try:
            content = pickle.dumps(outcome)
        except Exception as error:
            content = pickle.dumps(Outcome(ERROR, None, type(error).__name__, f"not to be sent: {error}"))
        content = struct.pack("<Q", len(content)) + content
        while content:
            content = content[os.write(writing, content) :]
    os._exit(0)


def _receive(reading, child, seconds):
    """The next message, or None when the child hangs or has ended."""
    end, used = time.monotonic() + PATIENCE * seconds, _processor_seconds(child)
    head = _read(reading, 8, child, end, used + seconds)
    return None if head is None else _read(reading, struct.unpack("<Q", head)[0], child, end, used + seconds)


def _read(reading, size, child, end, most):
    """So many bytes and no more: what follows is another message."""
    content = b""
    while len(content) < size:
        ready, _, _ = select.select([reading], [], [], 0.5)
        if not ready:
            if time.monotonic() > end or _processor_seconds(child) > most:
                return None
            continue
        part = os.read(reading, min(1 << 16, size - len(content)))
        if not part:
            return None
        content += part
    return content


def _processor_seconds(child):
    try:
        times = psutil.Process(child).cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system


def _peak():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e3 if os.uname().sysname == "Linux" else 1e6)


# -- what the harnesses' commands share --------------------------------------------------------------------------------


def options(
    description: str | None, argv: list[str] | None, more: dict[str, dict[str, Any]] | None = None
) -> argparse.Namespace:
    """A harness's options: --quick, --output, --minutes.

    Args:
        description: of the command.
        argv: the words; None takes the process's own.
        more: options of this harness alone, with what argparse needs to know of them.

    Returns:
        The options; `end` is when the harness must stop, on the monotonic clock.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cases of each kind, in seconds")
    parser.add_argument("--output", type=Path, default=Path("runs/reliability"), help="where cases are noted")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after so many; repeat the command to go on")
    for name, known in (more or {}).items():
        parser.add_argument(name, **known)
    args = parser.parse_args(argv)
    args.end = time.monotonic() + 60 * args.minutes
    return args


def say(result: dict[str, Any]) -> dict[str, Any]:
    """Print a harness's last line, and return what it says."""
    print("RESULT", json.dumps(result), flush=True)
    return result
