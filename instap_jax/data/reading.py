"""Batches read ahead, in order, by workers that may hang, crash or be killed. No JAX.

A batch is a function of its list of groups alone, so a worker that is lost costs nothing but time:
another one reads the same batch again. grain's `mp_prefetch` cannot replace a worker, waits for
ever for one that hangs, and for one that was killed while it wrote to its pipe (both ends of which
the main process keeps open).

Pixels travel in anonymous memory that the main process owns (`memfd_create`): workers decode
straight into it, a worker that is killed leaks nothing, and it does not count against /dev/shm.
Everything else of a batch goes through a pipe.
"""

import collections
import contextlib
import dataclasses
import math
import mmap
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing import connection, reduction, resource_tracker
from typing import Any

import numpy as np

from instap_jax.data.groups import GroupRef
from instap_jax.data.processes import exit_with_parent
from instap_jax.errors import UserError
from instap_jax.types import Batch, Fault

# Reads groups into `frames` and returns the batch. It calls `begin` with the number of each sample
# before it touches it, and leaves the sample out if it is told a fault.
Begin = Callable[[int], Fault]
Read = Callable[[Sequence[GroupRef], np.ndarray, Begin], Batch]

_LEAVE = 15.0  # seconds for a thread to finish its batch when the reader is closed
_TICK = 0.25  # seconds between looks at workers that have sent nothing
_POSITION_BITS = 24  # of a progress mark: the sample within the batch; above them, the batch
_HELD = 2  # batches that the consumer may hold while every other place is being filled
# Workers that die one after another while no batch is finished: no accident any more.
_DEATHS_IN_A_ROW = 5


