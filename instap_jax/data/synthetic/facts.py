"""What is true of an entity in its scene, and whether it tells the entity from the others.

A fact is stated only where it holds with a margin, and counts as telling entity i from entity j
only where it is false of j with a margin: in between lies what a viewer could dispute.
"""

import dataclasses

import numpy as np

from instap_jax.data.synthetic.render import Rendering
from instap_jax.data.synthetic.scene import DIRECTIONS, INPLACE, SIZES, Scene

# Relations that compare two entities wherever they are in a picture.
SIDES = {"left_of": (0, -1), "right_of": (0, 1), "above": (1, -1), "below": (1, 1)}
# Positions: on each axis, which third is meant (0, 1, 2; None: any).
ZONES = {
    "upper left": (0, 0),
    "upper right": (2, 0),
    "lower left": (0, 2),
    "lower right": (2, 2),
    "left": (0, None),
    "right": (2, None),
    "top": (None, 0),
    "bottom": (None, 2),
    "middle": (1, 1),
}
# A third as stated, and the wider one outside of which the statement is plainly false.
_THIRDS = ((-np.inf, 0.36), (0.42, 0.58), (0.64, np.inf))
_WIDER = ((-np.inf, 0.46), (0.34, 0.66), (0.54, np.inf))


@dataclasses.dataclass(frozen=True, slots=True)
class Fact:
    """Something said of an entity.

    Attributes:
      kind: look, motion, inplace, not_inplace, position, or the name of a relation.
      value: look: (size or None, texture or None, colour, shape); motion: (path, direction, speed
        or None, event); inplace, not_inplace: the motion's name; position: (when, zone), when
        being always, start or end; a relation: the words that name the other entity.
      other: index of the other entity of a relation.
    """

    kind: str
    value: tuple | str
    other: int | None = None


class Observation:
    """Positions over time of a scene's entities, from their visible boxes.

    Attributes:
      centre: float64 [k, t, 2] in short sides; NaN where absent.
      place: float64 [k, t, 2], the same as fractions of the picture.
    """

    def __init__(self, scene: Scene, rendering: Rendering):
        boxes = np.where(rendering.present[..., None], rendering.boxes, np.nan)
        self.scene = scene
        self.covered = rendering.covered
        pixels = (boxes[..., :2] + boxes[..., 2:]) / 2
        self.centre = pixels / rendering.short
        self.place = self.centre / np.asarray(scene.extent)

    def relations(self, i: int) -> list[tuple[str, int]]:
        """Every relation (kind, other) that plainly holds of entity i."""
        others = [j for j in range(len(self.scene.entities)) if j != i]
        return [(kind, j) for j in others for kind in RELATIONS if RELATIONS[kind](self, i, j)]

    def positions(self, i: int) -> list[tuple[str, str]]:
        """Every position (when, zone) that plainly holds of entity i, corners before sides."""
        still = self.scene.entities[i].motion.path == "still"
        return [
            (when, zone)
            for when in (("always",) if still else ("start", "end"))
            for zone in ZONES
            if _in_zone(self._when(i, when), zone, _THIRDS)
        ]

    def refutes(self, fact: Fact, i: int, j: int) -> bool:
        """Whether `fact`, true of entity i, is plainly false of entity j."""
        if fact.kind == "look":
            return _look_differs(fact.value, self.scene.entities[j])
        if fact.kind == "motion":
            return _motion_differs(fact.value, self.scene.entities[j].motion)
        if fact.kind in ("inplace", "not_inplace"):
            same = self.scene.entities[j].motion.inplace == fact.value
            return same == (fact.kind == "not_inplace")
        if fact.kind == "position":
            when, zone = fact.value
            return not _in_zone(self._when(j, when), zone, _WIDER)
        return self._relation_refuted(fact, i, j)

    def _relation_refuted(self, fact: Fact, i: int, j: int) -> bool:
        other = fact.other
        if j == other:
            return True  # nothing stands in a relation to itself
        if fact.kind in SIDES:
            axis, sign = SIDES[fact.kind]
            gap = sign * (self.centre[j] - self.centre[other])[:, axis]
            gap = gap[~np.isnan(gap)]
            return bool(len(gap) == 0 or np.mean(gap < 0.03) > 0.5)
        entities = self.scene.entities
        if fact.kind in ("larger", "smaller"):
            ranks = [list(SIZES).index(entities[k].size) for k in (j, other)]
            return ranks[0] <= ranks[1] if fact.kind == "larger" else ranks[0] >= ranks[1]
        if fact.kind == "same_colour":
            return entities[j].look.colour != entities[other].look.colour
        if fact.kind in ("behind", "in_front"):
            back, front = (j, other) if fact.kind == "behind" else (other, j)
            return bool(self.covered[back, front] < 0.02)
        if fact.kind in ("towards", "away"):
            change = self._approach(j, other)
            return change > -0.05 if fact.kind == "towards" else change < 0.05
        pace = _straight_pace(entities[j]), _straight_pace(entities[other])
        return pace[0] is not None and pace[0] == pace[1]

    def _when(self, i: int, when: str) -> np.ndarray:
        """Place [m, 2] in the frames that a statement is about."""
        seen = self.place[i][~np.isnan(self.place[i, :, 0])]
        return {"always": seen, "start": seen[:1], "end": seen[-1:]}[when]

    def _approach(self, i: int, other: int) -> float:
        """Change of the distance from its first to its last common frame; below 0: nearer."""
        distance = np.linalg.norm(self.centre[i] - self.centre[other], axis=-1)
        distance = distance[~np.isnan(distance)]
        return float(distance[-1] - distance[0]) if len(distance) else 0.0


