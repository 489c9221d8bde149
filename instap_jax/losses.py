"""The terms of the objectives: pure functions of arrays. Equation numbers are the paper's.

Every function computes in float32 whatever comes in. Samples whose `valid` is False have no part
in a loss in any role, may hold any value (NaN too), and get a zero gradient; a batch without
a valid sample has loss 0. How the terms are weighted and summed, (11)-(13), is not decided here.

Letters: k distilled layers, b samples of the GLOBAL batch, n instances of the global batch,
v visible tokens, p embedding width, m matching pairs, s text length, w vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jaxtyping import Bool, Float, Int, Int32, PRNGKeyArray

from instap_jax.types import IGNORED_TARGET

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ContrastiveOutput:
    """Result of a contrastive loss.

    Attributes:
      loss: scalar, mean over the valid pairs and the two directions.
      accuracy_v2t: scalar, fraction of the valid visual embeddings whose own text is strictly
        more similar than every text that counts as a negative. Strictly: equal embeddings
        (collapse) score 0. Same-video texts left out of the denominator do not count.
      accuracy_t2v: scalar, the same from text to video.
    """

    loss: Float[Array, ""]
    accuracy_v2t: Float[Array, ""]
    accuracy_t2v: Float[Array, ""]


def distillation_loss(
    student: Float[Array, "k b v p"],
    teacher: Float[Array, "k b v p"],
    valid: Bool[Array, " b"],
) -> Float[Array, ""]:
    """Loss (1): mean over layers, valid samples and visible tokens of |s/|s| - t/|t||^2.

    A zero vector is normalised to zero, with zero gradient. No gradient reaches the teacher.
    """
    keep = valid[None, :, None, None]
    s = _normalise(jnp.where(keep, student.astype(jnp.float32), 0))
    t = _normalise(jnp.where(keep, jax.lax.stop_gradient(teacher).astype(jnp.float32), 0))
    per_sample = jnp.mean(jnp.sum(jnp.square(s - t), axis=-1), axis=(0, 2))
    return _mean(per_sample, valid)


def contrastive_loss(
    video: Float[Array, "b p"],
    text: Float[Array, "b p"],
    temperature: Float[Array, ""] | float,
    *,
    valid: Bool[Array, " b"],
    video_ids: Int32[Array, " b"],
    text_ids: Int32[Array, " b"],
    bias: Float[Array, ""] | float | None = None,
    precision: Precision = Precision.HIGHEST,
) -> ContrastiveOutput:
    """Equation (2): symmetric InfoNCE between videos and their captions over the global batch.

    Pairs (i, j), j != i, that show the same video or carry the same caption are not negatives:
    they are left out of both denominators. (UMT makes same-id pairs further positives instead.)

    With `bias` instead the pairwise sigmoid loss (SigLIP, arXiv 2303.15343, equation 1): every
    pair is classified by itself, true or not, by sigmoid(cosine / tau + bias); the sum over
    a video's pairs, mean over videos.

    Shard `video` and `text` over the data axes: the b x b logits are then only ever held as
    b/devices rows a device. With replicated inputs every device would hold all of them.

    Args:
      video, text: W_v v and W_t t of (2); l2-normalised here.
      temperature: tau, divides the cosines. Keep it in its range before calling.
      video_ids: equal means the same media. text_ids: equal means the same sentence.
      bias: of the sigmoid loss; None: InfoNCE.
      precision: of the matmul that makes the logits. A cosine is divided by tau, so the TPU's
        default bfloat16 operands would leave errors of order 0.01 to 1 in the logits.
    """
    logits = cosine_logits(video, text, temperature, valid=valid, precision=precision)
    admissible = admissible_pairs(valid, video_ids, text_ids)
    return _contrast(logits, jnp.where(admissible, 1.0, 0.0), valid, bias)


def instance_contrastive_loss(
    instance: Float[Array, "n p"],
    text: Float[Array, "n p"],
    temperature: Float[Array, ""] | float,
    *,
    valid: Bool[Array, " n"],
    parent_ids: Int32[Array, " n"],
    text_ids: Int32[Array, " n"],
    alpha: float = 0.0,
    bias: Float[Array, ""] | float | None = None,
    precision: Precision = Precision.HIGHEST,
) -> ContrastiveOutput:
    """Equation (8): symmetric InfoNCE between instances and their sentences over the global batch.

    In both denominators a pair (n, m), m != n, from the same video weighs `alpha` (0: left out)
    and every other pair 1. Pairs with the same sentence are left out whatever `alpha` is.

    Args:
      instance, text: z~ and s~ of (5)-(7); l2-normalised here.
      temperature: tau_inst, a parameter of its own (Table 5).
      parent_ids: id of the video an instance is from, unique over the global batch and equal for
        repeats of one video; never an index into a group.
      bias: as in `contrastive_loss`; a pair's weight then is that of its term.
      precision: as in `contrastive_loss`, as is the advice on sharding.
    """
    logits = cosine_logits(instance, text, temperature, valid=valid, precision=precision)
    other_text = admissible_pairs(valid, jnp.arange(valid.shape[0]), text_ids)
    same_video = parent_ids[:, None] == parent_ids[None, :]
    weight = jnp.where(same_video, alpha, 1.0) * other_text
    return _contrast(logits, weight, valid, bias)


def cosine_logits(
    video: Float[Array, "b p"],
    text: Float[Array, "b p"],
    temperature: Float[Array, ""] | float,
    *,
    valid: Bool[Array, " b"],
    precision: Precision = Precision.HIGHEST,
) -> Float[Array, "b b"]:
    """cos(video_i, text_j) / temperature in row i, column j; 0 for invalid i or j."""
    keep = valid[:, None]
    v = _normalise(jnp.where(keep, video.astype(jnp.float32), 0))
    t = _normalise(jnp.where(keep, text.astype(jnp.float32), 0))
    return jnp.einsum("ip,jp->ij", v, t, precision=precision) / temperature


def admissible_pairs(
    valid: Bool[Array, " b"], video_ids: Int32[Array, " b"], text_ids: Int32[Array, " b"]
) -> Bool[Array, "b b"]:
    """Which pairs (i, j) are true negatives: both valid, another video, another sentence.

    Symmetric, and False on the diagonal. For the instance losses `video_ids` are the parents'.
    """
    other_video = video_ids[:, None] != video_ids[None, :]
    other_text = text_ids[:, None] != text_ids[None, :]
    return valid[:, None] & valid[None, :] & other_video & other_text


def hard_negatives(
    key: PRNGKeyArray, similarity: Float[Array, "b b"], admissible: Bool[Array, "b b"]
) -> tuple[Int32[Array, " b"], Bool[Array, " b"]]:
    """The negatives of (3) and (9): one column per row, in proportion to softmax similarity.

    Drawn in log space with Gumbel noise among the admissible columns alone, so a row whose
    probabilities underflow still gets its most similar negatives. The positive (the diagonal) is
    never drawn, whatever `admissible` says of it. No gradient.

    Args:
      similarity: logits, temperature applied. Give the transpose to draw videos for texts.

    Returns:
      The column of every row, and whether it is defined: False where a row has no admissible
      column. Its index is then the row itself, fit for a gather and for nothing else.
    """
    rows = jnp.arange(similarity.shape[0], dtype=jnp.int32)
    admissible = admissible & (rows[:, None] != rows[None, :])
    # Finite, so that an admissible column always beats one that is not.
    largest = jnp.finfo(jnp.float32).max / 2
    logits = jnp.clip(jax.lax.stop_gradient(similarity).astype(jnp.float32), -largest, largest)
    noisy = jnp.where(admissible, logits + jax.random.gumbel(key, logits.shape), -jnp.inf)
    defined = jnp.any(admissible, axis=1)
    index = jnp.where(defined, jnp.argmax(noisy, axis=1).astype(jnp.int32), rows)
    return index, defined


def matching_loss(
    logits: Float[Array, "m 2"], labels: Int[Array, " m"], valid: Bool[Array, " m"]
) -> Float[Array, ""]:
    """The cross-entropy of (3) and (9), mean over the valid pairs. Label 1: a true pair."""
    kept = jnp.where(valid[:, None], logits.astype(jnp.float32), 0)
    return _mean(_cross_entropy(kept, jnp.where(valid, labels, 0)), valid)


def masked_language_loss(
    logits: Float[Array, "*b s w"], targets: Int[Array, "*b s"], valid: Bool[Array, "*b"]
) -> Float[Array, ""]:
    """The MLM term and (10): mean cross-entropy over the predicted tokens of the valid samples.

    Args:
      targets: token ids; -100 where nothing is predicted (`masking.corrupt_tokens`).
    """
    predicted = (targets != IGNORED_TARGET) & valid[..., None]
    kept = jnp.where(predicted[..., None], logits.astype(jnp.float32), 0)
    return _mean(_cross_entropy(kept, jnp.where(predicted, targets, 0)), predicted)


def classification_loss(
    logits: Float[Array, "b w"],
    labels: Int[Array, " b"],
    valid: Bool[Array, " b"],
    *,
    smoothing: float,
) -> Float[Array, ""]:
    """Mean over the valid of the cross-entropy with (1 - smoothing) one_hot + smoothing / w."""
    kept = jnp.where(valid[:, None], logits.astype(jnp.float32), 0)
    uniform = jax.nn.logsumexp(kept, axis=-1) - jnp.mean(kept, axis=-1)
    hard = _cross_entropy(kept, jnp.where(valid, labels, 0))
    return _mean((1 - smoothing) * hard + smoothing * uniform, valid)


def _contrast(
    logits: Float[Array, "b b"],
    weight: Float[Array, "b b"],
    valid: Bool[Array, " b"],
    bias: Float[Array, ""] | float | None,
) -> ContrastiveOutput:
    """InfoNCE in both directions, or with a bias the sigmoid loss; pair (i, j), j != i, has this
    weight as a negative. Rows and columns that are not valid weigh 0.

    One logits matrix serves both directions, and only max and sum reductions touch it: with rows
    sharded those cross devices as b numbers, where an argmax could gather b x b.
    """
    diagonal = jnp.eye(logits.shape[0], dtype=bool)
    positive = jnp.sum(jnp.where(diagonal, logits, 0), axis=1)
    if bias is None:
        weighted = logits + jnp.where(diagonal, 0.0, jnp.log(weight))
        v2t = jax.nn.logsumexp(weighted, axis=1) - positive
        t2v = jax.nn.logsumexp(weighted, axis=0) - positive
        terms = (v2t + t2v) / 2
    else:
        negatives = jnp.where(diagonal, 0.0, weight * jax.nn.softplus(logits + bias))
        terms = jnp.sum(negatives, axis=1) + jax.nn.softplus(-(positive + bias))
    # A weight below 1 says how much a pair counts as a negative, not how similar it is.
    rivals = jnp.where(diagonal | (weight == 0), -jnp.inf, logits)
    return ContrastiveOutput(
        loss=_mean(terms, valid),
        accuracy_v2t=_mean(positive > jnp.max(rivals, axis=1), valid),
        accuracy_t2v=_mean(positive > jnp.max(rivals, axis=0), valid),
    )


def _cross_entropy(logits: Float[Array, "*b w"], labels: Int[Array, "*b"]) -> Float[Array, "*b"]:
    """-log softmax at the label; a masked sum, not a gather, so that w may be sharded."""
    chosen = labels[..., None] == jnp.arange(logits.shape[-1])
    positive = jnp.sum(jnp.where(chosen, logits, 0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - positive


def _normalise(x: Float[Array, "... p"]) -> Float[Array, "... p"]:
    """x / |x| along the last axis; zero, with zero gradient, where |x| <= 1e-12; NaN stays NaN."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    zero = square <= 1e-24
    return jnp.where(zero, 0, x * jax.lax.rsqrt(jnp.where(zero, 1.0, square)))


def _mean(values: Array, where: Bool[Array, "..."]) -> Float[Array, ""]:
    """Mean of the values where the mask is set; 0 if it is set nowhere."""
    total = jnp.sum(jnp.where(where, values.astype(jnp.float32), 0))
    return total / jnp.maximum(jnp.sum(where, dtype=jnp.float32), 1)
