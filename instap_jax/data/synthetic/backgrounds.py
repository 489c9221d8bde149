"""Backgrounds of the embedded set, and which colours can be read against them."""

import functools

import numpy as np

from instap_jax.data.synthetic import scene as scenes

_TONE_RGB = {
    "pale": (226, 226, 222),
    "gray": (134, 134, 134),
    "dark": (50, 50, 54),
    "beige": (212, 190, 152),
    "slate": (92, 108, 132),
}
_OWN_RGB = {
    "grass": ((62, 112, 48), (112, 158, 72)),
    "sky": ((120, 172, 226), (190, 214, 240)),
    "bricks": ((142, 78, 58), (168, 104, 82)),
    "water": ((44, 100, 124), (84, 142, 160)),
}
_PALETTE = {
    "red": (214, 36, 38),
    "orange": (255, 138, 10),
    "yellow": (252, 222, 40),
    "green": (34, 158, 58),
    "cyan": (40, 208, 216),
    "blue": (34, 72, 214),
    "purple": (128, 44, 176),
    "pink": (255, 128, 188),
    "white": (248, 248, 248),
    "black": (16, 16, 18),
}
# The same names in other tones: crimson, mustard, teal ...
_SHIFTED_PALETTE = {
    "red": (158, 18, 52),
    "orange": (226, 112, 46),
    "yellow": (214, 186, 66),
    "green": (112, 190, 84),
    "cyan": (84, 178, 170),
    "blue": (84, 122, 240),
    "purple": (164, 92, 206),
    "pink": (226, 100, 146),
    "white": (226, 228, 214),
    "black": (44, 40, 50),
}
_CONTRAST = 120.0


def rgb(colour: str, shifted: bool) -> np.ndarray:
    """float32 [3] of a colour name, 0-255."""
    return np.array((_SHIFTED_PALETTE if shifted else _PALETTE)[colour], np.float32)


