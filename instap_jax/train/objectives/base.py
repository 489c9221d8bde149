"""What a stage is, for the loop, and the little that all stages share."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from instap_jax.types import Batch

# What a stage-2 run has beside its encoder and its text encoder: fine-tuning has no use for these.
ALIGNED_ONLY = (
    "heads",
    "pool_norm",
    "vision_projection",
    "text_projection",
    "match_head",
    "cross_attention",
    "box_codes",
    "temperature",
    "instance_temperature",
    "contrastive_bias",
    "instance_contrastive_bias",
)

LossResult = tuple[jax.Array, dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """A stage of training.

    Attributes:
      create: (config, rngs) -> the model whose parameters are trained.
      create_frozen: (config, rngs) -> the model that is only read; an empty module where none is.
      frozen_path: path, inside the checkpoint named by `config.teacher.checkpoint`, of the frozen
        model's parameters.
      starts_from: stage of another run -> the modules that this stage takes from it. A run of the
        same stage is always taken whole.
      leaves: modules of such runs that this stage has no use for. Any other is an error: nothing
        that was trained is dropped unnamed.
      loss: (config, model, frozen, batch, key) -> (scalar to minimise, float32 scalars to log).
    """

    create: Callable[[ConfigDict, nnx.Rngs], nnx.Module]
    create_frozen: Callable[[ConfigDict, nnx.Rngs], nnx.Module]
    frozen_path: tuple[str, ...] = ()
    starts_from: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    leaves: tuple[str, ...] = ()
    loss: Callable[[ConfigDict, nnx.Module, nnx.Module, Batch, jax.Array], LossResult]


def compute_options(config: ConfigDict) -> dict:
    """Keyword arguments that every model takes from `config.compute`."""
    compute = config.compute
    return {
        "dtype": jnp.dtype(compute.dtype),
        "remat": compute.remat,
        "backend": compute.attention,
    }


def nothing(config: ConfigDict, rngs: nnx.Rngs) -> nnx.Module:
    """The frozen model of a stage that has none."""
    del config, rngs
    return nnx.Dict()
