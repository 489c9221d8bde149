"""Pictures of a scene, in NumPy: anti-aliased shapes by signed distance on local windows.

A shape's signed distance is tabulated once per process; drawing an entity is one look-up per
pixel of a window that just holds it, for all frames of the clip together.
"""

import dataclasses
import functools

import numpy as np

from instap_jax.data.synthetic import backgrounds
from instap_jax.data.synthetic.scene import Entity, Scene

_SPAN = 1.3  # the tables cover [-span, span]; the shapes fill [-1, 1]
_TABLE = 256
_MIN_SHARE = 0.15  # of its pixels: an entity of which less is seen is absent


@dataclasses.dataclass(frozen=True, slots=True)
class Rendering:
    """What can be seen of a scene.

    Attributes:
      boxes: float64 [k, t, 4], tight x0 y0 x1 y1 in pixels of what is visible (inside the picture
        and not covered by another entity); undefined where not `present`.
      present: bool [k, t], at least 15 % of the entity is visible.
      share: float64 [k, t], the visible share of the entity's pixels.
      covered: float64 [k, k], the largest share of entity i that entity j hides in any frame.
      short: pixels of the picture's short side.
    """

    boxes: np.ndarray
    present: np.ndarray
    share: np.ndarray
    covered: np.ndarray
    short: int
    _layers: tuple["_Layer", ...]

    def frames(self, scene: Scene, height: int, width: int) -> np.ndarray:
        """uint8 [t, h, w, 3]."""
        picture = backgrounds.paint(scene.background, height, width)
        frames = np.repeat(picture[None], scene.frames, axis=0)
        for layer in self._layers:
            layer.compose(frames)
        return frames


def render(scene: Scene, height: int, width: int) -> Rendering:
    """Draws every entity of a scene on its own and finds out what hides what."""
    layers = tuple(_draw(entity, height, width, scene.shifted) for entity in scene.entities)
    masks = np.zeros((len(layers), scene.frames, height, width), bool)
    for mask, layer in zip(masks, layers):
        layer.paste(mask)
    whole = np.stack([layer.pixels for layer in layers])  # [k, t], those outside included
    covered = np.zeros((len(layers), len(layers)))
    visible = masks.copy()
    for i in range(len(layers)):
        for j in range(i + 1, len(layers)):
            hidden = masks[i] & masks[j]
            covered[i, j] = (hidden.sum((1, 2)) / whole[i]).max()
            visible[i] &= ~masks[j]
    share = visible.sum((2, 3)) / whole
    present = share >= _MIN_SHARE
    return Rendering(_tight_boxes(visible), present, share, covered, min(height, width), layers)


def _tight_boxes(masks: np.ndarray) -> np.ndarray:
    """float64 [..., 4] around the True pixels of bool [..., h, w]."""
    columns, rows = masks.any(-2), masks.any(-1)
    x0, y0 = columns.argmax(-1), rows.argmax(-1)
    x1 = columns.shape[-1] - columns[..., ::-1].argmax(-1)
    y1 = rows.shape[-1] - rows[..., ::-1].argmax(-1)
    return np.stack([x0, y0, x1, y1], -1).astype(np.float64)


@dataclasses.dataclass(frozen=True, slots=True)
class _Layer:
    """One entity on a square window that moves with it.

    Attributes:
      origin: int [t, 2], x and y of the window's corner in the picture.
      alpha: float32 [t, s, s], how much of a pixel the shape covers.
      opacity: float32 [t]; what blinks fades, but keeps its extent.
      colour: float32 [t, s, s, 3].
      pixels: int [t], number of the shape's pixels, whether in the picture or not.
    """

    origin: np.ndarray
    alpha: np.ndarray
    opacity: np.ndarray
    colour: np.ndarray
    pixels: np.ndarray

    def _windows(self, height: int, width: int):
        """(frame, slices of the picture, slices of the window) wherever the two overlap."""
        size = self.alpha.shape[-1]
        for t, (x, y) in enumerate(self.origin.tolist()):
            x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + size, width), min(y + size, height)
            if x0 < x1 and y0 < y1:
                here = (t, slice(y0, y1), slice(x0, x1))
                yield here, (t, slice(y0 - y, y1 - y), slice(x0 - x, x1 - x))

    def paste(self, mask: np.ndarray) -> None:
        solid = self.alpha > 0.5
        for here, there in self._windows(*mask.shape[1:]):
            mask[here] = solid[there]

    def compose(self, frames: np.ndarray) -> None:
        weight = (self.alpha * self.opacity[:, None, None])[..., None]
        front, keep = self.colour * weight + 0.5, 1 - weight
        for here, there in self._windows(*frames.shape[1:3]):
            frames[here] = front[there] + keep[there] * frames[here]


