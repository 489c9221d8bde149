"""The checkpoints of a run while it trains: when they are due, written, tried again, restored."""

import contextlib
import logging
import os
import sys
import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from instap_jax.errors import AgreedFault, Stopped, UserError
from instap_jax.train import integrity
from instap_jax.train.checkpoint import (
    DIRECTORY,
    ITEMS,
    open_manager,
    refuse_converted,
    set_aside_damaged,
    storage_faults,
)
from instap_jax.train.state import TrainState


class Checkpointer:
    """Writes checkpoints in the background and restores them onto any mesh.

    A checkpoint that cannot be written leaves those before it as they are. It is an error, or,
    with `retries`, a line on the screen, and the checkpoint of a later step takes its place: the
    first as soon as `retry_seconds` have passed, each further one after twice the time.

    Args:
      workdir: local path or object-store URL of the run.
      every: steps between checkpoints.
      keep: how many of the newest are kept.
      retries: failures in a row that are borne. Several processes bear none: they may not learn
        of a failure at the same step, and would not save the same one; whoever starts them again
        makes them go on from the last checkpoint.

    A context in which checkpoints are written. It ends when all are, or, after a fault of one
    process of several, at once.

    Attributes:
      resumed: the step that `restore` gives, the same in every process; None: nothing is there.
    """

    def __init__(
        self, workdir: str, *, every: int, keep: int, retries: int = 0, retry_seconds: float = 1.0
    ):
        _silence_orbax()
        self._workdir, self._every = workdir, every
        self._retries = retries if jax.process_count() == 1 else 0
        self._retry_seconds = retry_seconds
        self._failures, self._again_at = 0, float("inf")
        self._in_progress: int | None = None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        with storage_faults(f"{workdir}: cannot open its checkpoints"):
            self._manager = open_manager(workdir, options)
        refuse_converted(self._manager, workdir)
        self.resumed = set_aside_damaged(self._manager, workdir, ITEMS)
        self._place = _identity(self._manager.directory)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind, *exc) -> None:
        together = kind is None or issubclass(kind, (Stopped, AgreedFault))
        if not together and jax.process_count() > 1:
            return  # the others may never come to where this one would wait for them
        # What ended the run says why it did.
        with contextlib.suppress(UserError) if kind else contextlib.nullcontext():
            self.close()

    def latest_step(self) -> int | None:
        """Of the newest checkpoint, one being written included."""
        return self._manager.latest_step()

    def due(self, step: int) -> bool:
        """Whether a checkpoint of this step is wanted: on schedule, or in place of a failed one."""
        return step % self._every == 0 or time.monotonic() >= self._again_at

    def save(
        self,
        state: TrainState,
        step: int,
        *,
        data: dict[str, Any],
        meta: dict[str, Any],
        wait: bool = False,
    ) -> None:
        """Saves this step unless that has been done, in the background or, with `wait`, now.

        Raises:
          UserError: storage failed, now or since the last call, and no retry is left.
        """
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave({"opt_state": state.opt_state, "step": state.step}),
            data=ocp.args.JsonSave(data),
            meta=ocp.args.JsonSave(meta | integrity.MARK),
        )
        while True:
            self._settle()  # what is still being written
            if self.latest_step() == step:
                return
            try:
                with storage_faults("cannot save"):
                    self._check_place()
                    self._manager.save(step, args=args, force=True)
                self._in_progress = step
            except UserError as error:
                self._failed(step, error)
            if wait:
                self._settle()
            if not wait or self.latest_step() == step:
                return
            time.sleep(max(0.0, self._again_at - time.monotonic()))

    def check(self) -> None:
        """Raises what a save in the background met, as soon as that is known; never waits."""
        if self._in_progress is None:
            return
        if jax.process_count() > 1 and self._manager.failure:
            with storage_faults(f"{self._workdir}: cannot save step {self._in_progress}"):
                raise self._manager.failure
        if not self._manager.is_saving_in_progress():
            self._settle()

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restores the checkpoint of step `resumed` as `abstract` describes it, and `data` as it
        was saved.

        Raises:
          UserError: when it does not fit, or storage fails.
        """
        step = self.resumed
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            optimizer=ocp.args.StandardRestore(
                {"opt_state": abstract.opt_state, "step": abstract.step}
            ),
            data=ocp.args.JsonRestore(),
        )
        with storage_faults(f"{self._workdir}/{DIRECTORY}/{step} cannot be restored"):
            restored = self._manager.restore(step, args=args)
        state = TrainState(
            step=restored.optimizer["step"],
            params=restored.params,
            opt_state=restored.optimizer["opt_state"],
            refused=jax.device_put(
                np.int32(restored.data.get("guard", {}).get("refused", 0)),
                abstract.refused.sharding,
            ),
        )
        return state, restored.data

    def wait(self) -> None:
        """Waits for a save in progress to be complete."""
        self._settle()

    def close(self) -> None:
        self._settle()
        with storage_faults(f"{self._workdir}: cannot close its checkpoints"):
            self._manager.close()

    def _check_place(self) -> None:
        """An unmounted file system leaves an empty directory, which would be written to."""
        directory, last = self._manager.directory, self._manager.latest_step()
        same = _identity(directory) == self._place
        if not same or not (last is None or (directory / str(last)).exists()):
            raise OSError(f"{directory} is not the directory it was: unmounted?")

    def _settle(self) -> None:
        """Waits for a save in progress, and takes note of how it ended."""
        if self._in_progress is None:
            return
        step, self._in_progress = self._in_progress, None
        try:
            with storage_faults("cannot save"):
                self._manager.finish()
        except UserError as error:
            self._failed(step, error)
        else:
            self._failures, self._again_at = 0, float("inf")

    def _failed(self, step: int, error: UserError) -> None:
        self._failures += 1
        if jax.process_count() == 1:  # else another process may still be writing there
            with contextlib.suppress(OSError):  # what was written may be what fills the disk
                for part in self._manager.directory.glob(f"{step}.*"):
                    part.rmtree()
        with storage_faults(f"{self._workdir}: cannot save step {step}, nor read what is there"):
            self._manager.reload()
        last = self._manager.latest_step()
        line = (
            f"{self._workdir}: {error}: step {step}; the last checkpoint is "
            f"{'from step ' + str(last) if last is not None else 'none'}"
        )
        if self._failures > self._retries:
            raise type(error)(line) from error
        pause = self._retry_seconds * 2 ** (self._failures - 1)
        self._again_at = time.monotonic() + pause
        print(f"{line}; trying again in {pause:g} s", file=sys.stderr)


def _identity(directory: epath.Path) -> int | None:
    """Of the file system of a local directory; None for an object store's.

    Its number there would not do: a bucket's may be another each time the system has forgotten it.
    """
    return None if "://" in str(directory) else os.stat(directory).st_dev


def _silence_orbax() -> None:
    """orbax logs every failure with its traceback, which we raise as one line."""
    logger = logging.getLogger("absl")
    if _is_ours not in logger.filters:
        logger.addFilter(_is_ours)


def _is_ours(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname
