"""The real train step of a configuration, lowered for a topology: no data, weights or TPU."""

import dataclasses
import math
import time

import jax
import numpy as np
from jax.extend import core
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instap_jax import sharding
from instap_jax.aot import topology as tpu
from instap_jax.train import flops
from instap_jax.train.feed import abstract_batch
from instap_jax.train.program import Program, build_program
from instap_jax.types import Kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoweredStep:
    """A step of one kind of batch, ready to compile.

    Attributes:
      argument_bytes: bytes a chip of each class of arguments, from shapes and shardings.
      samples: of the global batch.
      model_flops: of the products of the model, forward and backward, whole batch, nothing computed
        twice; executed_flops: as written, with what rematerialisation repeats.
      seconds: to trace and lower.
    """

    kind: Kind
    mesh: Mesh
    jaxpr: core.Jaxpr
    lowered: jax.stages.Lowered
    compiler_options: dict | None
    argument_bytes: dict[str, int]
    samples: int
    model_flops: int
    executed_flops: int
    seconds: float


def kinds(config: ConfigDict) -> tuple[Kind, ...]:
    """Which batches the run would take: those of its corpora, or, with none named, of its stage."""
    named = {Kind.VIDEO: config.data.videos, Kind.IMAGE: config.data.images}
    found = tuple(kind for kind, corpora in named.items() if corpora)
    return found or ((Kind.VIDEO, Kind.IMAGE) if config.stage == "align" else (Kind.VIDEO,))


def lower(config: ConfigDict, topology: tpu.Topology, kind: Kind) -> LoweredStep:
    """Traces and lowers the train step for a topology.

    Raises:
      UserError: mesh, batch or parameters do not divide; no compiler.
    """
    start = time.perf_counter()
    mesh = sharding.make_mesh(config.mesh, tpu.devices(topology))
    with jax.set_mesh(mesh):
        program = build_program(config, mesh)
        batch = abstract_batch(config, mesh, kind)
        args = (program.abstract, program.frozen_abstract, batch, program.seed)
        traced = program.step.trace(*args)
        return LoweredStep(
            kind=kind,
            mesh=mesh,
            jaxpr=traced.jaxpr.jaxpr,
            lowered=traced.lower(lowering_platforms=("tpu",)),
            compiler_options=program.compiler_options,
            argument_bytes=_argument_bytes(program, batch),
            samples=math.prod(batch["sample_valid"].shape),
            model_flops=_flops(config, mesh, batch, "all"),
            executed_flops=_flops(config, mesh, batch, config.compute.remat),
            seconds=time.perf_counter() - start,
        )


def _flops(config: ConfigDict, mesh: Mesh, batch, remat: str) -> int:
    """Of the whole batch; attention as plain products: without the padding that kernels add."""
    config = config.copy_and_resolve_references()
    config.compute.update(remat=remat, attention="xla")
    program = build_program(config, mesh)
    return flops.count_flops(
        program.step, program.abstract, program.frozen_abstract, batch, program.seed
    )


def _argument_bytes(program: Program, batch) -> dict[str, int]:
    return {
        "parameters": shard_bytes(program.abstract.params),
        "optimizer": shard_bytes((program.abstract.step, program.abstract.opt_state)),
        "teacher": shard_bytes(program.frozen_abstract),
        "batch": shard_bytes(batch),
    }


def shard_bytes(tree) -> int:
    """Bytes that one device holds of a tree of placed abstract arrays."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
