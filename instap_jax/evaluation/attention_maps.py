"""Where in a scene a model finds what an instance's sentence says: gradient-weighted maps.

The paper names 'gradient-weighted activation maps with rank-based Gaussian filtering' and
no more. Two maps are built here, both of the whole scene, unmasked, for one sentence:

* `similarity_maps` (any run of stage 'align'): Grad-CAM (Selvaraju et al., ICCV 2017) on the
  encoder's last tokens. The score is the cosine of equation (2) between the scene and the
  sentence; a channel's weight is its gradient, averaged over the tokens; a token's value is its
  weighted sum over the channels, negative ones cut to 0. The cosine does not depend on the length
  of the pooled vector, so these values sum to (almost) zero before the cut: positive is a token
  that speaks for the sentence more than the scene's average token does.
* `match_maps` (runs that trained the fusion layers on scenes, equation (3)): the gradient of the
  match logit with respect to the cross-attention probabilities, times these probabilities,
  negative products cut to 0, averaged over heads, fusion layers and the sentence's tokens (ALBEF,
  Li et al., NeurIPS 2021).

Axis letters: b scenes, n instances, t frames, l = t * side * side tokens of a scene, d width,
p shared embedding width, s text length, h heads, r c rows and columns of patches.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from instap_jax.evaluation import aligned
from instap_jax.models.depth import layer
from instap_jax.models.instap import InstAP
from instap_jax.models.layers import Context
from instap_jax.models.text import text_mask

Array = jax.Array

WINDOW = 3  # patches a side of the filter's window, as in TAM


def grad_cam(score: Callable[[Array], Array], tokens: Array) -> Array:
    """Grad-CAM of a scalar score on tokens.

    Args:
      score: tokens -> scalar.
      tokens: float32 [l, d].

    Returns:
      float32 [l], max(0, sum over d of mean-over-l gradient times token).
    """
    channel = jax.grad(score)(tokens).mean(axis=0)
    return jax.nn.relu(tokens @ channel)


def similarity_maps(model: InstAP, tokens: Array, ids: Array, parent: Array) -> Array:
    """Grad-CAM of the similarity of every instance's sentence with its scene.

    Args:
      tokens: [b, l, d], the encoder's last tokens. parent: int32 [n], index into b.
      ids: int32 [n, s], token ids of the sentences.

    Returns:
      float32 [n, l], not negative.
    """

    texts = aligned.embed_texts(model, ids)

    def one(instance):
        text, scene = instance

        def score(tokens: Array) -> Array:
            return aligned.unit(model.embed_visual(tokens.mean(axis=0))) @ text

        return grad_cam(score, tokens[scene].astype(jnp.float32))

    return jax.lax.map(one, (texts, parent))


def match_maps(model: InstAP, tokens: Array, ids: Array, parent: Array) -> Array:
    """Gradient times cross-attention of the match logit of every sentence with its scene.

    Args:
      tokens: [b, l, d], the encoder's last tokens. parent: int32 [n], index into b.
      ids: int32 [n, s], token ids of the sentences.

    Returns:
      float32 [n, l], not negative.
    """
    blocks = model.text.fusion_blocks
    depth, _, _, heads, _ = blocks.cross.query[...].shape

    def one(instance):
        ids, scene = instance
        ids, context = ids[None], tokens[scene][None]
        start, mask = model.text.encode(ids).tokens, text_mask(ids)

        def match_logit(scale: Array) -> Array:
            x = start
            for index in range(depth):
                seen = [Context(tokens=context[None], scale=scale[index][None])]
                x = layer(blocks, index)(x, mask=mask, contexts=seen)
            return model.match_head(x)[0, 1]

        # At a scale of ones this gradient is probability times gradient.
        ones = jnp.ones((depth, 1, heads, ids.shape[1], context.shape[1]), jnp.float32)
        product = jax.nn.relu(jax.grad(match_logit)(ones))[:, 0].mean(axis=(0, 1))
        return jnp.where(mask[0][:, None], product, 0).sum(axis=0) / mask.sum()

    return jax.lax.map(one, (ids, parent))


def rank_gaussian_filter(maps: Array) -> Array:
    """The rank Gaussian filter of TAM (Li et al., ICCV 2025, equations 6 and 7).

    The values of a 3 x 3 window, mirrored at the border without repeating it, are sorted; the
    value of rank k, counted from the median, gets the weight exp(-k**2 / (2 sigma**2)), sigma
    being the window's standard deviation over its mean; the result is the weighted mean. In a calm
    window that is the median, which drops lone peaks; in one with a real edge more of the window
    counts. Multiplying a map by a number multiplies the result.

    The paper's words 'rank-based Gaussian filtering' fit this filter; whether it is the one meant
    is not known.

    Args:
      maps: float32 [..., r, c], not negative, at least 2 x 2. Frames are filtered one by one.

    Returns:
      As given; 0 where a window is all zero.
    """
    rows, columns = maps.shape[-2:]
    reach = WINDOW // 2
    border = [(0, 0)] * (maps.ndim - 2) + [(reach, reach)] * 2
    padded = jnp.pad(maps, border, mode="reflect")
    window = jnp.stack(
        [padded[..., i : i + rows, j : j + columns] for i in range(WINDOW) for j in range(WINDOW)],
        axis=-1,
    )
    window = jnp.sort(window, axis=-1)
    mean = window.mean(axis=-1, keepdims=True)
    sigma = window.std(axis=-1, keepdims=True) / jnp.where(mean > 0, mean, 1.0)
    rank = jnp.arange(WINDOW**2) - WINDOW**2 // 2
    # The floor makes a window without any spread its median instead of 0 / 0.
    weight = jnp.exp(-(rank**2) / jnp.maximum(2 * sigma**2, 1e-6))
    return (window * weight).sum(axis=-1) / weight.sum(axis=-1)
