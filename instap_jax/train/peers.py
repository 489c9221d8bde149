"""What the processes of a run owe each other: to stop together, and not to hang alone."""

import faulthandler
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from instap_jax.train.stop import Ask


class Agreement:
    """What any process asks for, known to all of them at the same step.

    Each step a number of every process is added to the device's queue behind the step, and the
    largest is read one step late, with the metrics, so that no device and no host waits for it.
    JAX's preemption service would do the same without a device, but for SIGTERM alone, and its
    handler takes the place of ours: no Ctrl-C, no second signal, no word on the screen.
    """

    def __init__(self, mesh: Mesh):
        self._place = NamedSharding(mesh, P(mesh.axis_names))
        self._size = mesh.size
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
        self._told: jax.Array | None = None

    def exchange(self, ask: Ask) -> Ask:
        """Tells the other processes `ask`; returns the largest of what all told the last time.

        A single process is told its own at once.
        """
        if jax.process_count() == 1:
            return ask
        before = self._told
        mine = np.array([ask], np.int32)
        self._told = self._largest(
            jax.make_array_from_callback((self._size,), self._place, lambda _: mine)
        )
        return Ask.NOTHING if before is None else Ask(int(before))


class Watchdog:
    """Ends a process whose step does not end: one that waits for a host that hangs.

    A host that has died is noticed by the others' heartbeats; one that still lives but computes or
    reads no more is not. The process prints where each of its threads is, and exits with code 1.

    Args:
      seconds: between two calls of `step`.
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
