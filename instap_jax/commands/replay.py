"""`instap replay --workdir=DIR [--dump=STEP]`: the step that stopped a run, computed again."""

import math
from pathlib import Path

from absl import flags


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "directory of the run", required=True, flag_values=values)
    flags.DEFINE_integer(
        "dump", None, "step of the dump; the latest by default", flag_values=values
    )
    flags.DEFINE_bool(
        "trace", False, "also find the operation that first gives a NaN: slow", flag_values=values
    )


def run(values: flags.FlagValues) -> None:
    from instap_jax.train import dump, replay

    workdir = Path(values["workdir"].value)
    step = values["dump"].value
    step = dump.newest(workdir) if step is None else step
    found = replay.replay(workdir, step, trace=values["trace"].value)
    print(f"step {found.step} of {workdir}, on {found.devices} device(s)")
    for name, value in sorted(found.terms.items()):
        print(f"  {name:<24} {value:<12.6g}{'' if math.isfinite(value) else ' not finite'}")
    for title, arrays in (
        ("parameters before the step", found.params),
        ("gradients", found.gradient),
        ("updates", found.update),
    ):
        print(f"{title}: {f'not finite in {len(arrays)} arrays' if arrays else 'all finite'}")
        for name, (count, size) in list(arrays.items())[: replay.SHOWN]:
            print(f"  {name}: {count} of {size}")
    for names in found.samples:
        together = " (only together)" if len(names) > 1 else ""
        print(f"not finite by itself: sample {', '.join(names)}{together}")
    if found.origin:
        print(f"first: {found.origin}")
    if all(map(math.isfinite, found.terms.values())):
        print("every number is finite here; devices of another kind may round differently")
