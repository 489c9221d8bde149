"""The results of a report: one table per protocol, the runs measured under it side by side."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from instap_jax.evaluation.probe import wilson
from instap_jax.evaluation.report_html import Html, join, note, swatch, table, tag
from instap_jax.evaluation.report_plots import Dot, dot_plot
from instap_jax.evaluation.report_runs import Run
from instap_jax.evaluation.results import Measurement, Protocol, flatten, shared_line, weights_line
from instap_jax.evaluation.retrieval import RECALL_AT, TIE_RULE

_NO_MARGIN = tag("span", "", class_="pm")  # keeps the numbers of a column below each other
_DIRECTIONS = (("t2v", "T→V"), ("v2t", "V→T"))


@dataclasses.dataclass(frozen=True, slots=True)
class _Entry:
    """One measurement of one run, in a group of equal protocol."""

    run: Run
    measurement: Measurement

    @property
    def head(self) -> Html:
        return join(
            swatch(self.run.slot),
            f"{self.run.name} ",
            tag("span", weights_line(self.measurement.protocol), class_="pm"),
        )

    @property
    def untrained(self) -> bool:
        return self.measurement.protocol.step == 0


def results_sections(runs: Sequence[Run]) -> Html:
    """A section per task that any of the runs was measured on."""
    found = sorted({task for run in runs for task in run.results})
    tasks = [
        *(task for task in _SECTIONS if task in found),
        *(t for t in found if t not in _SECTIONS),
    ]
    sections = [_SECTIONS.get(task, _any_section)(task, _groups(runs, task)) for task in tasks]
    if not sections:
        text = "None of these runs has results: run instap evaluate first."
        return join(tag("h2", "Results"), note(text))
    return join(*sections, _provenance(runs))


def _provenance(runs: Sequence[Run]) -> Html:
    rows = []
    for run in runs:
        for task, result in run.results.items():
            versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
            head = join(swatch(run.slot), run.name)
            rows.append([head, task, result.written, result.config_hash, versions])
    header = ["run", "task", "measured (UTC)", "config hash", "with"]
    return tag(
        "details",
        tag("summary", "When and with which configuration and versions this was measured"),
        table(header, rows, class_="facts"),
    )


def _groups(runs: Sequence[Run], task: str) -> list[list[_Entry]]:
    """Measurements that may be compared: same suite, unit, scoring, frames, notes and sizes."""
    groups: dict[tuple, list[_Entry]] = {}
    for run in runs:
        if task in run.results:
            for one in run.results[task].measurements:
                same = dataclasses.replace(one.protocol, weights="", step=0)
                key = (dataclasses.astuple(same), tuple(one.counts.items()))
                groups.setdefault(key, []).append(_Entry(run, one))
    return list(groups.values())


def _heading(group: Sequence[_Entry]) -> Html:
    """Suite and unit as the title, the whole protocol that the entries share below it."""
    protocol, counts = group[0].measurement.protocol, group[0].measurement.counts
    title = tag("h3", f"{protocol.suite}: {protocol.unit}")
    return join(title, tag("p", shared_line(protocol, counts), class_="protocol"))


def _retrieval_section(task: str, groups: Sequence[Sequence[_Entry]]) -> Html:
    parts = [
        tag("h2", "Retrieval"),
        note(
            "T→V: text to video (an image is a one-frame video); V→T the reverse. Recall in "
            f"percent, ± half of its 95 % Wilson interval; {TIE_RULE}. MdR: median rank. "
            "Mean: mean of the six recalls. Chance: expectation of a random order."
        ),
        _overview(groups),
    ]
    for group in groups:
        parts += [_heading(group), _retrieval_table(group)]
    return join(*parts)


def _overview(groups: Sequence[Sequence[_Entry]]) -> Html:
    dots = [
        Dot(
            row=row,
            slot=entry.run.slot,
            value=entry.measurement.metrics["mean_recall"],
            hollow=entry.untrained,
        )
        for row, group in enumerate(groups)
        for entry in group
    ]
    rows = [_row_label(group[0].measurement.protocol) for group in groups]
    chance = [_mean_chance(group[0].measurement.metrics) for group in groups]
    plot = dot_plot(dots, rows, chance, unit="mean recall, %", label="Mean recall by suite and run")
    caption = tag(
        "figcaption", "Mean recall ", tag("span", "· grey tick: chance · hollow: untrained")
    )
    return tag("div", tag("figure", caption, plot), class_="panels")


def _row_label(protocol: Protocol) -> str:
    return f"{protocol.suite}\n{protocol.unit}\n{protocol.scoring}"


def _mean_chance(metrics: Mapping) -> float:
    return sum(metrics[d]["chance"][f"R@{k}"] for d, _ in _DIRECTIONS for k in RECALL_AT) / 6


def _retrieval_table(group: Sequence[_Entry]) -> Html:
    header = ["run"]
    for _, label in _DIRECTIONS:
        header += [f"{label} R@{k}" for k in RECALL_AT] + [f"{label} MdR"]
    columns = [_retrieval_values(entry.measurement.metrics) for entry in group]
    rows = []
    for entry, values in zip(group, columns):
        cells = []
        for i, (value, spread, better) in enumerate(values):
            best = len(group) > 1 and value == better(other[i][0] for other in columns)
            shown = f"{value:.1f}" if spread is not None or i == len(values) - 1 else f"{value:g}"
            text = tag("b", shown) if best else shown
            margin = tag("span", f"±{spread:.1f}", class_="pm") if spread is not None else ""
            cells.append(join(text, margin))
        rows.append([entry.head, *cells])
    metrics = group[0].measurement.metrics
    rows.append(["chance"])
    for direction, _ in _DIRECTIONS:
        recalls = [f"{metrics[direction]['chance'][f'R@{k}']:.1f}" for k in RECALL_AT]
        rows[-1] += [*(join(recall, _NO_MARGIN) for recall in recalls), ""]
    rows[-1].append(f"{_mean_chance(metrics):.1f}")
    return table([*header, "mean"], rows)


def _retrieval_values(metrics: Mapping) -> list[tuple]:
    """(value, half interval or None, which is better) of every column after the run's name."""
    values: list[tuple] = []
    for direction, _ in _DIRECTIONS:
        one = metrics[direction]
        for k in RECALL_AT:
            recall = one[f"R@{k}"]
            low, high = wilson(recall / 100 * one["queries"], one["queries"])
            values.append((recall, (high - low) / 2, max))
        values.append((one["median_rank"], None, min))
    return [*values, (metrics["mean_recall"], None, max)]


