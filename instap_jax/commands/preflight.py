"""`instap preflight --config=FILE --workdir=DIR [--hosts=N] [--chips=N]`: before a pod run."""

from absl import flags

from instap_jax import config_check


def define_flags(values: flags.FlagValues) -> None:
    config_check.define_flag(values)
    flags.DEFINE_string("workdir", None, "of the run to be", required=True, flag_values=values)
    for name in ("hosts", "chips"):
        flags.DEFINE_integer(
            name, None, f"{name} that there must be", lower_bound=1, flag_values=values
        )
    flags.DEFINE_float(
        "need",
        None,
        "samples a second that the input must give (default: what the timed steps take)",
        lower_bound=0.0,
        flag_values=values,
    )
    flags.DEFINE_float(
        "seconds", 15.0, "for which the input is measured", lower_bound=1.0, flag_values=values
    )


def run(values: flags.FlagValues) -> int:
    loaded = config_check.load(values)
    workdir = config_check.local_workdir(values["workdir"].value)
    # Only now JAX: a wrong key or path has already been reported.
    import jax

    from instap_jax.errors import EXIT_USER_ERROR
    from instap_jax.preflight import rows
    from instap_jax.preflight.run import run as preflight

    def show(found) -> None:
        # A process that could not join has no host 0 to speak for it.
        if jax.process_index() == 0 or rows.failing(found):
            for line in rows.table(found):
                print(line, flush=True)

    found = preflight(
        loaded.config,
        workdir,
        hosts=values["hosts"].value,
        chips=values["chips"].value,
        need=values["need"].value,
        seconds=values["seconds"].value,
        show=show,
    )
    counts = {status: sum(row.status == status for row in found) for status in rows.Status}
    if jax.process_index() == 0:
        said = [f"{counts[rows.Status.PASS]} pass", f"{counts[rows.Status.WARN]} warn"]
        print(", ".join([*said, f"{counts[rows.Status.FAIL]} fail"]))
    return EXIT_USER_ERROR if rows.failing(found) else 0
