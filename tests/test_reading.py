"""Reading ahead with workers that hang, crash or are killed: the same batches, in order."""

import contextlib
import dataclasses
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from instap_jax.data import reading
from instap_jax.data.reading import Reader
from instap_jax.errors import UserError
from instap_jax.types import Fault

SHAPE = (2, 3, 5)  # groups, samples of a group, pixels


@dataclasses.dataclass(frozen=True)
class Toy:
    """Reads numbers: a sample's pixels are its number. What is in `bad` happens instead of it."""

    bad: dict = dataclasses.field(default_factory=dict)
    mark: str = ""  # a file that says that something happened already

    def __call__(self, groups, frames, begin) -> dict:
        fault = np.zeros(SHAPE[:2], np.int32)
        for place in np.ndindex(SHAPE[:2]):
            number = groups[place[0]][place[1]]
            fault[place] = begin(place[0] * SHAPE[1] + place[1])
            frames[place] = 0 if fault[place] else number
            if not fault[place] and number in self.bad:
                self._happen(self.bad[number])
        return {"frames": frames, "fault": fault, "number": np.array(groups)}

    def _happen(self, what: str) -> None:
        if what.endswith(" once"):
            if Path(self.mark).exists():
                return
            Path(self.mark).touch()
        match what.split()[0]:
            case "hang":
                time.sleep(1000)
            case "slow":
                time.sleep(0.5)
            case "spin":
                while True:  # holds Python's lock
                    pass
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                os._exit(0)
            case "raise":
                raise ValueError("no such number")
            case "mend":
                raise UserError("mend this")


def tasks(count: int):
    return (np.arange(6 * k, 6 * k + 6).reshape(2, 3).tolist() for k in range(count))


@contextlib.contextmanager
def reader(read=None, count=8, *, workers=2, prefetch=1, timeout=30.0, **changes):
    made = Reader(
        read or Toy(**changes), tasks(count), shape=SHAPE, workers=workers, prefetch=prefetch,
        timeout=timeout,
    )  # fmt: skip
    try:
        yield made
    finally:
        made.close()


def check(batches: list[dict], count: int, faults: dict[int, Fault] | None = None) -> None:
    assert len(batches) == count
    for k, batch in enumerate(batches):
        numbers = np.arange(6 * k, 6 * k + 6).reshape(2, 3)
        fault = np.vectorize(lambda n: int((faults or {}).get(n, 0)))(numbers)
        np.testing.assert_array_equal(batch["number"], numbers)
        np.testing.assert_array_equal(batch["fault"], fault)
        pixels = np.where(fault, 0, numbers) % 256
        np.testing.assert_array_equal(batch["frames"], np.repeat(pixels[..., None], 5, -1))


def children() -> list[psutil.Process]:
    return [
        p for p in psutil.Process().children()
        if p.status() == psutil.STATUS_ZOMBIE or "spawn_main" in " ".join(p.cmdline())
    ]  # fmt: skip


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 0), (0, 3), (1, 0), (2, 2)])
def test_every_batch_once_in_order(workers, prefetch):
    with reader(workers=workers, prefetch=prefetch) as batches:
        check([{k: np.array(v) for k, v in batch.items()} for batch in batches], 8)
        with pytest.raises(StopIteration):
            next(batches)
    with reader(workers=0, count=0) as none:
        check(list(none), 0)


def test_the_last_batch_is_waited_for():
    with reader(bad={46: "slow"}) as batches:  # meanwhile another worker has nothing more to do
        check(list(batches), 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_that_the_consumer_holds_stay_as_they_are(workers):
    with reader(workers=workers, count=20) as batches:
        held = list(batches)  # more than there are places for
        check(held, 20)
        views = [batch["frames"][1, 2] for batch in held[:12]]
        del held
    assert [int(view[0]) for view in views] == [6 * k + 5 for k in range(12)]


@pytest.mark.parametrize(("workers", "how"), [(2, "spin"), (0, "hang")])
def test_a_sample_that_takes_too_long_is_left_out(workers, how, capsys):
    with reader(bad={8: how, 27: how}, workers=workers, timeout=0.6) as batches:
        check(list(batches), 8, {8: Fault.TIMEOUT, 27: Fault.TIMEOUT})
        assert batches.replaced == 2
    assert capsys.readouterr().err.count("hung for 0.6 s; replaced") == 2
    assert not children()


def test_a_thread_that_comes_back_too_late_writes_to_nothing_of_ours():
    late = []

    class Late(Toy):
        def __call__(self, groups, frames, begin):
            if groups[0][0] == 6 and begin(0) is Fault.NONE:
                time.sleep(1.0)
                frames[...] = 99
                begin(3)
                late.append(frames)
            return super().__call__(groups, frames, begin)

    with reader(Late(), workers=0, timeout=0.3, count=6) as batches:
        held = list(batches)
        while not late:
            time.sleep(0.05)
        check(held, 6, {6: Fault.TIMEOUT})


def test_a_machine_that_was_suspended_makes_no_worker_late(monkeypatch):
    clock, real = [0.0], time.monotonic
    monkeypatch.setattr(reading.time, "monotonic", lambda: real() + clock[0])

    class Slow(Toy):
        def __call__(self, groups, frames, begin):
            if begin(0) is Fault.NONE and groups[0][0] == 0:
                time.sleep(0.3)
                clock[0] += 3600
                time.sleep(0.3)
            return super().__call__(groups, frames, begin)

    with reader(Slow(), workers=0, timeout=20.0, count=2) as batches:
        check(list(batches), 2)


def test_a_sample_that_kills_its_worker_twice_is_left_out(tmp_path):
    bad = {13: "die", 20: "exit", 40: "die once"}
    with reader(bad=bad, mark=str(tmp_path / "mark")) as batches:
        faults = {13: Fault.DECODER_CRASHED, 20: Fault.DECODER_CRASHED}
        check(list(batches), 8, faults)
        assert batches.replaced == 5
    assert not children()


def test_workers_killed_from_outside_change_nothing():
    with reader(count=20, workers=2, prefetch=2) as batches:
        seen = []
        for k in range(20):
            seen.append({name: np.array(a) for name, a in next(batches).items()})
            if k % 10 == 0:
                for process in children():
                    process.kill()
        check(seen, 20)
        assert batches.replaced >= 3
    assert not children()


def test_workers_that_all_die_end_the_run(monkeypatch):
    monkeypatch.setattr(reading, "_DEATHS_IN_A_ROW", 1)
    with reader(bad=dict.fromkeys(range(100), "die"), workers=1) as batches:
        with pytest.raises(UserError, match=r"lost one after another \(the last one was killed by"):
            list(batches)
        with pytest.raises(UserError):
            next(batches)


def test_errors_come_in_the_place_of_their_batch():
    with reader(bad={14: "raise"}, workers=1) as batches:
        check([{k: np.array(v) for k, v in next(batches).items()} for _ in range(2)], 2)
        with pytest.raises(RuntimeError, match="no such number"):
            next(batches)
    with reader(bad={0: "mend"}, workers=0) as batches, pytest.raises(UserError, match="mend"):
        next(batches)


def test_no_thread_outlives_a_closed_reader():
    before = set(threading.enumerate())
    with reader(lambda *batch: time.sleep(0.5) or Toy()(*batch), workers=0, prefetch=3) as made:
        next(made)
    assert set(threading.enumerate()) <= before
