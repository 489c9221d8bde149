"""The terms that fuse text with visual tokens, the same for samples and for instances.

Each says what the fusion layers are to read, and what the loss of the result is, so that all terms
go through these layers at once (`TextEncoder.fuse_together`).

Axis letters: g groups, m pairs of a group, s text length, d text width, v visual tokens, e their
width, p shared embedding width.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from instap_jax import losses
from instap_jax.models.instap import InstAP
from instap_jax.models.placement import flat
from instap_jax.models.text import FusionTexts, text_mask
from instap_jax.train.objectives.base import LossResult
from instap_jax.train.objectives.instances import gather_in_group
from instap_jax.types import IGNORED_TARGET


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """Visual-text pairs of a batch: samples and their captions, or instances and theirs.

    Attributes:
      video, text: [g, m, p], embeddings, not l2-normalised.
      tau: their temperature. bias: of the sigmoid loss; None: InfoNCE.
      valid: bool [g, m].
      video_ids, text_ids: int32 [g, m], equal: the same media, the same sentence.
    """

    video: jax.Array
    text: jax.Array
    tau: jax.Array
    bias: jax.Array | None = None
    valid: jax.Array
    video_ids: jax.Array
    text_ids: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """A term of the fusion layers.

    Attributes:
      texts: what they read.
      loss: of what comes out, [g, m, s, d].
    """

    texts: FusionTexts
    loss: Callable[[jax.Array], LossResult]


def matching(
    model: InstAP,
    pairs: Pairs,
    ids: jax.Array,
    tokens: jax.Array,
    visual: jax.Array,
    key: jax.Array,
) -> Reading:
    """VTM of (3) and (9), with one hard negative video and text a pair, from its own group.

    Args:
      ids: int32 [g, m, s] and tokens: [g, m, s, d], of the texts.
      visual: [g, m, v, e], what a text is fused with.

    Returns:
      Of 3 m texts a group: the loss, and {'accuracy'} over the defined pairs, a third of which are
      true.
    """
    videos, texts = _negatives(pairs, key)
    other_visual = gather_in_group(visual, videos[0])
    other_ids, other_tokens = gather_in_group((ids, tokens), texts[0])
    # As UMT: true pairs, other videos for the texts, other texts for the videos.
    visual = jnp.concatenate([visual, other_visual, visual], axis=1)
    tokens = jnp.concatenate([tokens, tokens, other_tokens], axis=1)
    ids = jnp.concatenate([ids, ids, other_ids], axis=1)
    # A true pair counts beside a false one: alone it would teach to call everything a match.
    false = [pairs.valid & found[1] for found in (videos, texts)]
    valid = jnp.concatenate([false[0] | false[1], *false], axis=1)
    labels = jnp.zeros(valid.shape, jnp.int32).at[:, : pairs.valid.shape[1]].set(1)

    def loss(fused: jax.Array) -> LossResult:
        logits = model.match_head(flat(fused))
        right = jnp.argmax(logits, axis=-1) == flat(labels)
        value = losses.matching_loss(logits, flat(labels), flat(valid))
        return value, {"accuracy": _mean(right, flat(valid))}

    texts = FusionTexts(tokens=tokens, mask=text_mask(ids), visual=visual)
    return Reading(texts=texts, loss=loss)


def _negatives(pairs: Pairs, key: jax.Array):
    """((videos, defined), (texts, defined)), each [g, m]: of every text and of every video."""

    def draw(key, video, text, valid, video_ids, text_ids):
        similarity = losses.cosine_logits(video, text, pairs.tau, valid=valid)
        admissible = losses.admissible_pairs(valid, video_ids, text_ids)
        video_key, text_key = jax.random.split(key)
        return (
            losses.hard_negatives(video_key, similarity.T, admissible),
            losses.hard_negatives(text_key, similarity, admissible),
        )

    keys = jax.random.split(key, pairs.valid.shape[0])
    arrays = (pairs.video, pairs.text, pairs.valid, pairs.video_ids, pairs.text_ids)
    return jax.vmap(draw)(keys, *arrays)


def masked_language(
    model: InstAP,
    ids: jax.Array,
    targets: jax.Array,
    tokens: jax.Array,
    visual: jax.Array,
    visual_mask: jax.Array | None,
    valid: jax.Array,
) -> Reading:
    """MLM of (4) and (10): the chosen tokens of a text from what is left of it and its visuals.

    Args:
      ids, targets: int32 [g, m, s], of `masking.corrupt_tokens`. tokens: [g, m, s, d], of `ids`.
      visual: [g, m, v, e]. visual_mask: bool [g, m, v], or None. valid: bool [g, m].

    Returns:
      Of m texts a group: the loss, and {'accuracy'} over the predicted tokens.
    """
    targets, valid = flat(targets), flat(valid)

    def loss(fused: jax.Array) -> LossResult:
        logits = model.text.mlm_logits(flat(fused))
        predicted = (targets != IGNORED_TARGET) & valid[:, None]
        accuracy = _mean(jnp.argmax(logits, axis=-1) == targets, predicted)
        return losses.masked_language_loss(logits, targets, valid), {"accuracy": accuracy}

    texts = FusionTexts(tokens=tokens, mask=text_mask(ids), visual=visual, visual_mask=visual_mask)
    return Reading(texts=texts, loss=loss)


def _mean(values: jax.Array, where: jax.Array) -> jax.Array:
    """Mean of the values where the mask is set; 0 if it is set nowhere."""
    total = jnp.sum(jnp.where(where, values, 0), dtype=jnp.float32)
    return total / jnp.maximum(jnp.sum(where, dtype=jnp.float32), 1)
