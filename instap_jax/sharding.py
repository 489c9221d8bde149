"""Device mesh and the rules that place parameters, optimizer state and batches on it.

Parameters name their axes (`nnx.Param(..., logical_axes=('embed', 'mlp'))`); `RULES` says which
mesh axis each name is split over. Optimizer moments inherit the metadata of their parameter, so
one function places the whole training state.
"""

import dataclasses
import math

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from instap_jax.errors import UserError

MESH_AXES = ("replica", "fsdp", "tensor")
DATA_AXES = ("replica", "fsdp")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Mesh axis over which each logical parameter axis is split; None leaves it whole.

    `embed` (the residual stream) over fsdp gives ZeRO-3: each layer's weights are gathered where
    they are used. `heads`, `mlp` and `vocab` over tensor is Megatron's split.
    """

    embed: str | None = "fsdp"
    heads: str | None = "tensor"
    mlp: str | None = "tensor"
    vocab: str | None = "tensor"
    patch: str | None = None
    proj: str | None = None

    def spec(self, logical_axes: tuple[str | None, ...], ndim: int) -> P:
        """The partition of an array of `ndim` axes; missing leading axes (stacked layers) whole."""
        names = (None,) * (ndim - len(logical_axes)) + tuple(logical_axes)
        used: list[str | None] = []
        for name in names:
            axis = getattr(self, name) if name else None
            used.append(None if axis in used else axis)  # a mesh axis splits one array axis only
        return P(*used)


RULES = Rules()


def make_mesh(config: ConfigDict, devices: list[jax.Device] | None = None) -> Mesh:
    """Builds the mesh (replica, fsdp, tensor) of `config.mesh` over all (or the given) devices.

    Raises:
      UserError: when the axis sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config[axis] for axis in MESH_AXES]
    if sizes.count(-1) > 1:
        raise UserError(f"config.mesh: at most one axis may be -1, got {sizes}")
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = len(devices) // max(known, 1)
    if math.prod(sizes) != len(devices):
        shape = " x ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes))
        raise UserError(
            f"config.mesh: {shape} is {math.prod(sizes)} devices but there are {len(devices)}; "
            "set one axis to -1 to take what is left"
        )
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def data_shards(mesh: Mesh) -> int:
    """Over how many ways a batch is split: the product of the data axes."""
    return math.prod(mesh.shape[axis] for axis in DATA_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading (group) axis over all data axes."""
    return NamedSharding(mesh, P(DATA_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def place(array: np.ndarray, where: NamedSharding) -> jax.Array:
    """A host array that every process has whole, on the mesh."""
    return jax.make_array_from_callback(np.shape(array), where, lambda index: array[index])


def state_sharding(state, mesh: Mesh, rules: Rules = RULES):
    """A tree like `state` (arrays or abstract arrays) with a NamedSharding for every leaf.

    Raises:
      UserError: when a mesh axis does not divide the array axis that the rules split over it.
    """

    def place(path, leaf):
        if not isinstance(leaf, nnx.Variable):
            return replicated(mesh)
        shape = leaf.get_value().shape
        spec = rules.spec(leaf.get_metadata().get("logical_axes", ()), len(shape))
        for size, axis in zip(shape, spec):
            if axis and size % mesh.shape[axis]:
                raise UserError(
                    f"parameter {jax.tree_util.keystr(path)} of shape {shape} cannot be split "
                    f"{mesh.shape[axis]} ways over mesh axis {axis!r}: {size} is not a multiple; "
                    f"choose a config.mesh.{axis} that divides it"
                )
        return leaf.replace(NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(
        place, state, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )


def constrain_batch(array: jax.Array) -> jax.Array:
    """Keeps the leading axis of an activation split over the data axes of the current mesh.

    Needs `jax.set_mesh`; without one (a single device, a unit test) it does nothing.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return array
    return jax.lax.with_sharding_constraint(array, P(DATA_AXES))
