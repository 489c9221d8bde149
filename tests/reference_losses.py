"""Loss references in NumPy float64: loops written from the paper's formulas, not from the code.

Slow and plain on purpose: they share no line, no helper and no trick with `instap_jax.losses`.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np


def unit(x: np.ndarray) -> np.ndarray:
    """The vector of length one in the direction of x."""
    return x / math.sqrt(sum(float(c) ** 2 for c in x))


def distillation(student: np.ndarray, teacher: np.ndarray, valid: np.ndarray) -> float:
    """(1) over [k, b, v, p] and [b]."""
    layers, batch, tokens, _ = student.shape
    terms = [
        2 - 2 * float(unit(student[k, b, v]) @ unit(teacher[k, b, v]))
        for k, b, v in itertools.product(range(layers), range(batch), range(tokens))
        if valid[b]
    ]
    return sum(terms) / len(terms) if terms else 0.0


def contrastive(
    video: np.ndarray,
    text: np.ndarray,
    temperature: float,
    weight: Callable[[int, int], float],
    valid: np.ndarray,
) -> tuple[float, float, float]:
    """(2) and (8): loss, accuracy video to text, accuracy text to video.

    `weight(i, j)`, j != i, is what the pair counts in the denominators; validity is seen to here.
    """
    temperature = float(temperature)  # a NumPy float32 would pull the whole sum down to float32
    rows = [i for i in range(len(valid)) if valid[i]]
    if not rows:
        return 0.0, 0.0, 0.0

    def cosine(i: int, j: int) -> float:
        return float(unit(video[i]) @ unit(text[j]))

    loss, right = 0.0, [0, 0]
    for i in rows:
        others = [j for j in rows if j != i and weight(i, j) > 0]
        for direction in (0, 1):
            pair = (lambda j, i=i: (i, j)) if direction == 0 else (lambda j, i=i: (j, i))
            own = math.exp(cosine(i, i) / temperature)
            rest = sum(weight(i, j) * math.exp(cosine(*pair(j)) / temperature) for j in others)
            loss -= math.log(own / (own + rest)) / 2
            right[direction] += all(cosine(i, i) > cosine(*pair(j)) for j in others)
    return loss / len(rows), right[0] / len(rows), right[1] / len(rows)


def sigmoid_contrastive(
    video: np.ndarray,
    text: np.ndarray,
    temperature: float,
    bias: float,
    weight: Callable[[int, int], float],
    valid: np.ndarray,
) -> float:
    """SigLIP's equation 1 with a temperature that divides: every pair by itself, summed over the
    pairs of a video, mean over the videos. `weight` as in `contrastive`."""
    rows = [i for i in range(len(valid)) if valid[i]]
    loss = 0.0
    for i, j in itertools.product(rows, rows):
        label = 1 if i == j else -1
        cosine = float(unit(video[i]) @ unit(text[j]))
        right = 1 / (1 + math.exp(-label * (cosine / float(temperature) + float(bias))))
        loss -= (1.0 if i == j else weight(i, j)) * math.log(right)
    return loss / len(rows) if rows else 0.0


def cross_entropy(logits: np.ndarray, labels: np.ndarray, counted: np.ndarray) -> float:
    """Mean over the counted rows of -log softmax(logits)[label]; logits [m, c]."""
    terms = [
        math.log(sum(math.exp(float(x)) for x in row)) - float(row[label])
        for row, label, count in zip(logits, labels, counted)
        if count
    ]
    return sum(terms) / len(terms) if terms else 0.0


def gradient(loss: Callable[[np.ndarray], float], at: np.ndarray) -> np.ndarray:
    """Central differences of a float64 loss at every element."""
    step = 1e-6
    result = np.zeros_like(at, dtype=np.float64)
    for index in np.ndindex(at.shape):
        up, down = at.astype(np.float64), at.astype(np.float64)
        up[index] += step
        down[index] -= step
        result[index] = (loss(up) - loss(down)) / (2 * step)
    return result
