"""One progress line for all long work: count, share, rate, time left."""

import collections
import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import TextIO

# Lines back that the rate is taken from: what work begins with, as compiling, is then soon behind.
_LINES = 30


class Progress:
    """Prints `label  120/400 samples (30 %)  45.1/s  6 s left`, at most every `interval` seconds.

    On a terminal the line overwrites itself; in a log every update is its own line, less often.
    Rate and time left are those of the last lines, the final line's is that of the whole.

    Args:
      label: what is being done.
      total: how many units in all, or None where that is unknown.
      done: of them, before this process began.
      unit: plural name of a unit.
      stream: where to print; standard error by default, so that results stay pipeable.
    """

    _silent = False

    @classmethod
    def silence(cls) -> None:
        """Nothing is printed by this process any more: of several, one speaks."""
        cls._silent = True

    def __init__(
        self,
        label: str,
        total: int | None = None,
        *,
        done: int = 0,
        unit: str = "samples",
        interval: float | None = None,
        stream: TextIO | None = None,
    ):
        self._label, self._total, self._unit = label, total, unit
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._interval = interval if interval is not None else (0.2 if self._terminal else 10.0)
        self._patience = interval or (1.0 if self._terminal else 60.0)
        self._start = self._last = time.monotonic()
        self._done = self._count = done
        self._marks = collections.deque([(self._start, done)], _LINES)  # (time, count)
        self._width = 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None or self._count > self._done:
            self.close()
        else:  # of what failed before it had begun, the fault alone is said
            self._end_line()

    def update(self, count: int = 1, note: str = "") -> None:
        """Adds `count` finished units; `note` is shown at the end of the line."""
        self._count += count
        now = time.monotonic()
        if now - self._last >= self._interval:
            self._last = now
            self._print(self._line(now, note))
            self._marks.append((now, self._count))

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """While one call of unknown length is at work, says so and since when.

        On a terminal every second, in a log every minute. `what` must let other threads run, as
        compiling does.
        """
        start, over = time.monotonic(), threading.Event()

        def tell() -> None:
            while not over.wait(self._patience):
                now = time.monotonic()
                self._print(self._line(now, f"{what}, {_span(now - start)} so far"))

        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        try:
            yield
        finally:
            over.set()
            teller.join()

    def close(self) -> None:
        """Prints the final line, with the whole time taken."""
        elapsed = time.monotonic() - self._start
        count = self._count - self._done
        rate = count / max(elapsed, 1e-9)
        line = f"{self._label}  {count} {self._unit} in {_span(elapsed)}  {_rate(rate)}"
        self._print(line)
        self._end_line()

    def _end_line(self) -> None:
        if self._terminal and self._width and not self._silent:
            print(file=self._stream, flush=True)

    def _line(self, now: float, note: str) -> str:
        since, before = self._marks[0]
        rate = (self._count - before) / max(now - since, 1e-9)
        line = f"{self._label}  {self._count}"
        if self._total:
            line += f"/{self._total} {self._unit} ({100 * self._count / self._total:.0f} %)"
            if rate:  # before the first unit nothing is known of the time left
                line += f"  {_rate(rate)}  {_span((self._total - self._count) / rate)} left"
        else:
            line += f" {self._unit}  {_rate(rate)}"
        return f"{line}  {note}".rstrip()

    def _print(self, line: str) -> None:
        if self._silent:
            return
        if self._terminal:
            print("\r" + line.ljust(self._width), end="", file=self._stream, flush=True)
            self._width = len(line)
        else:
            print(line, file=self._stream, flush=True)


def _rate(per_second: float) -> str:
    return f"{per_second:.1f}/s" if per_second >= 1 else f"{per_second:.2g}/s"


def _span(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 90:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 90:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
