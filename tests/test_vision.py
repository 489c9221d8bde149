"""The student against the torch reference, layer outputs to predictions, values and gradients."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_reference as reference
from flax import nnx

from instap_jax import config as configuration
from instap_jax.models import distillation, vision

FRAMES, SIZE, PATCH, PATCHES = 3, 24, 8, 9
WIDTH, DEPTH, TAPS, PROJECTION = 32, 3, 2, 20
VISIBLE = np.array([[0, 4, 5, 11, 26], [3, 9, 10, 20, 21]], np.int32)


def config():
    c = configuration.default()
    c.vision.update(width=WIDTH, depth=DEPTH, heads=4, patch=PATCH, image_size=SIZE)
    c.vision.update(mlp_ratio=2.0, drop_path=0.5)
    c.teacher.projection = PROJECTION
    c.distill.layers = TAPS
    return c


@functools.cache
def make_pair():
    torch.manual_seed(0)
    theirs = reference.Student(
        width=WIDTH,
        depth=DEPTH,
        heads=4,
        hidden=2 * WIDTH,
        patch=PATCH,
        taps=TAPS,
        projection=PROJECTION,
    )
    return make_student(theirs, "float32"), theirs


def make_student(theirs, dtype):
    def create():
        return distillation.Student(config(), dtype=dtype, remat="none", rngs=nnx.Rngs(0))

    return reference.load(create, reference.student(theirs))


def video(frames=FRAMES):
    return np.random.default_rng(1).normal(size=(2, frames, SIZE, SIZE, 3)).astype(np.float32)


def torch_inputs(clip, visible):
    masked = torch.ones(clip.shape[0], clip.shape[1] * PATCHES, dtype=torch.bool)
    masked[torch.arange(len(visible))[:, None], torch.tensor(visible).long()] = False
    return torch.tensor(clip).permute(0, 4, 1, 2, 3), masked


@nnx.jit(static_argnames="taps")
def encode(encoder, clip, visible=None, taps=0):
    return encoder(clip, visible=visible, taps=taps)


@nnx.jit
def predict(student, clip, visible=None):
    return student(clip, visible=visible)


def test_patches_match_a_convolution():
    convolution = torch.nn.Conv3d(3, 10, (1, PATCH, PATCH), (1, PATCH, PATCH), bias=False)
    expected = convolution(torch.tensor(video()).permute(0, 4, 1, 2, 3)).flatten(2)
    kernel = reference.convolution(convolution.weight)
    ours = vision.patchify(video(), PATCH) @ kernel
    np.testing.assert_allclose(ours, reference.array(expected).transpose(0, 2, 1), atol=1e-5)


def test_patchify_refuses_a_size_it_cannot_cut():
    with pytest.raises(ValueError, match=r"24 x 24 .* 7"):
        vision.patchify(video(), 7)


@pytest.mark.parametrize("frames, patches, width", [(1, 9, 8), (3, 9, 10), (32, 196, 16)])
def test_position_codes_are_umts_table(frames, patches, width):
    expected = reference.sinusoid(frames * patches, width)
    np.testing.assert_allclose(
        vision.position_codes(frames, patches, width), expected, atol=3e-7, rtol=0
    )


def test_encoder_outputs_match_torch():
    ours, theirs = make_pair()
    expected = reference.array(theirs.encoder(*torch_inputs(video(), VISIBLE)))
    out = encode(ours.encoder, video(), VISIBLE, taps=DEPTH)
    np.testing.assert_allclose(out.taps, expected, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(out.tokens, out.taps[-1])
    without = encode(ours.encoder, video(), VISIBLE)
    assert without.taps is None
    np.testing.assert_allclose(without.tokens, expected[-1], atol=1e-5, rtol=0)


def test_predictions_and_every_gradient_match_torch():
    ours, theirs = make_pair()
    weights = np.random.default_rng(2).normal(size=(TAPS, *VISIBLE.shape, PROJECTION))
    weights = weights.astype(np.float32)
    theirs.zero_grad()
    expected = theirs(*torch_inputs(video(), VISIBLE))
    (expected * torch.tensor(weights)).sum().backward()

    @jax.jit
    def loss(state):
        predictions = nnx.merge(graphdef, state)(video(), visible=VISIBLE)
        return (predictions * weights).sum(), predictions

    graphdef, state = nnx.split(ours)
    gradients, predictions = jax.grad(loss, has_aux=True)(state)
    np.testing.assert_allclose(predictions, reference.array(expected), atol=1e-4, rtol=0)
    assert predictions.dtype == jnp.float32
    # The converter is linear, so it also converts gradients.
    torch_gradients = copy.deepcopy(theirs)
    for holder, parameter in zip(torch_gradients.parameters(), theirs.parameters()):
        holder.data = parameter.grad
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * max(1.0, np.abs(b).max())),
        nnx.to_pure_dict(gradients),
        reference.student(torch_gradients),
    )


def test_all_visible_is_dense_and_order_does_not_matter():
    ours, _ = make_pair()
    order = np.random.default_rng(3).permutation(FRAMES * PATCHES).astype(np.int32)
    np.testing.assert_allclose(
        predict(ours, video(), np.stack([order, order])),
        predict(ours, video())[:, :, order],
        atol=2e-5,
    )


def test_masked_patches_have_no_influence():
    ours, _ = make_pair()
    clip = video()
    changed = clip.copy()
    changed[:, 1, PATCH : 2 * PATCH, PATCH : 2 * PATCH] += 5  # token 13
    a, b = (encode(ours.encoder, x, VISIBLE).tokens for x in (clip, changed))
    np.testing.assert_array_equal(a, b)
    assert (
        np.abs(encode(ours.encoder, clip).tokens - encode(ours.encoder, changed).tokens).max() > 0
    )


def test_unattended_tokens_are_as_if_not_visible():
    ours, _ = make_pair()
    mask = np.tile(np.array([True, True, False, True, False]), (2, 1))
    masked = jax.jit(lambda: ours.encoder(video(), visible=VISIBLE, mask=mask).tokens)()
    fewer = encode(ours.encoder, video(), VISIBLE[:, mask[0]]).tokens
    np.testing.assert_allclose(masked[:, mask[0]], fewer, atol=1e-5)


def test_an_image_is_a_video_of_one_frame():
    ours, theirs = make_pair()
    every = np.tile(np.arange(PATCHES, dtype=np.int32), (2, 1))
    expected = reference.array(theirs.encoder(*torch_inputs(video(1), every)))
    np.testing.assert_allclose(encode(ours.encoder, video(1)).tokens, expected[-1], atol=1e-5)


def test_stochastic_depth_follows_the_key():
    ours, _ = make_pair()
    run = jax.jit(lambda key: ours.encoder(video(), visible=VISIBLE, key=key).tokens)
    a, b, c = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 1e-3
    assert ours.encoder.drop_path_rates == (0.0, 0.25, 0.5)


def test_bfloat16_stays_close_to_float32():
    ours, theirs = make_pair()
    half = make_student(theirs, "bfloat16")
    exact, predictions = (np.asarray(predict(m, video(), VISIBLE)) for m in (ours, half))
    assert predictions.dtype == jnp.float32
    assert encode(half.encoder, video(), VISIBLE).tokens.dtype == jnp.bfloat16
    cosine = (exact * predictions).sum(-1) / (
        np.linalg.norm(exact, axis=-1) * np.linalg.norm(predictions, axis=-1)
    )
    assert cosine.min() > 0.999
