"""Probes of frozen features: what can be read off them by neighbours, and by a linear map.

Nothing here is tuned on the test features: the neighbour probe has no free choice, the linear
probe picks its ridge by leave-one-out error on the training features alone.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from instap_jax.errors import UserError

_Z95 = 1.959963984540054
_BLOCK_ELEMENTS = 1 << 22
# Ridge strengths tried, per training example, of standardised features: strongest first, so that
# the simpler of two equally good ones is taken.
_RIDGES = 10.0 ** np.arange(3, -6, -1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """Accuracy of one probe on its test features.

    Attributes:
      accuracy: percent of the test features named correctly.
      low, high: 95 % Wilson interval, percent. It takes the test features as independent; entities
        of one scene are not quite, so read it as a lower bound of the uncertainty.
      chance: percent that naming the most frequent training class would get on the test features.
      classes: distinct labels among the training features.
      train_examples, test_examples: how many features.
    """

    accuracy: float
    low: float
    high: float
    chance: float
    classes: int
    train_examples: int
    test_examples: int


def knn_accuracy(
    train_x: np.ndarray,
    train_y: Sequence,
    test_x: np.ndarray,
    test_y: Sequence,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> ProbeResult:
    """Weighted nearest neighbours on cosine similarity, as in DINO (arXiv 2104.14294, 5.1).

    The k most similar training features vote for their class with weight exp(cosine /
    temperature). Those tied with the k-th vote too, so the order of the features does not matter
    (collapsed features answer the majority class); of tied classes the first in sorted order wins.

    Args:
      train_x, test_x: float [m, d] and [n, d], one frozen feature each; need not be normalised.
      train_y, test_y: m and n labels (integers or strings). A test label that no training feature
        has counts as wrong.

    Raises:
      UserError: no features, a feature that is not finite, a single class, fewer than k training
        features.
    """
    train_x, test_x = _features(train_x, test_x)
    classes, train_code, test_code = _encode(train_y, test_y, len(train_x), len(test_x))
    if k > len(train_x):
        raise UserError(f"{k} neighbours asked for, but only {len(train_x)} training features")
    train_x, test_x = _unit(train_x), _unit(test_x)
    one_hot = np.eye(len(classes))[train_code]
    predicted = np.empty(len(test_x), np.int64)
    rows = max(1, _BLOCK_ELEMENTS // len(train_x))
    for start in range(0, len(test_x), rows):
        cosine = test_x[start : start + rows] @ train_x.T
        kth = np.partition(cosine, -k, axis=1)[:, -k, None]
        # A hair below the k-th: equal features may differ in the last bit of a product.
        near = cosine >= kth - 1e-12
        vote = np.where(near, np.exp((cosine - 1) / temperature), 0) @ one_hot
        predicted[start : start + rows] = np.argmax(vote, axis=1)
    return _result(predicted, classes, train_code, test_code)


def linear_probe(
    train_x: np.ndarray, train_y: Sequence, test_x: np.ndarray, test_y: Sequence
) -> ProbeResult:
    """Linear classifier by ridge regression on one-hot labels, in closed form (float64).

    Features are standardised with the training mean and deviation; the intercept is not penalised.
    The ridge, out of 10^-5 .. 10^3 per training example, has the least leave-one-out squared error
    on the training features, which ridge regression gives exactly without refitting:
    e_i / (1 - h_ii). Deterministic: no seed, no learning rate, no number of epochs.

    Arguments, result and errors as for `knn_accuracy`.
    """
    train_x, test_x = _features(train_x, test_x)
    classes, train_code, test_code = _encode(train_y, test_y, len(train_x), len(test_x))
    mean, deviation = train_x.mean(axis=0), train_x.std(axis=0)
    deviation[deviation <= 1e-9 * max(deviation.max(), 1e-300)] = 1  # constant: carries nothing
    train_x, test_x = (train_x - mean) / deviation, (test_x - mean) / deviation
    target = np.eye(len(classes))[train_code]
    weights = _ridge(train_x, target - target.mean(axis=0))
    predicted = np.argmax(test_x @ weights + target.mean(axis=0), axis=1)
    return _result(predicted, classes, train_code, test_code)


def wilson(hits: float, total: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion, both ends in percent."""
    share = hits / total
    centre = share + _Z95**2 / (2 * total)
    spread = _Z95 * np.sqrt(share * (1 - share) / total + _Z95**2 / (4 * total**2))
    scale = 100 / (1 + _Z95**2 / total)
    low, high = (centre - spread) * scale, (centre + spread) * scale
    return float(max(low, 0.0)), float(min(high, 100.0))


def _ridge(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Weights [d, c] of centred `x` [m, d], `y` [m, c] at the best leave-one-out ridge."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    ridges = _RIDGES * len(x)
    chosen = ridges[np.argmin([_left_out_error(u, s, y, ridge) for ridge in ridges])]
    return vt.T @ ((s / (s**2 + chosen))[:, None] * (u.T @ y))


def _left_out_error(u: np.ndarray, s: np.ndarray, y: np.ndarray, ridge: float) -> float:
    """Mean squared leave-one-out error of the centred `y` [m, c], for features with SVD u s vt."""
    shrink = s**2 / (s**2 + ridge)
    # The intercept's share of the hat matrix is 1/m; centred columns are orthogonal to it.
    hat = (u**2) @ shrink + 1 / len(u)
    residual = y - u @ (shrink[:, None] * (u.T @ y))
    return float(np.mean((residual / np.maximum(1 - hat, 1e-12)[:, None]) ** 2))


def _features(train_x: np.ndarray, test_x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    train_x, test_x = np.asarray(train_x, np.float64), np.asarray(test_x, np.float64)
    if train_x.ndim != 2 or test_x.ndim != 2 or train_x.shape[1] != test_x.shape[1]:
        raise ValueError(f"features must be [m, d], [n, d]; got {train_x.shape}, {test_x.shape}")
    for name, x in (("training", train_x), ("test", test_x)):
        if not len(x):
            raise UserError(f"nothing to probe: there are no {name} features")
        if not np.isfinite(x).all():
            row = int(np.argwhere(~np.isfinite(x).all(axis=1))[0, 0])
            raise UserError(f"{name} feature {row} is not finite: the checkpoint is broken")
    return train_x, test_x


def _encode(train_y, test_y, m: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sorted training classes, and labels as indices into them (-1: not a training class)."""
    train_y, test_y = np.asarray(train_y), np.asarray(test_y)
    if train_y.shape != (m,) or test_y.shape != (n,):
        raise ValueError(f"{train_y.shape} and {test_y.shape} labels for {m} and {n} features")
    classes, train_code = np.unique(train_y, return_inverse=True)
    if len(classes) < 2:
        raise UserError(f"nothing to tell apart: every training label is {classes[0]!s}")
    place = np.minimum(np.searchsorted(classes, test_y), len(classes) - 1)
    return classes, train_code, np.where(classes[place] == test_y, place, -1)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _result(
    predicted: np.ndarray, classes: np.ndarray, train_code: np.ndarray, test_code: np.ndarray
) -> ProbeResult:
    hits = int(np.count_nonzero(predicted == test_code))
    low, high = wilson(hits, len(test_code))
    majority = int(np.argmax(np.bincount(train_code)))
    return ProbeResult(
        accuracy=100 * hits / len(test_code),
        low=low,
        high=high,
        chance=float(100 * np.mean(test_code == majority)),
        classes=len(classes),
        train_examples=len(train_code),
        test_examples=len(test_code),
    )
