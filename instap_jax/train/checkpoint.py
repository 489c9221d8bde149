"""Checkpoints: a thin wrapper around orbax, so that its API is named in one file.

A checkpoint is one directory `DIR/checkpoints/STEP` that holds four items and appears only when
all of them are complete:
  params     float32 parameters (what later stages and exports read)
  optimizer  optax state and the step number
  data       position of the input pipeline, JSON
  meta       resolved config, stage, versions, JSON
The best checkpoint of a run by its validation metric (`train/selection.py`), if it has one, is kept
beside them, `DIR/checkpoints-best/STEP`, params and meta alone.
"""

import contextlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from instap_jax.errors import UserError
from instap_jax.train.state import TrainState

DIRECTORY = "checkpoints"
NEWEST, BEST = "newest", "best"  # which checkpoint of a run to read
_DIRECTORIES = {NEWEST: DIRECTORY, BEST: "checkpoints-best"}
ITEMS = ("params", "optimizer", "data", "meta")


class Checkpointer:
    """Writes checkpoints in the background and restores them onto any mesh.

    Args:
      workdir: local path or object-store URL of the run.
      every: steps between checkpoints; `save` ignores other steps unless forced.
      keep: how many of the newest are kept.
    """

    def __init__(self, workdir: str, *, every: int, keep: int):
        self._workdir = workdir
        options = ocp.CheckpointManagerOptions(
            save_interval_steps=every, max_to_keep=keep, enable_async_checkpointing=True
        )
        with _storage_faults(f"{workdir}: cannot open its checkpoints"):
            self._manager = _manager(workdir, options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(
        self,
        state: TrainState,
        step: int,
        *,
        data: dict[str, Any],
        meta: dict[str, Any],
        force: bool = False,
    ) -> bool:
        """Starts saving; False when this step is not due. Errors of an earlier save raise here."""
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave({"opt_state": state.opt_state, "step": state.step}),
            data=ocp.args.JsonSave(data),
            meta=ocp.args.JsonSave(meta),
        )
        if force and self._manager.latest_step() == step:
            return False  # just saved on schedule
        with _storage_faults(self._cannot_save()):
            return self._manager.save(step, args=args, force=force)

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restores the newest checkpoint as `abstract` describes it; also the position of the data.

        Raises:
          UserError: when it is damaged or does not fit.
        """
        step = self._manager.latest_step()
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            optimizer=ocp.args.StandardRestore(
                {"opt_state": abstract.opt_state, "step": abstract.step}
            ),
            data=ocp.args.JsonRestore(),
        )
        with _storage_faults(
            f"{self._workdir}/{DIRECTORY}/{step} cannot be restored; move it away to go on from an "
            "earlier one"
        ):
            restored = self._manager.restore(step, args=args)
        state = TrainState(
            step=restored.optimizer["step"],
            params=restored.params,
            opt_state=restored.optimizer["opt_state"],
        )
        return state, restored.data

    def wait(self) -> None:
        """Waits for a save in progress to be complete."""
        with _storage_faults(self._cannot_save()):
            self._manager.wait_until_finished()

    def _cannot_save(self) -> str:
        last = self._manager.latest_step()
        return f"{self._workdir}: cannot save; the last checkpoint is from step {last or 0}"

    def close(self) -> None:
        self.wait()
        self._manager.close()


def write_params(workdir: str, params: Any, *, meta: dict[str, Any]) -> None:
    """Writes parameters alone, as step 0 of `workdir`: what a conversion makes.

    Args:
      params: State of host arrays.
      meta: as the loop writes it, and 'converted'.
    """
    args = ocp.args.Composite(params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(meta))
    with (
        _storage_faults(f"{workdir}: cannot save"),
        _manager(workdir, ocp.CheckpointManagerOptions()) as manager,
    ):
        manager.save(0, args=args)
        manager.wait_until_finished()


def write_best(workdir: str, params: Any, *, step: int, meta: dict[str, Any]) -> None:
    """Writes the parameters of `step` as the best of the run, in place of the one before."""
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    args = ocp.args.Composite(params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(meta))
    with (
        _storage_faults(f"{workdir}: cannot save the best checkpoint"),
        _manager(workdir, options, BEST) as manager,
    ):
        manager.save(step, args=args, force=True)


def has_best(workdir: str) -> bool:
    """Whether the run has a best checkpoint."""
    if not (epath.Path(workdir) / _DIRECTORIES[BEST]).exists():
        return False
    with _reader(workdir, BEST) as manager:
        return manager.latest_step() is not None


def read_meta(workdir: str, *, which: str = NEWEST) -> tuple[int, dict[str, Any]]:
    """(step, meta) of the newest checkpoint of a run, or of its best.

    Raises:
      UserError: when there is none.
    """
    with _reader(workdir, which) as manager:
        step = _newest(manager, workdir)
        with _storage_faults(f"{manager.directory}/{step} cannot be read"):
            restored = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        return step, restored.meta


def read_params(
    workdir: str,
    abstract: Any,
    *,
    select: tuple[str, ...] = (),
    step: int | None = None,
    which: str = NEWEST,
) -> Any:
    """Parameters of a checkpoint of a run, strictly as `abstract` describes them.

    Args:
      workdir: of the run that wrote them.
      abstract: State of abstract arrays (shape, dtype, sharding).
      select: path of the sub-module to take; `abstract` then describes that sub-module alone.
      step: of the checkpoint; None: the newest.
      which: NEWEST or BEST, where to look for it.

    Raises:
      UserError: when there is no checkpoint, or a parameter is missing, left over or misshapen.
    """
    with _reader(workdir, which) as manager:
        step = _newest(manager, workdir) if step is None else step
        path = manager.directory / str(step) / "params"
    item: Any = abstract
    for name in reversed(select):
        item = {name: item}
    with _storage_faults(f"{path} cannot be read"), _params_reader() as reader:
        stored = _select(reader.metadata(path).item_metadata.tree, select, workdir)
        expected, found = _shapes(abstract), _shapes(stored)
        if found != expected:
            raise UserError(_difference(expected, found, workdir))
        restored = reader.restore(
            path,
            args=ocp.args.PyTreeRestore(
                item,
                restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                partial_restore=bool(select),
            ),
        )
    for name in select:
        restored = restored[name]
    return restored


class StoredParams:
    """The parameters of one checkpoint, read leaf by leaf to the host; no device holds any.

    Attributes:
      shapes: dotted name of every parameter -> shape.
      step: of the checkpoint.
    """

    def __init__(self, workdir: str):
        with _reader(workdir) as manager:
            self.step = _newest(manager, workdir)
            self._path = manager.directory / str(self.step) / "params"
        self._workdir = workdir
        with _storage_faults(f"{self._path} cannot be read"), _params_reader() as reader:
            tree = reader.metadata(self._path).item_metadata.tree
        self._places = {_name(path): path for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
        self.shapes = _shapes(tree)

    def check(self, abstract: Any) -> None:
        """Raises UserError unless they are exactly the parameters that `abstract` describes."""
        expected = _shapes(abstract)
        if self.shapes != expected:
            raise UserError(_difference(expected, self.shapes, self._workdir))

    def read(self, name: str) -> np.ndarray:
        """One parameter, in the dtype it was stored with."""
        item: Any = ocp.RestoreArgs(restore_type=np.ndarray)
        for entry in reversed(self._places[name]):
            item = {entry.key: item}
        wanted = jax.tree.map(lambda _: 0, item)
        args = ocp.args.PyTreeRestore(wanted, restore_args=item, partial_restore=True)
        with _storage_faults(f"{self._path} cannot be read"), _params_reader() as reader:
            (leaf,) = jax.tree.leaves(reader.restore(self._path, args=args))
        return leaf


def module_names(workdir: str, *, which: str = NEWEST) -> tuple[str, ...]:
    """Top-level modules of the newest checkpoint of a run, or of its best.

    Raises:
      UserError: when there is no checkpoint.
    """
    with _reader(workdir, which) as manager:
        path = manager.directory / str(_newest(manager, workdir)) / "params"
    with _storage_faults(f"{path} cannot be read"), _params_reader() as reader:
        return tuple(reader.metadata(path).item_metadata.tree)


@contextlib.contextmanager
def _storage_faults(what: str):
    """Whatever storage raises, through orbax and tensorstore, as one line of ours."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise UserError(f"{what} ({type(error).__name__}: {reason})") from error


