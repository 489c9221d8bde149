"""What fine-tuning puts on the pre-trained towers: boxes for sentences, classes for clips.

Axis letters: B clips, T frames, N patches of a frame, M sentences, s text length, d width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from instap_jax.models.layers import LayerNorm, Linear
from instap_jax.models.text import TextEncoder, text_mask
from instap_jax.models.vision import NORM_EPSILON, VisionEncoder

Array = jax.Array

# UMT run_class_finetuning.py: truncated normal 0.02 times --init_scale 0.001, so that fine-tuning
# starts from equal probabilities.
_classifier_init = jax.nn.initializers.truncated_normal(0.02 * 0.001)


class BoxHead(nnx.Module):
    """A 3-layer MLP for boxes: two hidden layers of the input's width, ReLU between (DETR)."""

    def __init__(self, width: int, *, dtype: Any, rngs: nnx.Rngs):
        self.first = Linear(width, width, axes=("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.second = Linear(width, width, axes=("mlp", "embed"), dtype=dtype, rngs=rngs)
        self.last = Linear(width, 4, axes=("embed", None), dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """[..., d] -> float32 [..., 4], centre and size (cx, cy, w, h) in (0, 1)."""
        x = jax.nn.relu(self.second(jax.nn.relu(self.first(x))))
        return jax.nn.sigmoid(self.last(x).astype(jnp.float32))


class Grounder(nnx.Module):
    """The model of stage 'ground': encoder and text tower of stage 'align', and a box head.

    A sentence is fused with the tokens of one frame at a time, and the fused [CLS] of that frame
    becomes the frame's box: the head's input is "fused vision-text features" for an image and for
    a clip alike, an image being a clip of one frame. The tokens of a frame know of the others: the
    encoder attends over space and time together.

    Args:
      config: the whole configuration. dtype: compute dtype. remat: see `depth.scan_blocks`.
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
        self.encoder = VisionEncoder(config.vision, **options)
        self.text = TextEncoder(config.text, vision_width=config.vision.width, **options)
        self.head = BoxHead(config.text.width, dtype=dtype, rngs=rngs)

    def locate(self, frames: Array, ids: Array, *, key: Array | None = None) -> Array:
        """Boxes of sentences in their clips.

        Args:
          frames: [M, T, N, d], the encoder's tokens of each sentence's clip, frame by frame.
          ids: int32 [M, s]. key: for dropout; None runs deterministically.

        Returns:
          float32 [M, T, 4], cx cy w h as fractions of the picture that the encoder saw.
        """
        encode_key, fuse_key = (None, None) if key is None else jax.random.split(key)
        count, times = frames.shape[:2]
        tokens = self.text.encode(ids, key=encode_key).tokens
        fused = self.text.fuse(
            jnp.repeat(tokens, times, axis=0),
            jnp.repeat(text_mask(ids), times, axis=0),
            frames.reshape((count * times, *frames.shape[2:])),
            key=fuse_key,
        )
        return self.head(fused[:, 0]).reshape((count, times, 4))


class ClassHead(nnx.Module):
    """UMT's fc_norm and head: LayerNorm and one linear map of the mean token."""

    def __init__(self, width: int, classes: int, *, dtype: Any, rngs: nnx.Rngs):
        self.norm = LayerNorm(width, eps=NORM_EPSILON, dtype=dtype)
        self.linear = Linear(
            width, classes, axes=("embed", None), init=_classifier_init, dtype=dtype, rngs=rngs
        )

    def __call__(self, pooled: Array) -> Array:
        """[B, d] -> float32 logits [B, classes]."""
        return self.linear(self.norm(pooled)).astype(jnp.float32)


class Classifier(nnx.Module):
    """The model of stage 'classify': the encoder and a linear head on its mean token.

    UMT's modeling_finetune.py leaves out the encoder's final LayerNorm where it pools; here it
    stays, so that the mean is that of the tokens which pre-training used.

    Args:
      config: the whole configuration. dtype: compute dtype. remat: see `depth.scan_blocks`.
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
        self.encoder = VisionEncoder(
            config.vision, dtype=dtype, remat=remat, rngs=rngs, backend=backend
        )
        classes = len(config.classify.classes)
        self.head = ClassHead(config.vision.width, classes, dtype=dtype, rngs=rngs)
        self.frozen = config.classify.frozen

    def __call__(self, video: Array, *, key: Array | None = None) -> Array:
        """Video [B, T, H, W, 3], normalised as the encoder wants it -> float32 [B, classes].

        Args:
          key: for stochastic depth; None runs deterministically, as a frozen encoder always does.
        """
        tokens = self.encoder(video, key=None if self.frozen else key).tokens
        pooled = jnp.mean(tokens, axis=1, dtype=jnp.float32)
        return self.head(jax.lax.stop_gradient(pooled) if self.frozen else pooled)
