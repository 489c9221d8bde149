"""`report.html`: runs side by side on one page that carries everything with it.

What the runs are, their results with protocols, training curves, samples with boxes, and what each
configuration changed. The page has no scripts and needs no other file.
"""

import contextlib
import dataclasses
import datetime
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import instap_jax
from instap_jax.data import preview, schema
from instap_jax.data.media import MediaError
from instap_jax.errors import UserError
from instap_jax.evaluation.report_gallery import jpeg_source
from instap_jax.evaluation.report_html import DOCTYPE, Html, join, note, page, swatch, table, tag
from instap_jax.evaluation.report_plots import SMOOTHING, Curve, curve_plot
from instap_jax.evaluation.report_results import results_sections
from instap_jax.evaluation.report_runs import Run, facts, load_runs, scalar_names, series
from instap_jax.types import Sample

_PER_GROUP, _SHEETS = 2, 6  # samples drawn of every split and kind, and in all


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Panel:
    """How a logged scalar is drawn. `scale` turns it into `unit`."""

    title: str
    unit: str
    from_zero: bool = False
    smooth: bool = True
    scale: float = 1.0


# What every report shows, in this order.
_PANELS = {
    "loss": _Panel(title="Loss", unit="loss"),
    "loss_video": _Panel(title="Loss of video batches", unit="loss"),
    "loss_image": _Panel(title="Loss of image batches", unit="loss"),
    "learning_rate": _Panel(
        title="Learning rate", unit="learning rate", from_zero=True, smooth=False
    ),
    "grad_norm": _Panel(title="Gradient norm", unit="global L2 norm"),
    "param_norm": _Panel(title="Parameter norm", unit="global L2 norm", smooth=False),
    "examples_per_second": _Panel(title="Throughput", unit="samples per second", from_zero=True),
    "data_wait_share": _Panel(title="Data wait", unit="% of step time", from_zero=True),
    "mfu": _Panel(title="Model FLOPs utilisation", unit="% of peak", from_zero=True, scale=100),
}
# Shown in another form, or of no use as a curve.
_NOT_CURVES = {
    "step", "time", "step_seconds", "data_wait_seconds", "compute_seconds", "start_seconds",
}  # fmt: skip


def write_report(
    workdirs: Sequence[Path | str],
    out: Path | str,
    *,
    annotations: Path | str | None = None,
    media: Path | str | None = None,
) -> Path:
    """Writes the report of one or more runs; an existing page is replaced in one move.

    Args:
      workdirs: of the runs; their order is the order (and colours) of the page.
      out: the HTML file.
      annotations, media: an annotation file and its media root, for the samples; both or neither.

    Raises:
      UserError: no such run, a broken file of a run, a fault of the annotation file, or `out`
        is something else than a page or cannot be written.
    """
    out = Path(out)
    _check_target(out)
    text = render_report(load_runs(workdirs), _sheets(annotations, media))
    aside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8", errors="replace")  # JSON can hold half characters
        os.replace(aside, out)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise UserError(f"{out} cannot be written: {error.strerror}") from error
    return out


