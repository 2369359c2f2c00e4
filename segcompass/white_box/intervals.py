"""What the examinations report: statistics with bootstrap intervals, and areas under curves. Knows only numbers."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike


def bootstrap(
    values: ArrayLike,
    statistic: Callable[[np.ndarray], float],
    groups: ArrayLike | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """A statistic with its 95 % percentile interval.

    Args:
        values: float (N, ...), one row per observation.
        statistic: rows -> float.
        groups: (N,), rows of one group (slots of one scene) are drawn together; None = each row by itself.
        resamples: how often rows are drawn.
        seed: of the draws.

    Returns:
        (estimate, low, high).

    Raises:
        ValueError: there are no values.

    Example:
        >>> bootstrap([0.8, 0.9, 0.7, 0.8], np.mean)[0]
        0.8
    """
    values = np.asarray(values, dtype=float)
    if not len(values):
        raise ValueError("there is nothing to resample: no mask was measured.")
    group_of = np.arange(len(values)) if groups is None else np.unique(groups, return_inverse=True)[1]  # (N,)
    members = [np.flatnonzero(group_of == group) for group in range(group_of.max() + 1)]
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        picked = rng.integers(len(members), size=len(members))
        drawn.append(statistic(values[np.concatenate([members[group] for group in picked])]))
    known = np.array(drawn)[~np.isnan(drawn)]
    # whole resamples, none in between: a ratio may be infinite
    low, high = np.percentile(known, [2.5, 97.5], method="nearest") if len(known) else (np.nan, np.nan)
    return float(statistic(values)), float(low), float(high)


def ratio(value: float, reference: float) -> float:
    """How many times as much as a reference; infinite when only the reference is 0, nan when both are."""
    if reference > 0:
        return value / reference
    return float("inf") if value > 0 else float("nan")


def area_under(curve: Sequence[float] | np.ndarray, shares: Sequence[float]) -> float:
    """Area under a curve by the trapezoid rule.

    Args:
        curve: float (S,).
        shares: where it was measured, ascending.

    Returns:
        The area.
    """
    return float(np.trapezoid(curve, shares))
