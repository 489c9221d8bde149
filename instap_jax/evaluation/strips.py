"""Strips of frames with one instance's box: the pictures of a gallery."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from instap_jax.data import groups
from instap_jax.data.media import MediaError
from instap_jax.data.records import CorruptRecordError, RecordSource
from instap_jax.data.sampling import choose_frames
from instap_jax.errors import UserError
from instap_jax.types import Record

OWN, OTHER = "#1fa84f", "#e8590c"  # box of the instance that was meant; of another one
_FRAMES = 6  # of a strip, evenly chosen where there are more
_HEIGHT, _STILL_HEIGHT, _GAP = 128, 192, 4  # pixels
_QUALITY = 88


def read_frames(source: RecordSource, record: int, frames: int) -> list[np.ndarray]:
    """The T frames of a sample that evaluation looks at, uint8 [h, w, 3] as stored.

    Raises:
      UserError: the record cannot be read.
    """
    try:
        found = source[record]
        return list(groups.read_pictures(found, uniform_frames(found, frames), found.size))
    except (CorruptRecordError, MediaError) as error:
        name = source.record_name(record)
        raise UserError(
            f"{name} cannot be read ({error}); a suite is measured whole or not at all"
        ) from error


def uniform_frames(record: Record, frames: int) -> np.ndarray:
    """int64 [T]: the frames of a record that evaluation looks at, as `read_suite`."""
    return choose_frames(len(record.frame_index), frames, "uniform", np.random.default_rng(0))


def strip(
    frames: Sequence[np.ndarray],
    boxes: np.ndarray,
    present: np.ndarray,
    *,
    colour: str = OWN,
    heat: np.ndarray | None = None,
) -> bytes:
    """Frames in a row with one instance's box, perhaps under a heat map.

    Args:
      frames: T uint8 [h, w, 3] of one size.
      boxes: [T, 4], fractions of the picture. present: bool [T], where to draw them.
      colour: of the box.
      heat: [T, r, c] in [0, 1], laid over the frames; None: the frames as they are.

    Returns:
      A JPEG file.
    """
    height, width = frames[0].shape[:2]
    tall = _STILL_HEIGHT if len(frames) == 1 else _HEIGHT
    size = max(1, round(width * tall / height)), tall
    if len(frames) > _FRAMES:
        keep = np.linspace(0, len(frames) - 1, _FRAMES).round().astype(int)
    else:
        keep = np.arange(len(frames))
    sheet = Image.new("RGB", (len(keep) * (size[0] + _GAP) - _GAP, size[1]), "white")
    for column, t in enumerate(keep):
        picture = Image.fromarray(frames[t]).resize(size, Image.Resampling.BICUBIC)
        if heat is not None:
            picture = _heated(picture, heat[t])
        if present[t]:
            _draw_box(picture, boxes[t], colour)
        sheet.paste(picture, (column * (size[0] + _GAP), 0))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=_QUALITY, subsampling=0)
    return buffer.getvalue()


def _draw_box(picture: Image.Image, box: np.ndarray, colour: str) -> None:
    width, height = picture.size
    scaled = np.round(np.clip(box, 0, 1) * (width, height, width, height)).astype(int)
    x0, y0, x1, y1 = scaled.tolist()
    x1, y1 = max(x0, x1 - 1), max(y0, y1 - 1)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline="black")  # seen on any ground
    draw.rectangle((x0, y0, x1, y1), outline=colour, width=2)


def _heated(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """A grey copy of the picture, coloured where the map is high."""
    level = Image.fromarray(np.uint8(np.clip(heat, 0, 1) * 255))
    level = np.asarray(level.resize(picture.size, Image.Resampling.BILINEAR), np.float32) / 255
    grey = np.asarray(picture.convert("L"), np.float32)[..., None] * 0.75
    share = (0.85 * level**0.8)[..., None]
    mixed = (1 - share) * grey + share * _colours(level)
    return Image.fromarray(np.uint8(np.clip(mixed, 0, 255)))


def _colours(level: np.ndarray) -> np.ndarray:
    """[h, w] in [0, 1] -> float [h, w, 3]: dark violet, red, orange, yellow, evenly brighter."""
    stops = np.linspace(0, 1, 5)
    table = ((40, 11, 84), (132, 32, 107), (219, 63, 53), (251, 155, 6), (252, 246, 140))
    table = np.array(table, np.float32)
    return np.stack([np.interp(level, stops, table[:, i]) for i in range(3)], axis=-1)
