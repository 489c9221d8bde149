"""Instances of stage 2: crops cut on the device, and their look at the whole scene.

An instance's boxes are cut out of frames that are already on the device, the same encoder f turns
the crops into tokens C, and cross-attention to the scene's tokens V contextualises them.

Axis letters: g groups, b samples of a group, n instances of a group, t frames, l crop tokens,
m scene tokens, d width, S crop size. `parent` int32 [g, n] names the sample, of its own group, that
an instance belongs to: no gather leaves its group.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from instap_jax.models import boxes as box
from instap_jax.models.depth import scan_blocks, stack
from instap_jax.models.layers import CrossAttention, LayerNorm, Linear
from instap_jax.models.placement import data_ways, flat, split_over_data
from instap_jax.models.preprocess import crop_and_resize
from instap_jax.models.vision import NORM_EPSILON, VisionEncoder

Array = jax.Array


def instance_crops(
    frames: Array, extent: Array, boxes: Array, parent: Array, size: int, *, flip: Array
) -> Array:
    """Cuts every instance out of the frames of its sample.

    The boxes follow the annotation, not the random view of the sample: a crop shows the whole
    instance, whatever part of the picture the scene branch sees. Where the instance is absent the
    batch holds its nearest box; mask those frames with `token_mask`.

    Args:
      frames: uint8 [g, b, t, H, W, 3]. extent: float32 [g, b, 2].
      boxes: float32 [g, n, t, 4], fractions of the picture. parent: int32 [g, n].
      size: S in pixels.
      flip: bool [g, b], as drawn for the samples: an instance is mirrored with its scene.

    Returns:
      float32 [g, n, t, S, S, 3] in [0, 255].
    """

    def crop_group(frames, extent, flip, boxes, parent):
        def crop(instance):
            boxes, sample = instance
            return crop_and_resize(frames[sample], boxes, extent[sample], size, flip=flip[sample])

        # One instance of each group after the other: gathered at once, the frames of all
        # instances as float32 would be the largest buffer of the step.
        return lax.map(crop, (boxes, parent))

    return jax.vmap(crop_group)(frames, extent, flip, boxes, parent)


def encode_crops(
    encoder: VisionEncoder,
    crops: Array,
    visible: Array | None,
    mask: Array,
    *,
    at_most: int | None,
    key: Array | None,
) -> Array:
    """Crops through the encoder, in the fewest equal parts of `at_most` frames a device.

    Every device takes each part from its own crops, so that cutting moves nothing between devices.
    A number of crops that does not divide over the devices is encoded at once.

    Args:
      crops: [B, t, S, S, 3], normalised. visible, mask, key: as `VisionEncoder` takes them.
      at_most: of frames; a part has one whole crop at least. None: all at once.

    Returns:
      [B, l, d] in the compute dtype.
    """
    count, rest = divmod(crops.shape[0], data_ways())
    parts = 1
    if at_most and not rest:
        parts = fewest_parts(count, max(1, at_most // crops.shape[1]))
    if parts == 1:
        return encoder(crops, visible=visible, mask=mask, key=key).tokens

    # The backward pass computes a part again, keeping of its layers their inputs and what attention
    # put out: a third run of the other products, for the layers' inputs of one part instead of all.
    again = encoder.remat != "all"
    remat = "attention" if again else "all"

    def encode(part):
        index, part = part
        crops, visible, mask = split_over_data(part)
        part_key = None if key is None else jax.random.fold_in(key, index)
        return encoder(crops, visible=visible, mask=mask, key=part_key, remat=remat).tokens

    if again:
        encode = jax.checkpoint(encode, prevent_cse=False)  # as in `scan_blocks`
    cut = jax.tree.map(
        lambda x: x.reshape((-1, parts, *x.shape[1:])).swapaxes(0, 1), (crops, visible, mask)
    )
    tokens = lax.map(encode, (jnp.arange(parts), cut))
    return split_over_data(tokens.swapaxes(0, 1).reshape((-1, *tokens.shape[2:])))


def fewest_parts(count: int, at_most: int) -> int:
    """The smallest divisor of `count` that cuts it into parts of at most that size."""
    return next(n for n in range(-(-count // at_most), count + 1) if count % n == 0)


def token_mask(present: Array, patches: int) -> Array:
    """bool [..., t] of frames -> bool [..., t * patches] of their tokens."""
    return jnp.repeat(present, patches, axis=-1)


def masked_mean(tokens: Array, mask: Array) -> Array:
    """Mean of the tokens that the mask names; zeros where it names none.

    Args:
      tokens: [..., l, d]. mask: bool [..., l].

    Returns:
      float32 [..., d].
    """
    total = jnp.where(mask[..., None], tokens, 0).sum(axis=-2, dtype=jnp.float32)
    return total / jnp.maximum(mask.sum(axis=-1, dtype=jnp.float32), 1.0)[..., None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class InstanceOutput:
    """Attributes:
    tokens: [g, n, l, d], Z of equation (5), in the compute dtype; meaningless where masked.
    pooled: float32 [g, n, d], z of equation (6), the mean of Z over the tokens in the mask.
    """

    tokens: Array
    pooled: Array


class BoxCodes(nnx.Module):
    """Learned codes of an instance's box in its scene, beyond the paper (`align.size_code`,
    `align.motion_code`): what a crop resized to one size cannot show. Zero at the start.

    Args:
      width: d.
      size, motion: which of the two; at least one.
    """

    def __init__(self, width: int, *, size: bool, motion: bool, dtype: Any, rngs: nnx.Rngs):
        self.size, self.motion = size, motion
        self.projection = Linear(
            4 * box.OCTAVES * (size + motion),
            width,
            axes=(None, "embed"),
            init=jax.nn.initializers.zeros,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, boxes: Array, present: Array) -> Array:
        """boxes [g, n, t, 4] as fractions of the view, present [g, n, t] -> [g, n, t, d]."""
        features = []
        if self.size:
            features.append(box.size_features(boxes))
        if self.motion:
            features.append(box.motion_features(boxes, present))
        return self.projection(jnp.concatenate(features, axis=-1))


class InstanceCrossAttention(nnx.Module):
    """Equations (5) and (6): crop tokens look at their whole scene. W_v of (7) is the assembly's.

    Args:
      width: d, of crop and scene tokens.
      depth: blocks in a row (the paper: one).
      scale: of the attention's output projection at its start (`align.cross_attention_scale`).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        depth: int,
        scale: float,
        dtype: Any,
        remat: str,
        rngs: nnx.Rngs,
        backend: str = "auto",
    ):
        def create(rngs: nnx.Rngs) -> SceneBlock:
            return SceneBlock(width, heads, scale=scale, dtype=dtype, rngs=rngs, backend=backend)

        self.blocks = stack(create, depth, rngs)
        self.dtype = dtype
        self.remat = remat

    def __call__(
        self,
        crops: Array,
        scenes: Array,
        parent: Array,
        *,
        mask: Array,
        scene_mask: Array | None = None,
    ) -> InstanceOutput:
        """Contextualises crop tokens.

        Args:
          crops: [g, n, l, d]. scenes: [g, b, m, d]. parent: int32 [g, n].
          mask: bool [g, n, l], the crop tokens of frames in which the instance is present.
          scene_mask: bool [g, b, m], scene tokens that exist; None: all.
        """
        tokens, _ = scan_blocks(
            self.blocks,
            crops.astype(self.dtype),
            remat=self.remat,
            call=lambda block, x, key, rate: block(x, scenes, parent, mask=scene_mask),
        )
        return InstanceOutput(tokens=tokens, pooled=masked_mean(tokens, mask))