class Reader:
    """Iterator over the batches of `tasks`, in order, read ahead. Close it when done.

    A sample that takes longer than `timeout` seconds is left out with `Fault.TIMEOUT`, one that
    kills its worker twice with `Fault.DECODER_CRASHED`; the rest of its batch is read again, by a
    new worker. With `workers=0` a thread of this process reads. A thread cannot be killed: one
    that hangs is left alone and another takes its place, which needs a decoder that hangs without
    holding Python's lock; and a crash ends the process.

    Attributes:
      replaced: workers that had to be replaced so far.
    """

    def __init__(
        self,
        read: Read,
        tasks: Iterable[Sequence[GroupRef]],
        *,
        shape: tuple[int, ...],
        workers: int,
        prefetch: int,
        timeout: float,
    ):
        """
        Args:
          read: pickles to worker processes.
          tasks: the groups of each batch; iterated over in another thread, as far as needed.
          shape: of a batch's frames, uint8.
          workers: processes; 0: one thread of this process.
          prefetch: batches read ahead by each worker; with workers, at least one.
          timeout: seconds for one sample.
        """
        self._read, self._tasks, self._timeout = read, iter(tasks), timeout
        self._shape, self._size = shape, math.prod(shape)
        self._count = max(1, workers)
        self._ahead = self._count * max(1, prefetch) if workers else prefetch
        self._memory = _Memory(self._count, self._ahead + 1 + _HELD, self._size, shared=workers > 0)
        self._free = collections.deque(range(len(self._memory.places)))
        self._start = _Process if workers else _Thread
        self._next = 0  # the batch that the consumer gets next
        self._given = 0  # batches given to workers so far
        self._again: list[_Job] = []
        self._ready: dict[int, tuple[_Job, Any]] = {}
        self._exhausted = False  # no more tasks
        self._end: BaseException | None = None  # what every further call raises
        self._deaths = self.replaced = 0
        self._wanted = self._closed = False
        self._changed = threading.Condition()
        self._bell = _Bell()
        resource_tracker.ensure_running()  # else it would unblock Ctrl-C in the thread again
        self._thread = threading.Thread(target=self._manage, daemon=True)
        self._thread.start()

    def __iter__(self) -> "Reader":
        return self

    def __next__(self) -> Batch:
        """Returns the next batch; raises what the workers raised in its place."""
        with self._changed:
            self._wanted = True
            self._bell.ring()
            while self._next not in self._ready:
                if self._end is not None:
                    raise self._end
                if self._exhausted and self._next == self._given:
                    raise StopIteration
                self._changed.wait()
            self._wanted = False
            job, result = self._ready.pop(self._next)
            if isinstance(result, BaseException):
                self._end = result
                raise result
            self._next += 1
            # Without enough places left to go on with, the consumer gets a copy.
            others = len(self._free) + self._given - self._next
            result["frames"] = self._hand_out(job.place, copy=others < self._count)
            return result

    def close(self) -> None:
        """Stops the workers at once. What was handed out stays as it is."""
        self._closed = True
        self._bell.ring()
        self._thread.join(timeout=30)

    def _hand_out(self, place: int, *, copy: bool) -> np.ndarray:
        flat = self._memory.pixels(place)
        if copy:
            flat = flat.copy()
            self._free.append(place)
        else:
            # Views of it keep `flat` alive, as what is below it is no array: so this runs when
            # the last of them is gone.
            release = weakref.finalize(flat, _release, self._free, place, self._bell)
            release.atexit = False
        return flat.reshape(self._shape)

    # --- the thread that manages the workers -------------------------------------------------

    def _manage(self) -> None:
        # Workers inherit the block: Ctrl-C, which a terminal sends to every process, is answered
        # by the main process alone, from the first moment on.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        workers: list[_Worker] = []
        end: BaseException = StopIteration()
        try:
            workers += [self._start_worker(index) for index in range(self._count)]
            while not self._closed:
                self._give(workers)
                self._listen(workers)
                self._watch(workers)
        except BaseException as error:
            end = error
        finally:
            for worker in workers:
                worker.kill()
            for worker in workers:
                worker.leave()
            with self._changed:
                self._end = self._end or end
                self._changed.notify_all()

    def _start_worker(self, index: int) -> "_Worker":
        return self._start(self._read, self._memory, self._shape, index)

    def _give(self, workers: list["_Worker"]) -> None:
        """Hands the next batches to idle workers, as far ahead as there are places for."""
        for worker in workers:
            if worker.job is not None or not worker.started:
                continue
            job = self._again.pop(0) if self._again else self._new_job()
            if job is None:
                return
            worker.give(job)

    def _new_job(self) -> "_Job | None":
        limit = self._next + max(self._ahead, int(self._wanted))
        if self._given >= limit or not self._free or self._exhausted:
            return None
        groups = next(self._tasks, None)
        if groups is None:
            with self._changed:
                self._exhausted = True
                self._changed.notify_all()
            return None
        # The place that was freed last: what is left of it in the cache is written over.
        job = _Job(number=self._given, groups=groups, place=self._free.pop())
        self._given += 1
        return job

    def _listen(self, workers: list["_Worker"]) -> None:
        by_pipe = {worker.pipe: worker for worker in workers}
        for ready in connection.wait([self._bell, *by_pipe], timeout=_TICK):
            if ready is self._bell:
                self._bell.silence()
                continue
            worker = by_pipe[ready]
            try:
                result = worker.pipe.recv()
            except (EOFError, OSError):
                self._replace(workers, worker, worker.why_dead())
                continue
            if not worker.started:
                worker.started = True
                continue
            self._deaths = 0
            job, worker.job = worker.job, None
            with self._changed:
                self._ready[job.number] = job, result
                self._changed.notify_all()

    def _watch(self, workers: list["_Worker"]) -> None:
        """Replaces workers that have been at one sample for too long."""
        for worker in list(workers):
            if worker.job is not None and worker.waited(self._memory) > self._timeout:
                position = worker.position(self._memory)
                if position is not None:
                    worker.job.faults[position] = Fault.TIMEOUT
                self._replace(workers, worker, f"hung for {self._timeout:g} s")

    def _replace(self, workers: list["_Worker"], worker: "_Worker", why: str) -> None:
        """A new worker for one that is lost; its batch is read again."""
        position, job = worker.position(self._memory), worker.job
        worker.kill()
        if job is not None:
            if position is not None and position not in job.faults:
                job.deaths[position] += 1
                if job.deaths[position] > 1:
                    job.faults[position] = Fault.DECODER_CRASHED
            self._again.append(job)
            self._again.sort(key=lambda job: job.number)
        self._deaths += job is None or position not in job.faults
        if self._deaths > _DEATHS_IN_A_ROW * self._count:
            raise UserError(
                f"{self._deaths} data workers were lost one after another (the last one {why}) "
                "without finishing a batch; if memory ran out, lower data.workers or data.prefetch"
            )
        print(f"data worker {worker.name} {why}; replaced", file=sys.stderr, flush=True)
        self.replaced += 1
        self._memory.renew(worker.index, None if job is None else job.place)
        workers[workers.index(worker)] = self._start_worker(worker.index)


