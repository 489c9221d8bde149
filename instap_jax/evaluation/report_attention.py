"""Attention maps in a report: pointing scores beside their floors, overlays run by run."""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from instap_jax.evaluation.gallery import Case
from instap_jax.evaluation.report_gallery import jpeg_source, marked, of_suites, picture
from instap_jax.evaluation.report_groups import NO_MARGIN, Entry, cell, groups, heading, remarks
from instap_jax.evaluation.report_html import Html, join, note, table, tag
from instap_jax.evaluation.report_numbers import DASH, best, number
from instap_jax.evaluation.report_plots import Dot, dot_plot
from instap_jax.evaluation.report_runs import Run
from instap_jax.evaluation.strips import strip

_KEY_HEIGHT = 16  # pixels of the picture that the colour key is drawn over

# Metric, its margin, title.
_COLUMNS = (
    ("mass", "mass_margin", "mass in the box"),
    ("sibling_mass", "", "siblings' maps"),
    ("selectivity", "selectivity_margin", "selectivity"),
    ("hit", "hit_margin", "pointing hit"),
)


def attention_section(runs: Sequence[Run]) -> Html:
    """Scores of every suite and kind of map, then overlays of the same instances of all runs."""
    found = groups(runs, "attention")
    parts = [
        tag("h2", "Attention to the instance that the sentence names"),
        note(
            "Maps over the whole scene for the sentence of one instance. Mass: share of the map in "
            "its true box, ± half a 95 % interval (scenes as units); a map that knows nothing has "
            "the box's area. Siblings' maps: mass in the same box of the maps of the scene's "
            "other instances; selectivity: mass less that, so what the map owes to the sentence "
            "rather than to there being something to see. Pointing hit: the highest patch lies in "
            "the box. Percent."
        ),
        tag("div", _plot(found), class_="panels"),
    ]
    for group in found:
        parts += [heading(group), _table(group), remarks(group)]
    for suite, cases in of_suites(list(runs), "attention").items():
        parts.append(_overlays(suite, cases))
    return join(*parts)


def _plot(found: Sequence[Sequence[Entry]]) -> Html:
    dots = []
    for row, group in enumerate(found):
        for entry in group:
            one, slot = entry.measurement.metrics, entry.run.slot
            low, high = one["mass"] - one["mass_margin"], one["mass"] + one["mass_margin"]
            dots.append(Dot(row=row, slot=slot, value=one["mass"], low=low, high=high))
            if "sibling_mass" in one:
                dots.append(Dot(row=row, slot=slot, value=one["sibling_mass"], hollow=True))
    protocols = [group[0].measurement.protocol for group in found]
    plot = dot_plot(
        dots,
        [f"{protocol.suite}\n{protocol.scoring}" for protocol in protocols],
        [group[0].measurement.metrics["area"] for group in found],
        unit="mass in the box, %",
        label="Share of the attention map in the true box, by suite and run",
        limit=None,
    )
    detail = tag("span", "· grey tick: area of the box · hollow: siblings' maps")
    return tag("figure", tag("figcaption", "Mass in the box ", detail), plot)


def _table(group: Sequence[Entry]) -> Html:
    found = [entry.measurement.metrics for entry in group]
    rows = []
    for entry, metrics in zip(group, found):
        cells = []
        for name, margin, _ in _COLUMNS:
            rivals = [one[name] for one in found if name in one]
            compared = len(rivals) > 1 and name in metrics and name != "sibling_mass"
            top = compared and metrics[name] == best(rivals)
            cells.append(_cell(metrics, name, margin, top))
        raw = metrics.get("unsmoothed", {})
        cells += [_cell(raw, name, "", False) for name in ("mass", "hit")]
        rows.append([entry.head, *cells])
    floor = group[0].measurement.metrics
    chance = [cell(floor["area"]), "", "", cell(floor["hit_chance"])]
    chance += [cell(floor["area"]), cell(floor["hit_chance"])]
    rows.append([tag("span", "map that knows nothing", class_="lead"), *chance])
    titles = [title for _, _, title in _COLUMNS]
    protocol = group[0].measurement.protocol
    label = f"Pointing scores, {protocol.suite}, {protocol.scoring}"
    return table(["run", *titles, "mass, unfiltered", "hit, unfiltered"], rows, label=label)


def _cell(metrics: Mapping, name: str, margin: str, top: bool) -> Html:
    if name not in metrics:
        return join(DASH, NO_MARGIN)
    return cell(metrics[name], metrics.get(margin), best=top)


def _overlays(suite: str, cases: Sequence[tuple[Run, Case]]) -> Html:
    """The cases of one suite, those of the same instance together."""
    together: dict[str, list[tuple[Run, Case]]] = {}
    for run, case in cases:
        together.setdefault(case.key, []).append((run, case))
    cards = []
    for same in together.values():
        run, first = same[0]
        original, *_ = first.pictures
        area = _said(first, "area", "of the picture in the box")
        strips = [picture(run, "attention", first, original, area)]
        for run, case in same:
            for label in list(case.pictures)[1:]:
                mass = _said(case, label, "of the map in the box")
                strip = picture(run, "attention", case, label, mass)
                strips.append(tag("div", marked(run), strip))
        sentence = tag("figcaption", "“", first.texts.get("sentence", ""), "”")
        cards.append(tag("figure", sentence, tag("div", *strips, class_="overlays")))
    count = "one instance" if len(together) == 1 else f"{len(together)} instances"
    summary = tag("summary", f"Maps of {suite}: {count}, drawn at random")
    return tag("details", summary, _colour_key(), tag("div", *cards, class_="sheets"), open="open")


@functools.cache
def _colour_key() -> Html:
    """What the colours of a map mean, drawn by what draws the maps."""
    ramp = np.linspace(0, 1, 64, dtype=np.float32)[None, None]
    ground = np.full((_KEY_HEIGHT, 12 * _KEY_HEIGHT, 3), 128, np.uint8)
    picture = strip([ground], np.zeros((1, 4)), np.zeros(1, bool), heat=ramp)
    bar = tag(
        "img", src=jpeg_source(picture), alt="grey, violet, red, orange, yellow", class_="key"
    )
    return tag(
        "p", "Colour of a map: grey where it is 0 ", bar, " yellow where it is highest. Every map "
        "is scaled to its own highest value: colours tell where it lies, not how strong it is. "
        "Green box: the instance.", class_="note",
    )  # fmt: skip


def _said(case: Case, name: str, what: str) -> str:
    """A number of the case in words; '' where it has none."""
    return f"{number(case.numbers[name])} % {what}" if name in case.numbers else ""
