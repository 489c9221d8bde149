"""Attention backends: who computes what, and the TPU kernel, interpreted, against the einsums."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

from instap_jax.errors import UserError
from instap_jax.models import attention_backends as backends
from instap_jax.models import layers, placement

HEADS, CHANNELS = 2, 64


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def compare(ours, theirs, *arrays):
    """Outputs and gradients with respect to all arrays."""

    @jax.jit
    def both(arrays, weights):
        results = (jax.vjp(function, *arrays) for function in (ours, theirs))
        return [(y, pullback(weights)) for y, pullback in results]

    found, expected = both(arrays, normal(*arrays[0].shape, seed=9))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=0), found, expected)


def qkv(batch, queries, keys):
    shapes = (batch, queries, HEADS, CHANNELS), *((batch, keys, HEADS, CHANNELS),) * 2
    return [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize(("queries", "keys"), [(130, 300), (7, 128)])
def test_splash_matches_the_einsums(queries, keys):
    """Odd lengths, masked keys, and a row without any key."""
    mask = np.random.default_rng(0).random((2, keys)) < 0.6
    mask[1] = False
    compare(
        functools.partial(backends.attend, "splash", mask=mask, interpret=True),
        functools.partial(layers.dot_product_attention, mask=mask, backend="xla"),
        *qkv(2, queries, keys),
    )


def test_splash_ignores_the_padding_of_odd_lengths_without_a_mask():
    compare(
        functools.partial(backends.attend, "splash", mask=None, interpret=True),
        functools.partial(layers.dot_product_attention, backend="xla"),
        *qkv(1, 130, 130),
    )


def test_splash_is_split_over_samples_and_heads():
    mesh = mesh_of(jax.devices(), 2, 2, 2)
    arrays, mask = qkv(4, 64, 64), np.arange(64) < np.array([[64], [3], [0], [9]])
    expected = layers.dot_product_attention(*arrays, mask=mask)
    with jax.set_mesh(mesh):
        found = jax.jit(
            functools.partial(backends.attend, "splash", mask=mask, interpret=True),
        )(*arrays)
    assert found.sharding.spec == jax.sharding.PartitionSpec(("replica", "fsdp"), None, "tensor")
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)


def test_self_attention_pads_its_tokens_for_splash(monkeypatch):
    """With the row that has no key: the padding must not be in its mean either."""
    block = layers.Attention(
        128, 2, bias=layers.Bias.QUERY_VALUE, dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    block.qkv_bias[...] = normal(*block.qkv_bias.shape)
    mask = np.arange(200) < np.array([[150], [0]])
    monkeypatch.setattr(backends, "choose", lambda *_, **__: "splash")
    interpreted = functools.partial(backends.attend, interpret=True)
    monkeypatch.setattr(backends, "attend", interpreted)

    def by_einsums(x):
        q, k, v = block._project(x)
        y = layers._weighted_sum(layers.attention_probabilities(q, k, mask=mask), v)
        return block.out(y.reshape(x.shape))

    compare(lambda x: block(x, mask=mask), by_einsums, normal(2, 200, 128))


@pytest.mark.parametrize("tokens", [1, 128, 196, 197, 314, 624, 1568, 3136, 6272])
def test_blocks_cover_every_length(tokens):
    block, padding = backends.block_and_padding(tokens)
    assert block % 128 == 0
    assert (tokens + padding) % block == 0
    assert 0 <= padding < max(128, tokens / 4 + 128)


def mesh_of(devices, *shape):
    grid = np.array(devices, dtype=object)[: np.prod(shape)].reshape(shape)
    return Mesh(grid, ("replica", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def choose(backend, *, platform=None, dtype=jnp.bfloat16, samples=4, tokens=3136, shape=(1, 2, 2)):
    """`choose` on a mesh whose devices say that they are of a platform; None: no mesh."""
    sizes = dict(zip(("replica", "fsdp", "tensor"), shape)) if platform else {}
    mesh = types.SimpleNamespace(
        empty=platform is None,
        auto_axes=tuple(sizes),
        shape=sizes,
        abstract_device=types.SimpleNamespace(platform=platform),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
        return backends.choose(
            backend, dtype, samples=samples, queries=tokens, keys=tokens, heads=16
        )


@pytest.mark.parametrize(
    ("expected", "case"),
    [
        ("splash", {"platform": "tpu"}),
        ("cudnn", {"platform": "gpu"}),
        ("cudnn", {"platform": "cuda"}),
        ("xla", {"platform": "cpu"}),
        ("xla", {}),
        ("xla", {"platform": "tpu", "tokens": 32}),
        ("splash", {"platform": "tpu", "tokens": 196}),
        ("xla", {"platform": "gpu", "dtype": jnp.float32}),
        ("splash", {"platform": "tpu", "dtype": jnp.float32}),
        ("xla", {"platform": "tpu", "samples": 3}),  # does not divide over 2 devices
        ("xla", {"platform": "tpu", "shape": (1, 2, 3)}),  # nor do 16 heads over 3
    ],
)
def test_auto_goes_by_the_platform_of_the_mesh_and_the_length(expected, case):
    assert choose("auto", **case) == expected


def test_a_named_kernel_that_cannot_run_is_an_error():
    assert choose("splash", platform="tpu", tokens=8) == "splash"
    assert choose("xla", platform="tpu") == "xla"
    with pytest.raises(UserError, match=r"'splash' runs on a TPU.*'cpu'; use 'auto'"):
        choose("splash", platform="cpu")
    with pytest.raises(UserError, match="'cudnn' runs on a GPU"):
        choose("cudnn", platform="tpu")
    with pytest.raises(UserError, match=r"'cudnn' needs config.compute.dtype='bfloat16'"):
        choose("cudnn", platform="gpu", dtype=np.dtype("float32"))


def test_what_needs_probabilities_is_computed_by_xla(monkeypatch):
    monkeypatch.setattr(backends, "choose", lambda *_, **__: "splash")
    q, k, v = qkv(1, 8, 8)
    ones, key = jnp.ones((1, HEADS, 8, 8)), jax.random.key(0)
    scaled = layers.dot_product_attention(q, k, v, scale=ones)
    np.testing.assert_allclose(scaled, layers.dot_product_attention(q, k, v, scale=2 * ones) / 2)
    dropped = layers.dot_product_attention(q, k, v, dropout_rate=0.5, key=key)
    assert not np.allclose(dropped, scaled)


def test_weights_are_whole_over_data_and_their_gradients_split_again():
    mesh = mesh_of(jax.devices(), 1, 4, 2)
    param = nnx.Param(jnp.asarray(normal(8, 6)), logical_axes=("embed", "mlp"))
    x, seen = normal(4, 8, seed=1), []

    def loss(value):
        whole = placement.gathered(param.replace(value), jnp.bfloat16)
        jax.debug.inspect_array_sharding(whole, callback=seen.append)
        return jnp.sum(jnp.sin(x @ whole.astype(jnp.float32)))

    expected = jax.grad(loss)(param[...])
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss))(param[...])
    spec = jax.sharding.PartitionSpec
    assert gradient.sharding.spec == spec("fsdp", "tensor")
    assert gradient.dtype == jnp.float32
    assert seen[-1].is_equivalent_to(jax.NamedSharding(mesh, spec(None, "tensor")), 2)
    np.testing.assert_allclose(gradient, expected, rtol=1e-2, atol=1e-2)


def test_a_batch_that_does_not_divide_is_left_alone():
    with jax.set_mesh(mesh_of(jax.devices(), 1, 4, 2)):
        split = jax.jit(placement.split_over_data)({"a": normal(8, 2), "b": normal(3, 2)})
    assert split["a"].sharding.shard_shape((8, 2)) == (2, 2)
    assert split["b"].shape == (3, 2)
