"""Media files of the embedded set, the same bytes for the same pixels: H.264 in MP4, and JPEG."""

from pathlib import Path

import av
import numpy as np
from PIL import Image

_QUALITY = 20  # x264's constant rate factor: no artefact to be seen at this size
_JPEG_QUALITY = 92


def write_clip(path: Path, frames: np.ndarray, fps: int) -> None:
    """Writes uint8 [t, h, w, 3] as H.264 (yuv420p, index at the front); h and w are even."""
    # One thread, no version stamp: nothing but the pixels decides the bytes. Macroblock-tree rate
    # control is off because its SIMD code reads past the end of rows whose width is no multiple of
    # the vector's, so that the bytes depended on what lay in memory.
    options = {"preset": "veryfast", "crf": str(_QUALITY), "x264-params": "mbtree=0"}
    with av.open(
        str(path), "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}
    ) as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.gop_size = 12  # a decoder that seeks never has far to go
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def write_still(path: Path, frame: np.ndarray) -> None:
    """Writes uint8 [h, w, 3] as JPEG."""
    Image.fromarray(frame).save(path, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
