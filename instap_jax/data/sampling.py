"""Choices of the input pipeline that are pure functions: frames of a clip, instances of a group."""

import bisect
from collections.abc import Sequence

import numpy as np

SAMPLINGS = ("random", "uniform")


def choose_frames(frames: int, wanted: int, sampling: str, rng: np.random.Generator) -> np.ndarray:
    """Chooses T = `wanted` of the f = `frames` frames of a clip.

    The clip is cut into T segments of equal length (to within one frame). 'random' takes one
    random frame of each segment, 'uniform' its middle. A clip with fewer than T frames has nothing
    to choose: every frame is repeated, evenly, in both modes.

    Returns:
      int64 [T], not decreasing.
    """
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling {sampling!r} is none of {', '.join(SAMPLINGS)}")
    if sampling == "uniform" or frames < wanted:
        return (2 * np.arange(wanted) + 1) * frames // (2 * wanted)
    edges = np.arange(wanted + 1) * frames // wanted
    return rng.integers(edges[:-1], edges[1:])


def share_budget(counts: Sequence[int], budget: int, rng: np.random.Generator) -> np.ndarray:
    """Divides an instance budget among the samples of a group, as evenly as their counts allow.

    No sample gets less than another one that has no more instances, but for one instance where
    the rest does not divide: who gets those is drawn at random.

    Args:
      counts: instances of every sample.
      budget: n, at most so many in all.

    Returns:
      int64 [b], instances that each sample keeps; sums to min(budget, sum of counts).
    """
    counts = np.asarray(counts, np.int64)
    if counts.sum() <= budget:
        return counts
    levels = range(1, int(counts.max()) + 1)
    level = bisect.bisect_right(levels, budget, key=lambda k: np.minimum(counts, k).sum())
    kept = np.minimum(counts, level)
    more = np.flatnonzero(counts > level)
    kept[rng.permutation(more)[: budget - kept.sum()]] += 1
    return kept


def choose_instances(
    counts: Sequence[int], budget: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Chooses which instances of every sample of a group go into its budget.

    All of them where they fit; else a random subset of each sample, of the sizes that
    `share_budget` gives.

    Returns:
      One sorted int64 array of instance positions per sample.
    """
    kept = share_budget(counts, budget, rng)
    return [
        np.arange(count) if keep == count else np.sort(rng.permutation(count)[:keep])
        for count, keep in zip(counts, kept, strict=True)
    ]
