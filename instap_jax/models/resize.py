"""Interpolation of tables, as matrices: what torch's `interpolate(align_corners=False)` computes.

Both directions, no antialiasing. A target of the source's size gives the identity.
"""

import numpy as np

# torch's bicubic kernel (Keys, with this parameter).
_A = -0.75


def linear(source: int, target: int) -> np.ndarray:
    """float64 [target, source]: mode 'linear' along one axis."""
    place = np.maximum(_places(source, target), 0)
    low = np.floor(place).astype(int)
    part = place - low
    weights = np.zeros((target, source))
    rows = np.arange(target)
    np.add.at(weights, (rows, low), 1 - part)
    np.add.at(weights, (rows, np.minimum(low + 1, source - 1)), part)
    return weights


def bicubic(source: int, target: int) -> np.ndarray:
    """float64 [target, source]: mode 'bicubic' along one of its axes."""
    place = _places(source, target)
    low = np.floor(place).astype(int)
    weights = np.zeros((target, source))
    for offset in range(-1, 3):
        distance = np.abs(place - (low + offset))
        column = np.clip(low + offset, 0, source - 1)
        np.add.at(weights, (np.arange(target), column), _keys(distance))
    return weights


def _places(source: int, target: int) -> np.ndarray:
    """Where the centres of the target's cells lie on the source's."""
    return (np.arange(target) + 0.5) * source / target - 0.5


def _keys(x: np.ndarray) -> np.ndarray:
    near = ((_A + 2) * x - (_A + 3)) * x * x + 1
    far = ((_A * x - 5 * _A) * x + 8 * _A) * x - 4 * _A
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