class _Bell:
    """Wakes the thread that waits for it. A finalizer may ring it, in any thread, at any time."""

    def __init__(self):
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        weakref.finalize(self, os.close, self._fd)

    def fileno(self) -> int:
        return self._fd

    def ring(self) -> None:
        os.eventfd_write(self._fd, 1)

    def silence(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)


def _release(free: collections.deque, place: int, bell: _Bell) -> None:
    free.append(place)
    bell.ring()


# --- workers --------------------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class _Job:
    """A batch to read; `faults`: samples of it, by number, that are known not to be readable."""

    number: int
    groups: Sequence[GroupRef]
    place: int
    faults: dict[int, Fault] = dataclasses.field(default_factory=dict)
    deaths: collections.Counter = dataclasses.field(default_factory=collections.Counter)


class _Worker:
    """What the manager knows of a worker; a subclass starts and ends it."""

    def __init__(self, index: int, pipe: connection.Connection):
        self.index, self.pipe = index, pipe
        self.started = False  # it has said so
        self.job: _Job | None = None
        self._seen, self._idle, self._looked = -1, 0.0, 0.0

    def give(self, job: _Job) -> None:
        self.job, self._seen = job, -1
        with contextlib.suppress(OSError):  # a dead worker is noticed where its answer is read
            self.pipe.send((job.number, job.groups, job.place, job.faults))

    def leave(self) -> None:
        """Waits for the end that `kill` has asked for, where it could only ask."""

    def waited(self, memory: "_Memory") -> float:
        """Seconds since it went on to the next sample, not counting those that nobody ran in."""
        mark, now = int(memory.marks[self.index]), time.monotonic()
        if mark != self._seen:
            self._seen, self._idle = mark, 0.0
        else:
            # A machine that was suspended, or stopped in a debugger, does not make a worker late.
            self._idle += min(now - self._looked, 4 * _TICK)
        self._looked = now
        return self._idle

    def position(self, memory: "_Memory") -> int | None:
        """The sample of its batch that it is at; None: before the first, or after the last."""
        batch, sample = divmod(int(memory.marks[self.index]), 1 << _POSITION_BITS)
        return sample - 1 if self.job and batch == self.job.number and sample else None


class _Process(_Worker):
    def __init__(self, read: Read, memory: "_Memory", shape: tuple[int, ...], index: int):
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        super().__init__(index, ours)
        self._process = context.Process(
            target=_work_in_process, args=(theirs, read, memory, shape, index), daemon=True
        )
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self.name = f"{index} (process {self._process.pid})"

    def why_dead(self) -> str:
        self._process.join(timeout=5)
        code = self._process.exitcode
        if code is None:
            return "closed its pipe"
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()


class _Thread(_Worker):
    def __init__(self, read: Read, memory: "_Memory", shape: tuple[int, ...], index: int):
        ours, theirs = multiprocessing.Pipe()
        super().__init__(index, ours)
        self.name = "thread"
        arguments = theirs, read, memory, shape, index
        self._thread = threading.Thread(target=_work, args=arguments, daemon=True)
        self._thread.start()

    def why_dead(self) -> str:
        return "ended"

    def kill(self) -> None:
        self.pipe.close()  # it ends when it next looks at the pipe

    def leave(self) -> None:
        # One that is still within a record reader when the interpreter ends aborts the process.
        self._thread.join(timeout=_LEAVE)


