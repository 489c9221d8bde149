"""Retrieval metrics from ranks, in both directions, with a stated tie rule.

Tie rule: a tie counts against the model. The rank of a query is one plus the number of WRONG
candidates that score at least as high as its best correct candidate. Constant or saturated scores
therefore score zero, and no order of the files can change a number. Other correct candidates never
push a query down: with several captions a video, the first correct one decides.

A query without any correct candidate in the suite (a video without a caption) is not ranked; it
stays a candidate for the other direction, and its count is reported as `unmatched`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from instap_jax.errors import UserError

RECALL_AT = (1, 5, 10)
TIE_RULE = "a tie counts against the model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Positives:
    """The correct pairs of a suite: several texts a video and several videos a text are fine.

    Attributes:
      text, video: int64 [pairs], indices of each distinct correct pair, sorted by text, then video.
      texts, videos: how many there are, q and v.
    """

    text: np.ndarray
    video: np.ndarray
    texts: int
    videos: int

    @classmethod
    def of(cls, videos_of_text: Sequence[Sequence[int]], videos: int) -> "Positives":
        """From the correct videos of every text; one that is named twice counts once.

        Raises:
          UserError: nothing to retrieve, or no pair at all.
          ValueError: an index that is no video.
        """
        texts = len(videos_of_text)
        if not texts or not videos:
            raise UserError(f"nothing to retrieve: the suite has {texts} texts and {videos} videos")
        lengths = [len(row) for row in videos_of_text]
        flat = np.fromiter((v for row in videos_of_text for v in row), np.int64, sum(lengths))
        if not flat.size:
            raise UserError(
                f"no correct pair among {texts} texts and {videos} videos: check that the captions "
                "and the media come from the same split"
            )
        if flat.min() < 0 or flat.max() >= videos:
            raise ValueError(f"a positive names a video outside 0..{videos - 1}")
        code = np.unique(np.repeat(np.arange(texts), lengths) * videos + flat)
        return cls(text=code // videos, video=code % videos, texts=texts, videos=videos)

    def reversed(self) -> "Positives":
        """The same pairs with texts and videos in each other's place."""
        order = np.lexsort((self.text, self.video))
        return Positives(
            text=self.video[order], video=self.text[order], texts=self.videos, videos=self.texts
        )

    def of_each_text(self) -> np.ndarray:
        """int64 [q], correct videos of every text."""
        return np.bincount(self.text, minlength=self.texts)


def metrics_of_ranks(t2v: np.ndarray, v2t: np.ndarray, positives: Positives) -> dict:
    """Text-to-video and video-to-text recall and ranks (the paper's Tables 1 and 2).

    Args:
      t2v: int [q], rank of every text's best correct video, 1 is best; anything where it has none.
      v2t: int [v], the same for videos.

    Returns:
      {"t2v": {...}, "v2t": {...}, "mean_recall": percent, "texts": q, "videos": v, "pairs": int}.
      A direction holds R@1, R@5, R@10 (percent), "chance" (the same three for a random ranking),
      "median_rank" and "mean_rank" (1 is best), "queries" (ranked) and "unmatched" (not ranked).
      "mean_recall" is the mean of the six recalls.
    """
    directions = {
        "t2v": _summary(t2v, positives.of_each_text(), candidates=positives.videos),
        "v2t": _summary(v2t, positives.reversed().of_each_text(), candidates=positives.texts),
    }
    recalls = [direction[f"R@{k}"] for direction in directions.values() for k in RECALL_AT]
    return {
        **directions,
        "mean_recall": float(np.mean(recalls)),
        "texts": positives.texts,
        "videos": positives.videos,
        "pairs": len(positives.text),
    }


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
