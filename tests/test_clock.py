"""The times of a line: what is done once at every start is no part of a step's."""

import pytest

from instap_jax.train import clock
from instap_jax.train.clock import StepClock
from instap_jax.types import Kind


class Time:
    """A clock that the test turns."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(clock.time, "perf_counter", lambda: self.now)

    def step(self, made: StepClock, kind: Kind, *, wait: float, call: float, run: float) -> None:
        self.now += wait
        made.wait(wait)
        with made.calling(kind):
            self.now += call
        self.now += run
        made.step(8, None)


def test_first_batches_and_compiling_are_told_apart(monkeypatch):
    time = Time(monkeypatch)
    made = StepClock()
    time.step(made, Kind.VIDEO, wait=5.0, call=60.0, run=2.0)
    line = made.read()
    assert (line["step_seconds"], line["data_wait_seconds"], line["start_seconds"]) == (2, 0, 65)
    time.step(made, Kind.VIDEO, wait=0.5, call=0.5, run=1.0)
    time.step(made, Kind.IMAGE, wait=0.5, call=30.0, run=1.5)  # the other kind compiles later
    line = made.read()
    assert line["step_seconds"] == 2.0 and line["start_seconds"] == 30.0
    assert line["data_wait_seconds"] == 0.5 and line["compute_seconds"] == 1.5
    assert line["examples_per_second"] == pytest.approx(16 / 4.0)
    time.step(made, Kind.IMAGE, wait=0.0, call=1.0, run=1.0)
    assert "start_seconds" not in made.read()