def contrast(a: np.ndarray, b: np.ndarray) -> float:
    """Distance of two RGB colours as the eye weighs it ('redmean'): 0 to about 765."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    red = (a[0] + b[0]) / 2
    weight = np.array([2 + red / 256, 4.0, 2 + (255 - red) / 256])
    return float(np.sqrt((weight * (a - b) ** 2).sum()))


@functools.cache
def readable(shifted: bool) -> dict[tuple[str, str | None], tuple[str, ...]]:
    """Of every background (kind, tone), the colours whose contrast against all of it suffices."""
    table = {}
    for kind in scenes.SHIFTED_BACKGROUNDS if shifted else scenes.BACKGROUNDS:
        for tone in (None,) if kind in scenes.TONELESS else scenes.TONES:
            shades = _shades(kind, tone)
            table[kind, tone] = tuple(
                colour
                for colour in scenes.COLOURS
                if min(contrast(rgb(colour, shifted), shade) for shade in shades) >= _CONTRAST
            )
    return table


def paint(background: scenes.Background, height: int, width: int) -> np.ndarray:
    """uint8 [h, w, 3]."""
    rng = np.random.default_rng(background.seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / min(height, width)
    mix = _MIX[background.kind](rng, x, y)[..., None]
    dark, light = (
        np.array(shade, np.float32) for shade in _shades(background.kind, background.tone)
    )
    return np.clip(dark + (light - dark) * mix, 0, 255).astype(np.uint8)


def _shades(kind: str, tone: str | None) -> tuple:
    """The darkest and the lightest colour of a background."""
    if tone is None:
        return _OWN_RGB[kind]
    base = np.array(_TONE_RGB[tone], np.float32)
    if kind == "plain":
        return base, base
    return np.clip(base - 17, 0, 255), np.clip(base + 17, 0, 255)


def _smooth_noise(rng: np.random.Generator, x: np.ndarray, cells: int) -> np.ndarray:
    """Noise in [0, 1] with about `cells` bumps along each side, bilinear between them."""
    height, width = x.shape
    grid = rng.random((cells + 1, cells + 1), np.float32)
    rows, columns = np.linspace(0, cells, height), np.linspace(0, cells, width)
    r = np.minimum(rows.astype(int), cells - 1)
    c = np.minimum(columns.astype(int), cells - 1)
    fr, fc = (rows - r)[:, None].astype(np.float32), (columns - c)[None].astype(np.float32)
    top = grid[r][:, c] * (1 - fc) + grid[r][:, c + 1] * fc
    bottom = grid[r + 1][:, c] * (1 - fc) + grid[r + 1][:, c + 1] * fc
    return top * (1 - fr) + bottom * fr


def _plain(rng, x, y):
    return np.zeros_like(x)


def _gradient(rng, x, y):
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.cos(angle) * x + np.sin(angle) * y
    return (ramp - ramp.min()) / (ramp.max() - ramp.min())


def _noise(rng, x, y):
    fine = rng.random(x.shape, np.float32)
    return 0.5 * fine + 0.5 * _smooth_noise(rng, x, 12)


def _stripes(rng, x, y):
    angle = rng.uniform(0, np.pi)
    wave = np.sin((np.cos(angle) * x + np.sin(angle) * y) * 2 * np.pi * rng.uniform(4, 6))
    return 0.5 + 0.5 * np.clip(4 * wave, -1, 1)


def _tiles(rng, x, y):
    side = rng.uniform(0.15, 0.22)
    seam = np.minimum(np.abs((x / side) % 1 - 0.5), np.abs((y / side) % 1 - 0.5))
    return np.clip(seam * 14, 0, 1)


def _grass(rng, x, y):
    height, width = x.shape
    blades = rng.random((height // 6 + 2, width), np.float32)
    shift = rng.integers(0, 6, width)
    rows = (np.arange(height)[:, None] + shift[None]) // 6
    return np.clip(blades[rows, np.arange(width)[None]] * 0.8 + 0.2 * y, 0, 1)


def _sky(rng, x, y):
    clouds = 0.65 * _smooth_noise(rng, x, 4) + 0.35 * _smooth_noise(rng, x, 9)
    return np.clip(0.3 * y + 2.5 * (clouds - 0.5), 0, 1)


def _bricks(rng, x, y):
    tall, long = 0.11, 0.26
    row = np.floor(y / tall)
    u, v = (x / long + 0.5 * (row % 2)) % 1, (y / tall) % 1
    seam = np.maximum(np.abs(u - 0.5) * long / tall - (long / tall - 1) / 2, np.abs(v - 0.5))
    return np.clip((seam - 0.38) * 12, 0, 1) * 0.9 + 0.1 * _smooth_noise(rng, x, 10)


def _water(rng, x, y):
    sway = 0.03 * np.sin(2 * np.pi * (x * 2.2 + rng.random()))
    wave = np.sin(2 * np.pi * ((y + sway) * 7 + rng.random()))
    return np.clip(0.35 + 0.3 * wave + 0.5 * (_smooth_noise(rng, x, 6) - 0.5), 0, 1)


def _pebbles(rng, x, y):
    step = 0.12
    columns, rows = int(x.max() / step) + 2, int(y.max() / step) + 2
    gx, gy = np.meshgrid(np.arange(columns), np.arange(rows))
    px = ((gx + rng.uniform(0.15, 0.85, gx.shape)) * step).ravel().astype(np.float32)
    py = ((gy + rng.uniform(0.15, 0.85, gy.shape)) * step).ravel().astype(np.float32)
    distance = np.hypot(x[..., None] - px, y[..., None] - py)
    nearest = np.partition(distance, 1, axis=-1)
    return np.clip((nearest[..., 1] - nearest[..., 0]) * 25, 0, 1)


_MIX = {
    "plain": _plain,
    "gradient": _gradient,
    "noise": _noise,
    "stripes": _stripes,
    "tiles": _tiles,
    "grass": _grass,
    "sky": _sky,
    "bricks": _bricks,
    "water": _water,
    "pebbles": _pebbles,
}
