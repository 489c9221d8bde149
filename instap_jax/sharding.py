"""Device mesh and the rules that place parameters, optimizer state and batches on it.

Parameters name their axes (`nnx.Param(..., logical_axes=('embed', 'mlp'))`); `RULES` says which
mesh axis each name is split over. Optimizer moments inherit the metadata of their parameter, so
one function places the whole training state.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from instap_jax.errors import UserError

MESH_AXES = ("replica", "fsdp", "tensor")
DATA_AXES = ("replica", "fsdp")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Mesh axis over which each logical parameter axis is split; None leaves it whole.

    `embed` (the residual stream) over fsdp gives ZeRO-3: each layer's weights are gathered where
    they are used. `heads`, `mlp` and `vocab` over tensor is Megatron's split. A vocabulary has the
    size that its tokenizer has (BERT's 30,522 = 2 x 3 x 5,087): where tensor does not divide it, it
    stays whole, at 1 / fsdp of the table's memory on every device. Any other axis that its mesh
    axis does not divide is a fault of the configuration.
    """

    embed: str | None = "fsdp"
    heads: str | None = "tensor"
    mlp: str | None = "tensor"
    vocab: str | None = "tensor"
    patch: str | None = None
    proj: str | None = None

    def spec(
        self,
        logical_axes: tuple[str | None, ...],
        shape: tuple[int, ...],
        mesh: Mesh | AbstractMesh,
    ) -> P:
        """The partition of an array; missing leading axes (stacked layers) stay whole.

        Raises:
          UserError: when a mesh axis does not divide the array axis that it is to split.
        """
        names = (None,) * (len(shape) - len(logical_axes)) + tuple(logical_axes)
        used: list[str | None] = []
        for name, size in zip(names, shape):
            axis = getattr(self, name) if name else None
            if axis in used:  # a mesh axis splits one array axis only
                axis = None
            if axis and size % mesh.shape[axis]:
                if name != "vocab":
                    raise UserError(_uneven(name, size, axis, mesh.shape[axis]))
                axis = None
            used.append(axis)
        return P(*used)


def _uneven(name: str, size: int, axis: str, ways: int) -> str:
    fits = max(n for n in range(1, ways) if size % n == 0)
    return (
        f"axis {name!r} of size {size} cannot be split {ways} ways over mesh axis {axis!r}: choose "
        f"a config.mesh.{axis} that divides it (at most {fits} below {ways})"
    )


RULES = Rules()


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh (replica, fsdp, tensor) of `config.mesh` over all (or the given) devices.

    Of several slices, `replica` counts the slices first: only gradients of replicas, once a step,
    cross the data-center network; everything else stays on the links within a slice.

    Args:
      config: `mesh` of the configuration.
      devices: also those of a topology description, which no process of ours has.

    Raises:
      UserError: when the axis sizes do not multiply to the number of devices, or do not fit the
        slices.
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
    return _mesh(_grid(sizes, _slices(devices, config.slices), config.slices))


def mesh_of_all() -> Mesh:
    """All devices as data shards, replicas between slices: for what trains nothing."""
    slices = _slices(jax.devices(), None)
    per_slice = len(jax.devices()) // len(slices)
    return _mesh(_grid([len(slices), per_slice, 1], slices, len(slices)))


def _mesh(grid: np.ndarray) -> Mesh:
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _slices(devices: Sequence[jax.Device], count: int | None) -> list[list[jax.Device]]:
    """The devices of each slice; CPU and GPU devices, which know none, are cut in their order."""
    if devices[0].platform != "tpu":
        count = count or 1
        if len(devices) % count:
            raise UserError(f"config.mesh.slices={count} does not divide {len(devices)} devices")
        return [list(part) for part in np.array(devices, object).reshape(count, -1)]
    found = collections.defaultdict(list)
    for device in devices:
        found[getattr(device, "slice_index", 0)].append(device)
    if count not in (None, len(found)):
        raise UserError(
            f"config.mesh.slices={count} but there are {len(found)} slice(s): set "
            f"config.mesh.slices={len(found)}, and config.mesh.replica to a multiple of it"
        )
    return [found[index] for index in sorted(found)]


def _grid(sizes: list[int], slices: list[list[jax.Device]], count: int) -> np.ndarray:
    """Devices in mesh order; the slices are blocks of the first axis."""
    replica, *rest = sizes
    if replica % count:
        raise UserError(
            f"config.mesh.replica={replica} cannot be divided among {count} slices: set "
            f"config.mesh.replica={count} or a multiple of it"
        )
    blocks = [
        mesh_utils.create_device_mesh(
            [replica // count, *rest], devices, allow_split_physical_axes=True
        )
        for devices in slices
    ]
    return np.concatenate(blocks)


def data_shards(mesh: Mesh) -> int:
    """Over how many ways a batch is split: the product of the data axes."""
    return math.prod(mesh.shape[axis] for axis in DATA_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading (group) axis over all data axes."""
    return NamedSharding(mesh, P(DATA_AXES))


def host_rows(mesh: Mesh, total: int, process: int | None = None) -> np.ndarray:
    """Which rows of a batch's leading axis this process's devices hold, ascending.

    They follow from the mesh. On a TPU they are rarely consecutive (a mesh is laid out along the
    chips' links, a host owns a 2 x 2 square of chips), and hosts that share a tensor axis hold the
    same rows.

    Args:
      total: rows of the whole batch, a multiple of `data_shards`.
      process: another one than this, by its index.

    Returns:
      int64 row numbers.
    """
    starts, size = _host_starts(mesh, process), total // data_shards(mesh)
    return (np.array(starts)[:, None] * size + np.arange(size)).reshape(-1)


def _host_starts(mesh: Mesh, process: int | None = None) -> list[int]:
    """Numbers of the data shards of which a process has devices."""
    process = jax.process_index() if process is None else process
    shards = mesh.devices.reshape(data_shards(mesh), -1)
    return [
        number
        for number, devices in enumerate(shards)
        if any(device.process_index == process for device in devices)
    ]


def place_rows(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """This process's rows (`host_rows`) of a batch, as its part of the global array."""
    starts = _host_starts(mesh)
    size = len(array) // len(starts)
    first = {number * size: place * size for place, number in enumerate(starts)}

    def rows(index: tuple[slice, ...]) -> np.ndarray:
        start = first[index[0].start or 0]
        return array[start : start + size]

    shape = (size * data_shards(mesh), *array.shape[1:])
    return jax.make_array_from_callback(shape, batch_sharding(mesh), rows)


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
        try:
            spec = rules.spec(leaf.get_metadata().get("logical_axes", ()), shape, mesh)
        except UserError as error:
            raise UserError(f"parameter {jax.tree_util.keystr(path)} {shape}: {error}") from error
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
