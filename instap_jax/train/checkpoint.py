"""Checkpoints: a thin wrapper around orbax, so that its API is named here and in `saving` alone.

A checkpoint is one directory `DIR/checkpoints/STEP` that holds four items and appears only when
all of them are complete:
  params     float32 parameters (what later stages and exports read)
  optimizer  optax state and the step number
  data       position of the input pipeline, JSON
  meta       resolved config, stage, versions, JSON
The best checkpoint of a run by its validation metric (`train/selection.py`), if it has one, is kept
beside them, `DIR/checkpoints-best/STEP`, params and meta alone.

Whoever asks for the newest checkpoint gets the newest whose checksums agree (`train/integrity.py`),
and a line on the screen for each newer one that was passed over.
"""

import contextlib
import itertools
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from instap_jax.errors import StorageError, UserError, passes
from instap_jax.train import integrity

DIRECTORY = "checkpoints"
CONVERTED = 0  # the step of weights that were converted; a training saves its first step as 1
NEWEST, BEST = "newest", "best"  # which checkpoint of a run to read
DIRECTORIES = {NEWEST: DIRECTORY, BEST: "checkpoints-best"}
ITEMS = ("params", "optimizer", "data", "meta")
READ = ("params", "meta")  # what readers of a run need


@contextlib.contextmanager
def storage_faults(what: str):
    """Whatever storage raises, through orbax and tensorstore, as one line of ours.

    Raises:
      UserError, or StorageError where it may pass: in one of several processes always, as it may
        be that another has died within a save.
    """
    try:
        yield
    except (UserError, integrity.Damaged):
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        if system := re.search(r": ([^:]+) \[os_error_code", reason):
            reason = f"{system[1]}: {reason}"  # tensorstore names it at the end of a long line
        reason = reason[:300]
        kind = StorageError if jax.process_count() > 1 or passes(error) else UserError
        raise kind(f"{what} ({type(error).__name__}: {reason})") from error


class Manager(ocp.CheckpointManager):
    """orbax's, which also says at once that a save in the background has failed.

    orbax itself says so once all processes have met, for which the failed one waits twenty minutes.

    Attributes:
      failure: what a save has met in this process.
    """

    failure: BaseException | None = None

    def _wait_for_checkpointers(self):
        try:
            super()._wait_for_checkpointers()
        except BaseException as error:
            self.failure = error
            raise

    def finish(self) -> None:
        """Waits for a save in the background; raises what it met."""
        while self.is_saving_in_progress() and not self.failure:
            time.sleep(0.02)
        if self.failure and jax.process_count() > 1:
            raise self.failure
        self.wait_until_finished()


def open_manager(
    workdir: str, options: ocp.CheckpointManagerOptions, which: str = NEWEST
) -> Manager:
    """orbax's manager of a run's checkpoints, which writes the list of checksums."""
    path = epath.Path(workdir)
    if "://" not in workdir:
        path = epath.Path(Path(workdir).absolute())
    directory = path / DIRECTORIES[which]
    options.temporary_path_class = integrity.temporary_path_class(directory)
    return Manager(directory, item_names=ITEMS, options=options)


def write_params(workdir: str, params: Any, *, meta: dict[str, Any]) -> None:
    """Writes parameters alone, as step `CONVERTED` of `workdir`: what a conversion makes.

    Args:
      params: State of host arrays.
      meta: as the loop writes it, and 'converted'.
    """
    with (
        storage_faults(f"{workdir}: cannot save"),
        open_manager(workdir, ocp.CheckpointManagerOptions()) as manager,
    ):
        manager.save(CONVERTED, args=_readable(params, meta))
        manager.wait_until_finished()


def write_best(workdir: str, params: Any, *, step: int, meta: dict[str, Any]) -> None:
    """Writes the parameters of `step` as the best of the run, in place of the one before."""
    with (
        storage_faults(f"{workdir}: cannot save the best checkpoint"),
        _best_manager(workdir) as manager,
    ):
        set_aside_damaged(manager, workdir, READ)
        # Of a stretch of the run that a crash has lost.
        if _said_by_main(lambda: step in manager.all_steps()):
            manager.delete(step)
        manager.save(step, args=_readable(params, meta), force=True)


