"""Makers of tiny real media files, for tests."""

from pathlib import Path

import av
import numpy as np
from PIL import Image


def make_video(
    path: Path, frames: int = 12, size: tuple[int, int] = (34, 46), fps: int = 8
) -> Path:
    """Writes an H.264 mp4 whose frame i is grey of brightness `brightness(i)`.

    Args:
      size: (height, width) in pixels, both even (H.264 with 4:2:0 colour).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = size
    # faststart: the header comes first, so that a file cut off at its end still opens.
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "12"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            array = np.full((height, width, 3), brightness(index), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    return path


def brightness(index: int) -> int:
    """Grey level of frame `index` of `make_video`: steps of 10, so neighbours differ clearly."""
    return 20 + index % 22 * 10


def make_image(path: Path, size: tuple[int, int] = (33, 47), exif_orientation: int = 1) -> Path:
    """Writes a JPEG of `size` (height, width): red grows to the right, green downwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = size
    array = np.full((height, width, 3), 60, np.uint8)
    array[..., 0] = np.linspace(0, 255, width)[None, :]
    array[..., 1] = np.linspace(0, 255, height)[:, None]
    exif = Image.Exif()
    exif[0x0112] = exif_orientation
    Image.fromarray(array).save(path, "JPEG", quality=95, exif=exif)
    return path


def truncate(path: Path, fraction: float = 0.7) -> Path:
    """Cuts the end of a file off, as an interrupted download does."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    return path
