"""`instap ablate --config=FILE --table=NAME --out=DIR`: a table of configurations over seeds."""

from pathlib import Path

import numpy as np
from absl import flags

from instap_jax import config_check
from instap_jax.data.records import open_source
from instap_jax.errors import UserError
from instap_jax.study.runs import Evaluation
from instap_jax.study.study import Study, run_study
from instap_jax.study.summary import markdown
from instap_jax.study.tables import TABLES
from instap_jax.train.stop import StopRequest


def define_flags(values: flags.FlagValues) -> None:
    def text(name: str, default: str | None, help_text: str, *, required: bool = False) -> None:
        flags.DEFINE_string(name, default, help_text, required=required, flag_values=values)

    def names(name: str, default: list[str], help_text: str) -> None:
        flags.DEFINE_list(name, default, help_text, flag_values=values)

    config_check.define_flag(values)
    text("table", None, f"which rows: {', '.join(TABLES)}", required=True)
    text("out", None, "directory of the runs; tables that share rows may share it", required=True)
    names("seeds", ["0", "1", "2"], "of every row, separated by commas")
    names("task", ["retrieval"], "of `instap evaluate`")
    text("videos", "", "video suites to evaluate on: DIR:SPLIT, separated by commas")
    text("images", "", "image suites")
    text("probe_videos", "", "DIR:SPLIT that probes are fitted on")
    text("probe_images", "", "the same for images")
    names("metrics", ["mean_recall"], "columns: mean_recall, t2v/R@1, size/accuracy, ...")
    flags.DEFINE_enum(
        "equal",
        "steps",
        ["steps", "time"],
        "what rows have in common: the number of steps, or the time that they take",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "jobs",
        1,
        "runs at a time, each with its share of the cores",
        lower_bound=1,
        flag_values=values,
    )


def run(values: flags.FlagValues) -> None:
    evaluation = _evaluation(values)
    study = Study(
        loaded=config_check.load(values),
        table=values["table"].value,
        seeds=_seeds(values["seeds"].value),
        evaluation=evaluation,
        out=Path(config_check.absolute(values["out"].value)),
        equal=values["equal"].value,
        metrics=_metrics(values["metrics"].value, evaluation.task),
        jobs=values["jobs"].value,
    )
    with StopRequest() as stop:
        summary = run_study(study, stop)
    print(markdown(summary))
    print(f"{study.stem}.md, .json, .png")


def _seeds(texts: list[str]) -> tuple[int, ...]:
    if not texts or not all(text.isdecimal() for text in texts):
        raise UserError(f"--seeds={','.join(texts)}: must be numbers separated by commas")
    return tuple(dict.fromkeys(map(int, texts)))


def _metrics(names: list[str], task: str) -> tuple[str, ...]:
    """The columns; those of retrieval are known now, others when the first run is measured."""
    from instap_jax.evaluation.results import flatten
    from instap_jax.evaluation.retrieval import Positives, metrics_of_ranks

    if not names:
        raise UserError("--metrics is empty: give at least one, as mean_recall")
    one = np.ones(1, int)
    known = flatten(metrics_of_ranks(one, one, Positives.of([[0]], 1)))
    for name in names if task == "retrieval" else ():
        if name not in known:
            raise UserError(f"--metrics={name}: task retrieval measures {', '.join(known)}")
    return tuple(names)


def _evaluation(values: flags.FlagValues) -> Evaluation:
    """What to measure; wrong names are found now, not when the first run has been trained."""
    from instap_jax.evaluation.context import parse_suites
    from instap_jax.evaluation.tasks import TASKS

    def absolute(name: str) -> str:
        parts = (part.strip() for part in values[name].value.split(",") if part.strip())
        return ",".join(map(config_check.absolute, parts))

    given = {name: absolute(name) for name in ("videos", "images", "probe_videos", "probe_images")}
    tasks = ",".join(values["task"].value)
    if not tasks or set(tasks.split(",")) - TASKS.keys():
        raise UserError(f"--task={tasks}: tasks are {', '.join(TASKS)}")
    if not given["videos"] and not given["images"]:
        raise UserError("no suite: give --videos=DIR:SPLIT or --images=DIR:SPLIT")
    suites = parse_suites(given["videos"], given["images"])
    # Each by itself: what probes are fitted on is not measured and may share a split name.
    suites += parse_suites(given["probe_videos"], "") + parse_suites("", given["probe_images"])
    for suite in suites:
        open_source(suite.directory, suite.split, suite.kind)
    return Evaluation(task=tasks, **given)
