"""Grounding: the losses of boxes, the stage 'ground' on random batches, IoU and its floors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from runner import Runner, assert_close, batch_for, gradients, largest
from tiny import tiny_config

from instap_jax import box_losses
from instap_jax.errors import UserError
from instap_jax.evaluation import grounding
from instap_jax.train.objectives import objective


def giou_reference(a, b) -> tuple[float, float]:
    """IoU and GIoU of two boxes x0 y0 x1 y1 in float64, from the definitions."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return both / union, both / union - (hull - union) / hull


def loss_reference(predicted, target, present, valid) -> dict[str, float]:
    """The three numbers of `box_loss`, in loops over float64."""
    found = {"l1": [], "giou": [], "iou": []}
    for n in range(len(predicted)):
        frames = [t for t in range(predicted.shape[1]) if present[n, t]]
        if not valid[n] or not frames:
            continue
        parts = []
        for t in frames:
            cx, cy, w, h = (float(x) for x in predicted[n, t])
            x0, y0, x1, y1 = (float(x) for x in target[n, t])
            wanted = ((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0)
            corners = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
            iou, giou = giou_reference(corners, (x0, y0, x1, y1))
            l1 = sum(abs(p - q) for p, q in zip((cx, cy, w, h), wanted))
            parts.append((l1, 1 - giou, iou))
        for name, values in zip(found, zip(*parts)):
            found[name].append(sum(values) / len(values))
    return {name: sum(x) / len(x) if x else 0.0 for name, x in found.items()}


def random_boxes(rng, *shape) -> np.ndarray:
    low = rng.uniform(0, 0.6, (*shape, 2))
    return np.concatenate([low, low + rng.uniform(0.05, 0.4, (*shape, 2))], -1)


def example(seed: int):
    rng = np.random.default_rng(seed)
    predicted = np.concatenate(
        [rng.uniform(0.2, 0.8, (5, 3, 2)), rng.uniform(0.05, 0.5, (5, 3, 2))], -1
    )
    present = rng.random((5, 3)) < 0.7
    present[0], present[3] = True, False
    valid = np.array([True, True, False, True, True])
    return predicted, random_boxes(rng, 5, 3), present, valid


@pytest.mark.parametrize("seed", range(4))
def test_losses_and_gradients_equal_the_reference(seed):
    predicted, target, present, valid = example(seed)
    expected = loss_reference(predicted, target, present, valid)

    def loss(x):
        out = box_losses.box_loss(
            x, jnp.float32(target), present=jnp.asarray(present), valid=jnp.asarray(valid)
        )
        return 5 * out.l1 + 2 * out.giou, out

    gradient, out = jax.grad(loss, has_aux=True)(jnp.float32(predicted))
    for name, value in expected.items():
        assert getattr(out, name) == pytest.approx(value, rel=1e-5), name
    step = 1e-6
    for place in np.ndindex(predicted.shape):
        ends = []
        for sign in (1, -1):
            moved = predicted.copy()
            moved[place] += sign * step
            one = loss_reference(moved, target, present, valid)
            ends.append(5 * one["l1"] + 2 * one["giou"])
        slope = (ends[0] - ends[1]) / (2 * step)
        assert gradient[place] == pytest.approx(slope, rel=1e-3, abs=1e-4), place


def test_unused_boxes_may_hold_anything_and_get_no_gradient():
    predicted, target, present, valid = example(0)
    used = present & valid[:, None]

    def loss(x, y):
        out = box_losses.box_loss(x, y, present=jnp.asarray(present), valid=jnp.asarray(valid))
        return out.l1 + out.giou

    clean = jax.value_and_grad(loss)(jnp.float32(predicted), jnp.float32(target))
    noisy = [np.where(used[..., None], x, np.nan).astype(np.float32) for x in (predicted, target)]
    value, gradient = jax.value_and_grad(loss)(*map(jnp.asarray, noisy))
    assert value == clean[0] and np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient, clean[1])
    assert not np.asarray(gradient)[~used].any() and np.asarray(gradient)[used].any()


def test_without_any_instance_the_loss_is_zero():
    boxes = jnp.full((2, 3, 4), jnp.nan)
    out = box_losses.box_loss(
        boxes, boxes, present=jnp.zeros((2, 3), bool), valid=jnp.ones(2, bool)
    )
    assert (out.l1, out.giou, out.iou) == (0, 0, 0)


def test_giou_of_known_boxes():
    a = jnp.asarray([[0.0, 0, 1, 1], [0, 0, 0.5, 1], [0, 0, 0.25, 1], [0.5, 0.5, 0.5, 0.5]])
    b = jnp.asarray([[0.0, 0, 1, 1], [0, 0, 1, 1], [0.75, 0, 1, 1], [0.2, 0.2, 0.2, 0.2]])
    iou, giou = box_losses.box_iou(a, b)
    np.testing.assert_allclose(iou, [1, 0.5, 0, 0])
    # Two slivers at the ends of the picture: nothing shared, half of the hull empty.
    np.testing.assert_allclose(giou, [1, 0.5, -0.5, -1], atol=1e-6)


