"""What a fine-tuned model says of a whole suite: shared by 'grounding' and 'classification'."""

import collections
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from instap_jax import sharding
from instap_jax.data.pipeline import unknown_label
from instap_jax.data.records import RecordSource
from instap_jax.errors import UserError
from instap_jax.evaluation.context import Context, Suite
from instap_jax.evaluation.features import open_suite, read_batches
from instap_jax.progress import Progress
from instap_jax.types import Batch, Fault, Kind

# (config, model, batch [g, b, ...]) -> arrays [g, b, ...] or [g, n, ...] by name.
Compute = Callable[[ConfigDict, nnx.Module, Batch], dict[str, jax.Array]]

_SAMPLES = ("sample_valid", "fault", "record")  # what every host is to know of all samples


def require_stage(context: Context, task: str, stage: str) -> None:
    """Raises UserError where the run is of another stage than the task measures."""
    if context.config.stage != stage:
        raise UserError(
            f"task {task} measures runs of stage {stage!r}; {context.workdir} is of stage "
            f"{context.config.stage!r}: fine-tune it first (docs/finetuning.md)"
        )


def frames_of(context: Context, kind: Kind) -> int:
    """T of a sample: as asked for, or as in training; an image has one frame."""
    return 1 if kind is Kind.IMAGE else context.options.frames or context.config.data.frames


def run_on_suite(
    context: Context,
    suite: Suite,
    compute: Compute,
    *,
    reads: Sequence[str],
    rows: str,
    frames: int,
) -> dict[str, np.ndarray]:
    """What `compute` returns for every record or every instance of a suite, in order.

    Args:
      reads: names of the arrays of the batch that `compute` is given.
      rows: 'sample_valid' or 'instance_valid': what a row of the outputs is.
      frames: of a sample, as `compute` finds them in the batch.

    Raises:
      UserError: the suite is empty, or one of its records cannot be read or has no known label.
    """
    encoder, options, config = context.encoder, context.options, context.config
    source = open_suite(suite.directory, suite.split, suite.kind)
    passed = {rows, *_SAMPLES}
    whole = sharding.replicated(context.mesh)

    @jax.jit
    def step(params, batch: Batch) -> dict[str, jax.Array]:
        out = compute(config, nnx.merge(encoder.graphdef, params), batch)
        out |= {name: batch[name] for name in passed}
        return jax.lax.with_sharding_constraint(out, whole)

    found: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    batches = read_batches(
        config,
        context.mesh,
        source,
        frames=frames,
        batch_size=options.batch_size,
        workers=options.workers,
    )
    with Progress(f"measure {suite.split}", len(source)) as progress:
        for read in batches:
            batch = {
                name: sharding.place_rows(read.batch[name], context.mesh)
                for name in passed.union(reads)
            }
            out = jax.device_get(step(encoder.params["model"], batch))
            _refuse_faults(out, source, config)
            for name in out.keys() - passed:
                found[name].append(out[name][out[rows]])
            progress.update(int(out["sample_valid"].sum()))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _refuse_faults(out: dict[str, np.ndarray], source: RecordSource, config: ConfigDict) -> None:
    for place in np.argwhere(out["fault"]):
        record = int(out["record"][*place])
        if out["fault"][*place] == Fault.UNKNOWN_LABEL:
            raise UserError(unknown_label(source, record, config.classify.classes))
        raise UserError(
            f"{source.record_id(record)} cannot be read; a suite is measured whole or not at all"
        )
