"""Attention backends: who computes what, and the TPU kernel, interpreted, against the einsums."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AxisType, Mesh
from tiny import tiny_config

from instap_jax.aot import kernels
from instap_jax.errors import UserError
from instap_jax.models import attention_backends as backends
from instap_jax.models import depth, layers, placement
from instap_jax.models.kernels import layer_norm
from instap_jax.models.teacher import ClipVision
from instap_jax.models.vision import VisionEncoder

HEADS, WIDTH = 4, 256

by_kernel = functools.partial(backends.attend, "pallas", heads=HEADS, interpret=True)
by_einsums = functools.partial(layers.dot_product_attention, heads=HEADS, backend="xla")


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
    shapes = (batch, queries, WIDTH), *((batch, keys, WIDTH),) * 2
    return [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize(("queries", "keys"), [(130, 300), (7, 128)])
def test_pallas_matches_the_einsums(queries, keys):
    """Odd lengths, masked keys, and a row without any key."""
    mask = np.random.default_rng(0).random((2, keys)) < 0.6
    mask[1] = False
    compare(
        functools.partial(by_kernel, mask=mask),
        functools.partial(by_einsums, mask=mask),
        *qkv(2, queries, keys),
    )


def test_pallas_ignores_the_padding_of_odd_lengths_without_a_mask():
    compare(
        functools.partial(by_kernel, mask=None),
        by_einsums,
        *qkv(1, 130, 130),
    )


def test_the_kernel_in_bfloat16_is_as_close_as_rounding():
    """To the einsums in float32: sums and softmax are float32, factors and results are not."""
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in qkv(2, 64, 64)]
    weights = jnp.asarray(normal(2, 64, WIDTH, seed=9), jnp.bfloat16)
    y, pullback = jax.vjp(functools.partial(by_kernel, mask=None), *arrays)
    exact = [x.astype(jnp.float32) for x in arrays]
    expected, exact_pullback = jax.vjp(by_einsums, *exact)
    pairs = zip((y, *pullback(weights)), (expected, *exact_pullback(weights.astype(jnp.float32))))
    for found, true in pairs:
        assert found.dtype == jnp.bfloat16
        error = jnp.abs(found.astype(jnp.float32) - true)
        assert error.max() < 0.02 * jnp.abs(true).max()


@pytest.mark.parametrize(("remat", "times"), [("none", 2), ("attention", 1)])
def test_rematerialisation_may_keep_what_the_kernel_put_out(remat, times):
    @functools.partial(jax.checkpoint, policy=depth._REMAT[remat])
    def block(x):
        return jnp.sin(by_kernel(x, x, x, mask=None)).sum()

    gradient = jax.make_jaxpr(jax.grad(block))(normal(1, 16, WIDTH))
    names = [equation.params["name"] for equation, _ in kernels._find(gradient.jaxpr, 1)]
    assert sorted(names) == ["attention"] * times + ["attention_backward"]


def test_pallas_is_split_over_samples_and_heads():
    mesh = mesh_of(jax.devices(), 2, 2, 2)
    arrays, mask = qkv(4, 64, 64), np.arange(64) < np.array([[64], [3], [0], [9]])
    expected = by_einsums(*arrays, mask=mask)
    with jax.set_mesh(mesh):
        found = jax.jit(
            functools.partial(by_kernel, mask=mask),
        )(*arrays)
    assert found.sharding.spec == jax.sharding.PartitionSpec(("replica", "fsdp"), None, "tensor")
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)


def test_blocks_on_padded_tokens_give_what_they_give_without(monkeypatch):
    """With a row that has no key: the padding must not be in its mean either."""
    options = {"mlp_ratio": 2, "activation": layers.exact_gelu, "eps": 1e-6, "dtype": jnp.float32}
    block = layers.PreNormBlock(128, 2, bias=layers.Bias.QUERY_VALUE, rngs=nnx.Rngs(0), **options)
    block.attention.qkv_bias[...] = normal(*block.attention.qkv_bias.shape)
    mask = np.arange(200) < np.array([[150], [0]])

    def by_kernel(x):
        with monkeypatch.context() as patch:
            patch.setattr(backends, "choose", lambda *_, **__: "pallas")
            attend = functools.partial(backends.attend, interpret=True)
            patch.setattr(backends, "attend", attend)
            padded = backends.pad_tokens(x, backend="auto", heads=2)
            assert padded.shape == (2, 208, 128)
            return block(padded, mask=mask, length=200)[:, :200]

    compare(by_kernel, lambda x: block.with_probabilities(x, mask=mask)[0], normal(2, 200, 128))


@pytest.fixture
def kernels_everywhere(monkeypatch):
    monkeypatch.setattr(backends, "choose", lambda *_, **__: "pallas")
    monkeypatch.setattr(backends, "attend", functools.partial(backends.attend, interpret=True))


def close(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)


def test_encoders_return_no_padding(kernels_everywhere, monkeypatch):
    """50 visible tokens and 17 of a picture are padded, and nobody sees it."""
    config = tiny_config("stage1")
    config.vision.width = config.teacher.width = 128
    options = {"dtype": jnp.float32, "remat": "none"}
    student = VisionEncoder(config.vision, rngs=nnx.Rngs(0), **options)
    video, visible = normal(2, 4, 16, 16, 3), np.stack([np.arange(50), np.arange(50) + 14])
    mask = np.arange(50) < np.array([[50], [20]])
    teacher = ClipVision(config.teacher, rngs=nnx.Rngs(0), **options)
    pictures = normal(2, 12, 12, 3)

    def both():
        seen = student(video, visible=visible, taps=2).taps
        masked = student(video, visible=visible, mask=mask).tokens
        alone = teacher(pictures, taps=2)
        return seen, masked * mask[..., None], alone, teacher(pictures, taps=2, attention=True)

    found = both()
    assert found[0].shape == (2, 2, 50, config.vision.width)
    monkeypatch.setattr(backends, "choose", lambda *_, **__: "xla")
    close(found, both())


def test_padding_is_no_key_for_the_einsums_either():
    attention = layers.Attention(128, 2, bias=layers.Bias.FULL, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = normal(2, 20, 128)
    y, probabilities = attention.with_probabilities(x)
    padded = np.pad(x, ((0, 0), (0, 4), (0, 0)), constant_values=7)
    of_padded = attention.with_probabilities(padded, length=20)
    np.testing.assert_allclose(of_padded[0][:, :20], y, atol=1e-6)
    np.testing.assert_allclose(of_padded[1][..., :20, :20], probabilities, atol=1e-6)
    assert not of_padded[1][..., 20:].any()
    mask = np.arange(20) < np.array([[20], [0]])
    padded = [np.pad(x, ((0, 0), (0, 4), (0, 0)), constant_values=7) for x in qkv(2, 20, 20)]
    found = by_einsums(*padded, mask=mask, length=20)[:, :20]
    np.testing.assert_array_equal(found, by_einsums(*qkv(2, 20, 20), mask=mask))


@pytest.mark.parametrize("keys", [16, 624, 6272])
@pytest.mark.parametrize("tokens", [1, 128, 196, 197, 314, 624, 1568, 3136, 3137, 6272])
def test_blocks_cover_every_length(tokens, keys):
    block = backends._block(tokens, keys)
    padding = backends.padded_length(tokens, keys) - tokens
    assert block % 16 == 0
    assert (tokens + padding) % block == 0
    assert 0 <= padding < max(16, tokens / 6)
    assert block * keys <= backends._LOGITS


def test_a_long_sequence_goes_block_by_block(monkeypatch):
    """Gradients of keys and values are summed over blocks of queries."""
    monkeypatch.setattr(backends, "_LOGITS", 48 * 160)
    assert backends._block(150, 160) == 32
    mask = np.arange(150) < np.array([[150], [3]])
    compare(
        functools.partial(by_kernel, mask=mask),
        functools.partial(by_einsums, mask=mask),
        *qkv(2, 150, 150),
    )


def mesh_of(devices, *shape):
    grid = np.array(devices, dtype=object)[: np.prod(shape)].reshape(shape)
    return Mesh(grid, ("replica", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def choose(
    backend,
    *,
    platform=None,
    dtype=jnp.bfloat16,
    samples=4,
    tokens=3136,
    shape=(1, 2, 2),
    width=1024,
    kind="",
):
    """`choose` on a mesh whose devices say that they are of a platform; None: no mesh."""
    sizes = dict(zip(("replica", "fsdp", "tensor"), shape)) if platform else {}
    mesh = types.SimpleNamespace(
        empty=platform is None,
        auto_axes=tuple(sizes),
        manual_axes=(),
        shape=sizes,
        abstract_device=types.SimpleNamespace(platform=platform, device_kind=kind),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
        return backends.choose(
            backend, dtype, samples=samples, queries=tokens, keys=tokens, heads=16, width=width
        )


@pytest.mark.parametrize(
    ("expected", "case"),
    [
        ("pallas", {"platform": "tpu"}),
        ("cudnn", {"platform": "gpu"}),
        ("cudnn", {"platform": "cuda"}),
        ("xla", {"platform": "cpu"}),
        ("xla", {}),
        ("xla", {"platform": "tpu", "tokens": 32}),
        ("pallas", {"platform": "tpu", "tokens": 196}),
        ("xla", {"platform": "gpu", "dtype": jnp.float32}),
        ("pallas", {"platform": "tpu", "dtype": jnp.float32}),
        ("xla", {"platform": "tpu", "samples": 3}),  # does not divide over 2 devices
        ("xla", {"platform": "tpu", "shape": (1, 2, 3)}),  # nor do 16 heads over 3
        ("xla", {"platform": "tpu", "width": 16 * 80}),  # heads of 80 do not fill 128 lanes
        ("xla", {"platform": "tpu", "shape": (1, 2, 16)}),  # nor does one of 64
        ("cudnn", {"platform": "gpu", "width": 16 * 80}),
        ("xla", {"platform": "gpu", "tokens": 197}),  # odd
        ("pallas", {"platform": "tpu", "kind": "TPU v4", "tokens": 3584}),
        ("xla", {"platform": "tpu", "kind": "TPU v4", "tokens": 3920}),
        ("xla", {"platform": "tpu", "kind": "TPU v4", "tokens": 6272}),
        ("xla", {"platform": "tpu", "kind": "TPU v4", "dtype": jnp.float32, "tokens": 1568}),
        ("pallas", {"platform": "tpu", "kind": "TPU v5 lite", "tokens": 6272}),
    ],
)
def test_auto_goes_by_the_platform_of_the_mesh_and_the_length(expected, case):
    assert choose("auto", **case) == expected


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_within_shard_map_xla_computes(monkeypatch, name):
    """As re-ranking does: a kernel would split the mesh's axes a second time."""
    monkeypatch.setattr(backends, "platform", lambda: name)
    monkeypatch.setattr(layer_norm, "platform", lambda: name)
    data = jax.sharding.PartitionSpec(("replica", "fsdp"))
    x = jax.ShapeDtypeStruct((8, 256, WIDTH), jnp.bfloat16)

    def inside(x):
        norm = layers.LayerNorm(WIDTH, eps=1e-6, dtype=jnp.bfloat16)
        return layers.dot_product_attention(norm(x), x, x, heads=HEADS, backend="auto")

    mesh = mesh_of(jax.devices(), 2, 4, 1)
    split = jax.shard_map(inside, mesh=mesh, in_specs=data, out_specs=data, check_vma=False)
    jaxpr = jax.make_jaxpr(split)(x)
    assert "pallas" not in str(jaxpr) and "cudnn" not in str(jaxpr)


