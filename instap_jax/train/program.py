"""A stage made ready to run or to compile, without computing or reading anything."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import numpy as np
from flax import nnx
from jax.extend import core
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instap_jax import sharding
from instap_jax.train.objectives import Objective, objective
from instap_jax.train.optimizer import make_optimizer
from instap_jax.train.state import (
    TrainState,
    abstract_state,
    init_state,
    shardings,
    with_sharding,
)
from instap_jax.train.step import make_train_step

_TPU_OPTIONS = {
    # Gradients of split weights as one product and one reduction. Smaller than this, XLA makes
    # loops of small products between which parts of the result travel.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1 << 20,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A stage ready to run or to compile: structure, placement and the jitted step.

    Attributes:
      graphdef, abstract: of the trained model; `abstract` is a TrainState of abstract arrays.
      frozen_graphdef, frozen_abstract: of the frozen model.
      init: makes fresh parameters in place on the mesh.
      step: jitted; (state, frozen parameters, batch, seed) -> (state, metrics); donates the state.
      seed: uint32, `config.seed`.
      compiler_options: of the step; None: none.
    """

    objective: Objective
    graphdef: nnx.GraphDef
    abstract: TrainState
    frozen_graphdef: nnx.GraphDef
    frozen_abstract: nnx.State
    step: jax.stages.Wrapped
    init: Callable[[], TrainState]
    seed: np.uint32
    compiler_options: dict | None


def build_program(config: ConfigDict, mesh: Mesh) -> Program:
    """Builds the stage of `config` for a mesh that is current (`jax.set_mesh`)."""
    stage = objective(config)
    seed = np.uint32(config.seed)
    tx = make_optimizer(config)

    def create(rngs: nnx.Rngs) -> nnx.Module:
        return stage.create(config, rngs)

    graphdef, abstract = abstract_state(create, tx, mesh)
    frozen = nnx.eval_shape(lambda: stage.create_frozen(config, nnx.Rngs(0)))
    frozen_graphdef, frozen_abstract = nnx.split(frozen)
    frozen_abstract = with_sharding(frozen_abstract, mesh)
    step = make_train_step(config, stage, graphdef, frozen_graphdef, tx)
    options = _TPU_OPTIONS if mesh.devices.flat[0].platform == "tpu" else None
    return Program(
        objective=stage,
        graphdef=graphdef,
        abstract=abstract,
        frozen_graphdef=frozen_graphdef,
        frozen_abstract=frozen_abstract,
        step=jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(
                shardings(abstract),
                shardings(frozen_abstract),
                sharding.batch_sharding(mesh),
                sharding.replicated(mesh),
            ),
            out_shardings=(shardings(abstract), sharding.replicated(mesh)),
            compiler_options=options,
        ),
        init=lambda: init_state(create, tx, abstract, seed),
        seed=seed,
        compiler_options=options,
    )


def offloaded_bytes(program: Program, batch: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """Bytes of the host's memory that a step takes, of all devices together: what
    `compute.remat='offload'` keeps there from the forward to the backward pass.

    Args:
      batch: of `feed.abstract_batch`. The step is traced, not compiled.
    """
    args = (program.abstract, program.frozen_abstract, batch, program.seed)
    return _in_host_memory(program.step.trace(*args).jaxpr.jaxpr)


def _in_host_memory(jaxpr: core.Jaxpr) -> int:
    """Bytes that loops over layers stack there; of an accumulated step that is one part's."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            outputs = (variable.aval for variable in equation.outvars)
            total += sum(
                aval.size * aval.dtype.itemsize
                for aval in outputs
                if aval.memory_space == jax.memory.Space.Host
            )
        total += sum(map(_in_host_memory, core.jaxprs_in_params(equation.params)))
    return total
