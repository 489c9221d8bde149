"""Scenes of the embedded set: which entities there are, what they look like, how they move.

Lengths are in short sides of the picture: the picture is `extent` = (width, height) with the
smaller of the two equal to 1, x to the right, y down. Time runs from 0 to 1 over the clip, so a
scene does not depend on the number of pixels, and its motion not on the number of frames.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "cross",
    "ring",
    "diamond",
    "heart",
    "moon",
    "hourglass",
)
COLOURS = (
    "red",
    "orange",
    "yellow",
    "green",
    "cyan",
    "blue",
    "purple",
    "pink",
    "white",
    "black",
)
TEXTURES = ("plain", "striped", "dotted", "checkered")
BACKGROUNDS = ("plain", "gradient", "noise", "stripes", "tiles", "grass", "sky")
TONES = ("pale", "gray", "dark", "beige", "slate")
# Of the shifted suite; none of them occurs anywhere else.
SHIFTED_TEXTURES = ("wavy", "netted")
SHIFTED_BACKGROUNDS = ("bricks", "water", "pebbles")
# Kinds that carry their own colours; the others come in every tone.
TONELESS = ("grass", "sky", "bricks", "water")

# Diameter (largest extent of the upright shape) in short sides.
SIZES = {"small": (0.17, 0.19), "medium": (0.25, 0.28), "large": (0.36, 0.39)}

_DIAGONAL = np.sqrt(0.5)
DIRECTIONS = {
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "down": (0.0, 1.0),
    "up": (0.0, -1.0),
    "down_right": (_DIAGONAL, _DIAGONAL),
    "down_left": (-_DIAGONAL, _DIAGONAL),
    "up_right": (_DIAGONAL, -_DIAGONAL),
    "up_left": (-_DIAGONAL, -_DIAGONAL),
}
CARDINAL = ("right", "left", "down", "up")
# Of every path that moves, its admissible directions.
PATH_DIRECTIONS = {
    "straight": tuple(DIRECTIONS),
    "circling": ("clockwise", "anticlockwise"),
    "zigzag": CARDINAL,
    "bouncing": ("vertical", "horizontal"),
}
# Extent of a motion over the clip, per path and speed: the way between its ends in short sides
# (straight, zigzag), full turns (circling), bounces (bouncing). Fast is at least twice slow.
PACE = {
    ("straight", "slow"): (0.28, 0.36),
    ("straight", "fast"): (0.72, 0.92),
    ("zigzag", "slow"): (0.28, 0.36),
    ("zigzag", "fast"): (0.66, 0.80),
    ("circling", "slow"): (0.75, 0.95),
    ("circling", "fast"): (1.9, 2.3),
    ("bouncing", "slow"): (1.4, 1.6),
    ("bouncing", "fast"): (3.2, 3.6),
}
INPLACE = ("spin", "blink", "pulse")
_EDGE = 0.35  # of its diameter: how near a centre may come to the picture's edge


@dataclasses.dataclass(frozen=True, slots=True)
class Look:
    """What a still picture shows of an entity, whatever its size and place."""

    shape: str
    colour: str
    texture: str


@dataclasses.dataclass(frozen=True, slots=True)
class Motion:
    """How an entity moves.

    Attributes:
      path: still, straight, circling, zigzag or bouncing.
      direction: one of `PATH_DIRECTIONS[path]`; None where still.
      speed: slow or fast; None where still.
      inplace: none, spin, blink or pulse.
      event: none, enters (begins outside the picture) or leaves (ends outside).
    """

    path: str = "still"
    direction: str | None = None
    speed: str | None = None
    inplace: str = "none"
    event: str = "none"


@dataclasses.dataclass(frozen=True, slots=True)
class Entity:
    """One entity and its state in every frame.

    Attributes:
      diameter: largest extent of the upright, unscaled shape.
      centre: float64 [t, 2], x and y.
      angle: float64 [t], radians, clockwise as seen.
      scale: float64 [t], factor on the diameter.
      opacity: float64 [t].
    """

    look: Look
    size: str
    motion: Motion
    diameter: float
    centre: np.ndarray
    angle: np.ndarray
    scale: np.ndarray
    opacity: np.ndarray


@dataclasses.dataclass(frozen=True, slots=True)
class Background:
    """Kind and tone (None for kinds with colours of their own); `seed` draws its details."""

    kind: str
    tone: str | None
    seed: int


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """Entities from back to front before a background.

    Attributes:
      extent: (width, height) in short sides.
      frames: number of frames; 1 is a still picture.
      shifted: whether the palette is that of the shifted suite.
    """

    entities: tuple[Entity, ...]
    background: Background
    extent: tuple[float, float]
    frames: int
    shifted: bool


def draw_scene(
    rng: np.random.Generator,
    pool: Sequence[Look],
    readable: dict[tuple[str, str | None], tuple[str, ...]],
    *,
    frames: int,
    extent: tuple[float, float],
    shifted: bool,
) -> Scene | None:
    """Draws a scene, or None where the entities drawn find no room (draw again).

    Args:
      rng: source of every choice.
      pool: looks that other scenes use too, so that a look alone does not name a scene.
      readable: of every background (kind, tone), the colours that stand out against it.
      frames, extent, shifted: as in `Scene`.
    """
    kind, tone = pick(rng, tuple(readable))
    background = Background(kind, tone, int(rng.integers(2**31)))
    colours = readable[kind, tone]
    textures = SHIFTED_TEXTURES if shifted else TEXTURES
    pool = [look for look in pool if look.colour in colours]
    count = int(rng.choice((2, 3, 4, 5), p=(0.2, 0.35, 0.3, 0.15)))
    cast = draw_cast(rng, count, pool, colours, textures, video=frames > 1)
    entities: list[Entity] = []
    for look, size, motion in cast:
        entity = _place(rng, entities, look, size, motion, frames, extent)
        if entity is None:
            return None
        entities.append(entity)
    order = rng.permutation(count)
    return Scene(tuple(entities[k] for k in order), background, extent, frames, shifted)


def draw_pool(rng: np.random.Generator, shifted: bool, count: int = 6) -> list[Look]:
    """Looks shared by neighbouring samples of a suite."""
    return [
        _draw_look(rng, COLOURS, SHIFTED_TEXTURES if shifted else TEXTURES) for _ in range(count)
    ]


def draw_cast(
    rng: np.random.Generator,
    count: int,
    pool: Sequence[Look],
    colours: Sequence[str],
    textures: Sequence[str],
    *,
    video: bool,
) -> list[tuple[Look, str, Motion]]:
    """Look, size and motion of `count` entities that share attributes.

    In three scenes of four one entity is the twin of another: the same look, told from it only by
    motion, size or place. The others often take over a shape or a colour that is there already.
    """
    cast: list[tuple[Look, str, Motion]] = []
    for _ in range(count):
        pooled = pool and rng.random() < 0.5
        look = pick(rng, pool) if pooled else _draw_look(rng, colours, textures)
        if cast and not pooled and rng.random() < 0.5:
            other = pick(rng, cast)[0]
            if rng.random() < 0.5:
                look = dataclasses.replace(look, shape=other.shape)
            else:
                look = dataclasses.replace(look, colour=other.colour)
        size = _draw_size(rng, count)
        cast.append((look, size, draw_motion(rng, look) if video else Motion()))
    if rng.random() < 0.75:
        cast[-1] = _twin(rng, *cast[0], count, video=video)
    return cast


def draw_motion(rng: np.random.Generator, look: Look) -> Motion:
    """A motion that can be seen on this look (a plain disc does not show that it spins)."""
    paths = ("still", "straight", "circling", "zigzag", "bouncing")
    path = str(rng.choice(paths, p=(0.22, 0.42, 0.12, 0.12, 0.12)))
    direction = speed = None
    event = "none"
    if path != "still":
        direction = pick(rng, PATH_DIRECTIONS[path])
        speed = pick(rng, ("slow", "fast"))
    if path == "straight":
        event = str(rng.choice(("none", "enters", "leaves"), p=(0.66, 0.17, 0.17)))
    round_and_plain = look.shape in ("circle", "ring") and look.texture == "plain"
    inplace = "none"
    if rng.random() < (0.5 if path == "still" else 0.25):
        inplace = pick(rng, INPLACE[1:] if round_and_plain else INPLACE)
    return Motion(path, direction, speed, inplace, event)


def _twin(
    rng: np.random.Generator, look: Look, size: str, motion: Motion, count: int, *, video: bool
) -> tuple[Look, str, Motion]:
    """The same look again, with another motion, size or place."""
    cue = rng.random()
    if cue < (0.25 if video else 0.45):
        others = [name for name in SIZES if name != size]
        return look, pick(rng, others if count < 4 else others[:1]), motion
    if video and cue < 0.85:
        return look, size, draw_motion(rng, look)
    return look, size, motion


def _draw_look(rng: np.random.Generator, colours: Sequence[str], textures: Sequence[str]) -> Look:
    return Look(pick(rng, SHAPES), pick(rng, colours), pick(rng, textures))


def _draw_size(rng: np.random.Generator, count: int) -> str:
    large = 0.34 if count < 4 else 0.18
    return str(rng.choice(tuple(SIZES), p=(0.34, 1 - 0.34 - large, large)))


def _place(
    rng: np.random.Generator,
    others: Sequence[Entity],
    look: Look,
    size: str,
    motion: Motion,
    frames: int,
    extent: tuple[float, float],
) -> Entity | None:
    """Puts an entity where it stays in the picture and clear enough of the others, or None."""
    diameter = float(rng.uniform(*SIZES[size]))
    time = (np.arange(frames) + 0.5) / frames
    for _ in range(24):
        centre = _centres(rng, motion, diameter, time, extent)
        if centre is not None and not _crowded(rng, centre, diameter, others):
            angle, scale, opacity = _inplace_state(rng, motion.inplace, time)
            return Entity(look, size, motion, diameter, centre, angle, scale, opacity)
    return None


def _crowded(
    rng: np.random.Generator, centre: np.ndarray, diameter: float, others: Sequence[Entity]
) -> bool:
    """Whether an entity meets another for too long. In a still picture a few may overlap."""
    still = len(centre) == 1
    for other in others:
        reach = (diameter + other.diameter) / 2
        distance = np.linalg.norm(centre - other.centre, axis=-1) / reach
        if still:
            if distance[0] < (0.6 if rng.random() < 0.25 else 1.0):
                return True
        elif np.mean(distance < 0.9) > 0.25:
            return True
    return False


def _centres(
    rng: np.random.Generator,
    motion: Motion,
    diameter: float,
    time: np.ndarray,
    extent: tuple[float, float],
) -> np.ndarray | None:
    """Centres [t, 2] of a path that fits the picture, or None."""
    offset = _path(rng, motion, time)
    low = np.full(2, _EDGE * diameter)
    high = np.asarray(extent) - low
    if motion.event != "none":
        return _through_edge(rng, motion, offset, diameter, low, high)
    low, high = low - offset.min(0), high - offset.max(0)
    if np.any(low >= high):
        return None
    return rng.uniform(low, high) + offset


def _through_edge(
    rng: np.random.Generator,
    motion: Motion,
    offset: np.ndarray,
    diameter: float,
    low: np.ndarray,
    high: np.ndarray,
) -> np.ndarray | None:
    """A straight path that starts (or ends) just outside the picture and is inside at the other."""
    outside, inside = (0, -1) if motion.event == "enters" else (-1, 0)
    # At least one component moves; on a diagonal either edge may be the one that is crossed.
    axis = int(rng.choice(np.flatnonzero(np.abs(offset[-1] - offset[0]) > 1e-6)))
    beyond = (_EDGE + 0.52) * diameter
    # It stands beyond the low edge when the way in leads to higher coordinates.
    way_in = offset[inside, axis] - offset[outside, axis]
    edge = low[axis] - beyond if way_in > 0 else high[axis] + beyond
    base = rng.uniform(low, high) - offset[inside]
    base[axis] = edge - offset[outside, axis]
    end = base + offset[inside]
    path = base + offset
    across = 1 - axis
    fits = np.all((end >= low) & (end <= high))
    fits &= path[:, across].min() >= low[across] and path[:, across].max() <= high[across]
    return path if fits else None


def _path(rng: np.random.Generator, motion: Motion, time: np.ndarray) -> np.ndarray:
    """Displacement [t, 2] from the path's reference point."""
    if motion.path == "still":
        return np.zeros((len(time), 2))
    pace = rng.uniform(*PACE[motion.path, motion.speed])
    # 0 in the first frame, 1 in the last: the way between the ends is seen in full.
    way = (time - time[0]) / (time[-1] - time[0])
    if motion.path == "straight":
        return np.outer(way * pace, DIRECTIONS[motion.direction])
    if motion.path == "circling":
        turn = 1.0 if motion.direction == "clockwise" else -1.0
        radius = rng.uniform(0.12, 0.18)
        phase = 2 * np.pi * (turn * pace * way + rng.random())
        return radius * np.stack([np.cos(phase), np.sin(phase)], -1)
    if motion.path == "zigzag":
        along = np.asarray(DIRECTIONS[motion.direction])
        swing = 0.07 * _triangle_wave(2.5 * way + rng.random())
        return np.outer(way * pace, along) + np.outer(swing, along[::-1])
    height = rng.uniform(0.24, 0.32)
    if motion.direction == "vertical":
        return np.outer(height * np.abs(np.sin(np.pi * (pace * way + rng.random()))), (0.0, -1.0))
    swing = _triangle_wave(pace / 2 * way + rng.random())
    return np.outer(height * swing * 0.6, (1.0, 0.0))


def _triangle_wave(phase: np.ndarray) -> np.ndarray:
    """Of period 1, between -1 and 1."""
    return 4 * np.abs(phase % 1 - 0.5) - 1


def _inplace_state(
    rng: np.random.Generator, inplace: str, time: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Angle, scale and opacity [t]."""
    angle = np.full(len(time), rng.uniform(-0.15, 0.15))
    scale, opacity = np.ones(len(time)), np.ones(len(time))
    phase = rng.random()
    if inplace == "spin":
        turn = pick(rng, (-1.0, 1.0))
        angle = angle + turn * 2 * np.pi * (rng.uniform(0.7, 1.2) * time)
    elif inplace == "pulse":
        scale = 1 + 0.25 * np.sin(2 * np.pi * (rng.uniform(2.2, 2.8) * time + phase))
    elif inplace == "blink":
        # Never quite out: an entity that cannot be seen has no box, and its blinking no witness.
        bright = np.sin(2 * np.pi * (rng.uniform(2.6, 3.2) * time + phase)) > -0.2
        opacity = np.where(bright, 1.0, 0.3)
    return angle, scale, opacity


def pick(rng: np.random.Generator, options: Sequence):
    """One of the options, each as likely."""
    return options[int(rng.integers(len(options)))]
