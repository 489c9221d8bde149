"""Task 'grounding': boxes of sentences, IoU@50/70/90 (the paper's Table 3).

The IoU of an image is that of its box. The IoU of a trajectory is the mean over the frames in which
the instance is present: of its present frames among the T that the model was shown. IoU@k is the
percentage of instances whose IoU is at least k / 100.

Constants of the suite itself and a guess among its true boxes are measured beside the model, as the
floors that its numbers stand on.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from instap_jax.box_losses import to_corners
from instap_jax.errors import UserError
from instap_jax.evaluation.context import Context, Suite
from instap_jax.evaluation.outputs import frames_of, require_stage, run_on_suite
from instap_jax.evaluation.results import Measurement
from instap_jax.train.objectives import predict_boxes
from instap_jax.types import Kind

IOU_AT = (50, 70, 90)

_READ = ("frames", "extent", "boxes", "present", "parent", "instance_text", "record")


def measure(context: Context) -> list[Measurement]:
    """Every instance of every suite, by its whole caption."""
    require_stage(context, "grounding", "ground")
    return [_measure_suite(context, suite) for suite in context.suites]


def _measure_suite(context: Context, suite: Suite) -> Measurement:
    frames = frames_of(context, suite.kind)
    found = run_on_suite(
        context, suite, _predict, reads=_READ, rows="instance_valid", frames=frames
    )
    if not len(found["predicted"]):
        raise UserError(f"{suite.split} has no instances: there is nothing to ground")
    arrays = found["target"], found["present"]
    metrics = iou_metrics(trajectory_iou(found["predicted"], *arrays))
    metrics["floors"] = floors(*arrays, scene=found["scene"])
    mean = "" if suite.kind is Kind.IMAGE else "; IoU of a trajectory: mean over its frames"
    return Measurement(
        protocol=context.protocol(
            suite,
            unit="instances",
            scoring="box of the instance's caption, IoU",
            frames=frames,
            notes=f"caption cut to {context.config.tokenizer.length} tokens; whole picture; "
            f"uniform frames{mean}",
        ),
        metrics=metrics,
        counts={"instances": len(found["predicted"]), "boxes": int(found["present"].sum())},
    )


def _predict(config, model, batch) -> dict:
    return {
        "predicted": to_corners(predict_boxes(config, model, batch)),
        "target": batch["boxes"],
        "present": batch["present"],
        "scene": jnp.take_along_axis(batch["record"], batch["parent"], axis=1),
    }


def trajectory_iou(predicted: np.ndarray, target: np.ndarray, present: np.ndarray) -> np.ndarray:
    """IoU of every instance: the mean over its present frames.

    Args:
      predicted, target: [m, t, 4], x0 y0 x1 y1. present: bool [m, t], one True in each row.

    Returns:
      float64 [m].

    Raises:
      UserError: a predicted box that counts is not finite.
    """
    predicted, target = np.asarray(predicted, np.float64), np.asarray(target, np.float64)
    if not present.any(axis=1).all():
        raise ValueError("an instance is present in no frame")
    if not np.isfinite(predicted[present]).all():
        raise UserError("a predicted box is not finite: the checkpoint is broken")
    low = np.maximum(predicted[..., :2], target[..., :2])
    high = np.minimum(predicted[..., 2:], target[..., 2:])
    both = _area(low, high)
    union = _area(predicted[..., :2], predicted[..., 2:]) + _area(target[..., :2], target[..., 2:])
    iou = both / np.maximum(union - both, 1e-12)
    return np.where(present, iou, 0).sum(axis=1) / present.sum(axis=1)


def iou_metrics(iou: np.ndarray) -> dict[str, float]:
    """{'IoU@50', 'IoU@70', 'IoU@90', 'mean IoU'}, percent, of the instances' IoU [m]."""
    metrics = {f"IoU@{k}": float(100 * np.mean(iou >= k / 100)) for k in IOU_AT}
    return metrics | {"mean IoU": float(100 * np.mean(iou))}


def floors(
    target: np.ndarray, present: np.ndarray, *, scene: np.ndarray
) -> Mapping[str, dict[str, float]]:
    """What is reached without looking, or without reading; each as `iou_metrics` gives it.

    'mean box': the suite's mean box, everywhere. 'centre box': of the suite's mean size, in the
    middle. Both know the suite, so they are a little higher than any such constant of training.
    'any instance': the true box of an instance of the same scene drawn at random, the right one
    among them: what a perfect detector reaches that does not read the sentence.

    Args:
      scene: int [m], equal for instances of one sample.
    """
    mean = target[present].mean(axis=0, dtype=np.float64)
    half = (mean[2:] - mean[:2]) / 2
    centre = np.concatenate([0.5 - half, 0.5 + half])
    constants = {"mean box": mean, "centre box": centre}
    found = {
        name: iou_metrics(trajectory_iou(np.broadcast_to(box, target.shape), target, present))
        for name, box in constants.items()
    }
    scenes = [np.flatnonzero(scene == one) for one in np.unique(scene)]
    drawn = [one for rows in scenes for one in _any_instance(target[rows], present[rows])]
    found["any instance"] = {n: float(np.mean([one[n] for one in drawn])) for n in drawn[0]}
    return found


def _any_instance(target: np.ndarray, present: np.ndarray) -> list[dict[str, float]]:
    """For every instance of one scene the expectation over the instance that is drawn."""
    return [
        iou_metrics(
            trajectory_iou(
                target,
                np.broadcast_to(target[i], target.shape),
                np.broadcast_to(present[i], present.shape),
            )
        )
        for i in range(len(target))
    ]


def _area(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.maximum(high - low, 0).prod(axis=-1)
