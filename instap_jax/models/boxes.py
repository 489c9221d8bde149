"""Boxes of instances on the device: still boxes, and where crop tokens lie in their scene.

Boxes are float32 [..., t, 4], x0 y0 x1 y1 as fractions of the picture.
Axis letters: g groups, n instances of a group, t frames, i j rows and columns of crop patches,
r c rows and columns of scene patches, d width.
"""

import functools

import jax
import jax.numpy as jnp

from instap_jax.models.vision import PositionGrid, position_codes

Array = jax.Array

OCTAVES = 4  # of the waves that describe sizes and motion


def hold_still(boxes: Array, present: Array) -> tuple[Array, Array]:
    """The box of the middle frame in which the instance is present, held for all frames.

    What instances are without trajectories (Table 5): one box, whatever moves through it.

    Args:
      boxes: [..., t, 4]. present: bool [..., t].

    Returns:
      As given; then every frame counts as present, if any did.
    """
    count = present.sum(axis=-1, keepdims=True)
    middle = jnp.argmax(present.cumsum(axis=-1) >= (count + 1) // 2, axis=-1)
    box = jnp.take_along_axis(boxes, middle[..., None, None], axis=-2)
    return jnp.broadcast_to(box, boxes.shape), jnp.broadcast_to(count > 0, present.shape)


def to_view(boxes: Array, view: Array, flip: Array) -> Array:
    """Boxes as fractions of a view of the picture instead of the picture.

    Args:
      boxes: [..., t, 4]. view: [..., 4], part of the picture. flip: bool [...], view mirrored.

    Returns:
      [..., t, 4]; beyond [0, 1] for what the view does not show.
    """
    low, high = view[..., None, :2], view[..., None, 2:]
    x0, y0, x1, y1 = jnp.moveaxis(
        (boxes - jnp.concatenate([low, low], -1)) / jnp.concatenate([high - low] * 2, -1), -1, 0
    )
    flip = flip[..., None]
    return jnp.stack([jnp.where(flip, 1 - x1, x0), y0, jnp.where(flip, 1 - x0, x1), y1], axis=-1)


def enlarge(boxes: Array, factor: float) -> Array:
    """Boxes [..., 4] made `factor` times as wide and high about their centres."""
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    half = (boxes[..., 2:] - boxes[..., :2]) * (factor / 2)
    return jnp.concatenate([centre - half, centre + half], axis=-1)


def size_features(boxes: Array) -> Array:
    """Sines and cosines of the width and height of boxes [..., 4], on a logarithmic scale.

    Returns:
      float32 [..., 4 * OCTAVES]; a box of 1/64 of the view (or less) is half a period of the
      slowest away from one as large as the view.
    """
    size = jnp.clip(boxes[..., 2:] - boxes[..., :2], 1 / 64, 1.0)
    return _waves(jnp.log2(size) / 6)


def motion_features(boxes: Array, present: Array) -> Array:
    """Sines and cosines of how far a box has moved since the instance appeared.

    Args:
      boxes: [..., t, 4], fractions of the view. present: bool [..., t].

    Returns:
      float32 [..., t, 4 * OCTAVES]; moving across the whole view is half a period of the slowest.
      Zeros count as no motion: a still instance, and every one in its first frame.
    """
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    first = jnp.argmax(present, axis=-1)[..., None, None]
    return _waves(centre - jnp.take_along_axis(centre, first, axis=-2))


def _waves(x: Array) -> Array:
    """[..., k] -> [..., k * 2 * OCTAVES]: sin and cos of pi x, 2 pi x, 4 pi x ..."""
    angle = x[..., None] * (jnp.pi * 2.0 ** jnp.arange(OCTAVES))
    waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return waves.reshape((*x.shape[:-1], -1))


def patch_cover(boxes: Array, side: int) -> Array:
    """How much of every patch of the whole picture a box covers.

    Args:
      boxes: [..., 4]. side: patches a side.

    Returns:
      float32 [..., side, side], rows first, in [0, 1].
    """
    edges = jnp.arange(side + 1, dtype=jnp.float32) / side

    def overlap(low: Array, high: Array) -> Array:
        """[...] ends -> [..., side], covered share of every row or column."""
        cover = jnp.minimum(high[..., None], edges[1:]) - jnp.maximum(low[..., None], edges[:-1])
        return jnp.maximum(cover, 0.0) * side

    rows = overlap(boxes[..., 1], boxes[..., 3])
    columns = overlap(boxes[..., 0], boxes[..., 2])
    return rows[..., :, None] * columns[..., None, :]


def scene_codes(
    boxes: Array,
    *,
    crop_side: int,
    scene_side: int,
    width: int,
    grid: PositionGrid = PositionGrid(),  # noqa: B008 - immutable
) -> Array:
    """The position code of the scene at the centre of every crop patch (`align.scene_anchor`).

    It is the table that the encoder adds to scene tokens (`position_codes`, which names place and
    frame), read off between patch centres by bilinear interpolation; beyond the outermost centres
    it is held.

    Args:
      boxes: [g, n, t, 4], fractions of the scene's view (`to_view`).
      crop_side, scene_side: patches a side.
      grid: of the encoder (`position_codes`).

    Returns:
      float32 [g, n, t * crop_side**2, width].
    """
    g, n, t, _ = boxes.shape
    table = position_codes(t, scene_side**2, width, grid=grid)
    table = table.reshape((t, scene_side, scene_side, width))
    place = (jnp.arange(crop_side) + 0.5) / crop_side

    def weights(low: Array, high: Array) -> Array:
        """[g, n, t] ends -> [g, n, t, crop_side, scene_side]."""
        centre = low[..., None] + place * (high - low)[..., None]
        centre = jnp.clip(centre * scene_side - 0.5, 0, scene_side - 1)
        return jnp.maximum(1 - jnp.abs(centre[..., None] - jnp.arange(scene_side)), 0)

    rows = weights(boxes[..., 1], boxes[..., 3])
    columns = weights(boxes[..., 0], boxes[..., 2])
    # Without HIGHEST a TPU would round codes and weights to bfloat16.
    exactly = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    codes = exactly("gntir,trcd->gnticd", rows, table)
    codes = exactly("gntjc,gnticd->gntijd", columns, codes)
    return codes.reshape((g, n, t * crop_side**2, width))
