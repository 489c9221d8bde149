"""Wrong instance retrievals in a report: shares beside the paper's, a table, cases."""

from collections.abc import Mapping, Sequence

from instap_jax.evaluation.errors import CLASSES, DIRECTIONS, PAPER_SHARES
from instap_jax.evaluation.gallery import Case
from instap_jax.evaluation.report_gallery import marked, of_suites, picture
from instap_jax.evaluation.report_groups import Entry, groups, heading, remarks
from instap_jax.evaluation.report_html import Html, join, note, swatch, table, tag
from instap_jax.evaluation.report_numbers import number
from instap_jax.evaluation.report_plots import Bar, bar_plot
from instap_jax.evaluation.report_runs import Run

_NO_SHARE = tag("span", "", class_="pm range")  # keeps the numbers of a column below each other


def errors_section(runs: Sequence[Run]) -> Html:
    """Bars and a table for every suite, then the cases."""
    parts = [
        tag("h2", "Wrong instance retrievals"),
        note(
            "Every wrong top-1 retrieval of an instance falls into the first class whose rule "
            "holds; the rules are in the protocol line. Grey, hatched: shares of the paper's 1,500 "
            "errors, another model on other data by rules that it does not state: beside ours for "
            "orientation, not as a target. Short tick, and the rows 'random': the share that the "
            "rules would give if every wrong query had retrieved another instance at random."
        ),
    ]
    for group in groups(runs, "errors"):
        plots = [_plot(group, direction) for direction in DIRECTIONS]
        parts += [
            heading(group),
            tag("div", *plots, class_="panels"),
            _table(group),
            remarks(group),
        ]
    for suite, cases in of_suites(list(runs), "errors").items():
        parts.append(_cases(suite, cases))
    return join(*parts)


def _plot(group: Sequence[Entry], direction: str) -> Html:
    bars = []
    for row, kind in enumerate(CLASSES):
        for entry in group:
            one = entry.measurement.metrics[direction][kind]
            bars.append(Bar(row=row, slot=entry.run.slot, value=one["share"], tick=one["chance"]))
        bars.append(Bar(row=row, slot=None, value=PAPER_SHARES[kind]))
    protocol, name = group[0].measurement.protocol, DIRECTIONS[direction]
    plot = bar_plot(
        bars,
        list(CLASSES.values()),
        unit="share of the wrong retrievals, %",
        label=f"Shares of wrong retrievals by class, {protocol.suite}, {name}",
    )
    detail = tag("span", f"· {protocol.suite} · {name} · grey: the paper · tick: random")
    return tag("figure", tag("figcaption", "Shares ", detail), plot)


def _table(group: Sequence[Entry]) -> Html:
    header = ["run", "", "wrong", *(kind.replace("_", "-") for kind in CLASSES)]
    rows = []
    for entry in group:
        random = join(
            swatch(entry.run.slot), tag("span", f"{entry.run.name}: random", class_="lead")
        )
        for direction, name in DIRECTIONS.items():
            metrics = entry.measurement.metrics[direction]
            rows.append([entry.head, name, *_found_cells(metrics)])
            chance = [_share_cell(metrics[kind]["chance"]) for kind in CLASSES]
            rows.append([random, name, "", *chance])
    paper = [_share_cell(PAPER_SHARES[kind]) for kind in CLASSES]
    wrong = join("1,500", _NO_SHARE)
    rows.append([tag("span", "paper, its own rules", class_="lead"), "", wrong, *paper])
    suite = group[0].measurement.protocol.suite
    return table(header, rows, label=f"Wrong retrievals by class, {suite}")


def _found_cells(metrics: Mapping) -> list[Html]:
    """How many retrievals are wrong, and the share and count of every class."""
    share = number(100 * metrics["wrong"] / metrics["queries"])
    wrong = join(
        f"{number(metrics['wrong'], ',')} of {number(metrics['queries'], ',')}",
        tag("span", f"{share} %", class_="pm range"),
    )
    classes = (metrics[kind] for kind in CLASSES)
    return [wrong, *(_share_cell(one["share"], number(one["count"], ",")) for one in classes)]


def _share_cell(share: float, count: str = "") -> Html:
    return join(f"{number(share)} %", tag("span", count, class_="pm"))


def _cases(suite: str, cases: Sequence[tuple[Run, Case]]) -> Html:
    parts = []
    for kind, name in CLASSES.items():
        cards = [_card(run, case) for run, case in cases if case.group == kind]
        if cards:
            parts += [tag("h3", name.capitalize()), tag("div", *cards, class_="cards")]
    summary = tag("summary", f"Cases of {suite} ({len(cases)}), drawn at random of every class")
    return tag("details", summary, *parts)


def _card(run: Run, case: Case) -> Html:
    texts = dict(case.texts)
    direction, why = texts.pop("direction", ""), texts.pop("why", "")
    strips = [
        picture(run, "errors", case, label, text)
        for label, text in zip(case.pictures, texts.values())
    ]
    return tag(
        "figure",
        tag("figcaption", marked(run, tag("span", direction))),
        *strips,
        note("Why: ", why),
    )
