"""What the processes of a run owe each other: to stop together, and not to hang alone."""

import faulthandler
import itertools
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from instap_jax.train.stop import Ask


class Agreement:
    """What any process asks for, and what all have counted, known to each at the same step.

    Each step some numbers of every process are added to the device's queue behind the step, and
    what they make together is read one step late, with the metrics, so that no device and no host
    waits for it. JAX's preemption service would do the same without a device, but for SIGTERM
    alone, and its handler takes the place of ours: no Ctrl-C, no second signal, no word on the
    screen.
    """

    def __init__(self, mesh: Mesh):
        self._place = NamedSharding(mesh, P(mesh.axis_names))
        self._size = mesh.size
        self._together = jax.jit(_together, out_shardings=NamedSharding(mesh, P()))
        self._told: jax.Array | None = None

    def exchange(self, ask: Ask, counts: Sequence[int]) -> tuple[Ask, list[int]]:
        """Tells the other processes what this one asks and has counted since the last time.

        Returns:
          The largest of what all asked the last time, and the sums of what they counted, which
          must fit an int32. A single process is told its own at once.
        """
        if jax.process_count() == 1:
            return ask, list(counts)
        before = self._told
        mine = np.array([ask, *counts], np.int32)
        # A row for every device; what this process counted is in the row of its first alone.
        rest = np.array([ask, *(0 for _ in counts)], np.int32)
        rows = itertools.chain([mine], itertools.repeat(rest))
        shape = (self._size, len(mine))
        self._told = self._together(
            jax.make_array_from_callback(shape, self._place, lambda _: next(rows)[None])
        )
        if before is None:
            return Ask.NOTHING, [0 for _ in counts]
        largest, *sums = np.asarray(before).tolist()
        return Ask(largest), sums


def _together(told: jax.Array) -> jax.Array:
    """int32 [devices, 1 + counts] -> [1 + counts]: the largest, and sums."""
    return jnp.concatenate([told[:, :1].max(axis=0), told[:, 1:].sum(axis=0)])


class Watchdog:
    """Ends a process whose step does not end: one that waits for a host that hangs.

    A host that has died is noticed by the others' heartbeats; one that still lives but computes or
    reads no more is not. The process prints where each of its threads is, and exits with code 1.

    Args:
      seconds: until the first call of `step`, and between two calls.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds

    def __enter__(self) -> "Watchdog":
        self.step()
        return self

    def step(self) -> None:
        """Begins a step: the time counts from now."""
        # Runs without Python's lock, which what hangs may hold.
        faulthandler.dump_traceback_later(self._seconds, exit=True, file=sys.__stderr__)

    def __exit__(self, kind, *exc) -> None:
        # After a fault the other processes may never come to what this one waits for as it ends.
        if kind is None or jax.process_count() == 1:
            faulthandler.cancel_dump_traceback_later()
