"""Retrieval and probes in a report."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from instap_jax.evaluation.probe import wilson
from instap_jax.evaluation.report_groups import Entry, cell, groups, heading, remarks
from instap_jax.evaluation.report_html import Html, join, note, table, tag
from instap_jax.evaluation.report_numbers import DASH, best, known, number
from instap_jax.evaluation.report_plots import Dot, dot_plot
from instap_jax.evaluation.report_runs import Run
from instap_jax.evaluation.results import Protocol
from instap_jax.evaluation.retrieval import RECALL_AT, TIE_RULE

_DIRECTIONS = (("t2v", "T→V"), ("v2t", "V→T"))


def retrieval_section(runs: Sequence[Run]) -> Html:
    """A table for every suite and unit; the ways of scoring are rows of it."""
    found = groups(runs, "retrieval", any_scoring=True)
    parts = [
        tag("h2", "Retrieval"),
        note(
            "T→V: text to video (an image is a one-frame video); V→T the reverse. Recall in "
            f"percent, ± half of its 95 % Wilson interval; {TIE_RULE}. MdR: median rank. "
            "Mean: mean of the six recalls. Chance: expectation of a random order. Bold: the best "
            "of the runs that were scored in the same way."
        ),
        _overview(found),
    ]
    for group in found:
        parts += [
            heading(group, any_scoring=True),
            _retrieval_table(group),
            remarks(group),
        ]
    return join(*parts)


def _overview(found: Sequence[Sequence[Entry]]) -> Html:
    """Mean recalls: a row for each suite, unit and way of scoring."""
    rows = [
        [entry for entry in group if entry.scoring == scoring]
        for group in found
        for scoring in dict.fromkeys(entry.scoring for entry in group)
    ]
    dots = [
        Dot(
            row=row,
            slot=entry.run.slot,
            value=entry.measurement.metrics["mean_recall"],
            hollow=entry.untrained,
        )
        for row, entries in enumerate(rows)
        for entry in entries
    ]
    labels = [_row_label(entries[0].measurement.protocol) for entries in rows]
    chance = [_mean_chance(entries[0].measurement.metrics) for entries in rows]
    label = "Mean recall by suite and run"
    plot = dot_plot(dots, labels, chance, unit="mean recall, %", label=label)
    caption = tag(
        "figcaption", "Mean recall ", tag("span", "· grey tick: chance · hollow: untrained")
    )
    return tag("div", tag("figure", caption, plot), class_="panels")


def _row_label(protocol: Protocol) -> str:
    return f"{protocol.suite}\n{protocol.unit}\n{protocol.scoring}"


def _mean_chance(metrics: Mapping) -> float:
    return sum(metrics[d]["chance"][f"R@{k}"] for d, _ in _DIRECTIONS for k in RECALL_AT) / 6


def _retrieval_table(group: Sequence[Entry]) -> Html:
    header = ["run", "scored by", "mean"]
    for _, label in _DIRECTIONS:
        header += [f"{label} R@{k}" for k in RECALL_AT] + [f"{label} MdR"]
    columns = [_retrieval_values(entry.measurement.metrics) for entry in group]
    rows = []
    for entry, values in zip(group, columns):
        rivals = [one for other, one in zip(group, columns) if other.scoring == entry.scoring]
        cells = []
        for i, column in enumerate(values):
            top = best((other[i].value for other in rivals), column.better)
            cells.append(column.cell(best=len(rivals) > 1 and column.value == top))
        rows.append([entry.head, entry.scoring, *cells])
    protocol, metrics = group[0].measurement.protocol, group[0].measurement.metrics
    rows.append(["chance", "", *_chance_cells(metrics)])
    label = f"Recalls, {protocol.suite}, {protocol.unit}"
    return table(header, rows, class_="scored", label=label)


def _chance_cells(metrics: Mapping) -> list[Html]:
    cells = [join(number(_mean_chance(metrics)))]
    for direction, _ in _DIRECTIONS:
        chance = metrics[direction]["chance"]
        cells += [cell(chance[f"R@{k}"]) for k in RECALL_AT] + [join()]
    return cells


@dataclasses.dataclass(frozen=True, slots=True)
class _Column:
    """One number of a run: perhaps with half of its interval, and which end of it is better."""

    value: float
    form: str = ".1f"
    better: Callable = max
    margin: float | None = None

    def cell(self, *, best: bool) -> Html:
        if self.margin is not None:
            return cell(self.value, self.margin, best=best)
        shown = number(self.value, self.form)
        return tag("b", shown) if best else join(shown)


def _retrieval_values(metrics: Mapping) -> list[_Column]:
    """The columns after the run's name and the scoring."""
    values = [_Column(metrics["mean_recall"])]
    for direction, _ in _DIRECTIONS:
        one = metrics[direction]
        for k in RECALL_AT:
            recall = one[f"R@{k}"]
            values.append(_Column(recall, margin=_half_interval(recall, one["queries"])))
        values.append(_Column(one["median_rank"], form="g", better=min))
    return values


