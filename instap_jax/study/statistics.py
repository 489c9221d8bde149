"""Means over seeds and their 95 % intervals."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

# Student's t: the 97.5 % quantile for 1 to 30 degrees of freedom. Beyond, the last one is used,
# which makes an interval a little too wide, never too narrow.
T_QUANTILES = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over seeds.

    Attributes:
      count: seeds.
      half: half the width of its 95 % interval; None for a single seed, which has none.
    """

    mean: float
    half: float | None
    count: int

    def excludes_zero(self) -> bool:
        """Whether the interval is there and lies on one side of zero."""
        return self.half is not None and abs(self.mean) > self.half


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and interval t * s / sqrt(n), s with n - 1 degrees of freedom; None of no values."""
    if not len(values):
        return None
    array = np.asarray(values, np.float64)
    half = None
    if len(array) > 1:
        t = T_QUANTILES[min(len(array) - 1, len(T_QUANTILES)) - 1]
        half = float(t * array.std(ddof=1) / np.sqrt(len(array)))
    return Estimate(mean=float(array.mean()), half=half, count=len(array))


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Mean of ours - theirs over the seeds that both have: such runs saw the same data in the
    same order, so what a seed does to both cancels. None without a common seed."""
    return estimate([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])
