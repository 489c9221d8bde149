"""Ctrl-C and SIGTERM end a run between two steps, with a checkpoint, not in the middle of one.

Python's own KeyboardInterrupt may be raised anywhere, also inside JAX's garbage-collection
callback, where it is printed and lost. A flag that the loop reads is never lost.
"""

import signal
import sys
import threading


class StopRequest:
    """Context in which the first signal is remembered and a second one interrupts at once.

    Outside the main thread (a notebook's, a test's) signals are left as they are.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self._asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in self.SIGNALS}
            for number in self.SIGNALS:
                signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        """Whether the run was asked to stop."""
        return self._asked

    def _handle(self, number: int, frame) -> None:
        del frame
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        name = signal.Signals(number).name
        print(f"\n{name}: stopping at the end of the step; once more: at once", file=sys.stderr)
