"""Does a map point at the box? Scores of attention maps, with the floors they must beat.

Only frames in which the instance is present count. All values are shares in [0, 1].

* mass: of the map, the part inside the ground-truth box (a patch that the box cuts counts by its
  covered area). A map that is zero on these frames has mass 0.
* area: of these frames, the part inside the box: the mass of a map that knows nothing.
* hit: whether the centre of the map's highest patch lies inside the box (the pointing game, Zhang
  et al., ECCV 2016, without its tolerance); of several highest patches, the share inside.
* hit_chance: the share of all patch centres that lie inside: hit of a random patch.
* sibling: the mean mass, in the same box, of the maps of the other instances of the sample. A map
  that finds things, but not the one the sentence names, has as much.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pointing:
    """Scores of n instances, float64 [n] each; `sibling` NaN for an only child."""

    mass: np.ndarray
    area: np.ndarray
    hit: np.ndarray
    hit_chance: np.ndarray
    sibling: np.ndarray


def pointing(
    maps: np.ndarray, inside: np.ndarray, boxes: np.ndarray, present: np.ndarray, sample: np.ndarray
) -> Pointing:
    """Scores maps against boxes.

    Args:
      maps: [n, t, r, c], not negative.
      inside: [n, t, r, c], covered share of every patch (`models.boxes.patch_cover`).
      boxes: [n, t, 4], fractions of the picture. present: bool [n, t].
      sample: int [n], equal for the instances of one sample.
    """
    maps = np.asarray(maps, np.float64)
    seen = np.broadcast_to(present[:, :, None, None], maps.shape)
    inside = np.where(seen, inside, 0.0)
    centre = np.where(seen, _centres_inside(boxes, maps.shape[2:]), 0.0)
    peak = np.where(seen, maps, -1.0)
    peak = peak == peak.max(axis=(1, 2, 3), keepdims=True)
    patches = seen.sum(axis=(1, 2, 3))
    return Pointing(
        mass=_share(maps, inside, seen),
        area=inside.sum(axis=(1, 2, 3)) / patches,
        hit=(peak * centre).sum(axis=(1, 2, 3)) / peak.sum(axis=(1, 2, 3)),
        hit_chance=centre.sum(axis=(1, 2, 3)) / patches,
        sibling=_sibling_mass(maps, inside, seen, sample),
    )


def join(parts: list[Pointing]) -> Pointing:
    """The scores of several batches as one."""
    names = [field.name for field in dataclasses.fields(Pointing)]
    return Pointing(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    )


def summarise(scores: Pointing, sample: np.ndarray) -> dict[str, float]:
    """Means over instances in percent; a `_margin` is half a 95 % interval of the mean.

    Instances of one sample are not independent: the intervals treat a sample as the unit.
    'selectivity' is mass minus sibling, over the instances that have siblings.
    """
    metrics = {}
    for name in ("mass", "area", "hit", "hit_chance"):
        values = getattr(scores, name)
        metrics[name] = 100 * float(values.mean())
        if name in ("mass", "hit"):
            metrics[f"{name}_margin"] = 100 * margin(values, sample)
    known = ~np.isnan(scores.sibling)
    if known.any():
        difference = (scores.mass - scores.sibling)[known]
        metrics["sibling_mass"] = 100 * float(scores.sibling[known].mean())
        metrics["selectivity"] = 100 * float(difference.mean())
        metrics["selectivity_margin"] = 100 * margin(difference, sample[known])
    return metrics


def margin(values: np.ndarray, cluster: np.ndarray) -> float:
    """Half the 95 % interval of the mean of `values` [n], clusters drawn as wholes.

    1.96 times the cluster-robust standard error; 0 where there is only one cluster.
    """
    _, index = np.unique(cluster, return_inverse=True)
    sums = np.bincount(index, values - values.mean())
    count = len(sums)
    if count < 2:
        return 0.0
    return 1.96 * math.sqrt(count / (count - 1) * float(np.square(sums).sum())) / len(values)


def _share(maps: np.ndarray, inside: np.ndarray, seen: np.ndarray) -> np.ndarray:
    whole = (maps * seen).sum(axis=(1, 2, 3))
    return (maps * inside).sum(axis=(1, 2, 3)) / np.where(whole > 0, whole, 1.0)


def _sibling_mass(
    maps: np.ndarray, inside: np.ndarray, seen: np.ndarray, sample: np.ndarray
) -> np.ndarray:
    pair = (sample[:, None] == sample[None]) & ~np.eye(len(sample), dtype=bool)
    own, other = np.nonzero(pair)
    mass = _share(maps[other], inside[own], seen[own])
    number = np.bincount(own, minlength=len(sample))
    total = np.bincount(own, mass, minlength=len(sample))
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def _centres_inside(boxes: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """bool [n, t, r, c]: patches whose centre the box holds."""
    y, x = ((np.arange(side) + 0.5) / side for side in grid)
    rows = (y >= boxes[..., 1, None]) & (y <= boxes[..., 3, None])
    columns = (x >= boxes[..., 0, None]) & (x <= boxes[..., 2, None])
    return rows[..., :, None] & columns[..., None, :]
