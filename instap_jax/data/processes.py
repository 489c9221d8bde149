"""What every worker process of ours does first. No JAX."""

import multiprocessing
import os
import signal
import threading
from multiprocessing import connection

# For one file of media: several times what the longest clip that `media` admits takes.
SAMPLE_SECONDS = 3600


def exit_with_parent() -> None:
    """Called in a worker process: ends it when the main process is gone, even if killed outright.

    In a thread of its own, so that a worker that is busy, or hangs in a decoder, ends too.
    """

    def watch() -> None:
        connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def exit_after(seconds: int) -> None:
    """Called in a worker process before a piece of work: ends it if the next call comes too late.

    By the alarm signal, which also ends a decoder that never returns to Python. 0: no limit.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)