def _check_target(out: Path) -> None:
    """Only a page may be replaced: a run's log has a name that is as easily given."""
    try:
        if out.is_dir():
            raise UserError(f"--out {out} is a directory; name the HTML file")
        if not out.exists():
            return
        is_page = out.is_file() and _begins_as_page(out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be read: {error.strerror}") from error
    if not is_page:
        raise UserError(f"--out {out} exists and is not an HTML page; name another file")


def _begins_as_page(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(DOCTYPE)).lower() == DOCTYPE.encode()


def render_report(runs: Sequence[Run], samples: Html) -> Html:
    """The page. `samples`: the inside of its samples section, '' to leave that out."""
    names = ", ".join(run.name for run in runs)
    return page(
        f"InstAP report: {names}",
        _header(runs),
        _overview(runs),
        results_sections(runs),
        _curves(runs),
        join(tag("h2", "Samples"), samples) if samples else Html(""),
        _configurations(runs),
        _footer(),
    )


def _header(runs: Sequence[Run]) -> Html:
    now = datetime.datetime.now(datetime.UTC)
    count = "one run" if len(runs) == 1 else f"{len(runs)} runs side by side"
    return tag(
        "header",
        tag("h1", "InstAP report"),
        tag("p", f"{count} · {now:%Y-%m-%d %H:%M} UTC", class_="lead"),
        _legend(runs, "legend"),
    )


def _legend(runs: Sequence[Run], class_: str = "legend small") -> Html:
    return tag("ul", *(tag("li", swatch(r.slot), r.name) for r in runs), class_=class_)


def _overview(runs: Sequence[Run]) -> Html:
    columns = [facts(run) for run in runs]
    labels = dict.fromkeys(label for column in columns for label in column)
    rows = [[label, *(column.get(label, "—") for column in columns)] for label in labels]
    header = ["", *(join(swatch(run.slot), run.name) for run in runs)]
    gaps = [note(tag("b", run.name), ": ", text) for run in runs for text in run.missing]
    facts_table = table(header, rows, class_="facts", label="Facts about the runs")
    return join(tag("h2", "Runs"), facts_table, *gaps)


def _curves(runs: Sequence[Run]) -> Html:
    """Panels by stage: the losses of different stages are different quantities."""
    logged = [run for run in runs if run.lines]
    if not logged:
        return join(tag("h2", "Training"), note("None of these runs has a metrics.jsonl."))
    parts = [
        tag("h2", "Training"),
        note(f"Thin: as logged. Heavy: {SMOOTHING}. Axes marked (log) are logarithmic."),
    ]
    for stage in dict.fromkeys(run.stage for run in logged):
        mine = [run for run in logged if run.stage == stage]
        parts += [tag("h3", f"Stage: {stage}"), _legend(mine)]
        parts.append(_panels(mine, _PANELS, stage))
        others = {name: _Panel(title=name, unit=name) for name in _other_names(mine)}
        if others:
            summary = tag("summary", f"More logged quantities ({len(others)})")
            parts.append(tag("details", summary, _panels(mine, others, stage)))
    return join(*parts)


def _panels(runs: Sequence[Run], panels: dict[str, _Panel], stage: str) -> Html:
    figures = []
    for name, panel in panels.items():
        curves = [curve for run in runs if (curve := _curve(run, name, panel.scale))]
        if curves:
            plot = curve_plot(
                curves,
                unit=panel.unit,
                label=f"{panel.title} over steps, stage {stage}",
                from_zero=panel.from_zero,
                smooth=panel.smooth,
            )
            figures.append(tag("figure", tag("figcaption", panel.title), plot))
    return tag("div", *figures, class_="panels")


def _curve(run: Run, name: str, scale: float) -> Curve | None:
    if name == "data_wait_share":
        steps, waited, total = series(run, "data_wait_seconds", "step_seconds")
        values = 100 * waited / np.maximum(total, 1e-12)
    else:
        steps, values = series(run, name)
    return Curve(slot=run.slot, steps=steps, values=scale * values) if len(steps) else None


def _other_names(runs: Sequence[Run]) -> list[str]:
    known = _NOT_CURVES | set(_PANELS)
    return [
        name
        for name in scalar_names(runs)
        if name not in known and not name.startswith(("faults/", "kind_"))
    ]


def _sheets(annotations: Path | str | None, media: Path | str | None) -> Html:
    """Contact sheets of a few samples of every split and kind."""
    if annotations is None and media is None:
        return Html("")
    if annotations is None or media is None:
        raise UserError("--annotations and --media belong together: give both or neither")
    media = Path(media)
    if not media.is_dir():
        raise UserError(f"media root {media} is not a directory")
    figures = []
    for sample in _choose(Path(annotations)):
        try:
            picture = preview.sample_sheet(sample, media)
        except MediaError as error:
            figures.append(note(f"{sample.id}: {sample.media}: {error}"))
            continue
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90, subsampling=0)
        source = jpeg_source(buffer.getvalue())
        alt = f"Sample {sample.id}: {' / '.join(sample.captions)}"
        picture_tag = tag("img", src=source, alt=alt, loading="lazy")
        figures.append(tag("figure", picture_tag, class_="sheet"))
    return tag("div", *figures, class_="sheets")


def _choose(annotations: Path) -> list[Sample]:
    """At most two samples of every split and kind, drawn in one pass, in the order of the file."""
    rng = np.random.default_rng([0])
    kept: dict[tuple, list[Sample]] = {}
    seen: dict[tuple, int] = {}
    for sample in schema.read_annotations(annotations):
        group = (sample.split, sample.kind)
        mine = kept.setdefault(group, [])
        seen[group] = seen.get(group, 0) + 1
        place = len(mine) if len(mine) < _PER_GROUP else int(rng.integers(seen[group]))
        if place < _PER_GROUP:
            mine[place : place + 1] = [sample]
    # One of every group first, so that no split is left out.
    chosen = [mine[i] for i in range(_PER_GROUP) for mine in kept.values() if i < len(mine)]
    return sorted(chosen[:_SHEETS], key=lambda sample: sample.line)


def _configurations(runs: Sequence[Run]) -> Html:
    """One table of all that any run changed, what differs between the runs in bold."""
    known = [run for run in runs if run.config]
    parts = [tag("h2", "Configuration")]
    if not known:
        return join(*parts, note("None of these runs has a config.json."))
    text = "What differs from the library's defaults; grey: the default. Bold: the runs differ."
    parts.append(note(text))
    for run in known:
        source = " ".join([run.file or "no file", *run.overrides])
        parts.append(tag("p", swatch(run.slot), f"{run.name}: {source}", class_="protocol"))
    header = ["key", "default", *(join(swatch(run.slot), run.name) for run in known)]
    parts.append(table(header, _changes(known), class_="diff", label="Changed settings"))
    for run in known:
        resolved = json.dumps(run.config, indent=1, ensure_ascii=False)
        summary = tag("summary", "Complete configuration of ", swatch(run.slot), run.name)
        parts.append(tag("details", summary, tag("pre", resolved)))
    return join(*parts)


def _changes(runs: Sequence[Run]) -> list[list[str]]:
    defaults = {key: pair[0] for run in runs for key, pair in run.changed.items()}
    rows = []
    for key, default in defaults.items():
        values = [run.changed[key][1] if key in run.changed else default for run in runs]
        cells: list[str] = []
        for run, value in zip(runs, values):
            if key not in run.changed:
                cells.append(tag("span", _value(value), class_="lead"))
            elif any(other != value for other in values):
                cells.append(tag("b", _value(value)))
            else:
                cells.append(_value(value))
        rows.append([key, _value(default), *cells])
    return rows


def _value(value) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _footer() -> Html:
    text = f"Written by instap_jax {instap_jax.__version__}. Self-contained: no scripts, no links."
    return tag("footer", text)
