"""Where the wall time of training goes."""

import time


class StepClock:
    """Splits the wall time of steps into waiting for data and the rest, between two readings."""

    def __init__(self):
        self._reset()

    def _reset(self) -> None:
        self._start = time.perf_counter()
        self._steps = self._samples = 0
        self._waited = self._peak_seconds = 0.0
        self._counted = True

    def wait(self, seconds: float) -> None:
        self._waited += seconds

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
        elapsed = time.perf_counter() - self._start
        steps = max(self._steps, 1)
        scalars = {
            "examples_per_second": self._samples / elapsed,
            "step_seconds": elapsed / steps,
            "data_wait_seconds": self._waited / steps,
            "compute_seconds": (elapsed - self._waited) / steps,
        }
        if self._counted:
            scalars["mfu"] = self._peak_seconds / elapsed
        self._reset()
        return scalars
