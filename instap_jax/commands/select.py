"""`instap select --runs=A,B --videos=DIR:val --config=configs/classify_l16.py:FILE --workdir=DIR`:
the stage-1 run of the lowest validation loss, fine-tuned and measured."""

from pathlib import Path

from absl import flags

from instap_jax import config_check
from instap_jax.commands import train
from instap_jax.errors import UserError


def define_flags(values: flags.FlagValues) -> None:
    train.define_flags(values)

    def text(name: str, help_text: str, *, required: bool = True) -> None:
        flags.DEFINE_string(name, None, help_text, required=required, flag_values=values)

    flags.DEFINE_list(
        "runs", None, "stage-1 runs to choose from", required=True, flag_values=values
    )
    text("videos", "DIR:SPLIT on which the candidates' distillation loss is measured")
    text("test_videos", "DIR:SPLIT with labels, to measure the fine-tuned run on")
    flags.DEFINE_integer(
        "batch_size", 32, "samples a step of measuring", lower_bound=1, flag_values=values
    )


def run(values: flags.FlagValues) -> None:
    loaded = config_check.load(values)
    if loaded.config.stage != "classify":
        raise UserError(
            f"--config is of stage {loaded.config.stage!r}; `select` ends in 'classify'"
        )
    if loaded.config.checkpoint.init_from:
        raise UserError("config.checkpoint.init_from is what `select` finds out; leave it unset")
    from instap_jax.data.records import open_source
    from instap_jax.evaluation.context import Options, parse_suites
    from instap_jax.evaluation.selection import rank_candidates
    from instap_jax.evaluation.tasks import evaluate

    validation, test = (parse_suites(values[name].value, "") for name in ("videos", "test_videos"))
    if not test:
        raise UserError("--test_videos names no suite: give DIR:SPLIT")
    for suite in (*validation, *test):
        open_source(suite.directory, suite.split, suite.kind)  # before, not after the training
    if len(validation) != 1:
        raise UserError(f"--videos={values['videos'].value}: give one DIR:SPLIT")
    runs = [Path(config_check.absolute(run)) for run in values["runs"].value]
    ranked = rank_candidates(
        runs,
        validation[0],
        batch_size=values["batch_size"].value,
    )
    print(f"distillation loss (1) on {validation[0].split}, newest checkpoint, same masks for all:")
    for candidate in ranked:
        print(f"  {candidate.loss:.5f}  {candidate.workdir} at step {candidate.step}")
    loaded.config.checkpoint.init_from = str(ranked[0].workdir)
    print(f"fine-tuning {ranked[0].workdir}")
    workdir = train.start(loaded, values["workdir"].value)
    evaluate(workdir, ["classification"], test, Options(batch_size=values["batch_size"].value))
