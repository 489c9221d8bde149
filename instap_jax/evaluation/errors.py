"""Wrong instance retrievals, sorted by rules (the paper's error analysis).

The paper names three classes of its 1,500 wrong retrievals and their shares, not its rules. Ours
are below: ordered, so that every error falls into exactly one class, and made of what the
annotation says, so that they do not depend on the model whose errors are sorted.

A retrieval is wrong as in recall at 1: another candidate scores at least as high as the right one
(a tie counts against the model). What was retrieved is the best of the wrong candidates, the first
of them where several score the same.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from instap_jax.errors import UserError

# In the order in which they are tried.
CLASSES = {
    "multi_instance": "multi-instance confusion",
    "weak_evidence": "weak visual evidence",
    "cross_sample": "cross-sample semantic match",
    "other": "other",
}
DIRECTIONS = {"t2v": "T→V", "v2t": "V→T"}
# Percent of the paper's 1,500 errors; what is left is ours to call 'other'.
PAPER_SHARES = {
    "multi_instance": 44.6,
    "weak_evidence": 24.6,
    "cross_sample": 13.1,
    "other": 17.7,
}

# Share of the picture: a square of 32 px, COCO's limit of a small object, in the 224 px picture
# that ViT-L/16 sees; about four of its patches.
SMALL_AREA = (32 / 224) ** 2
# Share of the sampled frames: with fewer, most of the trajectory is a box held still.
FEW_FRAMES = 0.5
# Share of its box under boxes of other instances, mean over the frames that show it. Boxes say
# nothing on which one is in front: this is what may be hidden, not what is.
COVERED = 0.5
# Jaccard overlap of the two captions' sets of words.
SAME_WORDS = 0.5
# Attributes that make up an instance's look; equal and known in both: the captions describe
# things that look alike, whatever their words.
LOOK = ("shape", "colour", "texture")

RULES = (
    f"rules in order: same sample; box < {100 * SMALL_AREA:.1f} % of the picture, in < "
    f"{100 * FEW_FRAMES:.0f} % of the frames, or > {100 * COVERED:.0f} % under other boxes; "
    f"captions share >= {100 * SAME_WORDS:.0f} % of their words (Jaccard), or same annotated "
    f"{', '.join(LOOK)}; other"
)

_BLOCK = 1 << 23  # scores at a time
_CHANCE_DRAWS = 10  # random retrievals per error


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """What the annotation says about one instance of a suite, on the frames that evaluation sees.

    Attributes:
      record, place: which sample, and which of its instances.
      caption: all its sentences.
      boxes: float32 [T, 4], fractions of the picture. present: bool [T].
      area: share of the picture, mean over the frames that show it; 0 where none does.
      seen: share of the frames that show it.
      covered: share of its box under other instances' boxes, mean over these frames.
      look: values of `LOOK`; () where one is not annotated.
    """

    record: int
    place: int
    caption: str
    boxes: np.ndarray
    present: np.ndarray
    area: float
    seen: float
    covered: float
    look: tuple[str, ...]

    def weakness(self) -> str:
        """Why there is little to see of it; '' where there is enough."""
        reasons = []
        if self.area < SMALL_AREA:
            reasons.append(f"its box is {100 * self.area:.1f} % of the picture")
        if self.seen < FEW_FRAMES:
            frames = len(self.present)
            reasons.append(f"present in {round(self.seen * frames)} of {frames} frames")
        if self.covered > COVERED:
            reasons.append(f"{100 * self.covered:.0f} % of its box is under other boxes")
        return "; ".join(reasons)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Error:
    """One wrong retrieval. `query`, `retrieved`: rows of the suite. `margin`: how much more the
    wrong one scored. `reason`: in words."""

    query: int
    retrieved: int
    margin: float
    kind: str
    reason: str


def describe_instances(
    record: int,
    captions: Sequence[str],
    extras: Sequence[Mapping[str, Any]],
    boxes: np.ndarray,
    present: np.ndarray,
) -> list[Instance]:
    """The k instances of one sample.

    Args:
      record: which sample. captions: k texts. extras: k unknown keys of the annotation.
      boxes: float32 [k, T, 4], fractions of the picture. present: bool [k, T].
    """
    return [
        Instance(
            record=record,
            place=place,
            caption=captions[place],
            boxes=boxes[place],
            present=present[place],
            area=_mean_present(box_area(boxes[place]), present[place]),
            seen=float(present[place].mean()),
            covered=_mean_present(covered_share(boxes, present, place), present[place]),
            look=_look(extras[place]),
        )
        for place in range(len(captions))
    ]


def box_area(boxes: np.ndarray) -> np.ndarray:
    """[..., 4] -> [...], share of the picture."""
    sides = np.clip(boxes[..., 2:], 0, 1) - np.clip(boxes[..., :2], 0, 1)
    return np.maximum(sides, 0).prod(axis=-1)


def covered_share(boxes: np.ndarray, present: np.ndarray, place: int) -> np.ndarray:
    """Share of one instance's box that lies under the union of the others', frame by frame.

    Args:
      boxes: [k, T, 4]. present: bool [k, T]; absent ones cover nothing.

    Returns:
      float64 [T], measured on a 32 x 32 grid of points in the box.
    """
    grid = (np.arange(32) + 0.5) / 32
    own, frames = boxes[place], boxes.shape[1]
    x = own[:, 0, None] + grid * (own[:, 2] - own[:, 0])[:, None]
    y = own[:, 1, None] + grid * (own[:, 3] - own[:, 1])[:, None]
    under = np.zeros((frames, 32, 32), bool)
    for other in range(len(boxes)):
        if other != place:
            box = boxes[other][..., None]
            across = (x >= box[:, 0]) & (x <= box[:, 2])
            down = (y >= box[:, 1]) & (y <= box[:, 3])
            shown = present[other][:, None, None]
            under |= down[:, :, None] & across[:, None, :] & shown
    return under.mean(axis=(1, 2))


def word_overlap(first: str, second: str) -> float:
    """Jaccard overlap of the two sets of words, lower case; 0 where neither has any."""
    a, b = _words(first), _words(second)
    return len(a & b) / max(1, len(a | b))


def wrong_retrievals(queries: np.ndarray, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Top-1 retrieval where candidate i is right for query i.

    Args:
      queries, candidates: float32 [N, p], l2-normalised.

    Returns:
      int64 [N], the best wrong candidate of a wrong query, -1 of a right one; float32 [N], how
      much it scores above the right one.

    Raises:
      UserError: a score is not finite.
    """
    count = len(queries)
    retrieved, margin = np.full(count, -1), np.zeros(count, np.float32)
    rows = max(1, _BLOCK // max(1, count))
    for start in range(0, count if count > 1 else 0, rows):
        scores = queries[start : start + rows] @ candidates.T
        if not np.isfinite(scores).all():
            raise UserError("a similarity is not finite: the checkpoint is damaged")
        index = np.arange(len(scores))
        right = scores[index, start + index].copy()
        scores[index, start + index] = -np.inf
        best = scores.argmax(axis=1)
        above = scores[index, best] - right
        wrong = above >= 0
        retrieved[start + index[wrong]] = best[wrong]
        margin[start + index] = above
    return retrieved, margin


def classify(query: Instance, retrieved: Instance) -> dict[str, str]:
    """The classes whose rule holds, in order, each with its reason; the first one counts."""
    if query.record == retrieved.record:
        # A sibling may also be weak; that it speaks of another sample it cannot.
        return {"multi_instance": "an instance of the same sample"} | _weak(query)
    found = _weak(query)
    overlap = word_overlap(query.caption, retrieved.caption)
    if overlap >= SAME_WORDS:
        found["cross_sample"] = f"the captions share {100 * overlap:.0f} % of their words"
    elif query.look and query.look == retrieved.look:
        found["cross_sample"] = f"both are annotated {' '.join(query.look)}"
    return found or {"other": "no rule holds"}


def sort_errors(
    instances: Sequence[Instance], retrieved: np.ndarray, margin: np.ndarray
) -> tuple[list[Error], dict[str, Any]]:
    """Sorts the wrong retrievals of one direction.

    Args:
      instances: N. retrieved, margin: [N] of `wrong_retrievals`.

    Returns:
      The errors in the order of their queries, and their metrics: 'wrong', 'queries', and per
      class the 'count', the 'share' of all errors in percent, 'holds' (errors for which the rule
      holds, whatever came before it) and 'chance' (the share if every wrong query had retrieved
      another instance at random: what the rules alone make of it).
    """
    errors, holds = [], dict.fromkeys(CLASSES, 0)
    for query in np.flatnonzero(retrieved >= 0):
        found = classify(instances[query], instances[retrieved[query]])
        for name in found:
            holds[name] += 1
        kind, reason = next(iter(found.items()))
        errors.append(
            Error(
                query=int(query),
                retrieved=int(retrieved[query]),
                margin=float(margin[query]),
                kind=kind,
                reason=reason,
            )
        )
    counts = {name: sum(error.kind == name for error in errors) for name in CLASSES}
    chance = _by_chance(instances, [error.query for error in errors])
    metrics: dict[str, Any] = {"wrong": len(errors), "queries": len(instances)}
    for name in CLASSES:
        metrics[name] = {
            "count": counts[name],
            "share": 100 * counts[name] / max(1, len(errors)),
            "holds": holds[name],
            "chance": chance[name],
        }
    return errors, metrics


def _by_chance(instances: Sequence[Instance], queries: Sequence[int]) -> dict[str, float]:
    """Percent of each class when every query retrieves some other instance at random."""
    rng = np.random.default_rng([0])
    counts = dict.fromkeys(CLASSES, 0)
    for query in queries:
        for drawn in rng.integers(len(instances) - 1, size=_CHANCE_DRAWS):
            other = int(drawn) + (drawn >= query)  # never the query itself
            counts[next(iter(classify(instances[query], instances[other])))] += 1
    return {name: 100 * count / max(1, sum(counts.values())) for name, count in counts.items()}


def _weak(query: Instance) -> dict[str, str]:
    reason = query.weakness()
    return {"weak_evidence": reason} if reason else {}


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _look(extra: Mapping[str, Any]) -> tuple[str, ...]:
    """The key is the annotator's own: only a JSON object has named attributes."""
    attributes = extra.get("attributes")
    if not isinstance(attributes, dict):
        return ()
    values = [attributes.get(name) for name in LOOK]
    return tuple(str(value) for value in values) if None not in values else ()


def _mean_present(values: np.ndarray, present: np.ndarray) -> float:
    return float(values[present].mean()) if present.any() else 0.0
