"""The results of a report: one table per protocol, the runs measured under it side by side."""

from collections.abc import Callable, Sequence

from instap_jax.evaluation.report_attention import attention_section
from instap_jax.evaluation.report_errors import errors_section
from instap_jax.evaluation.report_groups import groups, heading, remarks
from instap_jax.evaluation.report_html import Html, join, note, swatch, table, tag
from instap_jax.evaluation.report_numbers import DASH, number
from instap_jax.evaluation.report_retrieval import choice_section, probe_section, retrieval_section
from instap_jax.evaluation.report_runs import Run
from instap_jax.evaluation.report_tuned import classification_section, grounding_section
from instap_jax.evaluation.results import flatten

# What a section raises on metrics that another version of the library named or nested otherwise.
_OTHER_METRICS = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError)


def results_sections(runs: Sequence[Run]) -> Html:
    """A section per task that any of the runs was measured on."""
    found = sorted({task for run in runs for task in run.results})
    tasks = [
        *(task for task in _SECTIONS if task in found),
        *(t for t in found if t not in _SECTIONS),
    ]
    sections = [_section(task, runs) for task in tasks]
    if not sections:
        text = "None of these runs has results: run instap evaluate first."
        return join(tag("h2", "Results"), note(text))
    return join(*sections, _provenance(runs))


def _section(task: str, runs: Sequence[Run]) -> Html:
    if task not in _SECTIONS:
        return _any_section(task, runs)
    try:
        return _SECTIONS[task](runs)
    except _OTHER_METRICS:
        return _any_section(task, runs)


def _provenance(runs: Sequence[Run]) -> Html:
    rows = []
    for run in runs:
        for task, result in run.results.items():
            versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
            head = join(swatch(run.slot), run.name)
            hashes = [result.checkpoint_hash or "—", result.config_hash]
            rows.append([head, task, result.written, *hashes, versions])
    header = ["run", "task", "measured (UTC)", "checkpoint hash", "config hash", "with"]
    return tag(
        "details",
        tag("summary", "When and with which configuration and versions this was measured"),
        table(header, rows, class_="facts", label="When and with what was measured"),
    )


def _any_section(task: str, runs: Sequence[Run]) -> Html:
    """Tasks without a layout of their own: every number by name, runs side by side."""
    parts = [tag("h2", task.replace("_", " ").capitalize())]
    for group in groups(runs, task):
        flat = [flatten(entry.measurement.metrics) for entry in group]
        names = dict.fromkeys(name for one in flat for name in one)
        rows = [[name, *(_number(one.get(name)) for one in flat)] for name in names]
        header = ["metric", *(entry.head for entry in group)]
        parts += [
            heading(group),
            table(header, rows, label=f"{task}: every number"),
            remarks(group),
        ]
    return join(*parts)


def _number(value) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number(value, ".4g")
    return DASH if value is None else str(value)


# In the order of the page; other tasks follow.
_SECTIONS: dict[str, Callable[[Sequence[Run]], Html]] = {
    "retrieval": retrieval_section,
    "grounding": grounding_section,
    "classification": classification_section,
    "errors": errors_section,
    "attention": attention_section,
    "choice": choice_section,
    "probe": probe_section,
}
