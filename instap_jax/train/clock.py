"""Where the wall time of training goes."""

import contextlib
import time
from collections.abc import Iterator

from instap_jax.types import Kind


class StepClock:
    """Splits the wall time of steps into waiting for data and the rest, between two readings.

    What a process does once, the first batch and the compiling of each kind of step, is kept apart:
    after every restart it would count as the time of some steps.
    """

    def __init__(self):
        self._compiled: set[Kind] = set()
        self._reset()

    def _reset(self) -> None:
        self._start = time.perf_counter()
        self._steps = self._samples = 0
        self._waited = self._peak_seconds = self._once = 0.0
        self._counted = True

    def wait(self, seconds: float) -> None:
        """Seconds of waiting for a batch."""
        if self._compiled:
            self._waited += seconds
        else:
            self._apart(seconds)

    def compiles(self, kind: Kind) -> bool:
        """Whether the next call of a step is the first of its kind."""
        return kind not in self._compiled

    @contextlib.contextmanager
    def calling(self, kind: Kind) -> Iterator[None]:
        """Around the call of a step, which compiles if it is the first of its kind."""
        start = time.perf_counter()
        yield
        if self.compiles(kind):
            self._compiled.add(kind)
            self._apart(time.perf_counter() - start)

    def _apart(self, seconds: float) -> None:
        self._once += seconds
        self.leave_out(seconds)

    def leave_out(self, seconds: float) -> None:
        """Seconds that were spent on something else than steps."""
        self._start += seconds

    def step(self, samples: int, peak_seconds: float | None) -> None:
        """Counts a finished step; `peak_seconds`: its model FLOPs over the mesh's peak rate."""
        self._steps += 1
        self._samples += samples
        self._peak_seconds += peak_seconds or 0.0
        self._counted &= peak_seconds is not None

    def read(self) -> dict[str, float]:
        """The means of the steps since the last reading, and `start_seconds` as a sum."""
        elapsed = time.perf_counter() - self._start
        steps = max(self._steps, 1)
        scalars = {
            "examples_per_second": self._samples / elapsed,
            "step_seconds": elapsed / steps,
            "data_wait_seconds": self._waited / steps,
            "compute_seconds": (elapsed - self._waited) / steps,
        }
        if self._once:
            scalars["start_seconds"] = self._once
        if self._counted:
            scalars["mfu"] = self._peak_seconds / elapsed
        self._reset()
        return scalars
