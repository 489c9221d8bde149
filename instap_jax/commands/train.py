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


def start(loaded: config_check.LoadedConfig, directory: str) -> Path:
    """Trains to the end, fresh or resumed, and returns the workdir."""
    workdir = config_check.local_workdir(directory)
    config_check.check_workdir(loaded.config, workdir)
    # Only now JAX: a wrong key or path has already been reported.
    with StopRequest(hold=False) as stop:
        from instap_jax import distributed
        from instap_jax.evaluation.validation import make_validate
        from instap_jax.train.loop import train

        with distributed.joined(loaded.config.distributed):
            distributed.first(lambda: config_check.record(loaded, workdir))
            distributed.check_shared(workdir / "config.json")
            train(loaded.config, workdir, stop, make_validate)
    return workdir
