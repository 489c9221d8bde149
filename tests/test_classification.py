"""Classification: loss, accuracy, views, the linear probe, Kinetics lists, labels in batches."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from runner import Runner, batch_for
from tiny import tiny_config

from instap_jax import losses
from instap_jax.data.converters import convert_file
from instap_jax.data.converters.reading import Request
from instap_jax.errors import UserError
from instap_jax.evaluation import classification
from instap_jax.train.objectives import objective


def loss_reference(logits, labels, valid, smoothing) -> float:
    terms = []
    for row, label, counts in zip(logits.astype(np.float64), labels, valid):
        if not counts:
            continue
        log = row - np.log(np.exp(row - row.max()).sum()) - row.max()
        target = np.full(len(row), smoothing / len(row))
        target[label] += 1 - smoothing
        terms.append(-(target * log).sum())
    return float(np.mean(terms)) if terms else 0.0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_equal_the_reference(smoothing):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (5, 4)).astype(np.float32)
    labels, valid = np.array([0, 3, 1, 2, -1]), np.array([1, 1, 0, 1, 0], bool)
    noisy = np.where(valid[:, None], logits, np.nan)

    def loss(x):
        return losses.classification_loss(
            x, jnp.asarray(labels), jnp.asarray(valid), smoothing=smoothing
        )

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(noisy))
    assert value == pytest.approx(loss_reference(logits, labels, valid, smoothing), rel=1e-6)
    assert np.isfinite(gradient).all() and not gradient[~valid].any()
    for place in np.ndindex(logits.shape):
        ends = []
        for sign in (1e-5, -1e-5):
            moved = logits.astype(np.float64)
            moved[place] += sign
            ends.append(loss_reference(moved, labels, valid, smoothing))
        assert gradient[place] == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-5)


def test_accuracy_against_sorting_by_hand():
    rng = np.random.default_rng(0)
    scores, labels = rng.random((200, 9)), rng.integers(0, 9, 200)
    order = np.argsort(-scores, axis=1)
    metrics = classification.accuracy_metrics(scores, labels)
    for k in (1, 5):
        expected = 100 * np.mean([label in row[:k] for row, label in zip(order, labels)])
        assert metrics[f"top-{k}"] == pytest.approx(expected)
        frequent = sorted(np.bincount(labels), reverse=True)[:k]
        assert metrics["majority"][f"top-{k}"] == pytest.approx(sum(frequent) / 2)
    low, high = (metrics["top-1 interval"][end] for end in ("low", "high"))
    assert low < metrics["top-1"] < high


def test_a_tie_counts_against_the_model_and_nan_is_refused():
    metrics = classification.accuracy_metrics(np.ones((3, 4)), np.array([0, 1, 2]))
    assert (metrics["top-1"], metrics["top-5"]) == (0, 100)  # of four classes all are in the top 5
    with pytest.raises(UserError, match="NaN"):
        classification.accuracy_metrics(np.full((1, 4), np.nan), np.array([0]))


def test_crops_are_squares_along_the_long_side():
    # A picture of 24 x 64 pixels on a canvas of 48 x 64, and an upright one of 48 x 32.
    extent = jnp.asarray([[0.5, 1.0], [1.0, 0.5]])
    boxes = np.asarray(classification.crop_boxes(extent, (48, 64), 3))
    np.testing.assert_allclose(boxes[:, 0, 1::2], [[0, 1]] * 3)
    np.testing.assert_allclose(boxes[:, 0, 0::2], [[0, 0.375], [0.3125, 0.6875], [0.625, 1]])
    np.testing.assert_allclose(boxes[:, 1, 0::2], [[0, 1]] * 3)
    np.testing.assert_allclose(
        boxes[:, 1, 1::2], [[0, 2 / 3], [1 / 6, 5 / 6], [1 / 3, 1]], atol=1e-6
    )
    whole = np.asarray(classification.crop_boxes(extent, (48, 64), 1))
    np.testing.assert_array_equal(whole, np.tile([0, 0, 1, 1], (1, 2, 1)))


class Looker:
    """Stands for the model: its logits are the mean colour of each frame of the view."""

    def __call__(self, video):
        return video.mean(axis=(2, 3, 4)) * 4


def test_views_are_dealt_out_and_averaged():
    config = tiny_config("classify")
    rng = np.random.default_rng(0)
    frames = np.zeros((1, 2, 6, *config.data.canvas, 3), np.uint8)
    frames[:] = rng.integers(0, 255, (1, 2, 6, 1, 1, 1))  # every frame one colour
    batch = {"frames": jnp.asarray(frames), "extent": jnp.ones((1, 2, 2))}
    found = classification.class_probabilities(config, Looker(), batch, clips=2, crops=3)
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    colour = ((frames[..., 0, 0, :] / 255 - mean) / deviation).mean(-1) * 4  # [1, 2, 6]
    expected = 0
    for first in (0, 1):  # clip j has frames j, j + 2, j + 4
        part = np.exp(colour[..., first::2])
        expected = expected + part / part.sum(-1, keepdims=True) / 2
    np.testing.assert_allclose(found, expected, atol=1e-5)


# --- the stage -----------------------------------------------------------------------------------


def classify_config(**changes):
    c = tiny_config("classify", **changes)
    c.steps = 60
    c.data.frames = 2
    return c


def moved(before, after) -> dict[str, bool]:
    changed = jax.tree.map(lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), before, after)
    return {name: any(jax.tree.leaves(changed[name])) for name in changed}


def test_full_fine_tuning_learns_one_batch_on_one_and_eight_devices():
    config = classify_config()
    batch = batch_for(config)
    one, many = Runner(config, 1), Runner(config, 8)
    state, history = one.run(batch, 25)
    assert history[0]["loss"] == pytest.approx(np.log(7), rel=1e-3)  # equal probabilities
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert all(moved(one.initial.params, state.params).values())
    others = many.run(batch, 2)[1]
    for a, b in zip(history, others):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    invalid = batch["sample_valid"].copy()
    invalid[0] = False
    a, b = (
        one.run(batch | {"sample_valid": invalid, "label": np.where(invalid, batch["label"], x)})
        for x in (-1, 4)
    )
    assert a[1] == b[1]


def test_a_linear_probe_moves_the_head_alone():
    """Weight decay and stochastic depth would move a frozen encoder, and its features, too."""
    config = classify_config(**{"classify.frozen": True, "vision.drop_path": 0.5})
    runner = Runner(config, 1)
    batch = batch_for(config)
    state, history = runner.run(batch, 8)
    assert moved(runner.initial.params, state.params) == {"encoder": False, "head": True}
    assert history[-1]["loss"] < history[0]["loss"]


@pytest.mark.parametrize("frozen", [True, False])
def test_stochastic_depth_is_of_full_fine_tuning_alone(frozen):
    config = classify_config(**{"classify.frozen": frozen, "vision.drop_path": 0.5})
    model = objective(config).create(config, nnx.Rngs(0))
    noise = jax.random.normal(jax.random.key(0), model.head.linear.kernel[...].shape)
    model.head.linear.kernel[...] = noise  # as initialised it hardly sees its input
    video = jax.random.normal(jax.random.key(1), (16, 2, 16, 16, 3))
    a, b = (model(video, key=jax.random.key(seed)) for seed in (2, 3))
    assert bool((a == b).all()) == frozen


# --- Kinetics lists ------------------------------------------------------------------------------


def convert(tmp_path, text: str, classes: str | None = None, **request):
    source, out = tmp_path / "in.csv", tmp_path / "out.jsonl"
    source.write_text(text, encoding="utf-8")
    names = None
    if classes is not None:
        names = tmp_path / "classes.txt"
        names.write_text(classes, encoding="utf-8")
    out.unlink(missing_ok=True)
    convert_file("kinetics", Request(input=source, classes=names, **request), out, lambda: None)
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_kinetics_lists(tmp_path):
    names = "abseiling\nriding a bike\n"
    for text in ("a/x.mp4,1\nb.mp4,0\n", "a/x.mp4 1\n\nb.mp4 0\n"):
        lines = convert(tmp_path, text, names)
        assert [line["media"] for line in lines] == ["a/x.mp4", "b.mp4"]
        assert [line["label"] for line in lines] == ["riding a bike", "abseiling"]
        assert lines[0]["caption"] == "A video of riding a bike."
        assert lines[0]["kind"] == "video" and lines[0]["instances"] == []
    assert convert(tmp_path, "a.mp4,riding a bike\n")[0]["label"] == "riding a bike"
    absolute = convert(tmp_path, "/data/k/a.mp4,zumba\n", media=Path("/data"))
    assert absolute[0]["media"] == "k/a.mp4"


def test_kinetics_official_csv(tmp_path):
    text = 'label,youtube_id,time_start,time_end,split\n"riding, a bike",-a_B,3,13,train\n'
    (line,) = convert(tmp_path, text)
    assert (line["media"], line["label"]) == ("-a_B_000003_000013.mp4", "riding, a bike")


@pytest.mark.parametrize(
    ("text", "classes", "message"),
    [
        ("a.mp4,2\n", "x\ny\n", r"in.csv:1: label '2' is none of the 2 classes"),
        ("a.mp4,7\n", None, "label 7 is a number; name the classes with --classes"),
        ("a.mp4\n", None, "expected 'path,label'"),
        ("a.mp4 playing guitar\n", None, "without further spaces, got 'a.mp4 playing guitar'"),
        ("a.mp4,\n", None, "in.csv:1: no label"),
        ("a.mp4,x\na.mp4,y\n", None, "this id occurs twice"),
        ("/x/a.mp4,x\n", None, "is absolute"),
        ("", None, "nothing to convert"),
        ("label,youtube_id,time_start,time_end\nx,y,z,4\n", None, "time_start and time_end"),
    ],
)
def test_kinetics_faults_are_one_line(tmp_path, text, classes, message):
    with pytest.raises(UserError, match=message) as error:
        convert(tmp_path, text, classes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()
