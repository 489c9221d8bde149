"""Where weights and activations lie while a layer computes, on a mesh that splits both.

XLA's partitioner, left alone, follows the parameters: with `embed` split over fsdp it contracts
over the split axis, in loops of small products, or splits activations by width and replicates the
batch. So every layer says what it means: activations split over the data axes, weights whole over
them, gathered in the compute dtype where they are used (ZeRO-3). Without a mesh
(`jax.set_mesh`), or on one without data parallelism, nothing here does anything but cast.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from instap_jax import sharding

Array = jax.Array


def data_ways() -> int:
    """Over how many ways the partitioner splits a batch; within `shard_map` it splits nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    split = (axis for axis in mesh.auto_axes if axis in sharding.DATA_AXES)
    return math.prod(mesh.shape[axis] for axis in split)


def is_split_already() -> bool:
    """Whether this is within `shard_map`, where no kernel can be given the mesh's axes again."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def platform() -> str:
    """'tpu', 'gpu' or 'cpu': that of the current mesh's devices; 'cpu' without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    name = device.platform if device else "cpu"
    return "gpu" if name in ("cuda", "rocm") else name


def device_kind() -> str:
    """Of the current mesh's devices, as 'TPU v4'; '' without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return device.device_kind if device else ""


def gathered(param: nnx.Param, dtype: Any) -> Array:
    """A parameter in the compute dtype, whole over the data axes, still split over `tensor`.

    The gradient arrives in that dtype and goes back to the split of the parameter, so it is summed
    and scattered and no device ever holds the whole of it.
    """
    value = param[...]
    if data_ways() == 1:
        return value.astype(dtype)
    axes, mesh = param.get_metadata().get("logical_axes", ()), jax.sharding.get_abstract_mesh()
    split = sharding.RULES.spec(axes, value.shape, mesh)
    return _gather(value, dtype, split)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(value: Array, dtype: Any, split: P) -> Array:
    whole = P(*(None if axis in sharding.DATA_AXES else axis for axis in split))
    # Cast on its own shard first: half the bytes travel.
    return jax.lax.with_sharding_constraint(value.astype(dtype), whole)


def _gather_forward(value, dtype, split):
    return _gather(value, dtype, split), value


def _gather_backward(dtype, split, value, gradient):
    gradient = jax.lax.with_sharding_constraint(gradient, split)
    return (gradient.astype(value.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def flat(array: Array) -> Array:
    """[g, b, ...] -> [g * b, ...], groups one after another. Rows stay on their device where the
    data axes divide g, as they do in training."""
    return array.reshape((-1, *array.shape[2:]))


def join(parts: Sequence[Array]) -> Array:
    """Rows of several kinds, [g, m, ...] each -> [g * (sum of m), ...], each in its group."""
    return flat(jnp.concatenate(parts, axis=1))


def cut(rows: Array, groups: int, counts: Sequence[int]) -> list[Array]:
    """The reverse of `join`: rows of so many kinds, m of each a group -> [g, m, ...] of each."""
    grouped = rows.reshape((groups, -1, *rows.shape[1:]))
    return jnp.split(grouped, np.cumsum(counts)[:-1], axis=1)


def split_over_data(tree: Any) -> Any:
    """Keeps the leading (batch) axis of activations split over the data axes.

    An array whose batch does not divide (a request of one clip, say) is left to the partitioner.
    """
    ways = data_ways()

    def split(array: Array) -> Array:
        return array if array.shape[0] % ways else sharding.constrain_batch(array)

    return tree if ways == 1 else jax.tree.map(split, tree)
