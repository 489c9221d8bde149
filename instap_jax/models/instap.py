"""InstAP assembled: UMT's modules, and the instance branch beside them. No losses.

UMT's weights map one to one (`multi_modality/models/umt.py`): `encoder` vision_encoder.encoder,
`heads` vision_encoder.clip_decoder, `pool_norm` vision_encoder.pool_norm, `vision_projection`
vision_proj, `text` text_encoder, `text_projection` text_proj, `match_head` itm_head, `temperature`
temp. `cross_attention` and `instance_temperature` are InstAP's own. Every module is there whatever
the weights of the losses, so that any run of the stage can go on from any other; only `box_codes`
and the two `contrastive_bias`, beyond the paper, are there where the configuration asks for them.

Axis letters: g groups, b samples of a group, n instances of a group, t frames, l crop tokens,
m scene tokens, d width, p shared embedding width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from instap_jax.models.distillation import DistillationHeads
from instap_jax.models.instances import (
    BoxCodes,
    InstanceCrossAttention,
    encode_crops,
    masked_mean,
)
from instap_jax.models.layers import LayerNorm, Linear, clamp
from instap_jax.models.placement import flat
from instap_jax.models.text import MatchHead, TextEncoder
from instap_jax.models.vision import NORM_EPSILON, VisionEncoder

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class InstanceFeatures:
    """Attributes:
    crop: float32 [g, n, d], c: the mean of the crop's own tokens, visual input of (9).
    tokens: [g, n, l, d], Z of (5), visual input of (10).
    mask: bool [g, n, l], the tokens of frames in which the instance is present.
    pooled: float32 [g, n, d], z of (6).
    """

    crop: Array
    tokens: Array
    mask: Array
    pooled: Array


class InstAP(nnx.Module):
    """The model of stage 'align'.

    Args:
      config: the whole configuration.
      dtype: compute dtype.
      remat: see `depth.scan_blocks`. backend: see `attention_backends`.
    """

    def __init__(
        self,
        config: ConfigDict,
        *,
        dtype: Any,
        remat: str,
        rngs: nnx.Rngs,
        backend: str = "auto",
    ):
        width, align = config.vision.width, config.align
        options = {"dtype": dtype, "remat": remat, "rngs": rngs, "backend": backend}

        def projection(width: int) -> Linear:
            return Linear(width, align.projection, axes=("embed", "proj"), dtype=dtype, rngs=rngs)

        def temperature() -> nnx.Param:
            # tau itself, as in UMT, not its logarithm as in CLIP.
            return nnx.Param(jnp.float32(config.contrastive.temperature), logical_axes=())

        self.encoder = VisionEncoder(config.vision, **options)
        self.heads = DistillationHeads(
            config.distill, width, config.teacher.projection, dtype=dtype, rngs=rngs
        )
        self.pool_norm = LayerNorm(width, eps=NORM_EPSILON, dtype=dtype)
        self.vision_projection = projection(width)
        self.text = TextEncoder(config.text, vision_width=width, **options)
        self.text_projection = projection(config.text.width)
        self.match_head = MatchHead(config.text.width, rngs=rngs)
        self.cross_attention = InstanceCrossAttention(
            width,
            align.cross_attention_heads,
            depth=align.cross_attention_depth,
            scale=align.cross_attention_scale,
            **options,
        )
        if align.size_code or align.motion_code:
            self.box_codes = BoxCodes(
                width, size=align.size_code, motion=align.motion_code, dtype=dtype, rngs=rngs
            )
        self.temperature = temperature()
        self.instance_temperature = temperature()
        self.temperature_range = tuple(config.contrastive.temperature_range)
        self.own_temperature = align.own_temperature
        self.sigmoid = config.contrastive.loss == "sigmoid"
        if self.sigmoid:
            start = jnp.float32(config.contrastive.bias)
            self.contrastive_bias = nnx.Param(start, logical_axes=())
            self.instance_contrastive_bias = nnx.Param(start, logical_axes=())
        self.contextual = align.cross_attention
        self.crop_frames = config.compute.crop_frames

    def predict_teacher(
        self, taps: Array, *, frames: int, visible: Array | None, patches: int
    ) -> Array:
        """What stage 1's heads make of the encoder's taps, for L_rec of (11).

        Args:
          taps: [K, B, V, d]. visible: int32 [B, V], or None for all frames * patches tokens.

        Returns:
          float32 [K, B, V, p of the teacher], not l2-normalised.
        """
        return self.heads(taps, self.encoder.position_codes(frames, patches, visible))

    def embed_visual(self, pooled: Array) -> Array:
        """W_v of (2) and (7), after UMT's LayerNorm: [..., d] -> [..., p], not l2-normalised."""
        return self.vision_projection(self.pool_norm(pooled))

    def embed_text(self, pooled: Array) -> Array:
        """W_t of (2) and (7): [CLS] of the last text layer [..., d] -> [..., p]."""
        return self.text_projection(pooled)

    def tau(self) -> Array:
        """The temperature of (2), float32 scalar within its range."""
        return clamp(self.temperature[...], *self.temperature_range)

    def instance_tau(self) -> Array:
        """The temperature of (8): a parameter of its own, or tau (`align.own_temperature`)."""
        if not self.own_temperature:
            return self.tau()
        return clamp(self.instance_temperature[...], *self.temperature_range)

    def bias(self) -> Array | None:
        """The bias of (2) as a sigmoid loss, float32 scalar; None with InfoNCE."""
        return self.contrastive_bias[...] if self.sigmoid else None

    def instance_bias(self) -> Array | None:
        """The bias of (8), which like its temperature is its own or that of (2)."""
        if not self.sigmoid or not self.own_temperature:
            return self.bias()
        return self.instance_contrastive_bias[...]

    def encode_instances(
        self,
        crops: Array,
        mask: Array,
        scenes: Array,
        parent: Array,
        *,
        visible: Array | None = None,
        codes: Array | None = None,
        key: Array | None = None,
    ) -> InstanceFeatures:
        """Equations (5) and (6).

        Args:
          crops: [g, n, t, S, S, 3], normalised with the ImageNet constants.
          mask: bool [g, n, l], of the visible tokens those to attend to and to pool.
          scenes: [g, b, m, d], the encoder's tokens of whole samples. parent: int32 [g, n].
          visible: int32 [g, n, l], crop tokens to encode; None: all.
          codes: [g, n, l, d], added to the tokens before (5), beyond the paper: where they lie in
            the scene (`boxes.scene_codes`), and `BoxCodes`.
          key: for stochastic depth; None runs deterministically.
        """
        groups, count = crops.shape[:2]
        rows = jax.tree.map(flat, (crops, visible, mask))
        tokens = encode_crops(self.encoder, *rows, at_most=self.crop_frames, key=key)
        tokens = tokens.reshape((groups, count, *tokens.shape[1:]))
        crop = masked_mean(tokens, mask)
        if codes is not None:
            tokens = tokens + codes.astype(tokens.dtype)
        if not self.contextual:
            pooled = masked_mean(tokens, mask)
            return InstanceFeatures(crop=crop, tokens=tokens, mask=mask, pooled=pooled)
        out = self.cross_attention(tokens, scenes, parent, mask=mask)
        return InstanceFeatures(crop=crop, tokens=out.tokens, mask=mask, pooled=out.pooled)
