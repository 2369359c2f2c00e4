"""Detectors are the best feature and threshold, and are scored on samples they were not chosen on."""

import pytest
import torch

from segcompass.white_box import detectors
from segcompass.white_box.detectors import (
    Firings,
    best_detectors,
    best_of_firings,
    score,
    score_all,
    score_firings,
)


def brute_force(h, present):
    """The best F1 over every feature and every threshold that separates its values."""
    best = 0.0
    for index in range(h.shape[1]):
        for level in [0.0, *h[:, index].tolist()]:
            best = max(best, score(h[:, index] > level, present)[2])
    return best


def test_detectors_are_the_best_feature_and_are_scored_elsewhere():
    generator = torch.Generator().manual_seed(1)
    h, other = (torch.rand(80, 9, generator=generator) for _ in range(2))
    present, present_other = h[:, 4] > 0.7, other[:, 4] > 0.6  # the held-out truth is shifted
    found = best_detectors(h, {"x": present}, other, {"x": present_other}, thresholds=80)["x"]
    assert found.index == 4 and found.chosen_f1 == pytest.approx(brute_force(h, present)) == 1
    fires = other[:, 4] > found.threshold
    hits = (fires & present_other).sum().item()
    assert found.precision == pytest.approx(hits / fires.sum().item())
    assert found.recall == pytest.approx(hits / present_other.sum().item())
    assert found.f1 < 1
    assert found.f1 == pytest.approx(2 * found.precision * found.recall / (found.precision + found.recall))


def test_noise_detects_nothing():
    generator = torch.Generator().manual_seed(2)
    h, other = (torch.rand(300, 20, generator=generator) for _ in range(2))
    truth, other_truth = (torch.rand(300, generator=generator) < 0.2 for _ in range(2))
    found = best_detectors(h, {"x": truth}, other, {"x": other_truth})["x"]
    assert found.f1 < 0.5


def test_attribute_that_never_or_always_holds_is_refused():
    h = torch.rand(4, 2)
    some = torch.tensor([True, False, True, False])
    for wrong, word in ((some & False, "never"), (some | True, "always")):
        with pytest.raises(ValueError, match=f"attribute 'x' is {word} present in the samples held out"):
            best_detectors(h, {"x": some}, h, {"x": wrong})


def test_sparse_firings_score_as_dense_ones_part_by_part(monkeypatch):
    torch.manual_seed(0)
    h, other = (torch.rand(n, 7).sub(0.5).relu() for n in (40, 30))
    present, there = torch.rand(40, 2) < 0.4, torch.rand(30, 2) < 0.4
    firings, held_out = Firings(7), Firings(7)
    for part in h.split(9):
        firings.add(part)
    held_out.add(other)
    rows, other_rows = torch.arange(0, 40, 2), torch.arange(30)
    assert torch.equal(firings.dense(2, 6, rows), h[rows, 2:6]) and firings.samples == 40
    monkeypatch.setattr(detectors, "DENSE", 60)  # two features at a time
    assert len(firings.steps(30)) == 4
    measured = score_firings(firings, rows, present[rows], held_out, other_rows, there, torch.device("cpu"))
    for part, expected in zip(measured, score_all(h[rows], present[rows], other, there), strict=True):
        assert torch.equal(part, expected)
    mine, theirs = (dict(zip("ab", table.T, strict=True)) for table in (present[rows], there))
    found = best_of_firings(firings, rows, mine, held_out, other_rows, theirs)
    assert found == best_detectors(h[rows], mine, other, theirs)
    nobody = score_firings(firings, rows[:0], present[:0], held_out, other_rows, there, torch.device("cpu"))
    assert not any(part.any() for part in nobody)
