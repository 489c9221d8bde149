"""`instap validate`: checks an annotation file against the schema and the media."""

from pathlib import Path

from absl import flags

from instap_jax.data import validation
from instap_jax.errors import EXIT_USER_ERROR, UserError
from instap_jax.progress import Progress


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "annotations", None, "Annotation file (JSON Lines).", required=True, flag_values=values
    )
    flags.DEFINE_string(
        "media", None, "Directory that media paths are relative to.", required=True,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "max_faults", 100, "Lines of faults to print; all are counted.", lower_bound=0,
        flag_values=values,
    )  # fmt: skip


def run(values: flags.FlagValues) -> int:
    if not values.media:
        raise UserError("--media is empty: name the directory that media paths are relative to")
    annotations = Path(values.annotations)
    faults = 0

    def show(fault: validation.Fault) -> None:
        nonlocal faults
        faults += 1
        if faults <= values.max_faults:
            print(f"{annotations}:{fault.line} {fault.id} {fault.reason}", flush=True)

    total = validation.count_lines(annotations)
    with Progress("validate", total) as progress:
        table = validation.validate(annotations, Path(values.media), show, progress.update)
    if faults > values.max_faults:
        print(f"... and {faults - values.max_faults} more faults (--max_faults shows more)")
    print("\n".join(validation.table_lines(table)))
    print(f"faults: {faults}")
    return EXIT_USER_ERROR if faults else 0
