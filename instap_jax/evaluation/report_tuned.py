"""Fine-tuned tasks in a report: boxes of sentences, classes of clips."""

from collections.abc import Mapping, Sequence

from instap_jax.evaluation.report_groups import Entry, cell, groups, heading, remarks
from instap_jax.evaluation.report_html import Html, join, note, table, tag
from instap_jax.evaluation.report_numbers import best
from instap_jax.evaluation.report_runs import Run


def grounding_section(runs: Sequence[Run]) -> Html:
    """IoU at thresholds, the floors of a suite below its runs."""
    parts = [
        tag("h2", "Grounding"),
        note(
            "Percent of instances whose box, predicted from their sentence, reaches this IoU with "
            "the true one. Floors, below the runs: what constants reach, and a true box of the "
            "scene drawn without reading the sentence."
        ),
    ]
    for group in groups(runs, "grounding"):
        columns = [
            name for name, v in group[0].measurement.metrics.items() if not isinstance(v, Mapping)
        ]
        floors = group[0].measurement.metrics.get("floors", {})
        parts += [heading(group), _with_floors(group, columns, floors), remarks(group)]
    return join(*parts)


def classification_section(runs: Sequence[Run]) -> Html:
    """Top-1 and top-5 accuracy."""
    parts = [
        tag("h2", "Classification"),
        note("Accuracy in percent, top-1 with half of its 95 % Wilson interval."),
    ]
    for group in groups(runs, "classification"):
        metrics = group[0].measurement.metrics
        floors = {"majority classes": metrics["majority"]} if "majority" in metrics else {}
        columns = [name for name, value in metrics.items() if not isinstance(value, Mapping)]
        parts += [heading(group), _with_floors(group, columns, floors), remarks(group)]
    return join(*parts)


def _with_floors(
    group: Sequence[Entry], columns: Sequence[str], floors: Mapping[str, Mapping[str, float]]
) -> Html:
    found = [entry.measurement.metrics for entry in group]
    top = {name: best(metrics[name] for metrics in found) for name in columns}
    rows = [
        [
            entry.head,
            *(
                cell(
                    metrics[name],
                    _margin(metrics, name),
                    best=len(group) > 1 and metrics[name] == top[name],
                )
                for name in columns
            ),
        ]
        for entry, metrics in zip(group, found)
    ]
    for label, floor in floors.items():
        shown = [cell(floor[name]) if name in floor else "" for name in columns]
        rows.append([tag("span", label, class_="lead"), *shown])
    label = f"Scores, {group[0].measurement.protocol.suite}"
    return table(["run", *columns], rows, label=label)


def _margin(metrics: Mapping, name: str) -> float | None:
    interval = metrics.get(f"{name} interval")
    return (interval["high"] - interval["low"]) / 2 if interval else None
