"""Where the numbers of a run go: `metrics.jsonl`, TensorBoard, optionally W&B, and the screen."""

import contextlib
import copy
import hashlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any, TextIO

from ml_collections import ConfigDict
from tensorboardX import SummaryWriter

from instap_jax.errors import UserError, cannot
from instap_jax.types import Kind

EVAL = "eval/"  # prefix of what a validation measures


class MetricWriter:
    """Appends scalars of a step to every destination of `config.log`.

    On resume the lines of steps that are about to be run again are taken out of `metrics.jsonl`,
    so that a step is there once.

    Args:
      workdir: of the run.
      config: the resolved configuration.
      resume_step: steps already done.
      unvalidated: the last of them is to be validated again, see `loop`.
    """

    def __init__(
        self, workdir: Path, config: ConfigDict, *, resume_step: int, unvalidated: bool = False
    ):
        path = workdir / "metrics.jsonl"
        if path.exists():
            _truncate(path, resume_step, unvalidated=unvalidated)
        try:
            self._file: TextIO = path.open("a")
        except OSError as error:
            raise cannot(f"{path}: cannot be written", error) from error
        self._board = None
        if config.log.tensorboard:
            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)
        self._wandb = _start_wandb(workdir, config)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Writes a line; what is not finite, of an update that was skipped, is left out.

        Raises:
          UserError: storage failed.
        """
        scalars = {name: value for name, value in scalars.items() if math.isfinite(value)}
        line = {"step": step, "time": round(time.time(), 3)} | scalars
        with self._storage():
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if self._board:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(scalars, step=step)

    def sync(self) -> None:
        """To the disk itself: before a checkpoint, so that no step of it lacks its line."""
        with self._storage():
            os.fsync(self._file.fileno())

    @contextlib.contextmanager
    def _storage(self):
        try:
            yield
        except OSError as error:
            raise cannot(f"{self._file.name}: cannot be written", error) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a line whose writing has already raised
            self._file.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


# How long things took: what a run and its repetition differ in.
TIMES = (
    "time", "examples_per_second", "step_seconds", "data_wait_seconds", "compute_seconds",
    "start_seconds", "mfu",
)  # fmt: skip
# Of a line's last step; everything else is a mean over its steps.
_OF_LAST_STEP = ("learning_rate", "param_norm")


class StepMeans:
    """Means of the metrics over the steps of a line, of all and of each kind of batch.

    Which kind a step takes is periodic in its number, and so is which step writes a line: metrics
    of that step alone could be of the same kind for ever.

    Args:
      split: whether there are two kinds, told apart as NAME_video and NAME_image.
      kept: of an earlier `state()`, amid a line; None at the start of one.
    """

    def __init__(self, *, split: bool, kept: dict[str, Any] | None):
        self._split = split
        self._steps: dict[str, int] = kept["steps"] if kept else {}
        # name -> kind -> [sum, how many]
        self._sums: dict[str, dict[str, list]] = kept["sums"] if kept else {}
        self._last: dict[str, float] = {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-able: a resumed run writes the uninterrupted one's line."""
        # A copy: the checkpoint is written while the next steps are added.
        return copy.deepcopy({"steps": self._steps, "sums": self._sums})

    def add(self, kind: Kind, scalars: dict[str, float]) -> None:
        """Adds a step; what is not finite, of an update that was skipped, is left out."""
        self._steps[str(kind)] = self._steps.get(str(kind), 0) + 1
        for name, value in scalars.items():
            if name in _OF_LAST_STEP:
                self._last[name] = value
            elif math.isfinite(value):
                total, count = self._sums.setdefault(name, {}).get(str(kind), (0.0, 0))
                self._sums[name][str(kind)] = [total + value, count + 1]

    def read(self) -> dict[str, float]:
        """The means since the last reading; `kind_KIND` is the share of its steps."""
        line = {}
        for name, by_kind in self._sums.items():
            totals, counts = zip(*by_kind.values())
            line[name] = sum(totals) / sum(counts)
            if self._split:
                line |= {f"{name}_{kind}": total / n for kind, (total, n) in by_kind.items()}
        steps = sum(self._steps.values())
        line |= {f"kind_{kind}": count / steps for kind, count in self._steps.items()}
        self._steps, self._sums = {}, {}
        return line | self._last


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; what a crash tore or storage damaged is left out."""
    lines = []
    for text in (workdir / "metrics.jsonl").read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def _truncate(path: Path, step: int, *, unvalidated: bool) -> None:
    def stays(line: dict) -> bool:
        again = unvalidated and line["step"] == step
        return line["step"] <= step and not (again and any(key.startswith(EVAL) for key in line))

    kept = [line for line in read_metrics(path.parent) if stays(line)]
    aside = path.with_suffix(".partial")
    try:
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(aside, path)
    except OSError as error:
        raise cannot(f"{path}: cannot be written", error) from error


def _start_wandb(workdir: Path, config: ConfigDict):
    if not config.log.wandb_project:
        return None
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "config.log.wandb_project is set but wandb is not installed; pip install -e '.[wandb]'"
        ) from error
    return wandb.init(
        project=config.log.wandb_project,
        dir=str(workdir),
        config=config.to_dict(),
        id=hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16],  # of every restart
        resume="allow",
    )
