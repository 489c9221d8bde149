"""What a report reads from a run's directory, and the figures it draws from its log."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instap_jax.errors import UserError
from instap_jax.evaluation.gallery import CASES, Case, read_cases
from instap_jax.evaluation.report_numbers import DASH, known, number
from instap_jax.evaluation.report_shapes import check_fields
from instap_jax.evaluation.results import DIRECTORY, Result, config_hash, read_results
from instap_jax.train.metrics import read_metrics

CONFIG, METRICS = "config.json", "metrics.jsonl"
_CONFIG_FIELDS = {
    "changed": "an object of pairs",
    "file": "text or null",
    "overrides": "a list of texts",
}
_CASE_FIELDS = {
    **dict.fromkeys(("suite", "group", "key"), "text"),
    **dict.fromkeys(("texts", "pictures"), "an object of texts"),
    "numbers": "an object of numbers",
}
_LARGEST_STEP = 2**53  # beyond it steps are not told apart on an axis


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run as found on disk. What is missing is empty here and listed in `missing`.

    Attributes:
      name: shortest trailing path that tells the runs of the report apart.
      slot: position in the report; decides the colour.
      config: resolved; {} when there is no config.json.
      changed: {dotted key: (default, value)}.
      file, overrides: where the configuration came from.
      lines: of metrics.jsonl, by step.
      results: by task. cases: pictures of single cases, by task.
      missing: sentences for the reader.
    """

    name: str
    slot: int
    workdir: Path
    config: Mapping[str, Any]
    changed: Mapping[str, Sequence[Any]]
    file: str
    overrides: Sequence[str]
    lines: Sequence[Mapping[str, Any]]
    results: Mapping[str, Result]
    cases: Mapping[str, Sequence[Case]]
    missing: Sequence[str]

    @property
    def stage(self) -> str:
        return str(self.config.get("stage", "unknown"))


def load_runs(workdirs: Sequence[Path | str]) -> list[Run]:
    """Reads the runs to compare.

    Raises:
      UserError: no run named, one named twice, a directory that holds no run, a broken file.
    """
    if not workdirs:
        raise UserError("no run to report on: name at least one with --workdirs=DIR")
    if not all(str(workdir).strip() for workdir in workdirs):
        raise UserError("--workdirs has an empty name before or after a comma: name a directory")
    paths = [Path(workdir) for workdir in workdirs]
    resolved = [_resolve(path) for path in paths]
    for path, place in zip(paths, resolved):
        if resolved.count(place) > 1:
            raise UserError(f"{path} is named twice in --workdirs")
    return [_load(path, name, i) for i, (path, name) in enumerate(zip(paths, _names(resolved)))]


def series(run: Run, *names: str) -> tuple[np.ndarray, ...]:
    """Steps int64 [n] and, for each name, values float64 [n]: of the lines that know them all."""
    found = [
        (line["step"], *(line[name] for name in names))
        for line in run.lines
        if all(known(line.get(name)) for name in names)
    ]
    steps, *values = zip(*found) if found else [()] * (1 + len(names))
    return np.array(steps, np.int64), *(np.array(one, np.float64) for one in values)


def scalar_names(runs: Sequence[Run]) -> list[str]:
    """Names of all logged scalars, in the order of their first appearance."""
    names = {name: None for run in runs for line in run.lines for name in line}
    return [name for name in names if any(len(series(run, name)[0]) for run in runs)]


def facts(run: Run) -> dict[str, str]:
    """What the run is and how it ran, as label -> text, for the table at the top of the report."""
    changed = f"{len(run.changed)} changed from the defaults" if run.config else ""
    data = run.config.get("data", {})
    return {
        "stage": run.stage,
        "configuration": run.file or DASH,
        "settings": changed or DASH,
        "config hash": config_hash(run.config) if run.config else DASH,
        "steps": _steps(run),
        "samples per step": str(data.get("batch_size", DASH)),
        **_speed(run),
        **_losses(run),
        "unreadable samples": _faults(run),
    }


