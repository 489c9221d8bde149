"""What a report reads from a run's directory, and the figures it draws from its log."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instap_jax.errors import UserError
from instap_jax.evaluation.gallery import Case, read_cases
from instap_jax.evaluation.results import DIRECTORY, Result, config_hash, read_results
from instap_jax.train.metrics import read_metrics

CONFIG, METRICS = "config.json", "metrics.jsonl"


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
    paths = [Path(workdir) for workdir in workdirs]
    if not paths:
        raise UserError("no run to report on: name at least one with --workdirs=DIR")
    resolved = [path.resolve() for path in paths]
    for path, place in zip(paths, resolved):
        if resolved.count(place) > 1:
            raise UserError(f"{path} is named twice in --workdirs")
    return [_load(path, name, i) for i, (path, name) in enumerate(zip(paths, _names(resolved)))]


def series(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps int64 [n] and values float64 [n] of a logged scalar (only the lines that have it)."""
    pairs = [(line["step"], line[name]) for line in run.lines if _is_number(line.get(name))]
    steps, values = zip(*pairs) if pairs else ((), ())
    return np.array(steps, np.int64), np.array(values, np.float64)


def scalar_names(runs: Sequence[Run]) -> list[str]:
    """Names of all logged scalars, in the order of their first appearance."""
    names = {name: None for run in runs for line in run.lines for name in line}
    return [name for name in names if any(len(series(run, name)[0]) for run in runs)]


def facts(run: Run) -> dict[str, str]:
    """What the run is and how it ran, as label -> text, for the table at the top of the report."""
    changed = f"{len(run.changed)} changed from the defaults" if run.config else ""
    data = run.config.get("data") or {}
    return {
        "stage": run.stage,
        "configuration": run.file or "—",
        "settings": changed or "—",
        "config hash": config_hash(run.config) if run.config else "—",
        "steps": _steps(run),
        "samples per step": str(data.get("batch_size", "—")),
        **_speed(run),
        "loss, first → last": _loss(run),
        "unreadable samples": _faults(run),
    }


def _load(path: Path, name: str, slot: int) -> Run:
    if not path.is_dir():
        raise UserError(f"{path}: no such directory")
    results = read_results(path)
    known = [(path / CONFIG).is_file(), (path / METRICS).is_file(), bool(results)]
    if not any(known):
        raise UserError(
            f"{path} holds no run: none of {CONFIG}, {METRICS}, {DIRECTORY}/*.json is there; "
            "name the --workdir of an `instap train`"
        )
    config = _read_config(path / CONFIG) if known[0] else {}
    lines, dropped = _read_lines(path) if known[1] else ([], 0)
    missing = []
    if not known[0]:
        missing.append(f"{CONFIG} is missing: its configuration is unknown.")
    if not lines:
        missing.append(f"{METRICS} is missing or empty: there are no training curves.")
    if dropped:
        missing.append(f"{METRICS}: {dropped} unreadable lines at its end were left out.")
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
        cases={task: read_cases(path, task) for task in results},
        missing=missing,
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("config"), dict):
        raise UserError(f"{path} is not the config.json of a run: it has no object 'config'")
    return config


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Lines sorted by step, the last one of a repeated step; and how many could not be read."""
    try:
        total = sum(1 for line in (path / METRICS).open(encoding="utf-8") if line.strip())
        lines = read_metrics(path)
    except (OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path / METRICS} is not a metrics file ({reason})") from error
    if total and not lines:
        raise UserError(f"{path / METRICS} is not a metrics file (none of its lines has a step)")
    by_step = {line["step"]: line for line in lines}
    return [by_step[step] for step in sorted(by_step)], total - len(lines)


def _names(paths: Sequence[Path]) -> list[str]:
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _steps(run: Run) -> str:
    wanted = run.config.get("steps")
    if not run.lines:
        return "—"
    last = f"{run.lines[-1]['step']:,}"
    return f"{last} of {wanted:,}" if isinstance(wanted, int) else last


def _speed(run: Run) -> dict[str, str]:
    steps, seconds = series(run, "step_seconds")
    if not len(steps):
        return dict.fromkeys(("training time", "samples/s", "step time", "data wait"), "—")
    covered = np.diff(steps, prepend=0)
    # The first line holds the compilation: in the total, but not in the rates.
    steady = slice(1, None) if len(steps) > 1 else slice(None)
    waited = series(run, "data_wait_seconds")[1]
    rate = series(run, "examples_per_second")[1]
    mfu = series(run, "mfu")[1]
    share = "—"
    if len(waited) == len(seconds):
        spent = (seconds * covered)[steady].sum()
        share = f"{100 * (waited * covered)[steady].sum() / max(spent, 1e-12):.1f} % of step time"
    return {
        "training time": duration(float((seconds * covered).sum())),
        "samples/s": f"{np.median(rate[steady]):.1f} (median)" if len(rate) else "—",
        "step time": f"{1000 * np.median(seconds[steady]):.0f} ms (median)",
        "data wait": share,
        **(
            {"model FLOPs utilisation": f"{100 * np.median(mfu[steady]):.1f} %"} if len(mfu) else {}
        ),
    }


def duration(seconds: float) -> str:
    """1234.5 -> '20 min 35 s'."""
    whole = round(seconds)
    if whole < 90:
        return f"{seconds:.1f} s"
    if whole < 5400:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _loss(run: Run) -> str:
    values = series(run, "loss")[1]
    if not len(values):
        return "—"
    tail = values[-max(1, len(values) // 20) :]
    return f"{values[0]:.4g} → {tail.mean():.4g} (mean of the last {len(tail)} logged)"


def _faults(run: Run) -> str:
    """The last counts by reason: they are totals of the run so far."""
    if not run.lines:
        return "—"
    last = run.lines[-1]
    counts = {
        name.removeprefix("faults/"): int(last[name])
        for name in last
        if name.startswith("faults/") and _is_number(last[name]) and last[name]
    }
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items()) or "none"
