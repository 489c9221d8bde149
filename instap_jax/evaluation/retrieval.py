"""Retrieval metrics from a score matrix, in both directions, with a stated tie rule.

Tie rule: a tie counts against the model. The rank of a query is one plus the number of WRONG
candidates that score at least as high as its best correct candidate. Constant or saturated scores
therefore score zero, and no order of the files can change a number. Other correct candidates never
push a query down: with several captions a video, the first correct one decides.

A query without any correct candidate in the suite (a video without a caption) is not ranked; it
stays a candidate for the other direction, and its count is reported as `unmatched`.
"""

from collections.abc import Sequence

import numpy as np

from instap_jax.errors import UserError

RECALL_AT = (1, 5, 10)
TIE_RULE = "a tie counts against the model"
_BLOCK_ELEMENTS = 1 << 23  # scores compared at a time


def retrieval_metrics(
    similarity: np.ndarray, positives: np.ndarray | Sequence[Sequence[int]]
) -> dict:
    """Text-to-video and video-to-text recall and ranks (PAPER.md section 5).

    Time is one pass over the scores. Memory beyond `similarity` is one block of about 8 M
    scores (at most 64 MiB with the comparison), whatever the size of the matrix.

    Args:
      similarity: float [q, v], score of text q with video v; higher is more alike. ±inf is a score.
      positives: the correct videos of every text: bool [q, v], or a sequence of q sequences of
        video indices (several videos a text, several texts a video).

    Returns:
      {"t2v": {...}, "v2t": {...}, "mean_recall": percent, "texts": q, "videos": v, "pairs": int}.
      A direction holds R@1, R@5, R@10 (percent), "chance" (the same three for a random ranking),
      "median_rank" and "mean_rank" (1 is best), "queries" (ranked) and "unmatched" (not ranked).
      "mean_recall" is the mean of the six recalls.

    Raises:
      UserError: empty suite, a NaN score, or a direction in which nothing has a correct candidate.
      ValueError: shapes that do not belong together.
    """
    similarity = np.asarray(similarity)
    if similarity.ndim != 2:
        raise ValueError(f"similarity must be [texts, videos], got shape {similarity.shape}")
    texts, videos = similarity.shape
    if not texts or not videos:
        raise UserError(f"nothing to retrieve: the suite has {texts} texts and {videos} videos")
    text, video = _pairs(positives, texts, videos)
    if not len(text):
        raise UserError(
            f"no correct pair among {texts} texts and {videos} videos: check that the captions and "
            "the media come from the same split"
        )
    text_rank, video_rank = _ranks(similarity, text, video)
    t2v = _summary(text_rank, np.bincount(text, minlength=texts), candidates=videos)
    v2t = _summary(video_rank, np.bincount(video, minlength=videos), candidates=texts)
    recalls = [direction[f"R@{k}"] for direction in (t2v, v2t) for k in RECALL_AT]
    return {
        "t2v": t2v,
        "v2t": v2t,
        "mean_recall": float(np.mean(recalls)),
        "texts": texts,
        "videos": videos,
        "pairs": len(text),
    }


def _pairs(positives, texts: int, videos: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct correct pairs as two index arrays, sorted by text."""
    if len(positives) != texts:
        raise ValueError(f"positives of {len(positives)} texts for {texts} rows of scores")
    if isinstance(positives, np.ndarray) and positives.dtype == bool:
        if positives.shape != (texts, videos):
            raise ValueError(f"positives {positives.shape} for scores {(texts, videos)}")
        return np.nonzero(positives)
    lengths = [len(row) for row in positives]
    flat = np.fromiter((v for row in positives for v in row), np.int64, sum(lengths))
    if flat.size and (flat.min() < 0 or flat.max() >= videos):
        raise ValueError(f"a positive names a video outside 0..{videos - 1}")
    code = np.unique(np.repeat(np.arange(texts), lengths) * videos + flat)
    return code // videos, code % videos


def _ranks(
    similarity: np.ndarray, text: np.ndarray, video: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pessimistic ranks, int64 [q] and [v]; meaningless where there is no correct candidate."""
    texts, videos = similarity.shape
    score = _as_float(similarity[text, video])
    best_of_text = np.full(texts, -np.inf, score.dtype)
    best_of_video = np.full(videos, -np.inf, score.dtype)
    np.maximum.at(best_of_text, text, score)
    np.maximum.at(best_of_video, video, score)
    # Correct candidates that reach the best score (it itself among them) are no competitors.
    text_rank = 1 - np.bincount(text, score >= best_of_text[text], texts).astype(np.int64)
    video_rank = 1 - np.bincount(video, score >= best_of_video[video], videos).astype(np.int64)
    rows = max(1, _BLOCK_ELEMENTS // videos)
    for start in range(0, texts, rows):
        block = _as_float(similarity[start : start + rows])
        _refuse_nan(block, start)
        reached = block >= best_of_text[start : start + rows, None]
        text_rank[start : start + rows] += np.count_nonzero(reached, axis=1)
        np.greater_equal(block, best_of_video, out=reached)
        video_rank += np.count_nonzero(reached, axis=0)
    return text_rank, video_rank


def _as_float(scores: np.ndarray) -> np.ndarray:
    # bfloat16 and float16 compare an order of magnitude slower; every value is exact in float32.
    return scores if scores.dtype in (np.float32, np.float64) else scores.astype(np.float32)


def _refuse_nan(block: np.ndarray, first_row: int) -> None:
    # One NaN anywhere makes the minimum NaN: no mask of the whole block in the usual case.
    if np.isnan(block.min()):
        bad = np.isnan(block)
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise UserError(
            f"NaN score of text {first_row + row} with video {column} ({int(bad.sum())} NaN among "
            f"texts {first_row}..{first_row + len(block) - 1}): the checkpoint or its inputs are "
            "not finite; nothing was measured"
        )


def _summary(rank: np.ndarray, correct: np.ndarray, *, candidates: int) -> dict:
    """One direction. `correct` [queries]: number of correct candidates of every query."""
    ranked = correct > 0
    rank, correct = rank[ranked], correct[ranked]
    summary = {f"R@{k}": float(100 * np.mean(rank <= k)) for k in RECALL_AT}
    return {
        **summary,
        "chance": {f"R@{k}": _chance(correct, candidates, k) for k in RECALL_AT},
        "median_rank": float(np.median(rank)),
        "mean_rank": float(np.mean(rank)),
        "queries": len(rank),
        "unmatched": int(np.count_nonzero(~ranked)),
    }


def _chance(correct: np.ndarray, candidates: int, k: int) -> float:
    """Expected recall (percent) of a uniformly random order: 1 - P(no correct one in the top k)."""
    number, queries = np.unique(correct, return_counts=True)
    miss = np.ones(len(number))
    for i in range(min(k, candidates)):
        miss *= np.clip((candidates - number - i) / (candidates - i), 0, 1)
    return float(100 * np.average(1 - miss, weights=queries))
