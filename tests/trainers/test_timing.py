"""What a phase's seconds hold."""

from segcompass.trainers import timing
from segcompass.trainers.timing import PhaseTimer


def clock(monkeypatch, *moments):
    moments = iter(moments)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(moments))


def test_a_phase_leaves_out_the_phases_inside_it(monkeypatch):
    clock(monkeypatch, 0.0, 1.0, 4.0, 10.0, 20.0, 22.0)
    timer = PhaseTimer()
    with timer.phase("scoring"), timer.phase("reference"):
        pass
    with timer.phase("reference"):
        pass
    assert timer.read() == {"scoring": 10.0 - 3.0, "reference": 3.0 + 2.0}
    assert timer.read() == {}


def test_whether_a_phase_counts_is_asked_when_it_ends(monkeypatch):
    """The first training step begins while the model is still in evaluation mode."""
    clock(monkeypatch, 0.0, 1.0, 2.0, 3.0)
    training = False
    timer = PhaseTimer(counted=lambda: training)
    with timer.phase("evaluation"):
        pass
    with timer.phase("update"):
        training = True
    assert timer.read() == {"update": 1.0}
