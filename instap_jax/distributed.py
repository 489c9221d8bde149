"""Joins the processes of a pod, one a host, into one JAX program, and takes them apart again."""

import atexit
import contextlib
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from instap_jax.errors import EXIT_STORAGE, Stopped, StorageError, UserError, exit_code
from instap_jax.progress import Progress

# All three or none: a process that was told one of them is meant to be part of a pod.
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Seconds that process 0 leaves the others for their own last words: without it they are aborted.
_LINGER = 3.0
# Seconds until a file that one host wrote is seen by another: what network file systems cache.
_VISIBLE_AFTER = 90.0


@contextlib.contextmanager
def joined(config: ConfigDict) -> Iterator[None]:
    """`initialize`, and an end in which no process waits for one that has failed.

    Processes that end well, or were stopped together, wait for each other. One that fails leaves
    at once, with its own exit code; the others notice within `heartbeat_timeout` seconds that it
    is gone, and abort.
    """
    initialize(config)
    try:
        yield
    except BaseException as error:
        if jax.process_count() > 1 and not isinstance(error, Stopped):
            code = exit_code(error)
            atexit.register(_leave, code)  # before JAX's own, which waits for the others
            # Before that Python waits for threads, of which those of a save wait for the others.
            threading.Thread(target=_leave_after_main, args=(code,), daemon=True).start()
        raise


def initialize(config: ConfigDict) -> None:
    """Connects this process to the others of its pod; alone, it does nothing.

    Must come before anything that asks JAX for devices. Where the others are:
      1. the environment variables `VARIABLES`, as a rehearsal and the launchers set them;
      2. what JAX finds out by itself on Cloud TPU, GKE and Slurm, unless JAX_PLATFORMS is 'cpu';
      3. nowhere: a single process.

    Args:
      config: `distributed` of the configuration.

    Raises:
      UserError: when the variables are incomplete or wrong. (When the others do not come within
        `initialization_timeout`, JAX aborts the process.)
    """
    if jax.distributed.is_initialized():
        return
    # Its handler of SIGTERM would take the place of train/stop.py's.
    jax.config.update("jax_enable_preemption_service", False)
    explicit = _explicit(os.environ)
    # A Cloud TPU host that is asked for its CPU alone is no part of a pod.
    if not explicit and os.environ.get("JAX_PLATFORMS") == "cpu":
        return
    if explicit:
        print(
            "process {process_id} of {num_processes}, coordinator {coordinator_address}: waiting "
            "for the others".format(**explicit),
            file=sys.stderr,
        )
    try:
        jax.distributed.initialize(
            **explicit,
            initialization_timeout=config.initialization_timeout,
            heartbeat_timeout_seconds=config.heartbeat_timeout,
        )
    except ValueError as error:
        if explicit or "coordinator_address should be defined" not in str(error):
            raise UserError(f"cannot join the other processes: {error}") from error
    if jax.process_index():
        Progress.silence()  # one screen, one line


def first(task: Callable[[], None]) -> None:
    """Process 0 alone does `task`; the others wait until it is done.

    Raises:
      UserError: what `task` raised, in process 0; that it did, in the others.
    """
    fault = None
    if jax.process_index() == 0:
        try:
            task()
        except UserError as error:
            fault = error
    codes = _gather(0 if fault is None else exit_code(fault))
    if any(codes):
        kind = StorageError if EXIT_STORAGE in codes else UserError  # of which another start is due
        raise fault or kind("process 0 has met a fault; it says which")


def check_shared(path: Path) -> None:
    """Raises UserError unless every process reads the same in a file that process 0 has written."""
    if jax.process_count() == 1:
        return
    wanted = int(_gather(_checksum(path))[0])
    deadline = time.monotonic() + _VISIBLE_AFTER
    while _checksum(path) != wanted and time.monotonic() < deadline:
        time.sleep(0.5)
    apart = np.flatnonzero(np.array(_gather(_checksum(path))) != wanted)
    if len(apart):
        raise UserError(
            f"{path.parent}: processes {', '.join(map(str, apart))} do not find there what process "
            "0 has written; it must be on storage that all hosts share"
        )


def _checksum(path: Path) -> int:
    try:
        return zlib.crc32(path.read_bytes()) >> 1  # as an int32
    except OSError:
        return -1


def _gather(number: int) -> list[int]:
    """The number, an int32, of every process, in their order."""
    return np.ravel(multihost_utils.process_allgather(np.int32(number))).tolist()


def _leave_after_main(code: int) -> None:
    threading.main_thread().join()
    _leave(code)


def _leave(code: int) -> None:
    """Ends the process without waiting for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(_LINGER)
    os._exit(code)


def _explicit(environment) -> dict[str, str | int]:
    """The arguments of `jax.distributed.initialize` that the environment names, or none."""
    given = {name: environment[name] for name in VARIABLES if environment.get(name)}
    if not given:
        return {}
    if len(given) < len(VARIABLES):
        missing = ", ".join(name for name in VARIABLES if name not in given)
        raise UserError(f"{', '.join(given)} set but not {missing}: set all three or none")
    address, *numbers = (given[name] for name in VARIABLES)
    if ":" not in address or not all(text.isdigit() for text in numbers):
        raise UserError(
            f"{', '.join(f'{name}={value}' for name, value in given.items())}: HOST:PORT and two "
            "whole numbers are expected"
        )
    count, index = map(int, numbers)
    if not index < count:
        raise UserError(f"JAX_PROCESS_ID={index} must be below JAX_NUM_PROCESSES={count}")
    return {"coordinator_address": address, "num_processes": count, "process_id": index}
