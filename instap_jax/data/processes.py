"""What every worker process of ours does first. No JAX."""

import multiprocessing
import os
import threading
from multiprocessing import connection


def exit_with_parent() -> None:
    """Called in a worker process: ends it when the main process is gone, even if killed outright.

    In a thread of its own, so that a worker that is busy, or hangs in a decoder, ends too.
    """

    def watch() -> None:
        connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
