"""The training state: one pytree; one abstract description initialises, places, restores it."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from instap_jax import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What changes from step to step.

    Attributes:
      step: int32 scalar, optimizer steps done. With the seed it determines all randomness.
      params: float32 parameters of the trained model.
      opt_state: state of the optax transformation, placed like the parameters.
      refused: int32 scalar, updates so far that were not applied (`train/step.py`).
    """

    step: jax.Array
    params: nnx.State
    opt_state: optax.OptState
    refused: jax.Array


def abstract_state(
    create: Callable[[nnx.Rngs], nnx.Module], tx: optax.GradientTransformation, mesh: Mesh
) -> tuple[nnx.GraphDef, TrainState]:
    """The model's structure and the shapes, dtypes and placement of its training state.

    Nothing is computed: initialisation, restoring and ahead-of-time compilation all start here.
    """
    model = nnx.eval_shape(lambda: create(nnx.Rngs(0)))
    graphdef, params = nnx.split(model)
    state = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=params,
        opt_state=jax.eval_shape(tx.init, params),
        refused=jax.ShapeDtypeStruct((), jnp.int32),
    )
    return graphdef, with_sharding(state, mesh)


def with_sharding(tree, mesh: Mesh):
    """The abstract arrays of `tree` with the sharding that the rules give them."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        sharding.state_sharding(tree, mesh),
    )


def shardings(abstract) -> NamedSharding:
    """The tree of shardings of a tree of abstract arrays, as `jax.jit` wants it."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def init_state(
    create: Callable[[nnx.Rngs], nnx.Module],
    tx: optax.GradientTransformation,
    abstract: TrainState,
    seed: np.uint32,
) -> TrainState:
    """Fresh parameters, made in place on the devices: no host ever holds the whole model.

    The values depend on the seed alone, not on the mesh (partitionable random bits).
    """

    def init(seed: jax.Array) -> TrainState:
        params = nnx.state(create(nnx.Rngs(jax.random.key(seed))))
        zero = jnp.int32(0)
        return TrainState(step=zero, params=params, opt_state=tx.init(params), refused=zero)

    return jax.jit(init, out_shardings=shardings(abstract))(seed)
