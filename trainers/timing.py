"""Where the wall-clock time of a step goes, phase by phase. Knows nothing about training."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PhaseTimer:
    """Adds up the seconds of named phases; a phase's time does not include that of the phases inside it.

    Args:
        counted: asked at the end of each phase whether its time is added; None adds all of them.

    Example:
        >>> timer = PhaseTimer()
        >>> with timer.phase("scoring"), timer.phase("reference"):
        ...     score()
        >>> timer.read()["reference"]
    """

    def __init__(self, counted: Callable[[], bool] | None = None):
        self.counted = counted
        self._seconds: dict[str, float] = {}
        self._inner: list[float] = []  # of each open phase, the seconds spent in phases inside it

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens while this is open.

        Args:
            name: the phase.

        Yields:
            Nothing.
        """
        self._inner.append(0.0)
        began = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - began
            inner = self._inner.pop()
            if self.counted is None or self.counted():
                self._seconds[name] = self._seconds.get(name, 0.0) + elapsed - inner
            if self._inner:
                self._inner[-1] += elapsed

    def read(self) -> dict[str, float]:
        """The seconds of each phase since the last time; they start again from 0."""
        seconds, self._seconds = self._seconds, {}
        return seconds
