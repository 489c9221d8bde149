"""Task 'classification': top-1 and top-5 accuracy of labels (the paper: Kinetics-400).

A sample is seen in `--clips` x `--crops` views, whose class probabilities are averaged, as UMT's
engine_for_finetuning.py does. Clips: the frames of T * clips equal segments, dealt out in turn, so
that every clip spans the whole sample. Crops: 1 is the whole picture, resized to a square; more are
squares of the short side, evenly spaced along the long side.
"""

import jax
import jax.numpy as jnp
import numpy as np

from instap_jax.errors import UserError
from instap_jax.evaluation.context import Context, Suite
from instap_jax.evaluation.outputs import frames_of, require_stage, run_on_suite
from instap_jax.evaluation.probe import wilson
from instap_jax.evaluation.results import Measurement
from instap_jax.models import preprocess
from instap_jax.models.heads import Classifier
from instap_jax.train.objectives.views import View
from instap_jax.types import Batch, Kind

TOP = (1, 5)

_READ = ("frames", "extent", "label")


def measure(context: Context) -> list[Measurement]:
    """Every sample of every suite; all of them have a label that the run knows."""
    require_stage(context, "classification", "classify")
    return [_measure_suite(context, suite) for suite in context.suites]


def _measure_suite(context: Context, suite: Suite) -> Measurement:
    options = context.options
    clips = 1 if suite.kind is Kind.IMAGE else options.clips
    frames = frames_of(context, suite.kind)

    def predict(config, model: Classifier, batch: Batch) -> dict[str, jax.Array]:
        scores = class_probabilities(config, model, batch, clips=clips, crops=options.crops)
        return {"scores": scores, "label": batch["label"]}

    found = run_on_suite(
        context, suite, predict, reads=_READ, rows="sample_valid", frames=frames * clips
    )
    head = "linear probe" if context.config.classify.frozen else "linear head, full fine-tuning"
    return Measurement(
        protocol=context.protocol(
            suite,
            unit="labels",
            scoring=f"{head}, {clips} x {options.crops} views",
            frames=frames,
            notes="mean of the views' probabilities; "
            + ("squares of the short side" if options.crops > 1 else "whole picture")
            + "; uniform frames; a tie counts against the model",
        ),
        metrics=accuracy_metrics(found["scores"], found["label"]),
        counts={"samples": len(found["label"]), "classes": found["scores"].shape[1]},
    )


def class_probabilities(
    config, model: Classifier, batch: Batch, *, clips: int, crops: int
) -> jax.Array:
    """float32 [g, b, classes], the mean over the views of a batch of T * clips frames."""
    groups, size, count = batch["frames"].shape[:3]
    frames = batch["frames"].reshape(
        (groups, size, count // clips, clips, *batch["frames"].shape[3:])
    )
    boxes = crop_boxes(batch["extent"], tuple(config.data.canvas), crops)
    flip = jnp.zeros((groups, size), bool)

    def see(view: jax.Array) -> jax.Array:
        clip = frames[:, :, :, view // crops]
        seen = View(boxes=boxes[view % crops], flip=flip)
        video = seen.render(batch | {"frames": clip}, config.vision.image_size, preprocess.IMAGENET)
        return jax.nn.softmax(model(video), axis=-1)

    # One view after the other: a dozen at once need a dozen times the memory.
    scores = jax.lax.map(see, jnp.arange(clips * crops)).mean(axis=0)
    return scores.reshape((groups, size, -1))


def crop_boxes(extent: jax.Array, canvas: tuple[int, int], crops: int) -> jax.Array:
    """float32 [crops, ..., 4], the views of pictures [..., 2] as fractions of each."""
    if crops == 1:
        return preprocess.center_view(extent)[None]
    pixels = jnp.maximum(extent * jnp.asarray(canvas, jnp.float32), 1.0)
    size = jnp.min(pixels, axis=-1, keepdims=True) / pixels  # (height, width) of the square
    place = jnp.arange(crops, dtype=jnp.float32) / (crops - 1)
    low = place.reshape((-1, *(1,) * size.ndim)) * (1 - size)
    box = jnp.concatenate([low, low + size], axis=-1)  # y0 x0 y1 x1
    return box[..., jnp.asarray([1, 0, 3, 2])]


def accuracy_metrics(scores: np.ndarray, labels: np.ndarray) -> dict:
    """Top-1 and top-5 accuracy in percent, the 95 % Wilson interval of the first, and floors.

    The label's rank is one plus the number of other classes that score at least as high: a tie
    counts against the model. 'majority' names the suite's most frequent classes for every sample.

    Args:
      scores: float [n, classes]. labels: int [n].

    Raises:
      UserError: a score is NaN.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if np.isnan(scores).any():
        raise UserError("a class score is NaN: the checkpoint is broken; nothing was measured")
    own = scores[np.arange(len(labels)), labels]
    rank = (scores >= own[:, None]).sum(axis=1)
    frequent = np.sort(np.bincount(labels, minlength=scores.shape[1]))[::-1]
    metrics = {f"top-{k}": float(100 * np.mean(rank <= k)) for k in TOP}
    low, high = wilson(float(np.sum(rank <= 1)), len(labels))
    majority = {f"top-{k}": float(100 * frequent[:k].sum() / len(labels)) for k in TOP}
    return metrics | {"top-1 interval": {"low": low, "high": high}, "majority": majority}
