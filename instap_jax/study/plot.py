"""The picture of a table: every seed, the mean, and its interval, one panel for each protocol."""

import os
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from instap_jax.study.summary import Column, Line, Summary

# Okabe and Ito's: told apart by colour-blind eyes too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_INK, _MUTED, _LINE = "#222222", "#666666", "#dddddd"


def plot(summary: Summary, path: Path) -> None:
    """Writes a PNG: rows from top to bottom, a colour for each suite; one panel beside another for
    global and instance retrieval. Nothing measured yet: no picture."""
    groups: dict[tuple[str, str, str], list[Column]] = {}
    for column in summary.columns:
        groups.setdefault((column.metric, column.scoring, column.unit), []).append(column)
    if not groups:
        return
    suites = list(dict.fromkeys(column.suite for column in summary.columns))
    height = 1.5 + (0.16 * len(suites) + 0.24) * len(summary.lines)
    figure = Figure(figsize=(2.3 + 3.6 * len(groups), height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axis, (group, columns) in zip(axes, groups.items()):
        _panel(axis, summary, columns, suites)
        _, scoring, unit = group
        title = unit if len({other for _, other, _ in groups}) == 1 else f"{unit}\n{scoring}"
        axis.set_title(title, fontsize=10, color=_INK)
        axis.set_xlabel(columns[0].title(), color=_MUTED, fontsize=9)
    axes[0].set_yticks(range(len(summary.lines)), [line.label for line in summary.lines])
    axes[0].set_ylim(len(summary.lines) - 0.5, -0.5)
    handles = [
        Line2D([], [], color=_COLOURS[i % len(_COLOURS)], lw=3, label=suite)
        for i, suite in enumerate(suites)
    ]
    handles.append(Line2D([], [], ls="", marker="o", ms=4, mfc="white", mec=_INK, label="a seed"))
    handles.append(Line2D([], [], ls="", marker="|", ms=11, mew=2, color=_INK, label="mean"))
    handles.append(Line2D([], [], lw=3.5, alpha=0.35, color=_INK, label="95 % interval"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9
    )
    figure.suptitle(summary.title, fontsize=11, color=_INK, x=0.01, ha="left")
    aside = path.with_name(f".{path.name}.partial")
    figure.savefig(aside, format="png", dpi=150)
    os.replace(aside, path)


def _panel(axis, summary: Summary, columns: list[Column], suites: list[str]) -> None:
    for index, line in enumerate(summary.lines):
        if not any(line.values.get(column) for column in columns):
            middle = axis.get_yaxis_transform()
            text = summary.gap([line], columns)
            axis.text(0.5, index, text, transform=middle, color=_MUTED, fontsize=8,
                      ha="center", va="center")  # fmt: skip
        for column in columns:
            place = suites.index(column.suite)
            y = index + (place - (len(suites) - 1) / 2) * 0.62 / max(len(suites), 2)
            _draw(axis, y, line, column, _COLOURS[place % len(_COLOURS)])
    for index in range(len(summary.lines) - 1):
        axis.axhline(index + 0.5, color=_LINE, lw=0.8, zorder=0)
    axis.grid(axis="x", color=_LINE, lw=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelsize=9, labelcolor=_INK)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _draw(axis, y: float, line: Line, column: Column, colour: str) -> None:
    """One row and suite: a ring for each seed, a stroke for the mean, a bar for its interval."""
    found = line.estimate(column)
    if found is None:
        return
    if found.half is not None:
        ends = found.mean - found.half, found.mean + found.half
        if column.is_percentage():
            ends = max(ends[0], 0), min(ends[1], 100)
        axis.plot(ends, [y, y], "-", lw=3.5, alpha=0.35, color=colour, solid_capstyle="butt")
        axis.plot(found.mean, y, "|", ms=11, mew=2, color=colour)
    values = list(line.values[column].values())
    axis.plot(values, [y] * len(values), "o", ms=4, mfc="white", mec=colour, mew=1.0)
