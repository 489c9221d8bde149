"""`instap train --config=FILE --workdir=DIR [--config.key=value ...]`: any stage."""

from pathlib import Path

from absl import flags

from instap_jax import config_check
from instap_jax.train.stop import StopRequest


def define_flags(values: flags.FlagValues) -> None:
    config_check.define_flag(values)
    flags.DEFINE_string("workdir", None, "directory of the run", required=True, flag_values=values)


def run(values: flags.FlagValues) -> None:
    start(config_check.load(values), values["workdir"].value)


def start(loaded: config_check.LoadedConfig, directory: str) -> None:
    """Trains to the end, fresh or resumed."""
    workdir = config_check.local_workdir(directory)
    config_check.check_workdir(loaded.config, workdir)
    # Only now JAX: a wrong key or path has already been reported.
    with StopRequest(hold=False) as stop:
        from instap_jax import distributed

        with distributed.joined(loaded.config.distributed):
            train_joined(loaded, workdir, stop)


def train_joined(loaded: config_check.LoadedConfig, workdir: Path, stop: StopRequest) -> None:
    """What every process does once it is joined with the others.

    Raises:
      UserError: the workdir holds another configuration's run.
    """
    from instap_jax import distributed
    from instap_jax.evaluation.validation import make_validate
    from instap_jax.train.loop import train

    def prepare() -> None:
        config_check.record(loaded, workdir)
        config_check.keep_tokenizer(loaded.config, workdir)

    distributed.first(prepare)
    distributed.check_shared(workdir / "config.json")
    train(loaded.config, workdir, stop, make_validate)
