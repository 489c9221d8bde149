"""`instap select --runs=A,B --videos=DIR:val --config=configs/classify_l16.py:FILE --workdir=DIR`:
the stage-1 run of the lowest validation loss, fine-tuned and measured."""

from pathlib import Path

from absl import flags

from instap_jax import config_check
from instap_jax.commands import train
from instap_jax.errors import UserError
from instap_jax.train.stop import StopRequest


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
    workdir = config_check.local_workdir(values["workdir"].value)
    if not (workdir / "config.json").exists():  # of a run that goes on, `train` compares it
        config_check.check_workdir(loaded.config, workdir)
    validation, test = _suites(values)
    runs = [Path(config_check.absolute(run)) for run in values["runs"].value]
    import jax

    from instap_jax import distributed
    from instap_jax.evaluation.context import Options
    from instap_jax.evaluation.selection import rank_candidates
    from instap_jax.evaluation.tasks import evaluate

    size = values["batch_size"].value
    with distributed.joined(loaded.config.distributed):
        ranked = rank_candidates(runs, validation, batch_size=size)
        if jax.process_index() == 0:
            _show(ranked, validation.split)
        loaded.config.checkpoint.init_from = str(ranked[0].workdir)
        with StopRequest(hold=False) as stop:
            train.train_joined(loaded, workdir, stop)
        evaluate(workdir, ["classification"], test, Options(batch_size=size))


def _show(ranked, split: str) -> None:
    print(f"distillation loss (1) on {split}, newest checkpoint, same masks for all:")
    for candidate in ranked:
        print(f"  {candidate.loss:.5f}  {candidate.workdir} at step {candidate.step}")
    print(f"fine-tuning {ranked[0].workdir}")


def _suites(values: flags.FlagValues):
    """(that of `--videos`, those of `--test_videos`), found to be there before anything is done."""
    from instap_jax.data.records import open_source
    from instap_jax.evaluation.context import parse_suites

    validation, test = (parse_suites(values[name].value, "") for name in ("videos", "test_videos"))
    if not test:
        raise UserError("--test_videos names no suite: give DIR:SPLIT")
    for suite in (*validation, *test):
        open_source(suite.directory, suite.split, suite.kind)
    if len(validation) != 1:
        raise UserError(f"--videos={values['videos'].value}: give one DIR:SPLIT")
    return validation[0], test
