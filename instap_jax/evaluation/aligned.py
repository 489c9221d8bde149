"""What a model of stage 'align' makes of scenes, instances and texts: evaluation and inference.

All of it is deterministic and unmasked, and sees whole pictures. A batch is one group of
`types.Batch`, of which only the named arrays are read.

Axis letters: b samples, n instances, t frames, v visual tokens of a clip, d width, s text length,
p shared embedding width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from instap_jax.models import preprocess
from instap_jax.models.instap import InstAP
from instap_jax.models.text import text_mask
from instap_jax.train.objectives import see_instances, term_weights, whole_view
from instap_jax.types import Batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Instances:
    """Attributes:
    embedding: float32 [n, p], l2-normalised: z~ of (7). Where training had no equation (8) (the
      baselines), W_v of the mean of the crop's own tokens.
    crop: float32 [n, d], that mean: the visual input of (9).
    """

    embedding: jax.Array
    crop: jax.Array


def see_scenes(config: ConfigDict, model: InstAP, batch: Batch) -> jax.Array:
    """`frames`, `extent` [1, b, ...] -> the encoder's tokens [b, v, d]."""
    video = whole_view(batch).render(batch, config.vision.image_size, preprocess.IMAGENET)
    return model.encoder(video).tokens


def embed_scenes(model: InstAP, tokens: jax.Array) -> jax.Array:
    """W_v of the mean of the tokens [b, v, d]: float32 [b, p], l2-normalised."""
    return unit(model.embed_visual(jnp.mean(tokens, axis=1, dtype=jnp.float32)))


def embed_instances(
    config: ConfigDict, model: InstAP, batch: Batch, tokens: jax.Array
) -> Instances:
    """`boxes`, `present`, `parent` [1, n, ...] of scenes with these tokens [b, v, d]."""
    seen = see_instances(config, model, batch, tokens[None], whole_view(batch))
    pooled = seen.pooled if "inst_vtc" in term_weights(config) else seen.crop
    return Instances(embedding=unit(model.embed_visual(pooled[0])), crop=seen.crop[0])


def embed_texts(model: InstAP, ids: jax.Array) -> jax.Array:
    """int32 [b, s] -> W_t of [CLS]: float32 [b, p], l2-normalised."""
    return unit(model.embed_text(model.text.encode(ids).pooled))


def match(model: InstAP, ids: jax.Array, visual: jax.Array) -> jax.Array:
    """The probability of (3) and (9) that text and visual tokens belong together.

    Args:
      ids: int32 [b, s]. visual: [b, v, d], of text i the tokens of its clip, or [b, 1, d], the
        crop of its instance.

    Returns:
      float32 [b].
    """
    tokens = model.text.encode(ids).tokens
    fused = model.text.fuse(tokens, text_mask(ids), visual)
    return jax.nn.softmax(model.match_head(fused), axis=-1)[:, 1]


def unit(x: jax.Array) -> jax.Array:
    """float32, the last axis of length one; zeros stay zeros."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
