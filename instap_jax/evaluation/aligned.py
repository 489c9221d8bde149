"""What a model of stage 'align' makes of scenes, instances and texts: evaluation and inference.

All of it is deterministic and unmasked, and sees whole pictures. Batches are grouped
(`types.Batch`), what comes out is flat; only the named arrays are read.

Axis letters: g groups, b samples of a group, n instances of a group, v visual tokens of a clip,
d width, s text length, p shared embedding width, B g * b or any number.
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
    embedding: float32 [g * n, p], l2-normalised: z~ of (7). Where training had no equation (8) (the
      baselines), W_v of the mean of the crop's own tokens.
    crop: float32 [g * n, d], that mean: the visual input of (9).
    """

    embedding: jax.Array
    crop: jax.Array


def see_scenes(config: ConfigDict, model: InstAP, batch: Batch) -> jax.Array:
    """`frames`, `extent` [g, b, ...] -> the encoder's tokens [g * b, v, d]."""
    video = whole_view(batch).render(batch, config.vision.image_size, preprocess.IMAGENET)
    return model.encoder(video).tokens


def embed_scenes(model: InstAP, tokens: jax.Array) -> jax.Array:
    """W_v of the mean of the tokens [B, v, d]: float32 [B, p], l2-normalised."""
    return unit(model.embed_visual(jnp.mean(tokens, axis=1, dtype=jnp.float32)))


def embed_instances(
    config: ConfigDict, model: InstAP, batch: Batch, tokens: jax.Array
) -> Instances:
    """`boxes`, `present`, `parent` [g, n, ...] of scenes with these tokens [g * b, v, d]."""
    groups, size = batch["frames"].shape[:2]
    scenes = tokens.reshape((groups, size, *tokens.shape[1:]))
    seen = see_instances(config, model, batch, scenes, whole_view(batch))
    pooled = seen.pooled if "inst_vtc" in term_weights(config) else seen.crop
    pooled, crop = (array.reshape((-1, array.shape[-1])) for array in (pooled, seen.crop))
    return Instances(embedding=unit(model.embed_visual(pooled)), crop=crop)


def embed_texts(model: InstAP, ids: jax.Array) -> jax.Array:
    """int32 [B, s] -> W_t of [CLS]: float32 [B, p], l2-normalised."""
    return unit(model.embed_text(model.text.encode(ids).pooled))


def match(model: InstAP, ids: jax.Array, visual: jax.Array) -> jax.Array:
    """The probability of (3) and (9) that text and visual tokens belong together.

    Args:
      ids: int32 [B, s]. visual: [B, v, d], of text i the tokens of its clip, or [B, 1, d], the
        crop of its instance.

    Returns:
      float32 [B].
    """
    tokens = model.text.encode(ids).tokens
    fused = model.text.fuse(tokens, text_mask(ids), visual)
    return jax.nn.softmax(model.match_head(fused), axis=-1)[:, 1]


def unit(x: jax.Array) -> jax.Array:
    """float32, the last axis of length one; zeros stay zeros."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
