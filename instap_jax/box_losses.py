"""Boxes of grounding compared: L1 and generalised IoU. Pure functions of arrays, in float32.

Corner form is x0 y0 x1 y1, centre form cx cy w h, both as fractions of the picture.
Axis letters: n instances of the GLOBAL batch, t frames.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

Array = jax.Array | np.ndarray

_TINY = 1e-12  # area below which a box is a point: its IoU is 0, not 0 / 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BoxLoss:
    """Attributes:
    l1: scalar, sum over the four centre-form coordinates of the absolute difference (DETR).
    giou: scalar, 1 - generalised IoU.
    iou: scalar, for the log.

    Each is the mean over the valid instances of the mean over the frames in which it is present.
    """

    l1: Float[Array, ""]
    giou: Float[Array, ""]
    iou: Float[Array, ""]


def box_loss(
    predicted: Float[Array, "n t 4"],
    target: Float[Array, "n t 4"],
    *,
    present: Bool[Array, "n t"],
    valid: Bool[Array, " n"],
) -> BoxLoss:
    """The loss of grounding (the paper: L1 + GIoU), as DETR defines both parts (arXiv 2005.12872).

    Instances that are not valid, frames without the instance, and instances present nowhere have
    no part in it, may hold any value and get a zero gradient. Without any the loss is 0.

    Args:
      predicted: centre form. target: corner form.
    """
    used = present & valid[:, None]
    # A harmless box in the unused places, so that nothing there can become NaN.
    predicted = jnp.where(used[..., None], predicted.astype(jnp.float32), 0.5)
    target = jnp.where(used[..., None], target.astype(jnp.float32), jnp.asarray([0.0, 0, 1, 1]))
    l1 = jnp.sum(jnp.abs(predicted - to_centre(target)), axis=-1)
    iou, generalised = box_iou(to_corners(predicted), target)

    def mean(values: Float[Array, "n t"]) -> Float[Array, ""]:
        frames = jnp.sum(used, axis=-1, dtype=jnp.float32)
        each = jnp.sum(jnp.where(used, values, 0), axis=-1) / jnp.maximum(frames, 1)
        return jnp.sum(each) / jnp.maximum(jnp.sum(frames > 0, dtype=jnp.float32), 1)

    return BoxLoss(l1=mean(l1), giou=mean(1 - generalised), iou=mean(iou))


def box_iou(
    a: Float[Array, "*b 4"], b: Float[Array, "*b 4"]
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """IoU and generalised IoU (arXiv 1902.09630) of boxes in corner form, pair by pair.

    GIoU = IoU - (enclosing area - union) / enclosing area, from -1 to 1.
    """
    intersection = _area(jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:]))
    union = _area(a[..., :2], a[..., 2:]) + _area(b[..., :2], b[..., 2:]) - intersection
    enclosing = _area(jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:]))
    iou = intersection / jnp.maximum(union, _TINY)
    return iou, iou - (enclosing - union) / jnp.maximum(enclosing, _TINY)


def to_corners(boxes: Float[Array, "*b 4"]) -> Float[Array, "*b 4"]:
    """cx cy w h -> x0 y0 x1 y1."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([centre - size / 2, centre + size / 2], axis=-1)


def to_centre(boxes: Float[Array, "*b 4"]) -> Float[Array, "*b 4"]:
    """x0 y0 x1 y1 -> cx cy w h."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([(low + high) / 2, high - low], axis=-1)


def _area(low: Float[Array, "*b 2"], high: Float[Array, "*b 2"]) -> Float[Array, "*b"]:
    return jnp.prod(jnp.maximum(high - low, 0), axis=-1)
