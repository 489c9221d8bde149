"""`instap ablate --config=FILE --table=NAME --out=DIR`: a table of configurations over seeds."""

from pathlib import Path

from absl import flags

from instap_jax import config_check
from instap_jax.errors import UserError
from instap_jax.study.runs import Suites
from instap_jax.study.study import Study, run_study
from instap_jax.study.summary import MEAN_RECALL, markdown
from instap_jax.study.tables import TABLES
from instap_jax.train.stop import StopRequest


def define_flags(values: flags.FlagValues) -> None:
    config_check.define_flag(values)
    names = ", ".join(TABLES)
    flags.DEFINE_string("table", None, f"which rows: {names}", required=True, flag_values=values)
    flags.DEFINE_string(
        "out", None, "directory of the study; another table may share it", required=True,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_list("seeds", ["0", "1", "2"], "seeds of every row", flag_values=values)
    flags.DEFINE_string("videos", "", "video suites to evaluate on: DIR:SPLIT, ...",
                        flag_values=values)  # fmt: skip
    flags.DEFINE_string("images", "", "image suites", flag_values=values)
    flags.DEFINE_enum(
        "equal", "steps", ["steps", "time"], "what the rows have in common: the number of steps, "
        "or the time they take", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_list(
        "metrics", [MEAN_RECALL], f"of retrieval: {MEAN_RECALL}, t2v/R@1, v2t/R@1, ...",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "jobs", 1, "runs at a time, each with its share of the cores", lower_bound=1,
        flag_values=values,
    )  # fmt: skip


def run(values: flags.FlagValues) -> None:
    study = Study(
        loaded=config_check.load(values),
        table=values["table"].value,
        seeds=_seeds(values["seeds"].value),
        suites=_suites(values),
        out=Path(config_check.absolute(values["out"].value)),
        equal=values["equal"].value,
        metrics=tuple(values["metrics"].value),
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


def _suites(values: flags.FlagValues) -> Suites:
    def absolute(name: str) -> str:
        parts = (part.strip() for part in values[name].value.split(",") if part.strip())
        return ",".join(map(config_check.absolute, parts))

    suites = Suites(videos=absolute("videos"), images=absolute("images"))
    if not suites.videos and not suites.images:
        raise UserError("no suite: give --videos=DIR:SPLIT or --images=DIR:SPLIT")
    return suites
