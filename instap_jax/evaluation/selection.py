"""Which stage-1 run to go on with: the lowest distillation loss on a validation split.

Computed here, on one split for all candidates, with the same views and masks for all, and without
stochastic depth: the losses in the training logs are of different data, noisy, and of a student
with layers left out.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instap_jax import config_check, sharding
from instap_jax.errors import UserError
from instap_jax.evaluation.context import Suite
from instap_jax.evaluation.encoder import load_model
from instap_jax.evaluation.features import open_suite, read_batches, refuse_faults
from instap_jax.progress import Progress
from instap_jax.train import checkpoint, inputs
from instap_jax.train.objectives import OBJECTIVES
from instap_jax.train.state import with_sharding
from instap_jax.types import Batch

# Fields on which the loss of a student depends whatever its parameters are: losses of candidates
# that differ in one of them cannot be compared.
_SAME = ("distill", "teacher", "vision.image_size", "vision.patch", "data")
_MAY_DIFFER = ("data.videos", "data.images", "data.batch_size", "data.group_size", "data.shuffle")
# What loss (1) reads of a batch, and what tells of unreadable samples.
_READ = ("frames", "extent", "keep_side", "sample_valid", "fault", "record")

# (batch on the mesh, its number) -> 'loss', 'count' of samples, 'fault' and 'record' of each.
Measure = Callable[[Batch, np.uint32], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A stage-1 run, its newest step, and its mean loss (1) on the validation split."""

    workdir: Path
    step: int
    loss: float


def rank_candidates(workdirs: Sequence[Path], suite: Suite, *, batch_size: int) -> list[Candidate]:
    """The runs by their loss on `suite`, the lowest first; of equal ones the one named first.

    Raises:
      UserError: no runs, one that is not of stage 1, has no teacher, or has a loss that is not
        finite; runs whose losses cannot be compared; a suite that cannot be measured whole.
    """
    mesh = sharding.mesh_of_all()
    if not workdirs:
        raise UserError("no candidates: give --runs=RUN,RUN,...")
    configs = [config_check.read(workdir) for workdir in workdirs]
    for workdir, config in zip(workdirs, configs):
        if config.stage != "distill":
            raise UserError(f"{workdir} is a run of stage {config.stage!r}, not of stage 1")
        if not config.teacher.checkpoint:
            raise UserError(
                f"{workdir} has no teacher (converted weights), so no loss: leave it out of --runs"
            )
        _check_comparable(workdirs[0], configs[0], workdir, config)
    if batch_size % sharding.data_shards(mesh):
        raise UserError(f"--batch_size must be a multiple of {sharding.data_shards(mesh)} devices")
    with jax.set_mesh(mesh):
        found = [
            _measure(workdir, config, suite, mesh, batch_size)
            for workdir, config in zip(workdirs, configs)
        ]
    return sorted(found, key=lambda candidate: candidate.loss)


def _check_comparable(first: Path, reference: ConfigDict, workdir: Path, config: ConfigDict):
    a, b = config_check.flatten(reference), config_check.flatten(config)
    for key in a:
        compared = any(key == one or key.startswith(one + ".") for one in _SAME)
        free = key in _MAY_DIFFER or key in config_check.MAY_CHANGE
        if compared and not free and a[key] != b[key]:
            raise UserError(
                f"the losses of {first} and {workdir} cannot be compared: {key} is {a[key]} and "
                f"{b[key]}"
            )


def _measure(
    workdir: Path, config: ConfigDict, suite: Suite, mesh: Mesh, batch_size: int
) -> Candidate:
    step, meta = checkpoint.read_meta(str(workdir))
    inputs.check_same(config, meta, str(workdir))
    config = config.copy_and_resolve_references()
    config.vision.drop_path = 0.0
    measure = _make_measure(config, workdir, step, mesh)
    source = open_suite(suite.directory, suite.split, suite.kind)
    options = {"frames": config.data.frames, "batch_size": batch_size, "workers": None}
    losses, counts = [], []
    with Progress(f"loss of {workdir.name}", len(source)) as progress:
        for number, read in enumerate(read_batches(config, mesh, source, **options)):
            batch = {name: sharding.place_rows(read.batch[name], mesh) for name in _READ}
            out = jax.device_get(measure(batch, np.uint32(number)))
            refuse_faults(out, source)
            losses.append(float(out["loss"]))
            counts.append(int(out["count"]))
            progress.update(counts[-1])
    loss = float(np.average(losses, weights=counts))
    if not math.isfinite(loss):
        raise UserError(
            f"{workdir}: its loss on {suite.split} at step {step} is {loss}: leave it out of --runs"
        )
    return Candidate(workdir=workdir, step=step, loss=loss)


def _make_measure(config: ConfigDict, workdir: Path, step: int, mesh: Mesh) -> Measure:
    """Loss (1) of a run's parameters and its teacher's, its random numbers those of the batch."""
    stage = OBJECTIVES["distill"]
    graphdef, params = load_model(config, stage.create, str(workdir), mesh, step=step)
    frozen_graphdef, frozen = nnx.split(
        nnx.eval_shape(lambda: stage.create_frozen(config, nnx.Rngs(0)))
    )
    frozen = checkpoint.read_params(
        config.teacher.checkpoint, with_sharding(frozen, mesh), select=stage.frozen_path
    )

    def measure(params, frozen, batch: Batch, number: jax.Array) -> dict[str, jax.Array]:
        model, teacher = nnx.merge(graphdef, params), nnx.merge(frozen_graphdef, frozen)
        loss, _ = stage.loss(config, model, teacher, batch, jax.random.key(number))
        # Loss (1) takes an output that is NaN for a vector of length zero, and stays finite.
        loss = jnp.where(jnp.isfinite(optax.tree.norm(params)), loss, jnp.nan)
        facts = {name: batch[name].reshape(-1) for name in ("fault", "record")}
        return facts | {"loss": loss, "count": batch["sample_valid"].sum()}

    jitted = jax.jit(measure, out_shardings=sharding.replicated(mesh))
    return functools.partial(jitted, params, frozen)
