"""A study: a named table, trained and evaluated over seeds, resumable, and summed up."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from instap_jax import config_check
from instap_jax.config_check import LoadedConfig
from instap_jax.errors import UserError
from instap_jax.study.plot import plot
from instap_jax.study.runner import Runner, locked
from instap_jax.study.runs import (
    CALIBRATION_STEPS,
    Evaluation,
    Run,
    calibrated_seconds,
    plan_calibration,
    plan_run,
)
from instap_jax.study.summary import Summary, summarise, write_summary
from instap_jax.study.tables import Row, Table, find_table
from instap_jax.train.stop import StopRequest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What was asked for.

    Attributes:
      loaded: the common ground of all rows; its seed is not used.
      equal: 'steps', every row trains config.steps; 'time', as long as the unchanged
        configuration takes for them.
    """

    loaded: LoadedConfig
    table: str
    seeds: tuple[int, ...]
    evaluation: Evaluation
    out: Path
    equal: str
    metrics: tuple[str, ...]
    jobs: int

    @property
    def stem(self) -> Path:
        """Path of the table's files, without their endings."""
        return self.out / (self.table + ("-time" if self.equal == "time" else ""))


def run_study(study: Study, stop: StopRequest) -> Summary:
    """Trains and evaluates what is not done yet; writes STEM.md, .json and .png as runs finish.

    Raises:
      UserError: a row that does not fit, a directory of other settings, or runs that failed
        (after the others are done).
      KeyboardInterrupt: `stop` asked.
    """
    table = find_table(study.table)
    _plan(study, table, dict.fromkeys((row.name for row in table.rows), study.loaded.config.steps))
    with locked(study.out) as lock:
        runner = Runner(jobs=study.jobs, logs=study.out / "logs", lock=lock, stop=stop)
        steps, notes = _steps(study, table, runner)
        runs = _plan(study, table, steps)
        _write(study, table, runs, notes)
        failed = runner.execute(
            runs, f"ablate {study.table}", finished=lambda: _write(study, table, runs, notes)
        )
        summary = _write(study, table, runs, notes)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; the same command "
            "tries them again"
        )
    return summary


def _plan(study: Study, table: Table, steps: dict[str, int]) -> list[Run]:
    """Every run, seed by seed, so that a table that is interrupted has whole columns.

    Raises:
      UserError: a row does not fit, or its directory holds a run of other settings.
    """
    runs = [
        plan_run(
            study.loaded, row, seed, study.out, steps=steps[row.name], evaluation=study.evaluation
        )
        for seed in study.seeds
        for row in table.rows
    ]
    for run in runs:
        if not run.config.data.videos and not run.config.data.images:
            raise UserError("config.data.videos and config.data.images are both empty: no data")
        config_check.check_workdir(run.config, run.workdir)
    return runs


def _steps(study: Study, table: Table, runner: Runner) -> tuple[dict[str, int], list[str]]:
    """Steps of every row, and how they came about."""
    whole = study.loaded.config.steps
    if study.equal == "steps":
        return {row.name: whole for row in table.rows}, ["Equal steps."]
    if study.loaded.config.stop_at is not None:
        raise UserError("--equal=time decides how long a row trains: leave config.stop_at out")
    rows = {row.name: row for row in (Row(label="InstAP"), *table.rows)}
    runs = {name: plan_calibration(study.loaded, row, study.out) for name, row in rows.items()}
    for run in runs.values():
        config_check.check_workdir(run.config, run.workdir)
    # One at a time: every row is measured with the same neighbours, none.
    failed = {}
    for run in runs.values():
        failed |= runner.execute([run], "calibrate")
    if failed:
        raise UserError(f"cannot measure the time of a step: {next(iter(failed.values()))}")
    seconds = {name: calibrated_seconds(run) for name, run in runs.items()}
    reference = seconds[Row(label="InstAP").name]
    least = study.loaded.config.optimizer.warmup_steps + 1
    steps = {
        row.name: max(round(whole * reference / seconds[row.name]), least) for row in table.rows
    }
    measured = ", ".join(f"{row.name} {seconds[row.name]:.3f}" for row in table.rows)
    note = (
        f"Equal time: as long as {whole:,} steps of the unchanged configuration take. Seconds a "
        f"step, measured over {CALIBRATION_STEPS} steps alone on the cores of one job: {measured}; "
        f"the unchanged configuration {reference:.3f}."
    )
    return steps, [note]


def _write(study: Study, table: Table, runs: Sequence[Run], notes: list[str]) -> Summary:
    overrides = [f"{key}={value}" for key, value in study.loaded.overrides.items()]
    common = f"Configuration: {study.loaded.file}, {'; '.join(overrides) or 'no overrides'}."
    summary = summarise(
        table, runs, seeds=study.seeds, metrics=study.metrics, notes=[*notes, common]
    )
    write_summary(summary, study.stem)
    plot(summary, study.stem.with_suffix(".png"))
    return summary