def test_corners_and_centres_are_inverse():
    boxes = random_boxes(np.random.default_rng(0), 7)
    there = box_losses.to_centre(jnp.float32(boxes))
    np.testing.assert_allclose(there[:, 2:], boxes[:, 2:] - boxes[:, :2], rtol=1e-5)
    np.testing.assert_allclose(box_losses.to_corners(there), boxes, atol=1e-6)


# --- the stage -----------------------------------------------------------------------------------


def ground_config():
    c = tiny_config("ground")
    c.steps = 60
    c.data.update(batch_size=16, frames=2)
    c.optimizer.clip_norm = None  # Adam's moments are then the gradients, and the first state
    return c


@pytest.fixture(scope="module")
def runner():
    return Runner(ground_config(), 1)


@pytest.fixture(scope="module")
def batch():
    batch = batch_for(ground_config())
    batch["present"][..., 0] = True
    return batch


@pytest.fixture(scope="module")
def reference(runner, batch):
    return runner.run(batch)


def test_eight_devices_equal_one(batch, reference):
    config = ground_config()
    config.mesh.update(replica=2, fsdp=2, tensor=2)
    state, history = Runner(config, 8).run(batch)
    assert reference[1][0] == pytest.approx(history[0], rel=1e-4, abs=1e-6)
    assert_close(reference[0].opt_state, state.opt_state, 2e-5)


def test_every_part_learns_and_the_words_head_does_not(reference):
    state, (metrics,) = reference
    assert metrics["loss"] == pytest.approx(5 * metrics["l1"] + 2 * metrics["giou"], rel=1e-5)
    assert metrics["instances"] == 32
    found = gradients(state)
    for part in (found["encoder"], found["head"], *(found["text"][k] for k in found["text"])):
        assert largest(part) > 0 or part is found["text"]["mlm_head"]
    # The decoder of masked words is in the aligned run's text tower; nothing reads it here.
    assert largest(found["text"]["mlm_head"]) == 0


def test_padding_and_unreadable_samples_change_nothing(runner, batch):
    unused = np.zeros(batch["parent"].shape, bool)
    unused[:, 3] = unused[0] = True
    results = []
    for seed in (1, 2):
        rng = np.random.default_rng(seed)
        noise = {
            "boxes": rng.uniform(0, 1, batch["boxes"].shape).astype(np.float32),
            "present": rng.random(batch["present"].shape) < 0.5,
            "parent": rng.integers(0, 2, batch["parent"].shape, np.int32),
            "instance_text": rng.integers(0, 300, batch["instance_text"].shape, np.int32),
        }
        mixed = {
            name: np.where(unused.reshape(unused.shape + (1,) * (a.ndim - 2)), a, batch[name])
            for name, a in noise.items()
        }
        valid = {"instance_valid": batch["instance_valid"] & ~unused}
        results.append(runner.run(batch | mixed | valid))
    assert results[0][1] == results[1][1]
    assert results[0][1][0]["instances"] == 21
    assert_close(results[0][0].opt_state, results[1][0].opt_state, 1e-7)
    broken = batch["sample_valid"].copy()
    broken[0, 0] = False
    own = (batch["parent"] == 0) & (np.arange(8) == 0)[:, None]  # instances of that sample
    boxes = np.where(own[..., None, None], np.float32([0, 0, 1, 1]), batch["boxes"])
    a, b = (
        runner.run(batch | {"sample_valid": broken, "boxes": x})[1][0]
        for x in (batch["boxes"], boxes)
    )
    assert a["instances"] == 30 and np.isfinite(a["loss"]) and a == b


def test_boxes_of_absent_frames_do_not_count(runner, batch):
    present = batch["present"].copy()
    present[..., 1] = False
    boxes = batch["boxes"].copy()
    boxes[..., 1, :] = [0, 0, 1, 1]
    a, b = (runner.run(batch | {"present": present, "boxes": x}) for x in (batch["boxes"], boxes))
    assert a[1] == b[1]


def test_groups_and_instances_in_another_order_give_the_same(runner, batch, reference):
    rng = np.random.default_rng(0)
    groups, slots = rng.permutation(8), rng.permutation(4)
    moved = {name: array[groups] for name, array in batch.items()}
    for name in ("boxes", "present", "instance_valid", "parent", "instance_text"):
        moved[name] = moved[name][:, slots]
    metrics = runner.run(moved)[1][0]
    for name in ("loss", "l1", "giou", "iou"):
        assert metrics[name] == pytest.approx(reference[1][0][name], rel=1e-5)


