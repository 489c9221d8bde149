"""The teacher g: CLIP's vision transformer, and the small CLIP that stage 'teacher' trains.

Structure after OpenAI's CLIP as UMT's clip.py taps it: the patch tokens of the last K layers go
through ln_post and the projection, as the class token of the last one does in CLIP itself.

Axis letters: B images, N patches, d width, p projection, K taps.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from instap_jax.models.attention_backends import pad_tokens
from instap_jax.models.depth import layer, scan_blocks, stack
from instap_jax.models.layers import Bias, LayerNorm, Linear, PreNormBlock, clamp, quick_gelu
from instap_jax.models.placement import gathered
from instap_jax.models.text import TextEncoder
from instap_jax.models.vision import patchify

Array = jax.Array

NORM_EPSILON = 1e-5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipVisionOutput:
    """Attributes:
    embedding: [B, p], the class token after ln_post and projection, not l2-normalised.
    taps: [K, B, N, p], patch tokens of the last K layers in layer order after ln_post and
      projection, not l2-normalised; None without taps.
    cls_attention: float32 [B, N], the class token's row of the last layer's attention, patches
      only, mean over heads (UMT's mask score); None unless asked for.
    received: float32 [B, N], mean over the patch tokens of the attention each patch receives in
      the last layer, mean over heads; None unless asked for.
    """

    embedding: Array
    taps: Array | None
    cls_attention: Array | None
    received: Array | None


class ClipVision(nnx.Module):
    """CLIP ViT: patches, class token, learned positions, ln_pre, blocks, ln_post, projection.

    Args:
      config: the `teacher` section of the configuration.
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
        width, patches = config.width, (config.image_size // config.patch) ** 2
        init = jax.nn.initializers.normal(width**-0.5)
        self.heads = config.heads
        self.patch = config.patch
        self.depth = config.depth
        self.patch_embedding = Linear(
            config.patch**2 * 3,
            width,
            axes=("patch", "embed"),
            use_bias=False,
            dtype=dtype,
            rngs=rngs,
        )
        self.class_token = nnx.Param(init(rngs.params(), (width,)), logical_axes=("embed",))
        self.positions = nnx.Param(
            init(rngs.params(), (patches + 1, width)), logical_axes=(None, "embed")
        )
        self.ln_pre = LayerNorm(width, eps=NORM_EPSILON, dtype=dtype, backend=backend)
        self.blocks = stack(lambda rngs: _block(config, dtype, backend, rngs), config.depth, rngs)
        self.ln_post = LayerNorm(width, eps=NORM_EPSILON, dtype=dtype, backend=backend)
        self.projection = Linear(
            width,
            config.projection,
            axes=("embed", "proj"),
            use_bias=False,
            init=init,
            dtype=dtype,
            rngs=rngs,
        )
        self.dtype = dtype
        self.remat = remat
        self.backend = backend

    def __call__(
        self, images: Array, *, taps: int = 0, attention: bool = False
    ) -> ClipVisionOutput:
        """Encodes images, deterministically.

        Args:
          images: float [B, H, W, 3] of the configured size, normalised with CLIP's constants.
          taps: also return the projected patch tokens of the last `taps` layers.
          attention: also return the two scores of the last layer's attention. That layer then
            runs by itself: no other one materialises its probabilities.
        """
        x = self._embed(images)
        length = x.shape[1]
        x, tapped = scan_blocks(
            self.blocks,
            pad_tokens(x, backend=self.backend, heads=self.heads),
            remat=self.remat,
            stop=self.depth - attention,
            taps=max(taps - attention, 0),
            call=lambda block, x, key, rate: block(x, length=length),
        )
        cls_attention = received = None
        if attention:
            last = layer(self.blocks, self.depth - 1)
            x, probabilities = last.with_probabilities(x, length=length)
            if taps:
                tapped = x[None] if tapped is None else jnp.concatenate([tapped, x[None]])
            probabilities = probabilities.mean(axis=1)
            cls_attention = probabilities[:, 0, 1:length]
            received = probabilities[:, 1:length, 1:length].mean(axis=1)
        return ClipVisionOutput(
            embedding=self.projection(self.ln_post(x[:, 0])),
            taps=self.projection(self.ln_post(tapped))[:, :, 1:length] if taps else None,
            cls_attention=cls_attention,
            received=received,
        )

    def _embed(self, images: Array) -> Array:
        x = self.patch_embedding(patchify(images[:, None], self.patch))
        class_token = gathered(self.class_token, x.dtype)
        class_token = jnp.broadcast_to(class_token, (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([class_token, x], axis=1)
        return self.ln_pre(x + gathered(self.positions, x.dtype))


def _block(config: ConfigDict, dtype: Any, backend: str, rngs: nnx.Rngs) -> PreNormBlock:
    return PreNormBlock(
        config.width,
        config.heads,
        mlp_ratio=config.mlp_ratio,
        bias=Bias.FULL,
        activation=quick_gelu,
        eps=NORM_EPSILON,
        dtype=dtype,
        rngs=rngs,
        backend=backend,
    )


class ClipModel(nnx.Module):
    """A CLIP with our text encoder, for when no CLIP weights are at hand; equation (2) trains it.

    Args:
      config: the whole configuration.
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
        options = {"dtype": dtype, "remat": remat, "rngs": rngs, "backend": backend}
        self.visual = ClipVision(config.teacher, **options)
        self.text = TextEncoder(config.text, **options)
        self.text_projection = Linear(
            config.text.width,
            config.teacher.projection,
            axes=("embed", "proj"),
            use_bias=False,
            dtype=dtype,
            rngs=rngs,
        )
        # tau itself, as in UMT, not its logarithm as in CLIP.
        tau = jnp.float32(config.contrastive.temperature)
        self.temperature = nnx.Param(tau, logical_axes=())
        self.temperature_range = tuple(config.contrastive.temperature_range)

    def embed_images(self, images: Array) -> Array:
        """float [B, H, W, 3], normalised with CLIP's constants -> [B, p], not l2-normalised."""
        return self.visual(images).embedding

    def embed_texts(self, ids: Array, *, key: Array | None = None) -> Array:
        """int32 [B, s] -> [B, p], not l2-normalised; key is for the text encoder's dropout."""
        return self.text_projection(self.text.encode(ids, key=key).pooled)

    def tau(self) -> Array:
        """The temperature of equation (2), float32 scalar within its configured range."""
        return clamp(self.temperature[...], *self.temperature_range)