def _work_in_process(*arguments) -> None:
    exit_with_parent()
    _work(*arguments)


def _work(
    pipe: connection.Connection,
    read: Read,
    memory: "_Memory",
    shape: tuple[int, ...],
    index: int,
) -> None:
    """What a worker does until its pipe is closed."""
    marks, places = memory.marks, memory.places  # a thread that was given up keeps its own
    # Freeing one block of just under 32 MB makes glibc keep smaller ones for what is read from the
    # records, a megabyte a clip, instead of returning each to the kernel.
    np.empty(31 << 20, np.uint8)
    try:
        pipe.send("started")
        while True:
            number, groups, place, faults = pipe.recv()
            frames = np.frombuffer(places[place], np.uint8, math.prod(shape)).reshape(shape)
            pipe.send(_read(read, number, groups, frames, faults, marks, index))
            del frames
    except (EOFError, OSError):
        pipe.close()


def _read(
    read: Read,
    number: int,
    groups: Sequence[GroupRef],
    frames: np.ndarray,
    faults: Mapping[int, Fault],
    marks: np.ndarray,
    index: int,
) -> dict[str, Any] | Exception:
    def begin(sample: int) -> Fault:
        marks[index] = (number << _POSITION_BITS) + sample + 1
        return faults.get(sample, Fault.NONE)

    marks[index] = number << _POSITION_BITS
    try:
        batch = dict(read(groups, frames, begin))
        del batch["frames"]
        return batch
    except Exception as error:  # raised where the consumer gets to this batch
        text = "".join(traceback.format_exception(error))
        return error if isinstance(error, UserError) else RuntimeError(f"in a data worker:\n{text}")
    finally:
        marks[index] = number << _POSITION_BITS


class _Memory:
    """Places for pixels, and a progress mark per worker; shared with worker processes.

    Attributes:
      marks: int64 [workers]: the batch, and how many of its samples were begun.
      places: buffers of `size` bytes, each at the start of a page.
    """

    def __init__(self, workers: int, places: int, size: int, *, shared: bool):
        self._workers, self._size = workers, math.ceil(size / mmap.PAGESIZE) * mmap.PAGESIZE
        self._fd = os.memfd_create("instap-batches") if shared else -1
        if shared:
            os.ftruncate(self._fd, mmap.PAGESIZE + places * self._size)
            weakref.finalize(self, os.close, self._fd)
            self._map(places)
        else:
            self.marks = np.zeros(workers, np.int64)
            self.places = [self._private() for _ in range(places)]
        self._pixels = size

    def _map(self, places: int) -> None:
        whole = memoryview(mmap.mmap(self._fd, mmap.PAGESIZE + places * self._size))
        self.marks = np.frombuffer(whole, np.int64, self._workers)
        starts = [mmap.PAGESIZE + place * self._size for place in range(places)]
        self.places = [whole[start : start + self._size] for start in starts]

    def _private(self) -> memoryview:
        return memoryview(mmap.mmap(-1, self._size))

    def pixels(self, place: int) -> np.ndarray:
        """A new array over a place, uint8 [size]."""
        return np.frombuffer(self.places[place], np.uint8, self._pixels)

    def renew(self, index: int, place: int | None) -> None:
        """After a worker was lost: a thread that hangs may still write to its place and mark."""
        if self._fd < 0:
            self.marks = self.marks.copy()
            self.places = list(self.places)
            if place is not None:
                self.places[place] = self._private()
        self.marks[index] = 0

    def __getstate__(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in ("_workers", "_size", "_pixels")}
        return state | {"_fd": reduction.DupFd(self._fd), "places": len(self.places)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        places = state.pop("places")
        vars(self).update(state, _fd=state["_fd"].detach())
        self._map(places)
