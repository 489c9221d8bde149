"""The progress line: what it says, and what it cannot know yet."""

import io

from instap_jax.progress import Progress


def lines(*counts: int, total: int | None, clock: list[float], monkeypatch) -> list[str]:
    times = iter(clock)
    monkeypatch.setattr("instap_jax.progress.time.monotonic", lambda: next(times))
    stream = io.StringIO()
    with Progress("work", total, unit="steps", interval=0, stream=stream) as progress:
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
