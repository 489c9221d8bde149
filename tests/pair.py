"""One of two processes that measure together: `python pair.py ADDRESS RANK STUDENT OUT FLAGS ...`.

It does what `instap evaluate FLAGS` does, then writes to OUT what `measure_more` finds.
"""

import json
import sys
from pathlib import Path

import jax

from instap_jax import main
from instap_jax.evaluation.context import Context, Options, parse_suites
from instap_jax.evaluation.outputs import run_on_suite
from instap_jax.evaluation.selection import rank_candidates


def measure_more(workdir: Path, student: Path, videos: str) -> dict:
    """The boxes of a suite's instances by way of the devices, and a stage-1 run's loss."""
    context = Context(workdir, parse_suites(videos, ""), Options(batch_size=8))
    (suite,) = context.suites
    with jax.set_mesh(context.mesh):
        found = run_on_suite(
            context,
            suite,
            lambda config, model, batch: {"boxes": batch["boxes"]},
            reads=("boxes",),
            rows="instance_valid",
            frames=2,
        )
    (candidate,) = rank_candidates([student], suite, batch_size=8)
    return {"boxes": found["boxes"].tolist(), "loss": candidate.loss}


if __name__ == "__main__":
    address, rank, student, out, *flags = sys.argv[1:]
    jax.distributed.initialize(address, 2, int(rank))
    if code := main.main(["evaluate", *flags]):
        sys.exit(code)
    given = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    found = measure_more(Path(given["workdir"]), Path(student), given["videos"])
    if rank == "0":
        Path(out).write_text(json.dumps(found))
