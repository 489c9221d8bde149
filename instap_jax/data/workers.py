"""Shards in parallel: a pool of processes that can be stopped and that never outlives its owner."""

import itertools
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent import futures

from instap_jax.data.processes import (
    SAMPLE_SECONDS,
    exit_after,
    exit_with_parent,
    ignore_interrupts,
    interrupts_held,
)
from instap_jax.data.shard import Task, write_shard
from instap_jax.progress import Progress


class WorkerDied(Exception):
    """A worker process was killed or crashed; the message names the lines it may have died of."""


class _Stopped(Exception):
    """The run is being stopped; the shard at hand is given up."""


class _Link:
    """Memory that the main process and its workers share.

    Without locks, because a worker may be killed while it holds one. Every cell has one writer.

    Attributes:
      stop: [1], not 0 when the workers are to stop before their next sample.
      begun: per worker, samples taken up so far.
      lines: per worker, the annotation line that it is working on; 0: none.
    """

    def __init__(self, context, workers: int):
        self.stop = context.RawArray("b", 1)
        self.begun = context.RawArray("q", workers)
        self.lines = context.RawArray("q", workers)
        self._entered = context.Value("i", 0)  # its lock is held only while a worker starts

    def enter(self) -> None:
        """Called in a worker before its first task."""
        with self._entered:
            self._worker = self._entered.value
            self._entered.value += 1

    def tick(self, line: int) -> None:
        """Called in a worker before every sample, and with line 0 after a shard."""
        self.lines[self._worker] = line
        self.begun[self._worker] += bool(line)
        exit_after(SAMPLE_SECONDS if line else 0)
        if self.stop[0]:
            raise _Stopped


def write_shards(
    tasks: Sequence[Task], processes: int, progress: Progress
) -> Iterator[tuple[Task, dict]]:
    """Yields (task, report) as shards are finished, in any order.

    One process works in place; more are spawned, so that they inherit no threads, and import
    neither JAX nor anything else of the caller's. Leaving the iteration early stops them.

    Raises:
      WorkerDied, and what `write_shard` raises.
    """
    processes = min(processes, len(tasks))
    if processes <= 1:
        for task in tasks:
            yield task, write_shard(task, lambda line: progress.update(bool(line)))
        return
    context = multiprocessing.get_context("spawn")
    link, waiting = _Link(context, processes), iter(tasks)
    pool = futures.ProcessPoolExecutor(processes, context, initializer=_enter, initargs=(link,))
    try:
        with interrupts_held():  # the processes start here
            # A few at a time: waiting for tens of thousands takes a good part of a core.
            pending = {pool.submit(_work, t): t for t in itertools.islice(waiting, 4 * processes)}
        shown = 0
        while pending:
            finished, _ = futures.wait(pending, 0.2, futures.FIRST_COMPLETED)
            begun = sum(link.begun)
            if begun > shown:  # no rate, and no time left, is known before the first sample
                progress.update(begun - shown)
            shown = begun
            for future in finished:
                pending |= {pool.submit(_work, task): task for task in itertools.islice(waiting, 1)}
                yield pending.pop(future), future.result()
    except futures.process.BrokenProcessPool as error:
        lines = ", ".join(str(line) for line in sorted(link.lines) if line)
        raise WorkerDied(
            "a worker process died (out of memory, or killed, or a file that crashes the decoder "
            f"or keeps it for more than {SAMPLE_SECONDS} s)"
            + (f"; annotation lines being packed: {lines}" if lines else "")
        ) from error
    finally:
        link.stop[0] = 1
        pool.shutdown(wait=True, cancel_futures=True)


_link: _Link  # of a worker process; set by _enter


def _enter(link: _Link) -> None:
    global _link
    _link = link
    link.enter()
    ignore_interrupts()
    exit_with_parent()


def _work(task: Task) -> dict:
    return write_shard(task, _link.tick)
