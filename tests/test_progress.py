"""The progress line: what it says, and what it cannot know yet."""

import io
import time

import pytest

from instap_jax.progress import Progress


def lines(
    *counts: int, total: int | None, clock: list[float], monkeypatch, done: int = 0
) -> list[str]:
    times = iter(clock)
    monkeypatch.setattr("instap_jax.progress.time.monotonic", lambda: next(times))
    stream = io.StringIO()
    with Progress("work", total, done=done, unit="steps", interval=0, stream=stream) as progress:
        for count in counts:
            progress.update(count, note="here")
    return stream.getvalue().splitlines()


def test_nothing_is_said_of_the_time_left_before_the_first_unit(monkeypatch):
    found = lines(0, 4, total=10, clock=[0.0, 5.0, 8.0, 9.0], monkeypatch=monkeypatch)
    assert found == [
        "work  0/10 steps (0 %)  here",
        "work  4/10 steps (40 %)  0.5/s  12 s left  here",
        "work  4 steps in 9 s  0.44/s",
    ]


def test_rate_of_what_is_slow_and_of_what_has_no_total(monkeypatch):
    found = lines(3, total=None, clock=[0.0, 100.0, 200.0], monkeypatch=monkeypatch)
    assert found == ["work  3 steps  0.03/s  here", "work  3 steps in 3 min 20 s  0.015/s"]


def test_a_call_of_unknown_length_is_told_while_it_lasts():
    stream = io.StringIO()
    with Progress("work", 10, unit="steps", interval=0.01, stream=stream) as progress:
        with pytest.raises(KeyError), progress.waiting("compiling"):
            while not stream.getvalue():
                time.sleep(0.01)
            raise KeyError
        said = stream.getvalue()
        time.sleep(0.05)
        assert stream.getvalue() == said, "nothing is said after it"
    assert said.startswith("work  0/10 steps (0 %)  compiling, 0 s so far\n")


@pytest.mark.parametrize("count, said", [(0, ""), (1, "work  1 steps in 0 s")])
def test_of_what_fails_before_it_has_begun_nothing_is_said(count, said):
    stream = io.StringIO()
    with pytest.raises(KeyError), Progress("work", unit="steps", stream=stream) as progress:
        progress.update(count)
        raise KeyError
    assert stream.getvalue().startswith(said) and bool(stream.getvalue()) == bool(said)


def test_what_was_done_before_counts_but_not_as_speed(monkeypatch):
    found = lines(1, 1, total=8, done=4, clock=[0.0, 2.0, 4.0, 4.0], monkeypatch=monkeypatch)
    assert found == [
        "work  5/8 steps (62 %)  0.5/s  6 s left  here",
        "work  6/8 steps (75 %)  0.5/s  4 s left  here",
        "work  2 steps in 4 s  0.5/s",
    ]


def test_a_slow_beginning_leaves_the_time_left_after_a_while(monkeypatch):
    """A first step of 1,000 s, then one a second."""
    clock = [0.0, *(1000.0 + i for i in range(40)), 1040.0]
    found = lines(*[1] * 40, total=100, clock=clock, monkeypatch=monkeypatch)
    assert "30/100 steps (30 %)  0.029/s" in found[29] and "40 min" in found[29]
    assert "31/100 steps (31 %)  1.0/s  69 s left" in found[30]
    assert found[-1].startswith("work  40 steps in 17 min 20 s  0.038/s")