def _probe_section(task: str, groups: Sequence[Sequence[_Entry]]) -> Html:
    parts = [
        tag("h2", "Entity attributes read from frozen features"),
        note(
            "Percent of test entities named correctly, with the 95 % Wilson interval (entities of "
            "one scene are not independent: read it as a lower bound of the uncertainty). Grey "
            "tick and last row: always naming the most frequent training class. Hollow: "
            "untrained weights. Nothing is tuned on the test split."
        ),
    ]
    parts.append(tag("div", *(_probe_plot(group) for group in groups), class_="panels"))
    for group in groups:
        parts += [_heading(group), _probe_table(group)]
    return join(*parts)


def _attributes(group: Iterable[_Entry]) -> list[str]:
    return list(dict.fromkeys(name for entry in group for name in entry.measurement.metrics))


def _chance_of(group: Sequence[_Entry], attribute: str) -> float:
    found = (entry.measurement.metrics.get(attribute) for entry in group)
    return next(one["chance"] for one in found if one)


def _probe_plot(group: Sequence[_Entry]) -> Html:
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
        label=f"Probe accuracy by attribute, {protocol.suite}, {protocol.scoring}",
    )
    detail = tag("span", f"· {protocol.suite} · {protocol.scoring}")
    return tag("figure", tag("figcaption", "Accuracy ", detail), plot)


def _probe_table(group: Sequence[_Entry]) -> Html:
    attributes = _attributes(group)
    best = {
        name: max(
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
            cells.append(_probe_cell(one, best[name] if len(group) > 1 else None))
        rows.append([entry.head, *cells])
    margin = tag("span", "", class_="pm range")
    chance = [join(f"{_chance_of(group, name):.1f}", margin) for name in attributes]
    return table(["run", *attributes], [*rows, ["majority class", *chance]])


def _probe_cell(one: Mapping | None, best: float | None) -> str:
    if not one:
        return "—"
    shown = f"{one['accuracy']:.1f}"
    interval = tag("span", f"{one['low']:.1f}–{one['high']:.1f}", class_="pm range")
    return join(tag("b", shown) if one["accuracy"] == best else shown, interval)


def _any_section(task: str, groups: Sequence[Sequence[_Entry]]) -> Html:
    """Tasks without a layout of their own: every number by name, runs side by side."""
    parts = [tag("h2", task.replace("_", " ").capitalize())]
    for group in groups:
        flat = [flatten(entry.measurement.metrics) for entry in group]
        names = dict.fromkeys(name for one in flat for name in one)
        rows = [[name, *(_number(one.get(name)) for one in flat)] for name in names]
        header = ["metric", *(entry.head for entry in group)]
        parts += [_heading(group), table(header, rows)]
    return join(*parts)


def _number(value) -> str:
    return (
        f"{value:.4g}" if isinstance(value, int | float) else "—" if value is None else str(value)
    )


_SECTIONS = {"retrieval": _retrieval_section, "probe": _probe_section}
