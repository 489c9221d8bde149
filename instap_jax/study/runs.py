"""The runs of a study: one (row, seed) each, its configuration, its commands, what is done of it.

OUT/ROW/seedN/                workdir of `instap train`; ROW@STEPS with steps of its own
OUT/ROW/seedN/evaluated.json  arguments and step of the evaluation that is there, and its digests
OUT/calibration/ROW/          the short run that measured a row's seconds a step
OUT/logs/                     what the commands printed
"""

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
from instap_jax.train.metrics import read_metrics

# Steps of a calibration. The first of each kind compile, and are left out.
CALIBRATION_STEPS = 40


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
    """The short run that measures a row's seconds a step."""
    stop = min(CALIBRATION_STEPS, loaded.config.steps)
    changes = row.changes() | {"stop_at": stop, "log.every": 1, "log.tensorboard": False}
    name = f"calibration/{row.name}"
    return _plan(loaded, row, changes, name=name, workdir=out / name, evaluation=None)


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
    """Seconds a step of a calibration: the median of each kind of step, weighted as they alternate.

    Raises:
      UserError: its log is missing or too short to tell.
    """
    by_kind: dict[str, list[float]] = {}
    try:
        lines = read_metrics(run.workdir)
    except OSError as error:
        raise UserError(f"{run.workdir}: no metrics.jsonl: {error.strerror}") from error
    for line in filter(_is_step, lines):
        kind = next((key for key in line if key.startswith("kind_")), "kind")
        by_kind.setdefault(kind, []).append(line["step_seconds"])
    # Each kind's first step compiles; the one after it may still wait for the first.
    kept = {kind: seconds[2:] for kind, seconds in by_kind.items()}
    if not kept or not all(kept.values()):
        raise UserError(f"{run.workdir}: too few steps to tell the time of a step from")
    total = sum(map(len, by_kind.values()))
    return sum(
        len(by_kind[kind]) / total * statistics.median(seconds) for kind, seconds in kept.items()
    )


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
