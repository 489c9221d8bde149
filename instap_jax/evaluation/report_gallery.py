"""Pictures of cases in a report, inline."""

import base64
from collections.abc import Mapping
from pathlib import Path

from instap_jax.evaluation.gallery import Case
from instap_jax.evaluation.report_html import Html, join, swatch, tag
from instap_jax.evaluation.report_runs import Run
from instap_jax.evaluation.results import DIRECTORY


def jpeg_source(data: bytes) -> str:
    """A JPEG file as the `src` of a picture."""
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def picture(run: Run, task: str, case: Case, label: str, caption: str) -> Html:
    """One strip of a case with its caption; `label` names it in the case."""
    path = Path(run.workdir) / DIRECTORY / task / case.pictures[label]
    image = tag(
        "img", src=jpeg_source(path.read_bytes()), alt=f"{label}: {caption}", loading="lazy"
    )
    return tag("div", image, tag("p", tag("b", label), f" {caption}"), class_="strip")


def marked(run: Run, *text: str) -> Html:
    """Text after the run's colour and name."""
    return join(swatch(run.slot), tag("b", run.name), " ", *text)


def of_suites(runs: list[Run], task: str) -> Mapping[str, list[tuple[Run, Case]]]:
    """The cases of all runs by suite, in the order of the runs."""
    found: dict[str, list[tuple[Run, Case]]] = {}
    for run in runs:
        for case in run.cases.get(task, ()):
            found.setdefault(case.suite, []).append((run, case))
    return found
