"""The TPU kernel of LayerNorm, interpreted, against XLA's, values and gradients."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from instap_jax.models import layers
from instap_jax.models.kernels import layer_norm as kernel

EPS = 1e-3


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


by_kernel = functools.partial(kernel.by_device, eps=EPS, interpret=True)


def by_xla(x, scale, bias):
    norm = layers.LayerNorm(x.shape[-1], eps=EPS, dtype=x.dtype, backend="xla")
    norm.scale[...], norm.bias[...] = scale, bias
    return norm(x)


def compare(shape, dtype=jnp.float32, atol=3e-5):
    arrays = jnp.asarray(3 * normal(*shape) + 2, dtype), normal(128, seed=1), normal(128, seed=2)
    weights = jnp.asarray(normal(*shape, seed=3), dtype)
    for function in (by_kernel, by_xla):
        y, pullback = jax.vjp(function, *arrays)
        if function is by_kernel:
            found = y, pullback(weights)
    assert y.dtype == dtype
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), atol=atol, rtol=1e-5
        ),
        found,
        (y, pullback(weights)),
    )


@pytest.mark.parametrize("shape", [(2, 40, 128), (3, 2, 16, 128), (2, 197, 128), (2, 600, 128)])
def test_the_kernel_is_layer_norm(shape):
    """Whole blocks, leading axes, odd lengths, and a last block that is not full."""
    compare(shape)


def test_the_kernel_computes_in_float32():
    compare((2, 32, 128), dtype=jnp.bfloat16, atol=0.04)


def test_norms_of_several_heads_side_by_side():
    """As the distillation heads have them: every one with its own parameters."""
    arrays = normal(3, 2, 40, 128), normal(3, 128, seed=1), normal(3, 128, seed=2)
    weights = normal(3, 2, 40, 128, seed=3)
    found, pullback = jax.vjp(jax.vmap(by_kernel), *arrays)
    gradients = pullback(weights)
    for head in range(3):
        one = [array[head] for array in arrays]
        expected, pullback = jax.vjp(by_xla, *one)
        np.testing.assert_allclose(found[head], expected, atol=3e-5)
        for gradient, true in zip(gradients, pullback(weights[head])):
            np.testing.assert_allclose(gradient[head], true, atol=5e-5)


def test_every_device_normalises_its_own_samples():
    grid = np.array(jax.devices()[:8], dtype=object).reshape(2, 2, 2)
    mesh = Mesh(grid, ("replica", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    arrays = normal(4, 32, 128), normal(128, seed=1), normal(128, seed=2)

    def gradients(function):
        return jax.jit(jax.grad(lambda *a: jnp.sin(function(*a)).sum(), argnums=(0, 1, 2)))

    expected = gradients(by_xla)(*arrays)
    with jax.set_mesh(mesh):
        found = gradients(by_kernel)(*arrays)
    assert found[0].sharding.shard_shape((4, 32, 128)) == (1, 32, 128)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), found, expected)


@pytest.mark.parametrize(
    ("expected", "platform", "backend", "shape"),
    [
        (True, "tpu", "auto", (4, 197, 1024)),
        (True, "tpu", "pallas", (6, 4, 197, 1024)),
        (False, "tpu", "xla", (4, 197, 1024)),
        (False, "tpu", "auto", (4, 32, 1024)),  # texts
        (False, "tpu", "auto", (4, 197, 96)),
        (False, "tpu", "auto", (3, 197, 1024)),  # samples that do not divide
        (False, "tpu", "auto", (197, 1024)),
        (False, "gpu", "auto", (4, 197, 1024)),
    ],
)
def test_where_it_is_used(expected, platform, backend, shape, monkeypatch):
    assert fits(monkeypatch, platform, backend, shape, tensor=1) is expected
    assert fits(monkeypatch, platform, backend, shape, tensor=2) is False


def fits(monkeypatch, platform, backend, shape, *, tensor):
    mesh = types.SimpleNamespace(
        empty=False,
        auto_axes=("fsdp",),
        manual_axes=(),
        shape={"fsdp": 2, "tensor": tensor},
        abstract_device=types.SimpleNamespace(platform=platform),
    )
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
    return kernel.fits(backend, shape)
