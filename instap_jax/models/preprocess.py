"""From uint8 frames on the device to network inputs: views, crops, normalisation.

Frames lie on a canvas whose top left `extent` (height, width, as fractions) is the picture. Boxes
are x0 y0 x1 y1 as fractions of the picture. Every function takes any leading batch axes, written
`...`, so that grouped batches [g, b, ...] need no reshaping across a sharded axis.

Axis letters: t frames, h w canvas rows and columns, y x output rows and columns, c colours.
"""

import jax
import jax.numpy as jnp
from jax import lax
from ml_collections import ConfigDict

Array = jax.Array

# (mean, standard deviation) of red, green, blue in [0, 1].
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # the student (UMT, both stages)
# The teacher's own. UMT feeds its teacher ImageNet-normalised frames; we do not.
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

_ATTEMPTS = 10  # at a random view before the fallback, as torchvision's RandomResizedCrop


def normalise(x: Array, constants: tuple[tuple[float, ...], tuple[float, ...]]) -> Array:
    """Colour values [..., 3] in [0, 255] -> (x / 255 - mean) / standard deviation, float32."""
    mean, deviation = (jnp.asarray(values, jnp.float32) for values in constants)
    return (x.astype(jnp.float32) / 255.0 - mean) / deviation


def crop_and_resize(
    frames: Array, boxes: Array, extent: Array, size: int, *, flip: Array | None = None
) -> Array:
    """Cuts one box out of every frame and resizes it to size x size, antialiased bilinear.

    The filter is Pillow's BILINEAR with `resize(box=...)`: a triangle as wide as one pixel of the
    coarser of the two grids. It may read around the box, never outside the picture. As two small
    matrix products per frame the boxes may be traced. Boxes are clamped to the picture; an
    empty one shows the pixel it lies on.

    Args:
      frames: uint8 [..., T, H, W, 3].
      boxes: float32 [..., T, 4], fractions of the picture.
      extent: float32 [..., 2], (height, width) of the picture as fractions of the canvas.
      flip: bool [...], mirror these left to right after cutting.

    Returns:
      float32 [..., T, size, size, 3] in [0, 255].
    """
    height, width = frames.shape[-3:-1]
    rows = _picture_pixels(extent[..., 0], height)[..., None]
    columns = _picture_pixels(extent[..., 1], width)[..., None]
    boxes = jnp.clip(boxes, 0.0, 1.0)
    down = _resize_weights(boxes[..., 1], boxes[..., 3], rows, height, size)
    across = _resize_weights(boxes[..., 0], boxes[..., 2], columns, width, size)
    if flip is not None:
        across = jnp.where(flip[..., None, None, None], across[..., ::-1, :], across)
    # Without HIGHEST a TPU would round the weights to bfloat16: one grey level in 256.
    # Columns first, as the canvas is wider than tall.
    out = jnp.einsum(
        "...thwc,...txw->...thxc",
        frames.astype(jnp.float32),
        across,
        precision=lax.Precision.HIGHEST,
    )
    return jnp.einsum("...thxc,...tyh->...tyxc", out, down, precision=lax.Precision.HIGHEST)


def _picture_pixels(extent: Array, canvas: int) -> Array:
    # At least one: an unreadable sample has no extent, and must give zeros, not NaN.
    return jnp.maximum(jnp.round(extent * canvas), 1.0)


def _resize_weights(low: Array, high: Array, pixels: Array, canvas: int, size: int) -> Array:
    """Filter weights of one axis.

    Args:
      low, high: [...], ends of the interval to show as fractions of the picture.
      pixels: [...], length of the picture in pixels.
      canvas: length of the canvas in pixels.

    Returns:
      float32 [..., size, canvas]; every row sums to one and is zero beyond the picture.
    """
    low, high, pixels = (a[..., None, None] for a in (low * pixels, high * pixels, pixels))
    scale = (high - low) / size  # canvas pixels to an output pixel
    output = jnp.arange(size, dtype=jnp.float32)[:, None] + 0.5
    source = jnp.arange(canvas, dtype=jnp.float32) + 0.5
    distance = jnp.abs(source - (low + output * scale)) / jnp.maximum(scale, 1.0)
    weights = jnp.where(source < pixels, jnp.maximum(1.0 - distance, 0.0), 0.0)
    return weights / weights.sum(axis=-1, keepdims=True)


def random_views(
    key: Array, extent: Array, keep_side: Array, config: ConfigDict
) -> tuple[Array, Array]:
    """Draws one random view for each clip: RandomResizedCrop without rounding to pixels.

    Area uniform in `view_area`, aspect (width / height, in pixels) log-uniform in `view_aspect`,
    place uniform. If none of ten draws fits into the picture, the largest centred view of an
    allowed aspect.

    Args:
      extent: float32 [..., 2], (height, width) of the picture as fractions of the canvas.
      keep_side: bool [...], never flip these.
      config: the `data` section of the configuration.

    Returns:
      boxes float32 [..., 4], fractions of the picture, for all frames of the clip;
      flip bool [...].
    """
    key_area, key_aspect, key_place, key_flip = jax.random.split(key, 4)
    canvas = jnp.asarray(config.canvas, jnp.float32)
    picture = jnp.maximum(extent * canvas, 1.0)
    picture_aspect = picture[..., 1] / picture[..., 0]
    low, high = config.view_aspect
    min_area, max_area = config.view_area

    shape = (*extent.shape[:-1], _ATTEMPTS)
    area = jax.random.uniform(key_area, shape, minval=min_area, maxval=max_area)
    aspect = jnp.exp(
        jax.random.uniform(key_aspect, shape, minval=jnp.log(low), maxval=jnp.log(high))
    )
    # As fractions of the picture: w h = area and w / h = aspect / picture's aspect.
    ratio = aspect / picture_aspect[..., None]
    sizes = jnp.stack([jnp.sqrt(area * ratio), jnp.sqrt(area / ratio)], axis=-1)
    fits = (sizes <= 1.0).all(axis=-1)
    first = jnp.argmax(fits, axis=-1)
    drawn = jnp.take_along_axis(sizes, first[..., None, None], axis=-2)[..., 0, :]

    ratio = jnp.clip(picture_aspect, low, high) / picture_aspect
    fallback = jnp.stack([jnp.minimum(ratio, 1.0), jnp.minimum(1.0 / ratio, 1.0)], axis=-1)
    any_fits = fits.any(axis=-1)[..., None]
    size = jnp.where(any_fits, drawn, fallback)
    place = jnp.where(any_fits, jax.random.uniform(key_place, size.shape), 0.5)
    corner = place * (1.0 - size)
    boxes = jnp.concatenate([corner, corner + size], axis=-1)
    flip = jax.random.bernoulli(key_flip, 0.5, keep_side.shape) & ~keep_side & config.flip
    return boxes, flip


def center_view(extent: Array) -> Array:
    """The view for evaluation: the whole picture, squashed to a square (UMT: Resize((224, 224))).

    Args:
      extent: float32 [..., 2].

    Returns:
      float32 [..., 4], fractions of the picture.
    """
    whole = jnp.asarray([0.0, 0.0, 1.0, 1.0], jnp.float32)
    return jnp.broadcast_to(whole, (*extent.shape[:-1], 4))