class SceneBlock(nnx.Module):
    """C + attention(query norm(C), key and value norm(V)): pre-norm, with residual, no MLP."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        scale: float,
        dtype: Any,
        rngs: nnx.Rngs,
        backend: str = "auto",
    ):
        self.norm = LayerNorm(width, eps=NORM_EPSILON, dtype=dtype, backend=backend)
        self.scene_norm = LayerNorm(width, eps=NORM_EPSILON, dtype=dtype, backend=backend)
        self.attention = CrossAttention(
            width, width, heads, dtype=dtype, rngs=rngs, out_scale=scale, backend=backend
        )

    def __call__(
        self, crops: Array, scenes: Array, parent: Array, *, mask: Array | None = None
    ) -> Array:
        """crops [g, n, l, d], scenes [g, b, m, d], parent [g, n], mask [g, b, m] -> as crops."""

        def of_instances(scenes: Array) -> Array:
            """[g * b, ...] -> [g * n, ...], each instance's own scene."""
            grouped = scenes.reshape((parent.shape[0], -1, *scenes.shape[1:]))
            return flat(jax.vmap(lambda scene, parent: scene[parent])(grouped, parent))

        # Keys and values once per scene, then shared by its instances. Groups are laid out flat:
        # attention over samples is what the kernels split over devices.
        k, v = self.attention.keys_values(self.scene_norm(flat(scenes)))
        mask = None if mask is None else of_instances(flat(mask))
        q = self.attention.queries(self.norm(flat(crops)))
        y = self.attention.attend(q, of_instances(k), of_instances(v), mask=mask)
        return crops + self.attention.out(y).reshape(crops.shape)
