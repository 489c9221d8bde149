"""The runs of a study: one (row, seed) each, its configuration, its commands, what is done of it.

OUT/ROW/seedN/                workdir of `instap train`; ROW@STEPS with steps of its own
OUT/ROW/seedN/evaluated.json  arguments and step of the evaluation that is there, and its digests
OUT/calibration/ROW/          the short run that measured a row's seconds a step
OUT/logs/                     what the commands printed
"""

import collections
import dataclasses
import hashlib
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from instap_jax import config_check
from instap_jax.config_check import LoadedConfig
from instap_jax.errors import UserError
from instap_jax.evaluation.results import DIRECTORY, read_result
from instap_jax.study.tables import Row
from instap_jax.train.kinds import kind_of_step
from instap_jax.train.metrics import read_metrics
from instap_jax.types import Kind

CALIBRATION_STEPS = 40
# Of each kind of step in a calibration: the first compiles, the next may still wait for it.
_UNTIMED = 2
_LEAST_TIMED = 3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """How runs are measured: flags of `instap evaluate`, paths absolute."""

    task: str
    videos: str
    images: str
    probe_videos: str
    probe_images: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training and what it is measured on.

    Attributes:
      name: as in messages, 'ROW/seedN'.
      workdir: of `instap train`.
      config: resolved and checked; what the workdir must hold.
      file: of --config. overrides: dotted key -> value; they make `config` out of `file`.
      evaluation: None for a calibration, which is not evaluated.
    """

    name: str
    row: str
    seed: int
    workdir: Path
    config: ConfigDict
    file: str
    overrides: dict[str, Any]
    evaluation: Evaluation | None

    @property
    def last(self) -> int:
        """The step at which training is done."""
        return min(self.config.steps, self.config.stop_at or self.config.steps)

    def train_command(self) -> list[str]:
        flags = [f"--config.{key}={value}" for key, value in self.overrides.items()]
        return _instap("train", f"--config={self.file}", *flags, f"--workdir={self.workdir}")

    def evaluate_command(self) -> list[str]:
        flags = [f"--{key}={value}" for key, value in dataclasses.asdict(self.evaluation).items()]
        return _instap("evaluate", f"--workdir={self.workdir}", *flags)

    def trained(self) -> bool:
        """Whether the checkpoint of the last step is there."""
        return (self.workdir / "checkpoints" / str(self.last)).is_dir()

    def step(self) -> int:
        """The last step known of the training, from its log; 0 before the first."""
        try:
            lines = read_metrics(self.workdir)
        except OSError:
            return 0
        return lines[-1]["step"] if lines else 0

    def evaluated(self) -> bool:
        """Whether these weights have been measured in this way, and the results are still those."""
        if self.evaluation is None:
            return True
        try:
            marker = dict(json.loads(self._marker.read_text()))
            digests = self._digests()
            self._check_steps()
        except (OSError, ValueError, TypeError, UserError):
            return False
        # A marker older than the digests has none: its results are taken as they are.
        return marker.pop("sha256", digests) == digests and marker == self._evaluated()

    def mark_evaluated(self) -> None:
        """Notes that the results that are there are those of `evaluate_command`.

        Raises:
          UserError: there are none, or they are of another step than the last.
        """
        self._check_steps()
        aside = self._marker.with_suffix(".partial")
        aside.write_text(json.dumps(self._evaluated() | {"sha256": self._digests()}) + "\n")
        os.replace(aside, self._marker)

    def done(self) -> bool:
        return self.trained() and self.evaluated()

    @property
    def _marker(self) -> Path:
        return self.workdir / "evaluated.json"

    def _evaluated(self) -> dict[str, Any]:
        return {"step": self.last, **dataclasses.asdict(self.evaluation)}

    def _results(self) -> dict[str, Path]:
        """Task -> its results file."""
        tasks = self.evaluation.task.split(",")
        return {task: self.workdir / DIRECTORY / f"{task}.json" for task in tasks}

    def _digests(self) -> dict[str, str]:
        """Task -> SHA-256 of its results file: `instap evaluate` by hand replaces the file."""
        files = self._results().items()
        return {task: hashlib.sha256(path.read_bytes()).hexdigest() for task, path in files}

    def _check_steps(self) -> None:
        for path in self._results().values():
            for measurement in read_result(path).measurements:
                step = measurement.protocol.step
                if step != self.last:
                    raise UserError(
                        f"{path} measures step {step}, and the run ends at step {self.last}; "
                        "use another --out"
                    )


def plan_run(
    loaded: LoadedConfig, row: Row, seed: int, out: Path, *, steps: int, evaluation: Evaluation
) -> Run:
    """The run of a row with a seed.

    Raises:
      UserError: the row does not fit the configuration.
    """
    folder = row.name if steps == loaded.config.steps else f"{row.name}@{steps}"
    changes = row.changes() | {"seed": seed, "steps": steps}
    name = f"{folder}/seed{seed}"
    return _plan(loaded, row, changes, name=name, workdir=out / name, evaluation=evaluation)


def plan_calibration(loaded: LoadedConfig, row: Row, out: Path) -> Run:
    """The short run that measures a row's seconds a step.

    Raises:
      UserError: the row does not fit, or some kind of step comes too rarely to be timed.
    """
    stop = min(CALIBRATION_STEPS, loaded.config.steps)
    changes = row.changes() | {"stop_at": stop, "log.every": 1, "log.tensorboard": False}
    name = f"calibration/{row.name}"
    run = _plan(loaded, row, changes, name=name, workdir=out / name, evaluation=None)
    counts = collections.Counter(kind_of_step(run.config, step) for step in range(stop))
    for kind in _shares(run.config):
        if counts[kind] < _UNTIMED + _LEAST_TIMED:
            raise UserError(
                f"--equal=time: {stop} steps with config.data.image_fraction="
                f"{run.config.data.image_fraction} hold {counts[kind]} of {kind} batches, and "
                f"timing them takes {_UNTIMED + _LEAST_TIMED}; use --equal=steps"
            )
    return run


def _shares(config: ConfigDict) -> dict[Kind, float]:
    """Kind of batch -> its share of the steps; of those that come at all."""
    images = config.data.image_fraction if config.data.images else 0.0
    images = images if config.data.videos else 1.0
    shares = {Kind.VIDEO: 1 - images, Kind.IMAGE: images}
    return {kind: share for kind, share in shares.items() if share}


def _plan(loaded: LoadedConfig, row: Row, changes, *, name, workdir: Path, evaluation) -> Run:
    config = loaded.config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    try:
        config_check.check(config)
    except UserError as error:
        raise UserError(f"row {row.name}: {error}") from error
    return Run(
        name=name,
        row=row.name,
        seed=config.seed,
        workdir=workdir,
        config=config,
        file=loaded.file,
        # The row's own changes after the user's: an override is of every run's common ground.
        overrides=dict(loaded.overrides) | changes,
        evaluation=evaluation,
    )


def calibrated_seconds(run: Run) -> float:
    """Seconds a step of a calibration: the median of each kind of step, weighted by its share.

    Raises:
      UserError: its log is missing or too short to tell.
    """
    try:
        lines = [line for line in read_metrics(run.workdir) if _is_step(line)]
    except OSError as error:
        raise UserError(f"{run.workdir}: no metrics.jsonl: {error.strerror}") from error
    total = 0.0
    for kind, share in _shares(run.config).items():
        seconds = [line["step_seconds"] for line in lines if f"kind_{kind}" in line][_UNTIMED:]
        if not seconds:
            raise UserError(f"{run.workdir}: too few steps to tell the time of a step from")
        total += share * statistics.median(seconds)
    return total


def step_seconds(run: Run) -> float | None:
    """Median of the logged seconds a step; None where fewer than two readings are."""
    try:
        seconds = [line["step_seconds"] for line in read_metrics(run.workdir) if _is_step(line)]
    except OSError:
        return None
    return statistics.median(seconds[1:]) if len(seconds) > 1 else None


def _is_step(line: dict[str, Any]) -> bool:
    """Whether a line of metrics is a training step's: validation has lines of its own."""
    return "step_seconds" in line


def _instap(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "instap_jax", *arguments]