def _draw(entity: Entity, height: int, width: int, shifted: bool) -> _Layer:
    short = min(height, width)
    radius = (entity.scale * entity.diameter * short / 2).astype(np.float32)[:, None, None]
    # How far the shape reaches from its centre, in radii: a spinning square turns its corners out.
    reach = 1.1 if np.ptp(entity.angle) == 0 else _SPAN
    size = int(np.ceil(2 * reach * radius.max())) + 3
    centre = entity.centre * short
    origin = np.floor(centre - size / 2).astype(np.int64)
    local = (origin - centre + 0.5).astype(np.float32)  # of the window's first pixel centre
    steps = np.arange(size, dtype=np.float32)
    x = (local[:, 0, None, None] + steps) / radius
    y = (local[:, 1, None, None] + steps[:, None]) / radius
    cos, sin = (f(entity.angle).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
    u, v = cos * x + sin * y, cos * y - sin * x
    inside = _look_up(_distance_table(entity.look.shape), u, v) * -radius  # pixels
    alpha = np.clip(inside + 0.5, 0, 1)
    pattern = _look_up(_texture_table(entity.look.texture), u, v)
    outline = np.clip(1.5 * short / 96 - inside, 0, 1)
    base = backgrounds.rgb(entity.look.colour, shifted)
    second, edge = _companions(entity.look.colour, base)
    colour = base + pattern[..., None] * (second - base)
    colour += outline[..., None] * (edge - colour)
    pixels = np.maximum((alpha > 0.5).sum((1, 2)), 1)
    return _Layer(origin, alpha, entity.opacity.astype(np.float32), colour, pixels)


def _companions(colour: str, base: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The colour of the texture's pattern and that of the outline.

    The pattern is a darker tone where the colour is light and a paler one where it is dark, so
    that the name of the colour stays true. The outline closes the silhouette where a pattern
    alone would melt into the background.
    """
    dark, light = np.float32(20), np.float32(255)
    if colour == "black":
        return base + 0.3 * (light - base), base
    pattern = base + 0.62 * ((light if colour in ("blue", "purple") else dark) - base)
    return pattern, base + 0.6 * (dark - base)


def _look_up(table: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    scale = np.float32((_TABLE - 1) / (2 * _SPAN))
    column = np.clip((u + _SPAN) * scale + 0.5, 0, _TABLE - 1).astype(np.int32)
    row = np.clip((v + _SPAN) * scale + 0.5, 0, _TABLE - 1).astype(np.int32)
    return table.ravel()[row * _TABLE + column]


def _grid() -> tuple[np.ndarray, np.ndarray]:
    axis = np.linspace(-_SPAN, _SPAN, _TABLE)
    return np.meshgrid(axis, axis)


@functools.cache
def _texture_table(texture: str) -> np.ndarray:
    """float32 [n, n]: 0 base colour, 1 pattern colour. Coarse enough to be seen at 12 pixels."""
    x, y = _grid()
    if texture == "plain":
        value = np.full_like(x, -1.0)
    elif texture == "striped":
        value = np.sin(2 * np.pi * 1.4 * (x + y) / np.sqrt(2)) - 0.1
    elif texture == "dotted":
        u, v = (x * 1.6) % 1 - 0.5, (y * 1.6) % 1 - 0.5
        value = 4 * (0.29 - np.hypot(u, v))
    elif texture == "checkered":
        value = np.sin(np.pi * 2 * x) * np.sin(np.pi * 2 * y) * 2
    elif texture == "wavy":
        value = np.sin(2 * np.pi * (1.5 * y + 0.28 * np.sin(2 * np.pi * 1.1 * x))) - 0.1
    elif texture == "netted":
        value = 4 * (np.maximum(np.cos(2 * np.pi * 1.7 * x), np.cos(2 * np.pi * 1.7 * y)) - 0.72)
    else:
        raise ValueError(f"no texture {texture!r}")
    return np.clip(0.5 + 3 * value, 0, 1).astype(np.float32)


@functools.cache
def _distance_table(shape: str) -> np.ndarray:
    """float32 [n, n]: signed distance to the edge, negative inside, in half extents."""
    x, y = _grid()
    if shape == "circle":
        distance = np.hypot(x, y) - 1
    elif shape == "ring":
        distance = np.abs(np.hypot(x, y) - 0.72) - 0.28
    elif shape == "moon":
        x = x - 0.25
        distance = np.maximum(np.hypot(x, y) - 1, 0.86 - np.hypot(x - 0.55, y))
    else:
        distance = _polygon_distance(_corners(shape), x, y)
    return distance.astype(np.float32)


def _corners(shape: str) -> np.ndarray:
    """Corners [m, 2] of a shape within [-1, 1]; y is down."""
    if shape == "square":
        return 0.9 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    if shape == "triangle":
        return np.array([(0, -0.92), (1, 0.82), (-1, 0.82)])
    if shape == "diamond":
        return np.array([(0, -1), (0.6, 0), (0, 1), (-0.6, 0)])
    if shape == "hourglass":
        right = np.array([(0.78, -1), (0.14, 0), (0.78, 1)])
        return np.concatenate([right, right[::-1] * (-1, 1)])
    if shape == "cross":
        w = 0.32
        arm = np.array([(w, -1), (w, -w), (1, -w)])
        turn = np.array([(0, 1), (-1, 0)])  # by a quarter
        return np.concatenate([arm @ np.linalg.matrix_power(turn, k) for k in range(4)])
    if shape == "star":
        angle = np.pi * np.arange(10) / 5
        radius = np.where(np.arange(10) % 2, 0.45, 1.05)[:, None]
        return radius * np.stack([np.sin(angle), -np.cos(angle)], -1) + (0, 0.08)
    if shape == "heart":
        s = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        x = 16 * np.sin(s) ** 3
        y = 13 * np.cos(s) - 5 * np.cos(2 * s) - 2 * np.cos(3 * s) - np.cos(4 * s)
        return np.stack([x / 16, -(y + 2.5) / 15], -1)
    raise ValueError(f"no shape {shape!r}")


def _polygon_distance(corners: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance [n, n] to a closed polygon (even-odd rule)."""
    nearest = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0)):
        dx, dy = bx - ax, by - ay
        along = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - along * dx, y - ay - along * dy))
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * dx / dy)
    return np.where(inside, -nearest, nearest)
