"""The mesh, the rules, and which rows of a batch a host reads."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import tiny_config

from instap_jax import sharding
from instap_jax.config import default
from instap_jax.errors import UserError
from instap_jax.train.program import build_program


def mesh_config(**sizes):
    config = default().mesh
    config.update(sizes)
    return config


@dataclasses.dataclass(frozen=True)
class Chip:
    """What `sharding` asks of a device."""

    process_index: int
    slice_index: int = 0
    platform: str = "tpu"


def mesh_of(processes) -> jax.sharding.Mesh:
    """A mesh (1, rows, columns) of chips of the given processes."""
    grid = np.empty((1, *np.shape(processes)), object)
    for place, process in np.ndenumerate(np.asarray(processes)):
        grid[0, *place] = Chip(process)
    return jax.sharding.Mesh(grid, sharding.MESH_AXES)


@pytest.mark.parametrize(
    ("processes", "total", "rows"),
    [
        ([[0], [0], [1], [1]], 4, [[0, 1], [2, 3]]),
        ([[0], [1], [1], [0]], 8, [[0, 1, 6, 7], [2, 3, 4, 5]]),  # a ring through two hosts
        ([[0, 0], [1, 1]], 2, [[0], [1]]),
        ([[0, 1], [0, 1]], 4, [[0, 1, 2, 3], [0, 1, 2, 3]]),  # a tensor axis over two hosts
        ([[0, 2], [1, 3]], 2, [[0], [1], [0], [1]]),
    ],
)
def test_rows_of_a_host_follow_from_the_mesh(processes, total, rows):
    mesh = mesh_of(processes)
    found = [sharding.host_rows(mesh, total, process).tolist() for process in range(len(rows))]
    assert found == rows


@pytest.mark.parametrize("sizes", [{}, {"tensor": 2}, {"replica": 2, "slices": 2, "tensor": 4}])
def test_placed_rows_are_the_batch(sizes):
    mesh = sharding.make_mesh(mesh_config(**sizes))
    array = np.arange(16 * 3).reshape(16, 3)
    assert sharding.host_rows(mesh, 16).tolist() == list(range(16))
    placed = sharding.place_rows(array, mesh)
    assert placed.sharding == sharding.batch_sharding(mesh)
    np.testing.assert_array_equal(placed, array)


def test_slices_are_blocks_of_replicas():
    devices = jax.devices()
    mesh = sharding.make_mesh(mesh_config(slices=2, replica=4, tensor=2), devices)
    assert [{d.id // 4 for d in row.flat} for row in mesh.devices] == [{0}, {0}, {1}, {1}]


def test_mesh_errors_name_the_fix():
    with pytest.raises(UserError, match="there are 8; set one axis to -1"):
        sharding.make_mesh(mesh_config(fsdp=3))
    with pytest.raises(UserError, match=r"replica=1 .* 2 slices: set config\.mesh\.replica=2"):
        sharding.make_mesh(mesh_config(slices=2))
    with pytest.raises(UserError, match=r"slices=3 does not divide 8 devices"):
        sharding.make_mesh(mesh_config(slices=3))
    two = [Chip(process_index=n, slice_index=n // 2) for n in range(4)]
    with pytest.raises(UserError, match=r"slices=1 but there are 2 .* config\.mesh\.slices=2"):
        sharding.make_mesh(mesh_config(), two)
    config = tiny_config("stage1")
    config.mesh.update(fsdp=1, tensor=8)
    config.vision.update(width=36, heads=2, mlp_ratio=1.0)
    mesh = sharding.make_mesh(config.mesh)
    fix = r"blocks.*'(mlp|heads)' of size \d+ .* choose a config\.mesh\.tensor .*at most 6 below 8"
    with jax.set_mesh(mesh), pytest.raises(UserError, match=fix):
        build_program(config, mesh)


def test_a_vocabulary_that_the_tensor_axis_does_not_divide_stays_whole():
    """BERT's 30,522 words on tensor=4; the rest of the model is split all the same."""
    config = tiny_config("stage2")
    config.text.vocab_size = 322  # tests/test_processes.py trains with it
    config.mesh.tensor = config.align.cross_attention_heads = 4
    for name in ("vision", "teacher", "text"):
        config[name].heads = 4
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        params = build_program(config, mesh).abstract.params
    specs = {
        leaf.shape: tuple(leaf.sharding.spec)
        for leaf in jax.tree.leaves(params)
        if 322 in leaf.shape
    }
    assert specs == {(322, 32): (None, "fsdp"), (322,): (None,)}
    assert any("tensor" in leaf.sharding.spec for leaf in jax.tree.leaves(params["text"]))
