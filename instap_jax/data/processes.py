"""Worker processes: how they start, what each does first, how they end. No JAX."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import connection, resource_tracker

# For one file of media: several times what the longest clip that `media` admits takes.
SAMPLE_SECONDS = 3600


@contextlib.contextmanager
def pool(processes: int) -> Iterator[Callable[..., Future]]:
    """Yields the `submit` of a pool of spawned processes, which answer no Ctrl-C.

    Spawned, because a fork of a process that has threads (a decoder's, JAX's) can hang. Leaving by
    an exception ends them at once, whatever they are at. Never cancel the futures: a pool that
    breaks at the same moment would wait for ever.
    """
    context = multiprocessing.get_context("spawn")
    end, ours = context.Pipe(duplex=False)  # the workers end when `ours` is closed
    executor = ProcessPoolExecutor(processes, context, initializer=_enter, initargs=(end,))

    def submit(*call) -> Future:
        with interrupts_held():  # the executor starts processes when it has work for them
            return executor.submit(_work, *call)

    with end:
        try:
            yield submit
        except BaseException:
            ours.close()
            raise
        finally:
            executor.shutdown(cancel_futures=True)
            ours.close()


_at_rest = threading.Lock()  # of a pool's worker; held while it is within no task


def _enter(end: connection.Connection) -> None:
    ignore_interrupts()
    exit_with_parent()
    _at_rest.acquire()
    threading.Thread(target=_exit_with, args=(end,), daemon=True).start()


def _exit_with(end: connection.Connection) -> None:
    connection.wait([end])
    # Not while it sends a result: the main process would wait for the rest of it for ever.
    with _at_rest:
        os._exit(1)


def _work(function: Callable, *args):
    _at_rest.release()
    try:
        return function(*args)
    finally:
        _at_rest.acquire()


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Keeps Ctrl-C waiting; processes that are started meanwhile never see one.

    A terminal sends it to all processes: the main one answers, with no half-started worker.
    """
    resource_tracker.ensure_running()  # else starting it would unblock the signal
    caught = []
    main = threading.current_thread() is threading.main_thread()
    # Any thread may take the signal, but Python answers it in the main one.
    handler = main and signal.signal(signal.SIGINT, lambda *call: caught.append(call))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which processes inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if main:
            signal.signal(signal.SIGINT, handler)
        if caught:
            signal.raise_signal(signal.SIGINT)


def ignore_interrupts() -> None:
    """Called in a worker process: Ctrl-C reaches all processes, but the main one answers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
