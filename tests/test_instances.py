"""Instance crops and scene cross-attention against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch_reference as reference
from flax import nnx
from test_preprocess import crop_reference
from tiny import tiny_config

from instap_jax import sharding
from instap_jax.models import instances
from instap_jax.models.vision import VisionEncoder

GROUPS, SAMPLES, INSTANCES, FRAMES = 2, 3, 4, 2
WIDTH, HEADS, CROP_TOKENS, SCENE_TOKENS = 16, 4, 6, 5

random = np.random.default_rng(0)
PARENT = np.array([[2, 0, 2, 1], [0, 0, 1, 2]], np.int32)


def test_crops_come_from_the_parents_frames():
    frames = random.integers(0, 256, (GROUPS, SAMPLES, FRAMES, 12, 16, 3), dtype=np.uint8)
    extent = np.float32([[[1, 1], [0.5, 0.75], [1, 0.5]]] * GROUPS)
    low = random.uniform(0, 0.4, (GROUPS, INSTANCES, FRAMES, 2))
    size = random.uniform(0.3, 0.6, low.shape)
    boxes = np.concatenate([low, low + size], axis=-1).astype(np.float32)
    flip = np.array([[False, True, True], [False, True, False]])
    crop = jax.jit(instances.instance_crops, static_argnums=4)
    out = crop(frames, extent, boxes, PARENT, 5, flip=flip)
    assert out.shape == (GROUPS, INSTANCES, FRAMES, 5, 5, 3)
    for g, n, t in np.ndindex(GROUPS, INSTANCES, FRAMES):
        b = PARENT[g, n]
        expected = crop_reference(frames[g, b, t], boxes[g, n, t], extent[g, b], 5)
        expected = expected[:, ::-1] if flip[g, b] else expected
        np.testing.assert_allclose(out[g, n, t], expected, atol=2e-3)


def test_token_mask_repeats_frames():
    out = instances.token_mask(jnp.array([[True, False, True]]), 2)
    np.testing.assert_array_equal(out, [[True, True, False, False, True, True]])


def test_masked_mean():
    tokens = random.normal(size=(3, 5, 4)).astype(np.float32)
    mask = np.array([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
    out = instances.masked_mean(jnp.asarray(tokens), mask)
    np.testing.assert_allclose(out[0], tokens[0, [0, 2, 3]].mean(0), atol=1e-6)
    np.testing.assert_array_equal(out[1], 0)
    np.testing.assert_allclose(out[2], tokens[2].mean(0), atol=1e-6)
    half = jnp.ones((1, 1001, 1), jnp.bfloat16)  # 1001 is no bfloat16
    assert instances.masked_mean(half, jnp.ones((1, 1001), bool)).item() == 1.0


def norm64(x, parameters):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * parameters["scale"] + parameters["bias"]


def block64(parameters, crop, scene, scene_mask):
    """One instance: crop [l, d], scene [m, d]."""
    attention = parameters["attention"]
    x, context = (
        norm64(crop, parameters["norm"]),
        norm64(scene, parameters["scene_norm"])[scene_mask],
    )
    out = []
    for h in range(HEADS):
        q = x @ attention["query"][:, 0, h] + attention["query_bias"][0, h]
        k, v = (
            context @ attention["key_value"][:, i, h] + attention["key_value_bias"][i, h]
            for i in (0, 1)
        )
        logits = q @ k.T / np.sqrt(q.shape[-1])
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out.append(weights / weights.sum(-1, keepdims=True) @ v)
    merged = np.concatenate(out, axis=-1)
    return crop + merged @ attention["out"]["kernel"] + attention["out"]["bias"]


@functools.cache
def make_module(depth=2, dtype="float32"):
    return reference.fill(
        lambda: instances.InstanceCrossAttention(
            WIDTH, HEADS, depth=depth, scale=1.0, dtype=dtype, remat="none", rngs=nnx.Rngs(0)
        )
    )


def inputs():
    crops = random.normal(size=(GROUPS, INSTANCES, CROP_TOKENS, WIDTH)).astype(np.float32)
    scenes = random.normal(size=(GROUPS, SAMPLES, SCENE_TOKENS, WIDTH)).astype(np.float32)
    mask = random.random((GROUPS, INSTANCES, CROP_TOKENS)) < 0.7
    scene_mask = random.random((GROUPS, SAMPLES, SCENE_TOKENS)) < 0.7
    mask[..., 0] = scene_mask[..., 0] = True
    return crops, scenes, mask, scene_mask


@nnx.jit
def attend(module, crops, scenes, mask, scene_mask=None):
    return module(crops, scenes, PARENT, mask=mask, scene_mask=scene_mask)


def test_cross_attention_matches_equations_5_and_6():
    crops, scenes, mask, scene_mask = inputs()
    module = make_module()
    out = attend(module, crops, scenes, mask, scene_mask)
    state = nnx.to_pure_dict(nnx.state(module.blocks, nnx.Param))
    blocks = [jax.tree.map(lambda a, i=i: np.float64(a[i]), state) for i in range(2)]
    for g, n in np.ndindex(GROUPS, INSTANCES):
        b = PARENT[g, n]
        z = np.float64(crops[g, n])
        for block in blocks:
            z = block64(block, z, np.float64(scenes[g, b]), scene_mask[g, b])
        np.testing.assert_allclose(out.tokens[g, n], z, atol=1e-5)
        np.testing.assert_allclose(out.pooled[g, n], z[mask[g, n]].mean(0), atol=1e-5)


def test_absent_frames_change_nothing_that_is_pooled():
    crops, scenes, mask, _ = inputs()
    changed = np.where(mask[..., None], crops, 100.0).astype(np.float32)
    a, b = (attend(make_module(), x, scenes, mask).pooled for x in (crops, changed))
    np.testing.assert_array_equal(a, b)


def test_an_instance_sees_its_own_scene_only():
    crops, scenes, mask, _ = inputs()
    changed = scenes.copy()
    changed[0, 2] += 1 + random.normal(size=changed[0, 2].shape)
    a, b = (attend(make_module(), crops, x, mask).pooled for x in (scenes, changed))
    moved = np.abs(a - b).max(axis=-1) > 1e-6
    np.testing.assert_array_equal(moved, (PARENT == 2) & (np.arange(GROUPS) == 0)[:, None])


def test_unused_slots_give_finite_gradients():
    crops, scenes, mask, scene_mask = inputs()
    mask[0, 3] = scene_mask[1, 1] = False

    @jax.jit
    def loss(state):
        module = nnx.merge(graphdef, state)
        return module(crops, scenes, PARENT, mask=mask, scene_mask=scene_mask).pooled.sum()

    graphdef, state = nnx.split(make_module())
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(jax.grad(loss)(state)))


def test_output_projection_starts_as_small_as_asked():
    def kernel(scale):
        module = instances.InstanceCrossAttention(
            WIDTH, HEADS, depth=1, scale=scale, dtype="float32", remat="none", rngs=nnx.Rngs(0)
        )
        return module.blocks.attention.out.kernel[...]

    np.testing.assert_allclose(kernel(0.1), 0.1 * kernel(1.0), rtol=1e-6)


def test_crops_encoded_in_parts_on_many_devices_are_those_of_one():
    """Two parts of two crops a device, against all at once: tokens and gradients."""
    config = tiny_config("stage2").vision
    config.update(depth=1, drop_path=0.0)
    crops = random.normal(size=(16, 2, 8, 8, 3)).astype(np.float32)
    mask = random.random((16, 8)) < 0.7
    weights = random.normal(size=(16, 8, config.width)).astype(np.float32)
    encoder = VisionEncoder(config, dtype=jnp.float32, remat="none", rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(encoder)

    def loss(state, at_most):
        encoder = nnx.merge(graphdef, state)
        tokens = instances.encode_crops(encoder, crops, None, mask, at_most=at_most, key=None)
        return jnp.sum(tokens * weights)

    compute = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected = compute(state, None)
    mesh = tiny_config("stage2").mesh
    mesh.update(replica=1, fsdp=4, tensor=2)
    with jax.set_mesh(sharding.make_mesh(mesh)):
        found = compute(state, 7)  # frames: three crops of two, and four a device
        in_parts = str(jax.make_jaxpr(loss, static_argnums=1)(state, 7))
        at_once = str(jax.make_jaxpr(loss, static_argnums=1)(state, 8))
    assert "length=2" in in_parts
    assert "length=2" not in at_once
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected
    )


def test_parts_are_as_few_as_fit():
    assert [instances.fewest_parts(count, 3) for count in (1, 3, 4, 6, 7)] == [1, 1, 2, 2, 7]
