"""The step that a run could not take, on disk: what `instap replay` computes again.

`WORKDIR/dumps/STEP` holds parameters and optimizer state before the step, the batch, and as `meta`
the configuration, the step's number and its metrics.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx

from instap_jax.errors import UserError
from instap_jax.train import integrity
from instap_jax.train.checkpoint import storage_faults
from instap_jax.train.state import TrainState
from instap_jax.types import Batch

DIRECTORY = "dumps"
ITEMS = ("params", "optimizer", "batch", "meta")


def write(workdir: Path, state: TrainState, batch: Batch, *, step: int, meta: dict) -> str:
    """Writes a dump, on all processes together; says where, or why not: it is no reason to fail."""
    path = Path(workdir).absolute() / DIRECTORY / str(step)
    args = ocp.args.Composite(
        params=ocp.args.StandardSave(state.params),
        optimizer=ocp.args.StandardSave(state.opt_state),
        batch=ocp.args.StandardSave(dict(batch)),
        meta=ocp.args.JsonSave(meta | integrity.MARK),
    )
    try:
        with storage_faults("it cannot be dumped"), _checkpointer(path) as checkpointer:
            checkpointer.save(path, args=args, force=True)
    except UserError as error:
        return str(error)
    return f"`instap replay --workdir={workdir} --dump={step}` shows what went wrong"


def newest(workdir: Path) -> int:
    """The latest step of which there is a dump.

    Raises:
      UserError: there is none.
    """
    steps = [int(path.name) for path in (workdir / DIRECTORY).glob("*") if path.name.isdigit()]
    if not steps:
        raise UserError(
            f"{workdir} holds no dump: a run leaves one in {DIRECTORY}/ where a loss or gradient "
            "that is not finite stops it"
        )
    return max(steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dump:
    """What a dump holds, on the devices as asked for."""

    params: nnx.State
    opt_state: Any
    batch: Batch


def read_meta(workdir: Path, step: int) -> dict[str, Any]:
    """`meta` of a dump, once its checksums agree.

    Raises:
      UserError: it is not there, or damaged.
    """
    path = epath.Path(workdir.absolute()) / DIRECTORY / str(step)
    if not path.exists():
        raise UserError(f"{path}: no such dump")
    try:
        with storage_faults(f"{path} cannot be read"):
            integrity.check(path, ITEMS)
    except integrity.Damaged as error:
        raise UserError(f"{path} is damaged: {error}") from error
    return _restore(path, meta=ocp.args.JsonRestore()).meta


def batch_shapes(workdir: Path, step: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array of the batch of a dump."""
    path = workdir.absolute() / DIRECTORY / str(step) / "batch"
    with (
        storage_faults(f"{path} cannot be read"),
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader,
    ):
        tree = reader.metadata(path).item_metadata.tree
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in tree.items()}


def read(workdir: Path, step: int, abstract: TrainState, batch: dict) -> Dump:
    """Reads a dump onto the devices that `abstract` and `batch` (abstract arrays) name."""
    restored = _restore(
        epath.Path(workdir.absolute()) / DIRECTORY / str(step),
        params=ocp.args.StandardRestore(abstract.params),
        optimizer=ocp.args.StandardRestore(abstract.opt_state),
        batch=ocp.args.StandardRestore(batch),
    )
    return Dump(params=restored.params, opt_state=restored.optimizer, batch=restored.batch)


def _restore(path: epath.Path, **items):
    with storage_faults(f"{path} cannot be read"), _checkpointer(path) as checkpointer:
        return checkpointer.restore(path, args=ocp.args.Composite(**items))


def _checkpointer(path) -> ocp.Checkpointer:
    handler = ocp.CompositeCheckpointHandler(*ITEMS)
    listed = integrity.temporary_path_class(epath.Path(path))
    return ocp.Checkpointer(handler, temporary_path_class=listed)
