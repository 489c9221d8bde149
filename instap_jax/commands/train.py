"""`instap train --config=FILE --workdir=DIR [--config.key=value ...]`: any stage."""

from absl import flags

from instap_jax import config_check
from instap_jax.train.stop import StopRequest


def define_flags(values: flags.FlagValues) -> None:
    config_check.define_flag(values)
    flags.DEFINE_string("workdir", None, "directory of the run", required=True, flag_values=values)


def run(values: flags.FlagValues) -> None:
    loaded = config_check.load(values)
    workdir = config_check.local_workdir(values["workdir"].value)
    config_check.record(loaded, workdir)
    # Only now JAX: a wrong key or path has already been reported.
    with StopRequest() as stop:
        from instap_jax.train.loop import train

        train(loaded.config, workdir, stop)
