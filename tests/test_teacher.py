"""The teacher against Hugging Face's CLIP vision tower, randomly initialised."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_reference as reference
import transformers
from flax import nnx

from instap_jax import config as configuration
from instap_jax.models import teacher

WIDTH, DEPTH, HEADS, PATCH, SIZE, PROJECTION, PATCHES = 32, 3, 4, 7, 28, 12, 16


def config():
    c = configuration.default()
    c.teacher.update(width=WIDTH, depth=DEPTH, heads=HEADS, patch=PATCH, image_size=SIZE)
    c.teacher.update(mlp_ratio=2.0, projection=PROJECTION)
    c.text.update(vocab_size=40, width=16, depth=2, heads=2, max_length=8)
    return c


def converted_block(source):
    parts = (source.self_attn.q_proj, source.self_attn.k_proj, source.self_attn.v_proj)
    parts = [reference.linear(part) for part in parts]
    kernels = [part["kernel"].reshape(WIDTH, HEADS, -1) for part in parts]
    biases = [part["bias"].reshape(HEADS, -1) for part in parts]
    return {
        "norm1": reference.norm(source.layer_norm1),
        "attention": {
            "qkv": np.stack(kernels, axis=1),
            "qkv_bias": np.stack(biases),
            "out": reference.linear(source.self_attn.out_proj),
        },
        "norm2": reference.norm(source.layer_norm2),
        "mlp": reference.mlp(source.mlp),
    }


def converted(source):
    tower = source.vision_model
    return {
        "patch_embedding": {
            "kernel": reference.convolution(tower.embeddings.patch_embedding.weight)
        },
        "class_token": reference.array(tower.embeddings.class_embedding),
        "positions": reference.array(tower.embeddings.position_embedding.weight),
        "ln_pre": reference.norm(tower.pre_layrnorm),
        "blocks": reference.stacked([converted_block(b) for b in tower.encoder.layers]),
        "ln_post": reference.norm(tower.post_layernorm),
        "projection": reference.linear(source.visual_projection),
    }


@functools.cache
def make_pair():
    torch.manual_seed(0)
    theirs = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=PROJECTION,
            num_hidden_layers=DEPTH,
            num_attention_heads=HEADS,
            image_size=SIZE,
            patch_size=PATCH,
            hidden_act="quick_gelu",
            attn_implementation="eager",
        )
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # its 0.02 leaves attention all but uniform
            parameter.add_(0.2 * torch.randn_like(parameter))
    return make_vision(theirs, "float32"), theirs


def make_vision(theirs, dtype):
    def create():
        return teacher.ClipVision(config().teacher, dtype=dtype, remat="none", rngs=nnx.Rngs(0))

    return reference.load(create, converted(theirs))


@functools.cache
def expected():
    theirs = make_pair()[1]
    pixels = torch.tensor(images()).permute(0, 3, 1, 2)
    with torch.no_grad():
        out = theirs(pixels, output_attentions=True, output_hidden_states=True)
        hidden = torch.stack(out.hidden_states[1:])[:, :, 1:]
        projected = theirs.visual_projection(theirs.vision_model.post_layernorm(hidden))
    attention = reference.array(out.attentions[-1]).mean(axis=1)
    return reference.array(out.image_embeds), reference.array(projected), attention


def images():
    return np.random.default_rng(4).normal(size=(3, SIZE, SIZE, 3)).astype(np.float32)


@nnx.jit(static_argnames=("taps", "attention"))
def encode(model, pixels, *, taps=0, attention=False):
    return model(pixels, taps=taps, attention=attention)


@pytest.mark.parametrize(
    "taps, attention", [(0, False), (2, False), (0, True), (1, True), (DEPTH, True)]
)
def test_embedding_and_taps_match(taps, attention):
    embedding, projected, _ = expected()
    out = encode(make_pair()[0], images(), taps=taps, attention=attention)
    np.testing.assert_allclose(out.embedding, embedding, atol=1e-4, rtol=1e-5)
    if taps:
        np.testing.assert_allclose(out.taps, projected[-taps:], atol=1e-4, rtol=1e-5)
    else:
        assert out.taps is None


def test_attention_scores_match():
    _, _, attention = expected()
    out = encode(make_pair()[0], images(), attention=True)
    np.testing.assert_allclose(out.cls_attention, attention[:, 0, 1:], atol=1e-6)
    np.testing.assert_allclose(out.received, attention[:, 1:, 1:].mean(axis=1), atol=1e-6)
    assert out.cls_attention.std(axis=1).min() > 0.01  # not a uniform row, which all would match
    assert out.received.shape == (3, PATCHES)
    without = encode(make_pair()[0], images())
    assert without.cls_attention is None
    assert without.received is None


def test_only_the_last_layer_materialises_probabilities():
    ours = make_pair()[0]
    graphdef, state = nnx.split(ours)
    program = jax.make_jaxpr(
        lambda state: jax.tree.leaves(nnx.merge(graphdef, state)(images(), attention=True))
    )(state)
    tokens = PATCHES + 1
    outputs = [v.aval.shape for e in program.eqns for v in e.outvars if hasattr(v.aval, "shape")]
    assert (3, HEADS, tokens, tokens) in outputs
    assert not any(len(shape) == 5 and shape[-2:] == (tokens, tokens) for shape in outputs)


@functools.cache
def make_clip():
    return reference.fill(
        lambda: teacher.ClipModel(config(), dtype="float32", remat="none", rngs=nnx.Rngs(0))
    )


def ids():
    return np.array([[2, 9, 8, 3, 0], [2, 7, 3, 0, 0], [2, 5, 6, 4, 3]], np.int32)


def test_every_parameter_of_the_small_clip_learns():
    graphdef, state = nnx.split(make_clip(), ...)

    def loss(state):
        model = nnx.merge(graphdef, state)
        a, b = model.embed_images(images()), model.embed_texts(ids())
        logits = (a @ b.T) / model.tau()
        return -jax.nn.log_softmax(logits)[jnp.arange(3), jnp.arange(3)].sum()

    gradients = jax.jit(jax.grad(loss))(state)
    silent = [
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_leaves_with_path(gradients)
        if not np.abs(g).max() > 1e-7
    ]
    assert not silent, silent


def test_temperature_starts_as_configured_and_stays_in_range():
    def create():
        model = teacher.ClipModel(config(), dtype="float32", remat="none", rngs=nnx.Rngs(0))
        return model.temperature[...]

    assert nnx.jit(create)() == pytest.approx(0.07)
    graphdef, state = nnx.split(make_clip())
    for value, used in ((0.07, 0.07), (9.0, 0.5), (-1.0, 0.001)):
        state["temperature"][...] = jnp.float32(value)
        assert nnx.merge(graphdef, state).tau() == pytest.approx(used)


def test_bfloat16_stays_close_to_float32():
    ours, theirs = make_pair()
    exact = encode(ours, images(), taps=1, attention=True)
    half = encode(make_vision(theirs, "bfloat16"), images(), taps=1, attention=True)
    assert half.taps.dtype == jnp.bfloat16
    assert half.cls_attention.dtype == jnp.float32
    np.testing.assert_allclose(half.cls_attention, exact.cls_attention, atol=5e-3)
    a, b = np.asarray(exact.taps), np.asarray(half.taps, np.float32)
    assert ((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).min() > 0.999