def tidy_best(workdir: str) -> None:
    """Removes what a crash within `write_best` left: half of the new one, or the one before."""
    with (
        storage_faults(f"{workdir}: cannot tidy its best checkpoint"),
        _best_manager(workdir) as manager,
    ):
        set_aside_damaged(manager, workdir, READ)
        # The oldest of several, as long as there are several.
        while (step := _said_by_main(lambda: _superfluous(manager))) != _NONE:
            manager.delete(step)


def _superfluous(manager: ocp.CheckpointManager) -> int:
    return min(sorted(manager.all_steps())[:-1], default=_NONE)


def _best_manager(workdir: str) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=1,
        enable_async_checkpointing=False,
        cleanup_tmp_directories=True,
        # Several processes meet by name: these are not the saves of the run, which go on meanwhile.
        multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix="best"),
    )
    return open_manager(workdir, options, BEST)


def _readable(params: Any, meta: dict[str, Any]) -> ocp.args.Composite:
    return ocp.args.Composite(
        params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(meta | integrity.MARK)
    )


def newest_intact(
    manager: ocp.CheckpointManager, items: Sequence[str]
) -> tuple[int | None, dict[int, str]]:
    """The newest step whose checksums agree, and the newer ones that were passed over, with why.

    The main process reads; the others take its word. Steps are as `manager` last listed them.

    Raises:
      UserError: the storage cannot be read, or no step of several is intact.
    """
    damaged: dict[int, str] = {}

    def find() -> int:
        for candidate in sorted(manager.all_steps(), reverse=True):
            try:
                integrity.check(manager.directory / str(candidate), items)
            except integrity.Damaged as error:
                damaged[candidate] = str(error)
                continue
            return candidate
        return _NONE_INTACT if damaged else _NONE

    with storage_faults(f"{manager.directory} cannot be read"):
        step = _said_by_main(find)
    if step == _NONE:
        return None, damaged
    if step == _NONE_INTACT:
        reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
        raise UserError(
            f"{manager.directory} holds no intact checkpoint ({reasons or 'see process 0'}); "
            "restore one from a copy, or name another directory"
        )
    for skipped, reason in damaged.items():
        print(
            f"{manager.directory}/{skipped} is damaged and passed over for {step}: {reason}",
            file=sys.stderr,
        )
    return step, damaged


_NONE, _NONE_INTACT, _FAILED = -1, -2, -3


def _said_by_main(find: Callable[[], int]) -> int:
    """What the main process finds, on every process: they may see another state of storage.

    Raises:
      What `find` raised in the main process, and there that it did in the others: all go on or
      none does, as they will meet again.
    """
    if jax.process_count() == 1:
        return find()
    found, fault = _FAILED, None
    if jax.process_index() == 0:
        try:
            found = find()
        except Exception as error:
            fault = error
    found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
    if found == _FAILED:
        raise fault or OSError("process 0 has met a fault; it says which")
    return found


def set_aside_damaged(
    manager: ocp.CheckpointManager, workdir: str, items: Sequence[str]
) -> int | None:
    """Moves damaged checkpoints that are newer than the newest intact one to a sibling directory.

    There they are out of the way of the run, which will write these steps again, and of its
    deletion of old checkpoints. Where none is intact nothing is moved, and a UserError says so.

    Returns:
      The newest intact step, the same on every process; None: there is no checkpoint.
    """
    step, damaged = newest_intact(manager, items)
    aside = manager.directory.parent / f"{manager.directory.name}-damaged"
    with storage_faults(f"{workdir}: cannot move a damaged checkpoint aside"):
        for skipped in damaged:
            aside.mkdir(parents=True, exist_ok=True)
            names = (f"{skipped}" + (f".{n}" if n else "") for n in itertools.count())
            place = next(aside / name for name in names if not (aside / name).exists())
            (manager.directory / str(skipped)).rename(place)
            print(f"it is kept as {place}", file=sys.stderr)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("set_aside_damaged")
    manager.reload()
    return step