def _resolve(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead to themselves
        raise UserError(f"{path} cannot be read: {error}") from error


def _load(path: Path, name: str, slot: int) -> Run:
    try:
        is_directory = path.is_dir()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not is_directory:
        raise UserError(f"{path}: no such directory")
    results = read_results(path)
    has_config, has_log = (path / CONFIG).is_file(), (path / METRICS).is_file()
    if not (has_config or has_log or results):
        raise UserError(
            f"{path} holds no run: none of {CONFIG}, {METRICS}, {DIRECTORY}/*.json is there; "
            "name the --workdir of an `instap train`"
        )
    config = _read_config(path / CONFIG) if has_config else {}
    lines, dropped = _read_lines(path) if has_log else ([], 0)
    missing = []
    if not has_config:
        missing.append(f"{CONFIG} is missing: its configuration is unknown.")
    if not lines:
        missing.append(f"{METRICS} is missing or empty: there are no training curves.")
    if dropped:
        missing.append(f"{METRICS}: {dropped} unreadable lines were left out.")
    if not results:
        missing.append(f"{DIRECTORY}/ holds no results: instap evaluate has not been run.")
    return Run(
        name=name,
        slot=slot,
        workdir=path,
        config=config.get("config", {}),
        changed=config.get("changed", {}),
        file=config.get("file") or "",
        overrides=config.get("overrides", []),
        lines=lines,
        results=results,
        cases={task: _read_cases(path, task) for task in results},
        missing=missing,
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("config"), dict):
        raise UserError(f"{path} is not the config.json of a run: it has no object 'config'")
    try:
        check_fields(config, _CONFIG_FIELDS)
        check_fields(config["config"], {"stage": "text", "data": "an object"}, within="'config'")
    except ValueError as error:
        raise UserError(f"{path} is not the config.json of a run: {error}") from error
    return config


def _read_cases(path: Path, task: str) -> list[Case]:
    cases = read_cases(path, task)
    try:
        for case in cases:
            check_fields(dataclasses.asdict(case), _CASE_FIELDS, within="a case")
            if not case.pictures:
                raise ValueError("a case has no picture")
    except ValueError as error:
        place = path / DIRECTORY / task / CASES
        raise UserError(f"{place} cannot be read ({error}); run `instap evaluate` again") from error
    return cases


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """One line for each step, sorted, the last value of what is there twice; and how many could
    not be read."""
    try:
        total = sum(1 for line in (path / METRICS).open(encoding="utf-8") if line.strip())
        lines = [line for line in read_metrics(path) if _is_step(line["step"])]
    except (OSError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path / METRICS} is not a metrics file ({reason})") from error
    if total and not lines:
        raise UserError(f"{path / METRICS} is not a metrics file (none of its lines has a step)")
    by_step: dict[int, dict[str, Any]] = {}
    for line in lines:  # validation has a line beside the step's own
        by_step.setdefault(line["step"], {}).update(line)
    return [by_step[step] for step in sorted(by_step)], total - len(lines)


def _names(paths: Sequence[Path]) -> list[str]:
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _is_step(value: int) -> bool:
    return not isinstance(value, bool) and 0 <= value <= _LARGEST_STEP


def _steps(run: Run) -> str:
    wanted = run.config.get("steps")
    if not run.lines:
        return DASH
    last = f"{run.lines[-1]['step']:,}"
    return f"{last} of {wanted:,}" if isinstance(wanted, int) else last


def _speed(run: Run) -> dict[str, str]:
    steps, seconds = series(run, "step_seconds")
    if not len(steps):
        return dict.fromkeys(("training time", "samples/s", "step time", "data wait"), DASH)
    once = series(run, "start_seconds")[1].sum()  # of every start, apart from its steps
    rate = _steady(series(run, "examples_per_second")[1])
    mfu = _steady(series(run, "mfu")[1])
    return {
        "training time": duration(float((seconds * np.diff(steps, prepend=0)).sum() + once)),
        "samples/s": f"{number(np.median(rate))} (median)" if len(rate) else DASH,
        "step time": f"{number(1000 * np.median(_steady(seconds)), '.0f')} ms (median)",
        "data wait": _data_wait(run),
        **({"model FLOPs utilisation": f"{number(100 * np.median(mfu))} %"} if len(mfu) else {}),
    }


def _steady(values: np.ndarray) -> np.ndarray:
    """Without the first line: in logs of before it holds the compilation, in none many steps."""
    return values[1:] if len(values) > 1 else values


def _data_wait(run: Run) -> str:
    steps, waited, seconds = series(run, "data_wait_seconds", "step_seconds")
    if not len(steps):
        return DASH
    covered = _steady(np.diff(steps, prepend=0))
    spent = max((_steady(seconds) * covered).sum(), 1e-12)
    return f"{number(100 * (_steady(waited) * covered).sum() / spent)} % of step time"


def duration(seconds: float) -> str:
    """1234.5 -> '20 min 35 s'; a dash where it is not known."""
    if not known(seconds):
        return DASH
    whole = round(seconds)
    if whole < 90:
        return f"{seconds:.1f} s"
    if whole < 5400:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _losses(run: Run) -> dict[str, str]:
    """Of all steps, and of each kind of batch where the log tells them apart."""
    names = {"loss": "loss", "loss_video": "loss of videos", "loss_image": "loss of images"}
    return {
        f"{label}, first → last": _loss(run, name)
        for name, label in names.items()
        if name == "loss" or len(series(run, name)[0])
    }


def _loss(run: Run, name: str) -> str:
    values = series(run, name)[1]
    if not len(values):
        return DASH
    tail = values[-max(1, len(values) // 20) :]
    return f"{values[0]:.4g} → {number(tail.mean(), '.4g')} (mean of the last {len(tail)} logged)"


def _faults(run: Run) -> str:
    """The last counts by reason: they are totals of the run so far."""
    if not run.lines:
        return DASH
    last = run.lines[-1]
    counts = {
        name.removeprefix("faults/"): int(last[name])
        for name in last
        if name.startswith("faults/") and known(last[name]) and last[name]
    }
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items()) or "none"
