"""Measurements of several runs that may be put side by side, and how they are headed."""

import dataclasses
from collections.abc import Sequence

from instap_jax.evaluation.report_html import Html, join, note, swatch, tag
from instap_jax.evaluation.report_numbers import known, number
from instap_jax.evaluation.report_runs import Run
from instap_jax.evaluation.results import Measurement, shared_line, weights_line

NO_MARGIN = tag("span", "", class_="pm")  # keeps the numbers of a column below each other


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
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
        # Not step 0: converted weights, too, have taken no step here.
        return ", random" in self.measurement.protocol.weights

    @property
    def scoring(self) -> str:
        return self.measurement.protocol.scoring


def groups(runs: Sequence[Run], task: str, *, any_scoring: bool = False) -> list[list[Entry]]:
    """Measurements that may be compared: same suite, unit, scoring, frames, notes and sizes.

    With `any_scoring` the ways of scoring share a group, for tables that name it in every row.
    """
    found: dict[tuple, list[Entry]] = {}
    for run in runs:
        if task in run.results:
            for one in run.results[task].measurements:
                same = dataclasses.replace(one.protocol, weights="", step=0)
                if any_scoring:
                    same = dataclasses.replace(same, scoring="")
                key = (dataclasses.astuple(same), tuple(one.counts.items()))
                found.setdefault(key, []).append(Entry(run, one))
    return list(found.values())


def heading(group: Sequence[Entry], *, any_scoring: bool = False) -> Html:
    """Suite and unit as the title, the whole protocol that the entries share below it."""
    protocol, counts = group[0].measurement.protocol, group[0].measurement.counts
    if any_scoring:
        protocol = dataclasses.replace(protocol, scoring="")
    title = tag("h3", f"{protocol.suite}: {protocol.unit}")
    return join(title, tag("p", shared_line(protocol, counts), class_="protocol"))


def remarks(group: Sequence[Entry]) -> Html:
    """What holds for single runs, each remark once, after the runs that it is about."""
    said: dict[str, dict[str, Html]] = {}
    for entry in group:
        for text in entry.measurement.remarks:
            said.setdefault(text, {})[entry.run.name] = swatch(entry.run.slot)
    lines = []
    for text, runs in said.items():
        names = [tag("span", mark, name, class_="named") for name, mark in runs.items()]
        lines.append(join(*names, text))
    return note(join(*(tag("span", line, class_="remark") for line in lines))) if lines else join()


def cell(value: float, margin: float | None = None, *, best: bool = False, digits: int = 1) -> Html:
    """A number, perhaps with half of its interval, bold where it is the best of its column."""
    shown = number(value, f".{digits}f")
    has_margin = known(value) and known(margin)
    spread = tag("span", f"±{margin:.{digits}f}", class_="pm") if has_margin else NO_MARGIN
    return join(tag("b", shown) if best else shown, spread)
