"""Intervals agree with scipy's, and values of one scene count as one observation."""

import numpy as np
import pytest
from scipy import stats

from segcompass.white_box.intervals import area_under, bootstrap, ratio


def test_area_under_curves():
    assert area_under([1, 1, 1], (0, 0.1, 1)) == pytest.approx(1)
    assert area_under([1, 0], (0, 1)) == pytest.approx(0.5)


def test_intervals_agree_with_scipy():
    values = np.random.default_rng(3).gamma(2.0, size=120)
    estimate, low, high = bootstrap(values, np.median, resamples=4000)
    theirs = stats.bootstrap((values,), np.median, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert estimate == np.median(values)
    # the end points of 4,000 resamples scatter by a few percent of the interval's width
    assert [low, high] == pytest.approx([theirs.low, theirs.high], abs=0.1 * (theirs.high - theirs.low))


def test_values_of_one_group_are_drawn_together():
    values = np.repeat(np.random.default_rng(0).normal(size=30), 10)
    _, low, high = bootstrap(values, np.mean)
    _, wide_low, wide_high = bootstrap(values, np.mean, groups=np.repeat(np.arange(30), 10))
    # ten copies of 30 values carry the information of 30: the interval is sqrt(10) times as wide
    assert (wide_high - wide_low) / (high - low) == pytest.approx(10**0.5, rel=0.2)


def test_nothing_to_resample_is_said():
    with pytest.raises(ValueError, match="nothing to resample"):
        bootstrap([], np.mean)


def test_ratio_over_nothing_is_infinite_or_unknown():
    assert ratio(0.3, 0.0) == float("inf") and np.isnan(ratio(0.0, 0.0))