def _half_interval(recall: float, queries: int) -> float:
    """Of the recall's Wilson interval; NaN where it is not known."""
    if not (known(recall) and known(queries) and 0 <= recall <= 100):
        return math.nan
    low, high = wilson(recall / 100 * queries, queries)
    return (high - low) / 2


def probe_section(runs: Sequence[Run]) -> Html:
    """Attributes of single entities, named by probes."""
    return _accuracies(
        runs,
        "probe",
        "Entity attributes read from frozen features",
        "Percent of test entities named correctly, with the 95 % Wilson interval (entities of one "
        "scene are not independent: read it as a lower bound of the uncertainty). Grey tick and "
        "last row: always naming the most frequent training class. Hollow: untrained weights. "
        "Nothing is tuned on the test split.",
        floor="majority class",
    )


def choice_section(runs: Sequence[Run]) -> Html:
    """Which of several sentences fits an instance, by kind of fact."""
    return _accuracies(
        runs,
        "choice",
        "Which sentence fits the instance",
        "Percent of questions in which the true sentence, among others that differ in one fact, "
        "is the most similar to the instance, with the 95 % Wilson interval (questions of one "
        "scene are not independent). Grey tick and last row: guessing.",
        floor="guessing",
    )


def _accuracies(runs: Sequence[Run], task: str, title: str, text: str, *, floor: str) -> Html:
    """Accuracies by name beside their floor: a plot and a table for every group."""
    found = groups(runs, task)
    parts = [tag("h2", title), note(text)]
    parts.append(tag("div", *(_accuracy_plot(group) for group in found), class_="panels"))
    for group in found:
        parts += [heading(group), _accuracy_table(group, floor), remarks(group)]
    return join(*parts)


def _attributes(group: Iterable[Entry]) -> list[str]:
    return list(dict.fromkeys(name for entry in group for name in entry.measurement.metrics))


def _chance_of(group: Sequence[Entry], attribute: str) -> float:
    found = (entry.measurement.metrics.get(attribute) for entry in group)
    chances = [one["chance"] for one in found if one]
    return chances[0]


def _accuracy_plot(group: Sequence[Entry]) -> Html:
    attributes = _attributes(group)
    dots = []
    for row, attribute in enumerate(attributes):
        for entry in group:
            if one := entry.measurement.metrics.get(attribute):
                dots.append(
                    Dot(
                        row=row,
                        slot=entry.run.slot,
                        value=one["accuracy"],
                        low=one["low"],
                        high=one["high"],
                        hollow=entry.untrained,
                    )
                )
    protocol = group[0].measurement.protocol
    plot = dot_plot(
        dots,
        attributes,
        [_chance_of(group, attribute) for attribute in attributes],
        unit="accuracy, %",
        label=f"Accuracy by attribute, {protocol.suite}, {protocol.scoring}",
    )
    detail = tag("span", f"· {protocol.suite} · {protocol.scoring}")
    return tag("figure", tag("figcaption", "Accuracy ", detail), plot)


def _accuracy_table(group: Sequence[Entry], floor: str) -> Html:
    attributes = _attributes(group)
    top = {
        name: best(
            entry.measurement.metrics[name]["accuracy"]
            for entry in group
            if name in entry.measurement.metrics
        )
        for name in attributes
    }
    rows = []
    for entry in group:
        cells = []
        for name in attributes:
            one = entry.measurement.metrics.get(name)
            cells.append(_accuracy_cell(one, top[name] if len(group) > 1 else None))
        rows.append([entry.head, *cells])
    margin = tag("span", "", class_="pm range")
    chance = [join(number(_chance_of(group, name)), margin) for name in attributes]
    protocol = group[0].measurement.protocol
    label = f"Accuracies, {protocol.suite}, {protocol.scoring}"
    return table(["run", *attributes], [*rows, [floor, *chance]], label=label)


def _accuracy_cell(one: Mapping | None, top: float | None) -> str:
    if not one:
        return DASH
    shown = number(one["accuracy"])
    text = f"{number(one['low'])}–{number(one['high'])}"
    interval = tag("span", text, class_="pm range")
    return join(tag("b", shown) if one["accuracy"] == top else shown, interval)
