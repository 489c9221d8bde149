"""Layers against torch; scans, rematerialisation, taps, stochastic depth against plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_reference as reference
from flax import nnx

from instap_jax.models import depth, layers

WIDTH, HEADS, DEPTH = 32, 4, 3
TOLERANCE = 1e-5


def make_block(rngs, *, bias=layers.Bias.QUERY_VALUE, dtype="float32"):
    return layers.PreNormBlock(
        WIDTH,
        HEADS,
        mlp_ratio=2.0,
        bias=bias,
        activation=layers.exact_gelu,
        eps=1e-6,
        dtype=dtype,
        rngs=rngs,
    )


@functools.cache
def make_created_block(dtype="float32"):
    return reference.fill(lambda: make_block(nnx.Rngs(0), dtype=dtype))


def create_stack(dtype="float32"):
    return depth.stack(lambda rngs: make_block(rngs, dtype=dtype), DEPTH, nnx.Rngs(0))


@functools.cache
def make_stack(dtype="float32"):
    return reference.fill(lambda: create_stack(dtype))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def check_value_and_gradient(ours, theirs, x):
    """Compares outputs, and gradients with respect to the input, of two functions of one array."""
    x_torch = torch.tensor(x, requires_grad=True)
    y_torch = theirs(x_torch)
    weights = normal(*y_torch.shape, seed=9)
    (y_torch * torch.tensor(weights)).sum().backward()
    y, gradient = jax.jit(lambda x: _value_and_gradient(ours, x, weights))(x)
    np.testing.assert_allclose(y, reference.array(y_torch), atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(gradient, x_torch.grad.numpy(), atol=5 * TOLERANCE, rtol=0)


def _value_and_gradient(function, x, weights):
    y, pullback = jax.vjp(function, x)
    return y, pullback(weights)[0]


def test_layer_norm_matches_torch():
    theirs = torch.nn.LayerNorm(WIDTH, eps=1e-2)
    reference.randomise(theirs)
    ours = reference.load(
        lambda: layers.LayerNorm(WIDTH, eps=1e-2, dtype="float32"), reference.norm(theirs)
    )
    check_value_and_gradient(ours, theirs, 3 + 0.1 * normal(2, 5, WIDTH))


def test_layer_norm_is_computed_in_float32():
    ours = layers.LayerNorm(WIDTH, eps=1e-6, dtype="bfloat16")
    x = (100 + normal(2, WIDTH)).astype(jnp.bfloat16)
    exact = layers.LayerNorm(WIDTH, eps=1e-6, dtype="float32")(x.astype(np.float32))
    assert ours(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(ours(x).astype(jnp.float32), exact, atol=1e-2)


def make_attention(bias):
    return layers.Attention(WIDTH, HEADS, bias=bias, dtype="float32", rngs=nnx.Rngs(0))


def test_umt_attention_matches_torch():
    torch.manual_seed(0)
    theirs = reference.Attention(WIDTH, HEADS)
    reference.randomise(theirs)
    ours = reference.load(
        lambda: make_attention(layers.Bias.QUERY_VALUE), reference.attention(theirs)
    )
    check_value_and_gradient(ours, theirs, normal(2, 7, WIDTH))


def torch_attention(context_width=WIDTH):
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(
        WIDTH, HEADS, batch_first=True, kdim=context_width, vdim=context_width
    )
    reference.randomise(theirs)
    return theirs


def test_full_bias_attention_matches_torch():
    theirs = torch_attention()
    kernel = reference.array(theirs.in_proj_weight).T.reshape(WIDTH, 3, HEADS, -1)
    bias = reference.array(theirs.in_proj_bias).reshape(3, HEADS, -1)
    out = reference.linear(theirs.out_proj)
    parameters = {"qkv": kernel, "qkv_bias": bias, "out": out}
    ours = reference.load(lambda: make_attention(layers.Bias.FULL), parameters)
    mask = np.arange(7) < np.array([7, 4])[:, None]
    check_value_and_gradient(
        lambda x: ours(x, mask=jnp.asarray(mask)),
        lambda x: theirs(x, x, x, key_padding_mask=torch.tensor(~mask))[0],
        normal(2, 7, WIDTH),
    )


def test_cross_attention_matches_torch():
    context_width = 24
    theirs = torch_attention(context_width)
    weights = [theirs.q_proj_weight, theirs.k_proj_weight, theirs.v_proj_weight]
    q, k, v = (reference.array(w).T.reshape(w.shape[1], 1, HEADS, -1) for w in weights)
    bias = reference.array(theirs.in_proj_bias).reshape(3, HEADS, -1)
    parameters = {
        "query": q,
        "query_bias": bias[:1],
        "key_value": np.concatenate([k, v], axis=1),
        "key_value_bias": bias[1:],
        "out": reference.linear(theirs.out_proj),
    }
    ours = reference.load(
        lambda: layers.CrossAttention(
            WIDTH, context_width, HEADS, dtype="float32", rngs=nnx.Rngs(0)
        ),
        parameters,
    )
    x, context = normal(2, 5, WIDTH), normal(2, 7, context_width, seed=1)
    mask = np.arange(7) < np.array([7, 3])[:, None]

    def theirs_of(x, context):
        return theirs(x, context, context, key_padding_mask=torch.tensor(~mask))[0]

    check_value_and_gradient(
        lambda x: ours(x, [layers.Context(tokens=context[None], mask=mask[None])]),
        lambda x: theirs_of(x, torch.tensor(context)),
        x,
    )
    check_value_and_gradient(
        lambda c: ours(x, [layers.Context(tokens=c[None], mask=mask[None])]),
        lambda c: theirs_of(torch.tensor(x), c),
        context,
    )


def test_block_matches_torch():
    torch.manual_seed(0)
    theirs = reference.Block(WIDTH, HEADS, 2 * WIDTH)
    reference.randomise(theirs)
    ours = reference.load(lambda: make_block(nnx.Rngs(0)), reference.block(theirs))
    check_value_and_gradient(ours, theirs, normal(2, 7, WIDTH))


def test_a_dropout_mask_is_stored_and_not_drawn_again_by_every_reader():
    drop = functools.partial(layers.dropout, rate=0.5, key=jax.random.key(0))
    held = [
        e
        for e in jax.make_jaxpr(drop)(normal(8)).eqns
        if e.primitive.name == "optimization_barrier"
    ]
    assert [v.aval.dtype for e in held for v in e.outvars] == [bool]
    np.testing.assert_array_equal(drop(jnp.ones(8)), jax.jit(drop)(jnp.ones(8)))
    assert set(np.unique(drop(jnp.ones(8)))) == {0.0, 2.0}


def test_quick_gelu_is_clips():
    x = normal(50)
    np.testing.assert_allclose(layers.quick_gelu(x), x / (1 + np.exp(-1.702 * x)), atol=1e-6)


def test_masked_keys_are_as_if_absent():
    ours = make_created_block().attention
    x = normal(2, 7, WIDTH)
    mask = jnp.arange(7)[None] < jnp.array([[4], [4]])
    np.testing.assert_allclose(ours(x, mask=mask)[:, :4], ours(x[:, :4]), atol=TOLERANCE)


def test_a_row_without_keys_is_finite_in_value_and_gradient():
    ours = make_created_block().attention
    mask = jnp.zeros((2, 7), bool)
    value, gradient = jax.value_and_grad(lambda x: ours(x, mask=mask).sum())(
        jnp.asarray(normal(2, 7, WIDTH))
    )
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()


def test_probabilities_come_with_the_same_output():
    ours = make_created_block("bfloat16")
    x = normal(2, 7, WIDTH).astype(jnp.bfloat16)
    y, probabilities = ours.with_probabilities(x)
    np.testing.assert_array_equal(y, ours(x))
    assert probabilities.shape == (2, HEADS, 7, 7)
    assert probabilities.dtype == jnp.float32
    np.testing.assert_allclose(probabilities.sum(-1), 1.0, atol=1e-6)


def run_one_by_one(blocks, x, *, key=None, rates=None, start=0, stop=DEPTH):
    outputs = []
    for i in range(start, stop):
        block = depth.layer(blocks, i)
        if key is None:
            x = block(x)
        else:
            x = block(x, key=jax.random.fold_in(key, i), drop_path_rate=rates[i])
        outputs.append(x)
    return outputs


@pytest.mark.parametrize(
    "start, stop, taps, stochastic", [(0, 3, 0, True), (0, 3, 3, False), (1, 3, 1, True)]
)
def test_scan_equals_layers_one_by_one(start, stop, taps, stochastic):
    blocks, x = make_stack(), normal(3, 5, WIDTH)
    key = jax.random.key(5) if stochastic else None
    rates = jnp.linspace(0.0, 0.6, DEPTH)
    expected = run_one_by_one(blocks, x, key=key, rates=rates, start=start, stop=stop)
    y, tapped = depth.scan_blocks(
        blocks,
        x,
        remat="none",
        key=key,
        drop_path_rates=rates,
        start=start,
        stop=stop,
        taps=taps,
    )
    np.testing.assert_allclose(y, expected[-1], atol=TOLERANCE)
    if taps:
        np.testing.assert_allclose(tapped, jnp.stack(expected[-taps:]), atol=TOLERANCE)
    else:
        assert tapped is None


def test_scan_refuses_more_taps_than_layers():
    with pytest.raises(ValueError, match="4 taps"):
        depth.scan_blocks(make_stack(), normal(1, 2, WIDTH), remat="all", taps=4)


def scan_loss(remat):
    blocks, x = make_stack(), normal(4, 9, WIDTH)
    graphdef, state = nnx.split(blocks)
    rates = jnp.linspace(0.0, 0.5, DEPTH)

    def loss(state):
        blocks = nnx.merge(graphdef, state)
        key = jax.random.key(0)
        y, _ = depth.scan_blocks(blocks, x, remat=remat, key=key, drop_path_rates=rates)
        return (y**2).mean()

    return loss, state


def _pullback(function, x):
    return jax.vjp(function, x)[1]


def test_remat_policies_give_equal_gradients_and_keep_less(monkeypatch):
    monkeypatch.setattr(depth, "OFFLOADED_FROM", 0)
    gradients, kept = {}, {}
    for remat in ("none", "attention", "offload", "dots", "all"):
        loss, state = scan_loss(remat)
        gradients[remat] = jax.jit(jax.grad(loss))(state)
        pullback = jax.eval_shape(functools.partial(_pullback, loss), state)
        kept[remat] = sum(leaf.size for leaf in jax.tree.leaves(pullback))
    for remat in ("none", "offload", "dots"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
            gradients[remat],
            gradients["all"],
        )
    assert kept["none"] < 0.7 * kept["dots"] < 0.5 * kept["all"]


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    x = jnp.ones((4000, 3, 2))
    y = jax.jit(layers.drop_path)(x, rate=jnp.float32(0.3), key=jax.random.key(0))
    assert set(np.unique(y).tolist()) == {0.0, float(np.float32(1 / np.float32(0.7)))}
    assert (y == y[:, :1, :1]).all()
    assert abs((y[:, 0, 0] == 0).mean() - 0.3) < 0.03
    np.testing.assert_array_equal(layers.drop_path(x, rate=0.3, key=None), x)


def test_dropout_drops_elements():
    y = layers.dropout(jnp.ones((100, 100)), rate=0.25, key=jax.random.key(0))
    assert abs((y == 0).mean() - 0.25) < 0.02
    assert not (y == y[:, :1]).all()
    assert abs(y.mean() - 1) < 0.03


def test_the_branches_of_a_block_are_dropped_independently():
    block = make_created_block()
    x = jnp.asarray(normal(1, 3, WIDTH)).repeat(200, axis=0)
    y = block(x, key=jax.random.key(0), drop_path_rate=0.5)
    assert len(np.unique(np.asarray(y)[:, 0, 0].round(4))) == 4


def test_attention_dropout_needs_a_key():
    attention = make_created_block().attention
    x = normal(2, 7, WIDTH)
    np.testing.assert_array_equal(attention(x, dropout_rate=0.5), attention(x))
    dropped = attention(x, dropout_rate=0.5, key=jax.random.key(0))
    assert np.abs(dropped - attention(x)).max() > 1e-3


def test_bfloat16_stays_close_to_float32():
    x = normal(2, 9, WIDTH)
    exact, _ = depth.scan_blocks(make_stack(), x, remat="all")
    y, _ = depth.scan_blocks(make_stack("bfloat16"), x.astype(jnp.bfloat16), remat="all")
    assert y.dtype == jnp.bfloat16
    assert np.abs(y.astype(jnp.float32) - exact).max() < 0.03 * np.abs(exact).max()


def test_stacked_layers_are_initialised_independently_and_name_their_axes():
    state = nnx.state(create_stack(), nnx.Param)
    kernel = state["attention"]["qkv"][...]
    assert np.abs(kernel[0] - kernel[1]).max() > 0.01
    bound = np.sqrt(6 / (4 * WIDTH))  # of torch's xavier_uniform_ on the weight [3 d, d]
    assert 0.95 * bound < np.abs(kernel).max() <= bound
    for parameter in jax.tree.leaves(state, is_leaf=lambda p: isinstance(p, nnx.Param)):
        assert len(parameter.get_metadata("logical_axes")) == parameter[...].ndim - 1
        assert parameter[...].dtype == jnp.float32


@pytest.mark.parametrize(
    "x, sign, value, gradient",
    [(0.1, 1, 0.1, 1), (0.7, -1, 0.5, 0), (0.7, 1, 0.5, 1), (0.0, 1, 0.01, 0), (0.0, -1, 0.01, -1)],
)
def test_clamp_lets_the_gradient_lead_back(x, sign, value, gradient):
    y, slope = jax.value_and_grad(lambda x: sign * layers.clamp(x, 0.01, 0.5))(jnp.float32(x))
    assert y == pytest.approx(sign * value)
    assert slope == gradient
