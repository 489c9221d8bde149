"""Ctrl-C and SIGTERM end a run between two steps, with a checkpoint, not in the middle of one.

Python runs signal handlers in the main thread only, between two of its own instructions: not while
XLA compiles or a device is waited for, which may take many minutes. What the system itself writes
to a pipe at a signal, a thread of ours reads at once.
"""

import enum
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

from instap_jax.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, Preempted, Stopped


class Ask(enum.IntEnum):
    """Why a process asks for the end of the run; of several reasons the largest counts."""

    NOTHING = 0
    PREEMPTED = 1  # SIGTERM: what Cloud TPU, GKE and Slurm send before they take a machine
    INTERRUPTED = 2  # Ctrl-C
    FAULT = 3  # of this process's data: not saved

    def raise_(self) -> None:
        """Raises what ends the run with the right exit code."""
        raise Stopped if self is Ask.INTERRUPTED else Preempted


_SIGNALS = {signal.SIGTERM: Ask.PREEMPTED, signal.SIGINT: Ask.INTERRUPTED}
# Seconds in which a second signal is still the first: launchers send one to a process, and to the
# group that it is in.
_SAME = 1.0
_CODES = {Ask.PREEMPTED: EXIT_PREEMPTED, Ask.INTERRUPTED: EXIT_INTERRUPTED}


class StopRequest:
    """Context in which a signal is remembered until the step ends, and a second one ends at once.

    Outside the main thread (a notebook's, a test's) signals are left as they are.

    Args:
      hold: False where there is nothing to save yet, as while the first step compiles: the first
        signal, too, then ends the process at once, until `hold` is called.

    Attributes:
      asked: what the process was asked for so far.
      at_once: called before the process is ended at once, from another thread than the main one.
    """

    def __init__(self, *, hold: bool = True):
        self.asked = Ask.NOTHING
        self.at_once: Callable[[], None] = lambda: None
        self._holds = hold
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __bool__(self) -> bool:
        return self.asked is not Ask.NOTHING

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._read, self._write = socket.socketpair()
            self._write.setblocking(False)
            self._wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, lambda *_: None)
            threading.Thread(target=self._watch, daemon=True, name="signals").start()
        return self

    def __exit__(self, *exc) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._write.close()  # which ends the thread

    def hold(self) -> None:
        """From now on a first signal waits for the end of the step."""
        self._holds = True

    def _watch(self) -> None:
        with self._read:
            while numbers := self._read.recv(1):
                if numbers[0] in _SIGNALS:
                    self._signal(signal.Signals(numbers[0]))

    def _signal(self, number: signal.Signals) -> None:
        again, ask = bool(self), _SIGNALS[number]
        if again and time.monotonic() - self._since < _SAME:
            return
        self._since = time.monotonic()
        self.asked = max(self.asked, ask)
        what = "at once"
        if self._holds and not again:
            what = "stopping at the end of the step; once more: at once"
        elif not again:
            what = "nothing to save yet"
        print(f"\n{number.name}: {what}", file=sys.stderr, flush=True)
        if again or not self._holds:
            try:
                self.at_once()
            finally:
                os._exit(_CODES[ask])  # the main thread may not answer
