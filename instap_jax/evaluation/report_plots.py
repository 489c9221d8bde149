"""Plots of a report as inline SVG, drawn by Matplotlib and coloured by the page's CSS variables."""

import dataclasses
import html
import io
import math
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from instap_jax.evaluation.report_html import SERIES, Html
from instap_jax.evaluation.report_numbers import known, number

# Stand-ins that Matplotlib accepts as colours; `_themed` turns them into CSS variables.
_INK, _MUTED, _LINE = "#000101", "#000102", "#000103"
_SLOTS = [f"#0002{slot:02x}" for slot in range(SERIES)]
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _LINE: "--line"} | {
    stand_in: f"--s{slot}" for slot, stand_in in enumerate(_SLOTS)
}
_POINTS = 600  # of a drawn curve; longer logs keep the extremes of every stretch
_WINDOW_SHARE, _LEAST_HALF, _LEAST_LINES = 25, 2, 12  # of the running mean
SMOOTHING = (
    f"centred running mean over about 1/{_WINDOW_SHARE} of the log, at least {2 * _LEAST_HALF + 1} "
    f"lines (none in logs of fewer than {_LEAST_LINES})"
)
_COLUMN = 1.16  # right end of the column of the bars' values, in widths of the axis
_LOG_SPAN = 8.0  # positive values that span more than this factor get a logarithmic axis


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One run's values over its steps; `slot` is the run's place in the report."""

    slot: int
    steps: np.ndarray
    values: np.ndarray


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """One measured value with its interval; `hollow` marks untrained weights."""

    row: int
    slot: int
    value: float
    low: float | None = None
    high: float | None = None
    hollow: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One share. `slot` None: of a reference outside the report, grey and hatched. `tick`: what
    chance would give."""

    row: int
    slot: int | None
    value: float
    tick: float | None = None


def curve_plot(
    curves: Sequence[Curve],
    *,
    unit: str,
    label: str,
    from_zero: bool = False,
    smooth: bool = True,
) -> Html:
    """Values over steps: thin as logged, heavy as a running mean. The axis picks its scale.

    Args:
      unit: text of the y axis.
      label: what the plot shows, for readers who cannot see it.
      from_zero: the y axis starts at zero (rates, shares).
      smooth: draw the running mean of logs that are long enough; False for what has no noise.
    """
    figure, axes = _axes(5.4, 2.75)
    for curve in curves:
        style = "-" if curve.slot < SERIES else (0, (4, 1.5))
        color = _SLOTS[curve.slot % SERIES]
        mean = running_mean(curve.values) if smooth else None
        marker = "o" if len(curve.steps) == 1 else None
        width, alpha = (1.6, 1.0) if mean is None else (0.7, 0.35)
        drawn = _decimated(curve.steps, curve.values)
        axes.plot(*drawn, ls=style, color=color, lw=width, alpha=alpha, marker=marker, ms=3)
        if mean is not None:
            axes.plot(*_decimated(curve.steps, mean), ls=style, color=color, lw=1.7)
    values = np.concatenate([c.values[np.isfinite(c.values)] for c in curves] or [np.zeros(0)])
    axes.set_xlabel("step", color=_MUTED)
    axes.set_ylabel(_whole(unit), color=_MUTED, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
    if (
        not from_zero
        and values.size
        and values.min() > 0
        and np.ptp(np.log(values)) > np.log(_LOG_SPAN)
    ):
        _logarithmic(axes, values)
        return _svg(figure, label)
    axes.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=True)
    axes.yaxis.offsetText.set(color=_MUTED, size=8)
    if from_zero:
        axes.set_ylim(0, 1.08 * values.max() if values.size and values.max() > 0 else 1)
    return _svg(figure, label)


def dot_plot(
    dots: Sequence[Dot],
    rows: Sequence[str],
    chance: Sequence[float],
    *,
    unit: str,
    label: str,
    limit: float | None = 100.0,
) -> Html:
    """Values by row, one colour per run, 95 % intervals as whiskers, chance as a grey tick.

    Args:
      limit: end of the axis; None: as far as the values go.
    """
    dots = [dot for dot in dots if known(dot.value)]
    chance = [value if known(value) else math.nan for value in chance]
    per_row = max((sum(d.row == row for d in dots) for row in range(len(rows))), default=1)
    lines = max((row.count("\n") + 1 for row in rows), default=1)
    height = max(0.3, 0.13 * per_row + 0.12, 0.17 * lines + 0.1)  # inches; room for the labels
    figure, axes = _axes(5.4, 0.75 + len(rows) * height)
    for row in range(len(rows)):
        mine = [dot for dot in dots if dot.row == row]
        spread = np.linspace(-0.3, 0.3, len(mine)) if len(mine) > 1 else [0.0]
        for dot, shift in zip(mine, spread):
            color = _SLOTS[dot.slot % SERIES]
            if known(dot.low) and known(dot.high):
                axes.plot([dot.low, dot.high], [row + shift] * 2, color=color, lw=1.3, alpha=0.6)
            face = "none" if dot.hollow else color
            axes.plot(dot.value, row + shift, "o", ms=5.2, mec=color, mfc=face, mew=1.3)
    axes.vlines(
        chance, np.arange(len(rows)) - 0.42, np.arange(len(rows)) + 0.42, color=_MUTED, lw=1.4
    )
    if limit is None:
        limit = _end_of_axis([*chance, *(end for dot in dots for end in (dot.value, dot.high))])
    axes.set_xlim(0, 1.02 * limit)
    _name_rows(axes, rows, unit)
    return _svg(figure, label)


