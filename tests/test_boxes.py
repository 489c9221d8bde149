"""Boxes on the device, and what crops carry of them, against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from runner import Runner, batch_for
from tiny import tiny_config

from instap_jax.models import boxes
from instap_jax.models.instances import BoxCodes
from instap_jax.models.vision import position_codes


def test_still_box_is_that_of_the_middle_present_frame():
    every = np.arange(5, dtype=np.float32)[None, :, None] * np.ones((4, 1, 4), np.float32)
    present = np.array([[0, 1, 1, 1, 0], [1, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]], bool)
    held, shown = boxes.hold_still(jnp.asarray(every), jnp.asarray(present))
    np.testing.assert_array_equal(held[:3, :, 0], [[2] * 5, [3] * 5, [4] * 5])
    np.testing.assert_array_equal(shown.all(1), [True, True, True, False])
    assert not shown[3].any()


def test_scene_codes_interpolate_the_encoders_table():
    rng = np.random.default_rng(0)
    side, crop, width, frames = 4, 3, 8, 2
    low = rng.uniform(-0.3, 0.5, (1, 5, frames, 2))
    box = np.concatenate([low, low + rng.uniform(0.2, 0.9, low.shape)], -1).astype(np.float32)
    codes = boxes.scene_codes(jnp.asarray(box), crop_side=crop, scene_side=side, width=width)
    table = np.asarray(position_codes(frames, side**2, width)).reshape(frames, side, side, width)
    for n, t, i, j in np.ndindex(5, frames, crop, crop):
        x0, y0, x1, y1 = np.float64(box[0, n, t])
        y = np.clip((y0 + (i + 0.5) / crop * (y1 - y0)) * side - 0.5, 0, side - 1)
        x = np.clip((x0 + (j + 0.5) / crop * (x1 - x0)) * side - 0.5, 0, side - 1)
        r, c = min(int(y), side - 2), min(int(x), side - 2)
        fy, fx = y - r, x - c
        top = table[t, r, c] * (1 - fx) + table[t, r, c + 1] * fx
        bottom = table[t, r + 1, c] * (1 - fx) + table[t, r + 1, c + 1] * fx
        expected = top * (1 - fy) + bottom * fy
        np.testing.assert_allclose(codes[0, n, (t * crop + i) * crop + j], expected, atol=1e-5)
    whole = jnp.asarray([[[[0.0, 0, 1, 1]] * frames]])
    codes = boxes.scene_codes(whole, crop_side=side, scene_side=side, width=width)
    np.testing.assert_allclose(codes[0, 0], table.reshape(-1, width), atol=1e-6)


def test_boxes_in_a_view():
    box = jnp.asarray([[[0.5, 0.25, 0.75, 0.5]]])
    view = jnp.asarray([[0.5, 0.0, 1.0, 0.5]])
    plain = boxes.to_view(box, view, jnp.asarray([False]))
    np.testing.assert_allclose(plain[0, 0], [0, 0.5, 0.5, 1], atol=1e-6)
    flipped = boxes.to_view(box, view, jnp.asarray([True]))
    np.testing.assert_allclose(flipped[0, 0], [0.5, 0.5, 1, 1], atol=1e-6)


def test_enlarged_boxes_keep_their_centre():
    box = jnp.asarray([[0.2, 0.4, 0.4, 0.8]])
    np.testing.assert_allclose(boxes.enlarge(box, 1.5)[0], [0.15, 0.3, 0.45, 0.9], atol=1e-6)
    np.testing.assert_allclose(boxes.enlarge(box, 1.0), box, atol=1e-7)


def waves(x):
    angle = np.pi * 2.0 ** np.arange(boxes.OCTAVES)
    return np.concatenate([np.concatenate([np.sin(v * angle), np.cos(v * angle)]) for v in x])


def some_boxes(rng, frames=3):
    low = rng.uniform(-0.2, 0.6, (2, 5, frames, 2))
    return np.concatenate([low, low + rng.uniform(0.005, 0.9, low.shape)], -1).astype(np.float32)


def test_size_and_motion_features():
    rng = np.random.default_rng(0)
    box = some_boxes(rng)
    present = np.array([[[0, 1, 1], [1, 1, 1], [0, 0, 1], [1, 0, 1], [0, 0, 0]]] * 2, bool)
    size = boxes.size_features(jnp.asarray(box))
    motion = boxes.motion_features(jnp.asarray(box), jnp.asarray(present))
    for g, n, t in np.ndindex(2, 5, 3):
        x0, y0, x1, y1 = np.float64(box[g, n, t])
        extent = np.clip([x1 - x0, y1 - y0], 1 / 64, 1)
        np.testing.assert_allclose(size[g, n, t], waves(np.log2(extent) / 6), atol=1e-5)
        first = np.float64(box[g, n, np.argmax(present[g, n])])
        moved = np.array([x0 + x1 - first[0] - first[2], y0 + y1 - first[1] - first[3]]) / 2
        np.testing.assert_allclose(motion[g, n, t], waves(moved), atol=1e-5)


@pytest.mark.parametrize(("size", "motion"), [(True, False), (False, True), (True, True)])
def test_learned_codes_start_at_nothing_and_read_what_they_are_asked_to(size, motion):
    rng = np.random.default_rng(1)
    module = BoxCodes(8, size=size, motion=motion, dtype="float32", rngs=nnx.Rngs(0))
    box, present = jnp.asarray(some_boxes(rng)), jnp.ones((2, 5, 3), bool)
    np.testing.assert_array_equal(module(box, present), 0)
    kernel = rng.normal(size=module.projection.kernel.shape).astype(np.float32)
    module.projection.kernel[...] = jnp.asarray(kernel)
    codes = module(box, present)
    shifted = module(box + 0.1, present)  # all frames alike: neither size nor motion
    np.testing.assert_allclose(codes, shifted, atol=1e-4)
    assert (np.abs(codes - module(boxes.enlarge(box, 0.9), present)).max() > 1e-3) == size
    gone = box.at[:, :, 1].add(0.1)
    assert (np.abs(codes - module(gone, present)).max() > 1e-3) == motion


def test_codes_change_no_loss_at_the_start_and_learn_from_it():
    outcome = {}
    for coded in (False, True):
        changes = {"align.size_code": coded, "align.motion_code": coded, "data.frames": 2}
        config = tiny_config("stage2", **changes)
        outcome[coded] = Runner(config, 1).run(batch_for(config, groups=1))
    (_, (plain,)), (state, (metrics,)) = outcome[False], outcome[True]
    assert metrics["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert metrics["grad_norm"] > plain["grad_norm"]
    first_moment = state.opt_state[0].mu["box_codes"]["projection"]["kernel"][...]
    assert np.abs(first_moment).max() > 0