@pytest.mark.parametrize("masked", [False, True])
def test_cudnn_takes_our_shapes_and_masks(monkeypatch, masked):
    """Its checks of shapes run without a GPU; what it computes was not seen here."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda *_: 91000)
    q = jax.ShapeDtypeStruct((2, 208, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((2, 320, 128), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((2, 320), bool) if masked else None

    def gradients(q, k, v, mask):
        def total(q, k, v):
            y = backends.attend("cudnn", q, k, v, heads=2, mask=mask)
            return y.astype(jnp.float32).sum()

        return jax.grad(total, (0, 1, 2))(q, k, v)

    assert jax.eval_shape(gradients, q, k, k, mask) == (q, k, k)


def test_a_named_kernel_that_cannot_run_is_an_error():
    assert choose("pallas", platform="tpu", tokens=8) == "pallas"
    assert choose("xla", platform="tpu") == "xla"
    with pytest.raises(UserError, match=r"'pallas' runs on a TPU.*'cpu'; use 'auto'"):
        choose("pallas", platform="cpu")
    with pytest.raises(UserError, match="'cudnn' runs on a GPU"):
        choose("cudnn", platform="tpu")
    with pytest.raises(UserError, match=r"'cudnn' needs config.compute.dtype='bfloat16'"):
        choose("cudnn", platform="gpu", dtype=np.dtype("float32"))


def test_what_needs_probabilities_is_computed_by_xla(monkeypatch):
    monkeypatch.setattr(backends, "choose", lambda *_, **__: "pallas")
    attend = functools.partial(layers.dot_product_attention, *qkv(1, 8, 8), heads=HEADS)
    ones, key = jnp.ones((1, HEADS, 8, 8)), jax.random.key(0)
    scaled = attend(scale=ones)
    np.testing.assert_allclose(scaled, attend(scale=2 * ones) / 2)
    dropped = attend(dropout_rate=0.5, key=key)
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