def has_best(workdir: str) -> bool:
    """Whether the run has a best checkpoint."""
    directory = epath.Path(workdir) / DIRECTORIES[BEST]

    def is_there() -> bool:  # by one process: no manager, which all open together
        return directory.exists() and any(part.name.isdigit() for part in directory.iterdir())

    with storage_faults(f"{directory} cannot be read"):
        return bool(_said_by_main(is_there))


def read_meta(workdir: str, *, which: str = NEWEST) -> tuple[int, dict[str, Any]]:
    """(step, meta) of the newest checkpoint of a run, or of its best.

    Raises:
      UserError: when there is none.
    """
    with _reader(workdir, which) as manager:
        step = _newest(manager)
        with storage_faults(f"{manager.directory}/{step} cannot be read"):
            restored = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        return step, restored.meta


def refuse_converted(manager: ocp.CheckpointManager, workdir: str) -> None:
    """Raises UserError where `workdir` holds converted weights: no run goes on from those."""
    if manager.latest_step() == CONVERTED:
        raise UserError(
            f"{workdir} holds converted weights, not a run to go on with: train in another "
            "--workdir, with --config.checkpoint.init_from naming this one"
        )


def read_resumed(workdir: str) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
    """(step, meta, data) of the checkpoint that a run goes on from; None where it has none.

    That is the newest of which all items are intact; nothing is moved or restored.

    Raises:
      UserError: none is intact, or what is there was converted.
    """
    with _reader(workdir, NEWEST) as manager:
        refuse_converted(manager, workdir)
        step, _ = newest_intact(manager, ITEMS)
        if step is None:
            return None
        wanted = ocp.args.Composite(meta=ocp.args.JsonRestore(), data=ocp.args.JsonRestore())
        with storage_faults(f"{manager.directory}/{step} cannot be read"):
            restored = manager.restore(step, args=wanted)
        return step, restored.meta, restored.data


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
        directory = manager.directory / str(_newest(manager) if step is None else step)
        if step is not None and jax.process_index() == 0:
            _check_named(directory)
    path = directory / "params"
    item: Any = abstract
    for name in reversed(select):
        item = {name: item}
    with storage_faults(f"{path} cannot be read"), _params_reader() as reader:
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
      step: of the checkpoint; the newest, where none is asked for.
    """

    def __init__(self, workdir: str, *, step: int | None = None):
        with _reader(workdir) as manager:
            self.step = _newest(manager) if step is None else step
            directory = manager.directory / str(self.step)
        if step is not None:
            _check_named(directory)
        self._path = directory / "params"
        self._workdir = workdir
        with storage_faults(f"{self._path} cannot be read"), _params_reader() as reader:
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
        with storage_faults(f"{self._path} cannot be read"), _params_reader() as reader:
            (leaf,) = jax.tree.leaves(reader.restore(self._path, args=args))
        return leaf


def module_names(workdir: str, *, step: int, which: str = NEWEST) -> tuple[str, ...]:
    """Top-level modules of a checkpoint of a run, or of its best.

    Raises:
      UserError: when there is no checkpoint.
    """
    with _reader(workdir, which) as manager:
        path = manager.directory / str(step) / "params"
    with storage_faults(f"{path} cannot be read"), _params_reader() as reader:
        return tuple(reader.metadata(path).item_metadata.tree)


def _reader(workdir: str, which: str = NEWEST) -> ocp.CheckpointManager:
    directory = DIRECTORIES[which]
    if not (epath.Path(workdir) / directory).exists():
        if which == BEST:
            raise UserError(
                f"{workdir}: no best checkpoint (it has no {directory}/ directory): training keeps "
                "one where config.evaluation.every is set"
            )
        raise UserError(f"{workdir}: no such run (it has no {directory}/ directory)")
    return open_manager(workdir, ocp.CheckpointManagerOptions(read_only=True), which)


def _params_reader() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


def _newest(manager: ocp.CheckpointManager) -> int:
    step, _ = newest_intact(manager, READ)
    if step is None:
        raise UserError(f"{manager.directory}: no complete checkpoint there")
    return step


def _check_named(directory: epath.Path) -> None:
    try:
        with storage_faults(f"{directory} cannot be read"):
            integrity.check(directory, READ)
    except integrity.Damaged as error:
        raise UserError(f"{directory} is damaged: {error}") from error


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