def test_a_box_depends_on_its_own_scene_sentence_and_frame(runner, batch, reference):
    """Other pixels, other words or another parent: another box; a stranger's: the same."""
    base = reference[1][0]["l1"]
    only = np.zeros_like(batch["instance_valid"])
    only[0, 0] = True
    alone = batch | {"instance_valid": only, "parent": np.zeros_like(batch["parent"])}
    l1 = runner.run(alone)[1][0]["l1"]
    assert l1 != base
    frames, words = batch["frames"].copy(), batch["instance_text"].copy()
    frames[:, 1], frames[1:], words[0, 1:], words[1:] = 0, 0, 7, 7
    strangers = runner.run(alone | {"frames": frames, "instance_text": words})[1][0]["l1"]
    assert strangers == pytest.approx(l1, rel=1e-6)
    words = batch["instance_text"].copy()
    words[0, 0, 1:3] = 9
    assert runner.run(alone | {"instance_text": words})[1][0]["l1"] != pytest.approx(l1, rel=1e-6)
    frames = batch["frames"].copy()
    frames[0, 0] = 255 - frames[0, 0]
    assert runner.run(alone | {"frames": frames})[1][0]["l1"] != pytest.approx(l1, rel=1e-6)
    other = runner.run(alone | {"parent": np.ones_like(batch["parent"])})[1][0]["l1"]
    assert other != pytest.approx(l1, rel=1e-6)


def test_padding_of_a_sentence_changes_no_box():
    config = ground_config()
    model = objective(config).create(config, nnx.Rngs(0))
    frames = jax.random.normal(jax.random.key(0), (2, 2, 16, 32))
    ids = jnp.asarray([[2, 7, 9, 11], [2, 8, 6, 0]])
    longer = jnp.pad(ids, [(0, 0), (0, 4)])
    np.testing.assert_allclose(model.locate(frames, ids), model.locate(frames, longer), atol=1e-6)


def test_one_batch_is_learned(runner, batch):
    _, history = runner.run(batch, 40)
    assert history[-1]["loss"] < 0.6 * history[0]["loss"]
    assert history[-1]["iou"] > history[0]["iou"] + 0.1


# --- the metric ----------------------------------------------------------------------------------


def test_iou_of_a_trajectory_is_the_mean_over_its_present_frames():
    target = np.tile([0.0, 0, 0.5, 0.5], (2, 3, 1))
    predicted = target.copy()
    predicted[:, 1] = [0, 0, 0.5, 0.25]  # half of it
    predicted[:, 2] = np.nan  # where only the second is absent
    present = np.array([[1, 1, 0], [1, 1, 0]], bool)
    np.testing.assert_allclose(grounding.trajectory_iou(predicted, target, present), [0.75, 0.75])
    with pytest.raises(UserError, match="not finite"):
        grounding.trajectory_iou(predicted, target, np.ones((2, 3), bool))
    with pytest.raises(ValueError, match="no frame"):
        grounding.trajectory_iou(predicted, target, np.zeros((2, 3), bool))


def test_iou_equals_the_reference():
    rng = np.random.default_rng(0)
    a, b, present = random_boxes(rng, 6, 4), random_boxes(rng, 6, 4), rng.random((6, 4)) < 0.6
    present[:, 0] = True
    expected = [
        np.mean([giou_reference(a[i, t], b[i, t])[0] for t in range(4) if present[i, t]])
        for i in range(6)
    ]
    np.testing.assert_allclose(grounding.trajectory_iou(a, b, present), expected, rtol=1e-9)


def test_thresholds_are_inclusive():
    metrics = grounding.iou_metrics(np.array([0.5, 0.7, 0.9, 0.4999]))
    assert (metrics["IoU@50"], metrics["IoU@70"], metrics["IoU@90"]) == (75, 50, 25)
    assert metrics["mean IoU"] == pytest.approx(100 * 2.5999 / 4)


def test_floors_of_a_scene_that_is_known():
    boxes = np.array(
        [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0, 0, 0.5, 0.5], [0.25, 0.25, 0.75, 0.75]]
    )
    target, present = boxes[:, None], np.ones((4, 1), bool)
    found = grounding.floors(target, present, scene=np.array([5, 5, 9, 2]))
    # Two scenes with the only candidate right, one with an even chance for each of its two.
    assert found["any instance"]["IoU@50"] == pytest.approx(75)
    # Mean size 0.5 x 0.5, in the middle: only the last.
    assert found["centre box"]["IoU@90"] == 25
    mean = boxes.mean(0)
    expected = np.mean([giou_reference(mean, box)[0] for box in boxes])
    assert found["mean box"]["mean IoU"] == pytest.approx(100 * expected)
