"""Wrong instance retrievals in a report: shares beside the paper's, a table, cases."""

from collections.abc import Sequence

from instap_jax.evaluation.errors import CLASSES, DIRECTIONS, PAPER_SHARES
from instap_jax.evaluation.gallery import Case
from instap_jax.evaluation.report_gallery import marked, of_suites, picture
from instap_jax.evaluation.report_groups import Entry, groups, heading, remarks
from instap_jax.evaluation.report_html import Html, join, note, table, tag
from instap_jax.evaluation.report_plots import Bar, bar_plot
from instap_jax.evaluation.report_runs import Run


def errors_section(runs: Sequence[Run]) -> Html:
    """Bars and a table for every suite, then the cases."""
    parts = [
        tag("h2", "Wrong instance retrievals"),
        note(
            "Every wrong top-1 retrieval of an instance falls into the first class whose rule "
            "holds; the rules are in the protocol line. Grey, hatched: shares of the paper's 1,500 "
            "errors, another model on other data by rules that it does not state: beside ours for "
            "orientation, not as a target. Short tick: the share that the rules would give if "
            "every wrong query had retrieved another instance at random."
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
    detail = tag("span", f"· {protocol.suite} · {name} · grey: the paper")
    return tag("figure", tag("figcaption", "Shares ", detail), plot)


def _table(group: Sequence[Entry]) -> Html:
    header = ["run", "", "wrong", *(kind.replace("_", "-") for kind in CLASSES)]
    rows = []
    for entry in group:
        for direction, name in DIRECTIONS.items():
            metrics = entry.measurement.metrics[direction]
            share = 100 * metrics["wrong"] / metrics["queries"]
            wrong = join(
                f"{metrics['wrong']:,} of {metrics['queries']:,}",
                tag("span", f"{share:.1f} %", class_="pm range"),
            )
            cells = [
                join(
                    f"{metrics[kind]['share']:.1f} %",
                    tag("span", f"{metrics[kind]['count']:,}", class_="pm"),
                )
                for kind in CLASSES
            ]
            rows.append([entry.head, name, wrong, *cells])
    paper = [f"{PAPER_SHARES[kind]:.1f} %" for kind in CLASSES]
    rows.append([tag("span", "paper, its own rules", class_="lead"), "", "1,500", *paper])
    return table(header, rows)


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
