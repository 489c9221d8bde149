"""One process of a pod whose storage fails: `python pod_storage.py SCENARIO RANK COUNT PORT DIR`.

It ends as `instap train` does: with the exit code of what it met.
"""

import errno
import os
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from instap_jax import distributed
from instap_jax.config import default
from instap_jax.errors import AgreedFault, StorageError, UserError, cannot, exit_code
from instap_jax.train import checkpoint, integrity, saving
from instap_jax.train.peers import Agreement
from instap_jax.train.state import TrainState
from instap_jax.train.stop import Ask

META = {"stage": "distill"}
SECONDS = 60  # within which what is tried here happens


def state_of(mesh, step: int) -> TrainState:
    def placed(value, *spec):
        value = np.asarray(value)
        place = NamedSharding(mesh, P(*spec))
        return jax.make_array_from_callback(value.shape, place, lambda index: value[index])

    kernel = placed(np.full((12, 4), step, np.float32), "fsdp")
    return TrainState(
        step=placed(np.int32(step)),
        params=nnx.State({"kernel": nnx.Param(kernel)}),
        opt_state=(placed(np.float32(step)),),
        refused=placed(np.int32(0)),
    )


def save(saver, mesh, step: int, **options) -> None:
    saver.save(state_of(mesh, step), step, data={"at": step}, meta=META, **options)


def together(rank: int, mesh, workdir: str) -> None:
    """What all must find alike, and a best checkpoint while the newest is being finished."""
    agreement = Agreement(mesh)
    asks = Ask.PREEMPTED if rank else Ask.NOTHING
    assert agreement.exchange(asks, [1, 10 * (rank + 1)]) == (Ask.NOTHING, [0, 0])
    assert agreement.exchange(Ask.NOTHING, [0, 0]) == (Ask.PREEMPTED, [2, 30])
    assert agreement.exchange(Ask.NOTHING, [0, 0]) == (Ask.NOTHING, [0, 0])
    with saving.Checkpointer(workdir, every=1, keep=1) as saver:
        assert saver.resumed is None
        save(saver, mesh, 1, wait=True)
        delete = saver._manager._checkpoint_deleter.delete_steps

        def slowly(steps):
            time.sleep(3 * bool(steps))
            delete(steps)

        if rank == 0:
            saver._manager._checkpoint_deleter.delete_steps = slowly
        save(saver, mesh, 2)
        time.sleep(1.5)
        checkpoint.write_best(workdir, state_of(mesh, 2).params, step=2, meta=META)
    assert checkpoint.has_best(workdir)
    if rank == 0:  # its storage does not answer
        integrity.check = _refused
    try:
        checkpoint.read_meta(workdir)
    except StorageError:
        return
    raise AssertionError("read what cannot be read")


def background(rank: int, mesh, workdir: str) -> None:
    """The storage fails process 0 while it writes; the other waits for it there."""
    if rank == 0:
        integrity.write_manifest = _refused
    with saving.Checkpointer(workdir, every=1, keep=1) as saver:
        save(saver, mesh, 1)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:  # the steps of the run
            saver.check()
            time.sleep(0.1)
    raise AssertionError("no word of it")


def at_the_end(rank: int, mesh, workdir: str) -> None:
    """Likewise, in a save that all wait for."""
    if rank == 0:
        integrity.write_manifest = _refused
    with saving.Checkpointer(workdir, every=1, keep=1) as saver:
        save(saver, mesh, 1, wait=True)
    raise AssertionError("saved")


def prepared(rank: int, mesh, workdir: str) -> None:
    """The storage fails process 0 in what it does for all."""

    def task():
        raise cannot("config.json", OSError(errno.ESTALE, "Stale file handle"))

    distributed.first(task)


def first_fails(rank: int, mesh, workdir: str) -> None:
    """A fault of one process alone, while the other waits for it."""
    _one_fails(rank == 0)


def second_fails(rank: int, mesh, workdir: str) -> None:
    _one_fails(rank == 1)


def _one_fails(here: bool) -> None:
    if here:
        raise UserError("a path that is not there")
    multihost_utils.sync_global_devices("never met")


def all_fail(rank: int, mesh, workdir: str) -> None:
    """A fault that all meet at the same step: what was being saved is saved."""
    with saving.Checkpointer(workdir, every=1, keep=1) as saver:
        save(saver, mesh, 1)
        raise AgreedFault("not finite")


def killed(rank: int, mesh, workdir: str) -> None:
    """A process dies within a save that all wait for."""
    write = integrity.write_manifest

    def slowly(directory):
        time.sleep(5)
        write(directory)

    integrity.write_manifest = slowly
    with saving.Checkpointer(workdir, every=1, keep=1) as saver:
        if rank == 1:
            threading.Timer(1, os.kill, (os.getpid(), signal.SIGKILL)).start()
        save(saver, mesh, 1, wait=True)
    raise AssertionError("saved without the other")


def _refused(*_, **__):
    raise OSError(errno.EIO, "Input/output error")


def main() -> int:
    scenario, rank, count, port, workdir = sys.argv[1:]
    os.environ |= dict(zip(distributed.VARIABLES, (f"127.0.0.1:{port}", count, rank)))
    config = default().distributed
    # A connection that closes is seen at once: there is no heartbeat to be waited for.
    config.heartbeat_timeout = 300 if scenario.endswith("fails") else 10
    try:
        with distributed.joined(config):
            mesh = jax.make_mesh((jax.device_count(),), ("fsdp",))
            Path(workdir).mkdir(exist_ok=True)
            globals()[scenario](int(rank), mesh, workdir)
    except UserError as error:
        print(error, flush=True)
        return exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