def _manager(
    workdir: str, options: ocp.CheckpointManagerOptions, which: str = NEWEST
) -> ocp.CheckpointManager:
    path = epath.Path(workdir)
    if "://" not in workdir:
        path = epath.Path(Path(workdir).absolute())
    return ocp.CheckpointManager(path / _DIRECTORIES[which], item_names=ITEMS, options=options)


def _reader(workdir: str, which: str = NEWEST) -> ocp.CheckpointManager:
    directory = _DIRECTORIES[which]
    if not (epath.Path(workdir) / directory).exists():
        if which == BEST:
            raise UserError(
                f"{workdir}: no best checkpoint (it has no {directory}/ directory): training keeps "
                "one where config.evaluation.every is set"
            )
        raise UserError(f"{workdir}: no such run (it has no {directory}/ directory)")
    return _manager(workdir, ocp.CheckpointManagerOptions(read_only=True), which)


def _params_reader() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


def _newest(manager: ocp.CheckpointManager, workdir: str) -> int:
    step = manager.latest_step()
    if step is None:
        raise UserError(f"{manager.directory}: no complete checkpoint there")
    return step


def _select(tree, select: tuple[str, ...], workdir: str):
    for name in select:
        if name not in tree:
            raise UserError(f"{workdir}: its checkpoint has no {'/'.join(select)!r}")
        tree = tree[name]
    return tree


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): tuple(leaf.shape) for path, leaf in leaves}


def _name(path) -> str:
    """Dotted name of a leaf; orbax stores a Variable as a node with one child `value`."""
    keys = [str(getattr(e, "key", getattr(e, "name", getattr(e, "idx", e)))) for e in path]
    return ".".join(key for key in keys if key not in ("value", ".value"))


def _difference(expected: dict, found: dict, workdir: str) -> str:
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    other = sorted(k for k in expected.keys() & found.keys() if expected[k] != found[k])
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing (first: {missing[0]})")
    if extra:
        parts.append(f"{len(extra)} left over (first: {extra[0]})")
    if other:
        name = other[0]
        parts.append(f"{len(other)} of another shape ({name}: {found[name]} not {expected[name]})")
    return f"{workdir}: its parameters do not fit this config: {'; '.join(parts)}"
