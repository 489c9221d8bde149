"""Which stage-1 run to go on with: the lowest distillation loss on a validation split.

Computed here, on one split for all candidates, with the same views and masks for all, and without
stochastic depth: the losses in the training logs are of different data, noisy, and of a student
with layers left out.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instap_jax import config_check, sharding
from instap_jax.data.records import open_source
from instap_jax.data.suite import read_suite
from instap_jax.errors import UserError
from instap_jax.evaluation.context import Suite
from instap_jax.evaluation.encoder import load_model
from instap_jax.progress import Progress
from instap_jax.train import checkpoint, inputs
from instap_jax.train.objectives import OBJECTIVES
from instap_jax.train.state import with_sharding

# Fields on which the loss of a student depends whatever its parameters are: losses of candidates
# that differ in one of them cannot be compared.
_SAME = ("distill", "teacher", "vision.image_size", "vision.patch", "data")
_MAY_DIFFER = ("data.videos", "data.images", "data.batch_size", "data.group_size", "data.shuffle")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A stage-1 run, its newest step, and its mean loss (1) on the validation split."""

    workdir: Path
    step: int
    loss: float


def rank_candidates(workdirs: Sequence[Path], suite: Suite, *, batch_size: int) -> list[Candidate]:
    """The runs by their loss on `suite`, the lowest first; of equal ones the one named first.

    Raises:
      UserError: no runs, one that is not of stage 1, or runs whose losses cannot be compared.
    """
    mesh = sharding.mesh_of_all()
    if not workdirs:
        raise UserError("no candidates: give --runs=RUN,RUN,...")
    configs = [config_check.read(workdir) for workdir in workdirs]
    for workdir, config in zip(workdirs, configs):
        if config.stage != "distill":
            raise UserError(f"{workdir} is a run of stage {config.stage!r}, not of stage 1")
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
    stage = OBJECTIVES["distill"]
    graphdef, params = load_model(config, stage.create, str(workdir), mesh, step=step)
    frozen_graphdef, frozen = nnx.split(
        nnx.eval_shape(lambda: stage.create_frozen(config, nnx.Rngs(0)))
    )
    frozen = checkpoint.read_params(
        config.teacher.checkpoint, with_sharding(frozen, mesh), select=stage.frozen_path
    )

    @jax.jit
    def loss(params, frozen, batch, key):
        model, teacher = nnx.merge(graphdef, params), nnx.merge(frozen_graphdef, frozen)
        return stage.loss(config, model, teacher, batch, key)[0], batch["sample_valid"].sum()

    source = open_source(suite.directory, suite.split, suite.kind)
    groups = sharding.data_shards(mesh)
    batches = read_suite(
        config,
        source,
        frames=config.data.frames,
        groups=groups,
        group_size=batch_size // groups,
        workers=config.data.workers,
        rows=sharding.host_rows(mesh, groups),
    )
    losses, counts = [], []
    with Progress(f"loss of {workdir.name}", len(source)) as progress:
        for number, read in enumerate(batches):
            if read.batch["fault"].any():
                raise UserError(f"{suite.split} holds samples that cannot be read")
            batch = jax.tree.map(lambda array: sharding.place_rows(array, mesh), read.batch)
            value, count = loss(params, frozen, batch, jax.random.key(number))
            losses.append(float(value))
            counts.append(int(count))
            progress.update(len(read.facts))
    return Candidate(workdir=workdir, step=step, loss=float(np.average(losses, weights=counts)))