def bar_plot(bars: Sequence[Bar], rows: Sequence[str], *, unit: str, label: str) -> Html:
    """Shares by row as horizontal bars, one colour per run, their values right of the axis."""
    per_row = max((sum(bar.row == row for bar in bars) for row in range(len(rows))), default=1)
    figure, axes = _axes(5.4, 0.75 + len(rows) * max(0.34, 0.17 * per_row + 0.1))
    height = 0.8 / per_row
    for row in range(len(rows)):
        mine = [bar for bar in bars if bar.row == row]
        for place, bar in enumerate(mine):
            y = row + (place - (len(mine) - 1) / 2) * height
            color = _MUTED if bar.slot is None else _SLOTS[bar.slot % SERIES]
            face, hatch = ("none", "////") if bar.slot is None else (color, None)
            if known(bar.value):
                wide = 0.82 * height
                axes.barh(y, bar.value, wide, color=face, edgecolor=color, hatch=hatch, lw=0.6)
            _value_beside(axes, y, number(bar.value), color)
            if known(bar.tick):
                reach = 0.41 * height
                axes.vlines(bar.tick, y - reach, y + reach, color=_INK, lw=1.3)
    head = {"transform": axes.transAxes, "va": "bottom", "ha": "right", "size": 7.5}
    axes.text(_COLUMN, 1.0, "bar, %", color=_MUTED, **head)
    axes.set_xlim(0, 1.04 * _end_of_axis([end for bar in bars for end in (bar.value, bar.tick)]))
    _name_rows(axes, rows, unit)
    return _svg(figure, label)


def _value_beside(axes, y: float, text: str, color: str) -> None:
    """In a column of its own: beside its bar a value could be read as that of the tick."""
    place = axes.get_yaxis_transform()
    axes.text(_COLUMN, y, text, transform=place, va="center", ha="right", size=7.5, color=color)


def _end_of_axis(values: Sequence[float | None]) -> float:
    """The greatest of the known values; 1 where none is above 0."""
    return max((value for value in values if known(value) and value > 0), default=1.0)


def _name_rows(axes, rows: Sequence[str], unit: str) -> None:
    """Names on the left, the first row at the top, a grid along the values."""
    axes.set_yticks(range(len(rows)), [_whole(row) for row in rows], color=_INK, parse_math=False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(unit, color=_MUTED)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=_LINE, lw=0.7)
    axes.tick_params(axis="y", length=0, labelsize=9)


def running_mean(values: np.ndarray) -> np.ndarray | None:
    """Centred mean over about 1/25 of the log (at least 5 lines); None for short logs.

    Values that are not finite are left out. Towards the ends the window shrinks on both sides
    alike, so that a slope is not bent; where less than half of it is left there is no mean (NaN).
    """
    count = len(values)
    if count < _LEAST_LINES:
        return None
    half = max(_LEAST_HALF, count // _WINDOW_SHARE // 2)
    good = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0))])
    number = np.concatenate([[0], np.cumsum(good)])
    centre = np.arange(count)
    reach = np.minimum(half, np.minimum(centre, count - 1 - centre))
    low, high = centre - reach, centre + reach + 1
    finite = number[high] - number[low]
    return np.where(
        (finite > 0) & (2 * reach >= half),
        (total[high] - total[low]) / np.maximum(finite, 1),
        np.nan,
    )


def _decimated(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `_POINTS` points: the least and the greatest value of every stretch, in order."""
    if len(steps) <= _POINTS:
        return steps, values
    keep = {0, len(steps) - 1}
    for stretch in np.array_split(np.arange(len(steps)), _POINTS // 2 - 1):
        known = np.where(np.isfinite(values[stretch]), values[stretch], 0)
        keep |= {int(stretch[np.argmin(known)]), int(stretch[np.argmax(known)])}
    index = np.array(sorted(keep))
    return steps[index], values[index]


def _whole(text: str) -> str:
    """Without the half characters that JSON can hold and Matplotlib refuses."""
    return text.encode("utf-8", "replace").decode()


def _axes(width: float, height: float):
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_LINE)
    axes.tick_params(colors=_MUTED, labelsize=8, width=0.7, length=3, which="both")
    axes.grid(axis="y", color=_LINE, lw=0.7)
    axes.set_axisbelow(True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_size(8.5)
    return figure, axes


def _logarithmic(axes, values: np.ndarray) -> None:
    axes.set_yscale("log")
    low, high = values.min(), values.max()
    if math.log(high) - math.log(low) < math.log(
        1000
    ):  # powers of ten alone would be too few to read values off
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if low >= 1e-4 and high < 1e5:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel(f"{axes.get_ylabel()} (log)", color=_MUTED, parse_math=False)


def _svg(figure: Figure, label: str) -> Html:
    label, buffer = _whole(label), io.StringIO()
    # Text stays text (the page's font, searchable); ids do not change from one run to the next.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _themed(buffer.getvalue(), label)


def _themed(svg: str, label: str) -> Html:
    """Strips what an inline SVG does not need and turns the stand-in colours into variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'<style type="text/css">.*?</style>', "", svg, flags=re.S)
    svg = re.sub(r' id="(?![pmh][0-9a-f]{10}")[^"]*"', "", svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, f"var({variable})")
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)
    return Html(svg)