def _sided(kind: str):
    axis, sign = SIDES[kind]

    def holds(seen: Observation, i: int, j: int) -> bool:
        gap = seen.centre[i] - seen.centre[j]
        gap = gap[~np.isnan(gap[:, 0])]
        enough = max(1, seen.scene.frames // 2)
        if len(gap) < enough:
            return False
        along, across = sign * gap[:, axis], np.abs(gap[:, 1 - axis])
        return bool(along.min() >= 0.15 and np.all(along >= across))

    return holds


def _sized(sign: int):
    def holds(seen: Observation, i: int, j: int) -> bool:
        ranks = [list(SIZES).index(seen.scene.entities[k].size) for k in (i, j)]
        return sign * (ranks[0] - ranks[1]) > 0

    return holds


def _same_colour(seen: Observation, i: int, j: int) -> bool:
    return seen.scene.entities[i].look.colour == seen.scene.entities[j].look.colour


def _covering(flip: bool):
    def holds(seen: Observation, i: int, j: int) -> bool:
        return bool(seen.covered[(j, i) if flip else (i, j)] >= 0.2)

    return holds


def _heading(sign: int):
    """Moves straight to (or from) one that keeps its place, getting plainly nearer (farther)."""

    def holds(seen: Observation, i: int, j: int) -> bool:
        entity, goal = seen.scene.entities[i], seen.scene.entities[j]
        if entity.motion.path != "straight" or goal.motion.path != "still":
            return False
        step = np.diff(seen.centre[i], axis=0)
        aim = sign * (seen.centre[j] - seen.centre[i])[:-1]
        good = ~np.isnan(step[:, 0] + aim[:, 0])
        if good.sum() < seen.scene.frames // 2 or sign * seen._approach(i, j) > -0.2:
            return False
        way = np.array(DIRECTIONS[entity.motion.direction])
        cosine = (aim[good] @ way) / np.linalg.norm(aim[good], axis=-1)
        return bool(cosine.min() > 0.7)

    return holds


def _paced(speed: str):
    def holds(seen: Observation, i: int, j: int) -> bool:
        mine, yours = (_straight_pace(seen.scene.entities[k]) for k in (i, j))
        return mine == speed and yours is not None and yours != mine

    return holds


def _straight_pace(entity) -> str | None:
    return entity.motion.speed if entity.motion.path == "straight" else None


# Kind -> whether it plainly holds of i towards j.
RELATIONS = {
    **{kind: _sided(kind) for kind in SIDES},
    "larger": _sized(1),
    "smaller": _sized(-1),
    "same_colour": _same_colour,
    "behind": _covering(False),
    "in_front": _covering(True),
    "towards": _heading(1),
    "away": _heading(-1),
    "faster": _paced("fast"),
    "slower": _paced("slow"),
}


def inplace_facts(scene: Scene, i: int) -> list[Fact]:
    """The in-place motion of entity i, or those that it lacks while another entity has them."""
    inplace = scene.entities[i].motion.inplace
    if inplace != "none":
        return [Fact("inplace", inplace)]
    there = {entity.motion.inplace for entity in scene.entities}
    return [Fact("not_inplace", name) for name in INPLACE if name in there]


def _in_zone(place: np.ndarray, zone: str, thirds) -> bool:
    for axis, third in enumerate(ZONES[zone]):
        if third is not None:
            low, high = thirds[third]
            if not np.all((place[:, axis] > low) & (place[:, axis] < high)):
                return False
    return True


def _look_differs(value: tuple, entity) -> bool:
    size, texture, colour, shape = value
    look = entity.look
    if (colour, shape) != (look.colour, look.shape):
        return True
    return size not in (None, entity.size) or texture not in (None, look.texture)


def _motion_differs(value: tuple, motion) -> bool:
    path, direction, speed, event = value
    if path != motion.path:
        # A zigzag also gets somewhere: only another direction tells it from a straight way.
        if {path, motion.path} != {"straight", "zigzag"}:
            return True
        return bool(np.dot(DIRECTIONS[direction], DIRECTIONS[motion.direction]) < 0.5)
    if direction != motion.direction or (speed is not None and speed != motion.speed):
        return True
    return event != "none" and event != motion.event
