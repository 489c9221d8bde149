"""Which tokens a model sees: the attention-guided mask of stage 1 and the masking of captions.

Pure functions of a key and arrays, with static output shapes. Letters: b samples, t frames of a
clip, l tokens of a clip (t times the patches of a frame), v visible tokens, s text length.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Int32, PRNGKeyArray

from instap_jax.types import IGNORED_TARGET

Array = jax.Array | np.ndarray

# Stands for log 0. Below the log of any float32 plus Gumbel noise, so that a token without a
# score is drawn only when all others have been; large enough that noise still orders such tokens.
_LOG_ZERO = -1e3


def visible_count(tokens: int, ratio: float, *, frames: int = 1) -> int:
    """Number of tokens that stay visible: ceil(ratio * l) are masked, at least 1 stays.

    Args:
      tokens: l, the tokens of the whole clip.
      ratio: rho in [0, 1).
      frames: in how many equal parts the clip is masked, see `choose_visible`.

    Raises:
      ValueError: if the tokens do not divide into the frames, or the ratio is out of range.
    """
    if tokens % frames:
        raise ValueError(f"{tokens} tokens do not divide into {frames} frames")
    if not 0 <= ratio < 1:
        raise ValueError(f"mask ratio {ratio} is not in [0, 1)")
    part = tokens // frames
    # 0.1 * 30 is 3.0000000000000004: without the slack one token too many would be masked.
    masked = math.ceil(ratio * part - 1e-9)
    return frames * max(1, part - masked)


def choose_visible(
    key: PRNGKeyArray,
    scores: Float[Array, "b l"],
    count: int,
    choice: str,
    *,
    frames: int = 1,
) -> Int32[Array, "b v"]:
    """Chooses the visible set Omega of every sample from the teacher's scores.

    'sample' draws without replacement in proportion to the score: the Gumbel top-k trick, the
    same distribution as `torch.multinomial` in UMT (`engine_for_pretraining_umt.py` and
    `models/umt.py: encode_teacher`). 'topk' keeps the highest scores, equal ones by lower index
    (the paper's text); it ignores the key.

    UMT chooses in each frame by itself (its scores are [batch * frames, patches]), so every
    frame keeps the same number of tokens. `frames=t` does that for scores whose l tokens lie
    frame after frame; `frames=1` makes one choice over all l tokens.

    Scores need not sum to one. Zero, negative and NaN scores are drawn only when fewer than
    `count` tokens have a positive one, then uniformly; infinity counts as the largest float32.
    With 'topk' NaN ranks below everything.

    Args:
      count: v, visible tokens of the clip (`visible_count`); a multiple of `frames`.
      choice: 'sample' or 'topk'.

    Returns:
      Indices into the l tokens, strictly increasing in each row.

    Raises:
      ValueError: if the frames do not divide tokens and count, or the choice is unknown.
    """
    batch, tokens = scores.shape
    if tokens % frames or count % frames:
        raise ValueError(f"{frames} frames do not divide {tokens} tokens, {count} visible")
    if not 0 < count <= tokens:
        raise ValueError(f"cannot keep {count} of {tokens} tokens")
    part = tokens // frames
    scores = scores.astype(jnp.float32).reshape(batch, frames, part)
    if choice == "topk":
        rank = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    elif choice == "sample":
        positive = scores > 0  # False for NaN
        finite = jnp.minimum(jnp.where(positive, scores, 1.0), jnp.finfo(jnp.float32).max)
        log_score = jnp.where(positive, jnp.log(finite), _LOG_ZERO)
        rank = log_score + jax.random.gumbel(key, scores.shape)
    else:
        raise ValueError(f"mask choice {choice!r} is neither 'sample' nor 'topk'")
    _, index = jax.lax.top_k(rank, count // frames)  # equal values: lower index first
    index = jnp.sort(index, axis=-1) + part * jnp.arange(frames)[:, None]
    return index.reshape(batch, count).astype(jnp.int32)


def corrupt_tokens(
    key: PRNGKeyArray,
    ids: Int[Array, "*b s"],
    *,
    ratio: float = 0.5,
    vocab_size: int,
    mask_id: int,
    special_ids: tuple[int, ...],
) -> tuple[Int[Array, "*b s"], Int[Array, "*b s"]]:
    """Masks caption tokens for masked language modelling (UMT `MLMLoss.mask`).

    Every token that is not special is chosen with probability `ratio`. Of the chosen 80 % become
    `mask_id`, 10 % a token drawn uniformly from the vocabulary but for [PAD] (0), which would no
    longer be attended to, 10 % stay as they are.

    Args:
      special_ids: tokens that are never chosen. UMT protects [PAD] and [CLS] only and does
        predict [SEP]; pass its id too to protect it.

    Returns:
      The corrupted ids, and the targets: the original id where a token was chosen, else -100.
    """
    choose, replace, randomise, draw = jax.random.split(key, 4)
    chosen = jax.random.bernoulli(choose, ratio, ids.shape) & ~_is_any(ids, special_ids)
    masked = chosen & jax.random.bernoulli(replace, 0.8, ids.shape)
    random = chosen & ~masked & jax.random.bernoulli(randomise, 0.5, ids.shape)
    words = jax.random.randint(draw, ids.shape, 1, vocab_size, ids.dtype)
    corrupted = jnp.where(masked, mask_id, jnp.where(random, words, ids))
    return corrupted.astype(ids.dtype), jnp.where(chosen, ids, IGNORED_TARGET).astype(ids.dtype)


def _is_any(ids: Int[Array, "*b s"], values: tuple[int, ...]) -> Bool[Array, "*b s"]:
    """Whether each id is one of the values."""
    return jnp.isin(ids, jnp.asarray(values, ids.dtype))
