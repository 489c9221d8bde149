"""What the runs of a table measured, put together: JSON for programs, Markdown for people."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from instap_jax.errors import UserError
from instap_jax.evaluation.results import flatten, read_results, shared_line
from instap_jax.study.runs import Run, step_seconds
from instap_jax.study.statistics import Estimate, estimate, paired_difference
from instap_jax.study.tables import Table

# Words in the names of metrics that are percentages; ranks and counts are not.
_PERCENTAGES = ("R@", "mean_recall", "accuracy", "IoU", "top-")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """What one number of every row is: a metric of a suite under one protocol."""

    unit: str
    scoring: str
    suite: str
    metric: str

    def is_percentage(self) -> bool:
        return any(word in self.metric for word in _PERCENTAGES)

    def title(self) -> str:
        """The metric in words, with its unit."""
        return self.metric.replace("_", " ") + (" (%)" if self.is_percentage() else "")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A row of the table as far as it has been measured.

    Attributes:
      seeds: of which there is something. step_seconds: mean over them of each run's median.
      values: column -> seed -> value.
      differences: column -> paired difference to `rival`, another line's name.
    """

    name: str
    label: str
    rival: str
    steps: int
    seeds: tuple[int, ...]
    step_seconds: float | None
    values: Mapping[Column, Mapping[int, float]]
    differences: Mapping[Column, Estimate | None]

    def estimate(self, column: Column) -> Estimate | None:
        return estimate(list(self.values.get(column, {}).values()))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A table with its numbers.

    Attributes:
      seeds: all that were asked for.
      protocols: what was measured how, one line each, with the rows it holds for.
      notes: how the rows were made comparable.
    """

    title: str
    lines: tuple[Line, ...]
    columns: tuple[Column, ...]
    seeds: tuple[int, ...]
    protocols: tuple[str, ...]
    notes: tuple[str, ...]

    def gap(self, lines: Sequence[Line], columns: Sequence[Column]) -> str:
        """What stands where one of the lines has no number: '—' if none will come.

        A row that was measured with every seed and not in these columns has no such number.
        """
        for line in lines:
            if len(line.seeds) == len(self.seeds) and not line.values.keys() & set(columns):
                return "—"
        return "not yet run"


def summarise(
    table: Table,
    runs: Sequence[Run],
    *,
    seeds: Sequence[int],
    metrics: Sequence[str],
    notes: Sequence[str],
) -> Summary:
    """Reads what the finished runs measured.

    Args:
      runs: of the table's rows, finished or not.
      metrics: of the results files, 'mean_recall', 't2v/R@1', 'size/accuracy' and so on.

    Raises:
      UserError: no result of a run has one of them.
    """
    protocols: dict[str, list[str]] = {}  # line -> rows measured so
    values: dict[str, dict[Column, dict[int, float]]] = {row.name: {} for row in table.rows}
    for run in (run for run in runs if run.done()):
        measured, shown = _measured(run, metrics)
        for column, value in measured.items():
            values[run.row].setdefault(column, {})[run.seed] = value
        for line in shown:
            rows = protocols.setdefault(line, [])
            rows += [] if run.row in rows else [run.row]
    columns = list(dict.fromkeys(column for row in values.values() for column in row))
    lines = tuple(_line(table, row, runs, values) for row in table.rows)
    return Summary(
        title=table.title,
        lines=lines,
        columns=tuple(sorted(columns, key=lambda c: (metrics.index(c.metric), c.scoring, c.unit))),
        seeds=tuple(seeds),
        protocols=tuple(sorted(f"{line} ({', '.join(rows)})" for line, rows in protocols.items())),
        notes=tuple(notes),
    )


def _measured(run: Run, metrics: Sequence[str]) -> tuple[dict[Column, float], list[str]]:
    """The columns of one run, and the protocol line of each of its measurements."""
    found, shown, known = {}, [], {}
    results = read_results(run.workdir)
    for task in run.evaluation.task.split(","):
        for measurement in results[task].measurements:
            protocol, flat = measurement.protocol, flatten(measurement.metrics)
            known |= flat
            for metric in (metric for metric in metrics if metric in flat):
                place = {name: getattr(protocol, name) for name in ("suite", "unit", "scoring")}
                found[Column(**place, metric=metric)] = float(flat[metric])
            if any(metric in flat for metric in metrics):
                shown.append(shared_line(protocol, measurement.counts))
    for metric in metrics:
        if metric not in known:
            raise UserError(f"--metrics={metric}: {run.name} measured {', '.join(known)}")
    return found, shown


def _line(table: Table, row, runs: Sequence[Run], values) -> Line:
    mine = [run for run in runs if run.row == row.name]
    done = [run for run in mine if run.done()]
    rival = table.rival(row)
    seconds = [s for s in map(step_seconds, done) if s is not None]
    return Line(
        name=row.name,
        label=row.label,
        rival=rival,
        steps=mine[0].config.steps,
        seeds=tuple(run.seed for run in done),
        step_seconds=sum(seconds) / len(seconds) if seconds else None,
        values=values[row.name],
        differences={
            column: paired_difference(by_seed, values[rival].get(column, {}))
            for column, by_seed in values[row.name].items()
            if rival
        },
    )


def markdown(summary: Summary) -> str:
    """The table as Markdown: means, then paired differences, then how they were measured."""
    parts = [f"# {summary.title}", ""]
    named = {line.name: line for line in summary.lines}
    for metric, scoring, unit in dict.fromkeys(
        (c.metric, c.scoring, c.unit) for c in summary.columns
    ):
        columns = [
            c for c in summary.columns if (c.metric, c.scoring, c.unit) == (metric, scoring, unit)
        ]
        suites = [column.suite for column in columns]
        parts += [f"## {unit}: {columns[0].title()}, {scoring}", ""]
        parts += _grid(
            ["row", "change", "seeds", "steps", "s/step", *suites],
            [
                [
                    line.label,
                    f"`{line.name}`",
                    f"{len(line.seeds)}/{len(summary.seeds)}",
                    f"{line.steps:,}",
                    "" if line.step_seconds is None else f"{line.step_seconds:.3f}",
                    *_means(summary, line, columns),
                ]
                for line in summary.lines
            ],
        )
        parts += ["", "Difference, paired by seed:", ""]
        parts += _grid(
            ["row", "minus", *suites],
            [
                [line.label, rival.label, *_differences(summary, line, rival, columns)]
                for line in summary.lines
                if (rival := named.get(line.rival))
            ],
        )
        parts.append("")
    parts += _footing(summary)
    return "\n".join(parts) + "\n"


def _footing(summary: Summary) -> list[str]:
    text = [
        "`±`: half of the 95 % interval of the mean over seeds (Student t); a single seed has "
        "none. Differences are taken seed by seed, as runs of one seed see the same data in the "
        "same order; **bold**: their interval excludes zero. s/step: median of a run's log, mean "
        "over seeds, as busy as the machine was."
    ]
    if len(summary.seeds) < 2:
        text.append("One seed: no interval.")
    text += summary.notes
    text += ["Measured on (rows):\n", *(f"* {line}" for line in summary.protocols)]
    return [part for line in text for part in ([line] if line.startswith("*") else ["", line])]


def _means(summary: Summary, line: Line, columns: Sequence[Column]) -> list[str]:
    found = [(column, line.estimate(column)) for column in columns]
    return [_cell(value) if value else summary.gap([line], [column]) for column, value in found]


def _differences(summary: Summary, line: Line, rival: Line, columns: Sequence[Column]) -> list[str]:
    found = [(column, line.differences.get(column)) for column in columns]
    return [
        _difference(value, len(summary.seeds)) if value else summary.gap([line, rival], [column])
        for column, value in found
    ]


def _cell(value: Estimate, sign: str = "") -> str:
    mean = round(value.mean, 1) or 0.0  # never -0.0
    return f"{mean:{sign}.1f}" + ("" if value.half is None else f" ± {value.half:.1f}")


def _difference(value: Estimate, seeds: int) -> str:
    """Bold where the interval excludes zero and what is printed is not zero; with the number of
    pairs where some seeds have none."""
    text = _cell(value, "+")
    text = f"**{text}**" if value.excludes_zero() and round(value.mean, 1) else text
    if value.count == seeds:
        return text
    return f"{text} ({value.count} pair{'s' if value.count > 1 else ''})"


def _grid(head: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---" if name in ("row", "change", "minus") else "---:" for name in head]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]


def as_json(summary: Summary) -> dict[str, Any]:
    """Everything, and the value of every seed."""

    def column(one: Column) -> dict[str, Any]:
        return dataclasses.asdict(one)

    def plain(value: Estimate | None):
        return None if value is None else dataclasses.asdict(value)

    return {
        "title": summary.title,
        "seeds": list(summary.seeds),
        "protocols": list(summary.protocols),
        "notes": list(summary.notes),
        "rows": [
            {
                "name": line.name,
                "label": line.label,
                "minus": line.rival or None,
                "steps": line.steps,
                "seeds": list(line.seeds),
                "step_seconds": line.step_seconds,
                "metrics": [
                    column(one)
                    | {
                        "values": {str(seed): v for seed, v in line.values[one].items()},
                        "mean": plain(line.estimate(one)),
                        "difference": plain(line.differences.get(one)),
                    }
                    for one in summary.columns
                    if one in line.values
                ],
            }
            for line in summary.lines
        ],
    }


def write(path: Path, text: str) -> None:
    """Replaces a file in one move.

    Raises:
      UserError: it cannot be written.
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def write_summary(summary: Summary, stem: Path) -> None:
    """Writes STEM.md and STEM.json."""
    write(stem.with_suffix(".md"), markdown(summary))
    write(stem.with_suffix(".json"), json.dumps(as_json(summary), indent=1) + "\n")
