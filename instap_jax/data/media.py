"""Decoding of clips (PyAV) and stills (Pillow), and the paths they are allowed to come from.

Media are input from outside: every way in which a file can be missing, damaged or hostile ends in
one exception, `MediaError`, whose text is the reason. Frame indices count decoded frames in
presentation order, whatever their time stamps; frames that an edit list hides do not count.
"""

import contextlib
import dataclasses
import io
import itertools
import math
import struct
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from PIL import Image, ImageOps

from instap_jax.data.containers import declared_size
from instap_jax.errors import UserError
from instap_jax.types import Kind

MAX_SIDE = 16_384  # pixels
MAX_PIXELS = 100_000_000  # of a still
# Of a frame of a clip: 8192x4352. A decoder holds up to 17 frames, 54 MB each with 4:2:0 colour.
MAX_CLIP_PIXELS = 36_000_000
MAX_FRAMES = 1_000_000  # of one clip: nine hours at 30 frames/s
# Of all frames of a clip together, nearly two hours of 1080p at 30 frames/s: a small file can say
# "the same again" a million times, and each costs the time of a whole frame.
MAX_DECODED_PIXELS = 4 * 10**11

# A header's frame rate is doubted if it is off by this share of what so many frames' times say.
_RATE_TOLERANCE = 0.1
_ABSURD_RATE = 240.0
_TIMED_FRAMES = 5

# Named, so that neither a play list (which may open other files or addresses) nor one of Pillow's
# formats that call other programs is ever tried on a file from outside.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,gif"
_STILLS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")

# Larger pictures than MAX_PIXELS are refused here with an error; Pillow's own warning is noise.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class MediaError(Exception):
    """One media file cannot be used; the text is the reason. A fault of one sample."""


@dataclasses.dataclass(frozen=True, slots=True)
class MediaInfo:
    """What a file holds: number of frames, frames per second (0 for an image), size in pixels."""

    frames: int
    fps: float
    height: int
    width: int


def probe(path: Path, kind: Kind) -> MediaInfo:
    """Reads what can be known without decoding: an image's header, a clip's packets.

    The packets are counted because a header's frame count also counts frames that an edit list
    hides, and because a header knows nothing of a file that was cut off after it. The first frame
    is decoded: only it knows the rotation.

    Raises:
      MediaError: missing, not of this kind, truncated, too large, or nothing decodes.
    """
    if kind is Kind.IMAGE:
        with _reasons(), _open_still(path) as image:
            height, width = image.height, image.width
            # These orientations swap the sides; of a TIFF file Pillow has swapped them already.
            if image.getexif().get(0x0112) in (5, 6, 7, 8) and image.format != "TIFF":
                height, width = width, height
            return MediaInfo(1, 0.0, height, width)
    with _reasons():
        _check_declared_size(path)
    with _reasons(), _open_clip(path) as clip:
        first = None
        for packet in clip.packets():
            first = first or next(iter(packet.decode()), None)
        clip.check_whole(clip.shown)
        first = first or next(iter(clip.stream.codec_context.decode(None)), None)
        if first is None or not clip.shown:
            raise MediaError("no frame can be decoded")
        height, width = first.height, first.width
        if first.rotation % 180:
            height, width = width, height
        return MediaInfo(clip.shown, clip.rate(), height, width)


def read_frames(
    media: Path | bytes, indices: Sequence[int], short_side: int | None = None
) -> list[np.ndarray]:
    """Decodes the wanted frames of a clip in one sequential pass that ends at the last of them.

    Args:
      media: a file, or its bytes.
      indices: frame indices, not decreasing; one that is repeated yields the same array again.
      short_side: pixels; a frame whose shorter side is longer is scaled down to it.

    Returns:
      One uint8 [h, w, 3] RGB array per index, rotated as the file's display matrix says.

    Raises:
      MediaError: missing, truncated or damaged before the last wanted frame, index past the end.
    """
    wanted = [int(i) for i in indices]
    if any(b < a for a, b in itertools.pairwise(wanted)) or (wanted and wanted[0] < 0):
        raise ValueError(f"frame indices must be non-negative and not decrease: {wanted}")
    found: list[np.ndarray] = []
    if not wanted:
        return found
    with _reasons(), _open_clip(media) as clip:
        index = -1
        for index, frame in enumerate(clip.frames()):
            if wanted[len(found)] > index:
                continue
            array = _to_array(frame, short_side)
            while len(found) < len(wanted) and wanted[len(found)] == index:
                found.append(array)
            if len(found) == len(wanted):
                return found
        last = wanted[len(found)]
        raise MediaError(f"frame {last} is past the end: the clip has {index + 1} frames")


def iterate_frames(path: Path, short_side: int | None = None) -> Iterator[np.ndarray]:
    """Yields every frame of a clip as `read_frames` would, one in memory at a time.

    Raises:
      MediaError: as the frames are reached.
    """
    with _reasons(), _open_clip(path) as clip:
        for frame in clip.frames():
            yield _to_array(frame, short_side)


def verify(path: Path, kind: Kind) -> MediaInfo:
    """Like `probe`, but decodes the whole file, as `validate` promises that it can be decoded.

    Raises:
      MediaError: as `probe`, and damage or a missing frame anywhere in the file.
    """
    info = probe(path, kind)
    if kind is Kind.IMAGE:
        read_image(path)
        return info
    with _reasons(), _open_clip(path) as clip:
        decoded = sum(1 for _ in clip.frames())
    if decoded != info.frames:
        raise MediaError(f"damaged: the file holds {info.frames} frames, {decoded} decode")
    return info


def read_image(media: Path | bytes, short_side: int | None = None) -> np.ndarray:
    """Decodes a still to uint8 [h, w, 3] RGB, turned upright as its EXIF orientation says.

    Args:
      media: a file, or its bytes.
      short_side: pixels; an image whose shorter side is longer is scaled down to it.

    Raises:
      MediaError: missing, not an image, truncated, or larger than the limits.
    """
    with _reasons(), _open_still(media) as image:
        size = image.size
        if short_side is not None:
            size = _scaled(*size, short_side)
            # Lets the JPEG decoder skip detail that would be thrown away; never below `size`.
            image.draft(None, size)
        image = _to_rgb(image)
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        return np.array(ImageOps.exif_transpose(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip at 255 what goes up to 65,535
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5)
    if image.has_transparency_data:  # on white, as web pages show it; below may lie anything
        layer = image.convert("RGBA")
        image, info = Image.new("RGB", image.size, "white"), image.info
        image.paste(layer, mask=layer.getchannel("A"))
        image.info = dict(info)  # with the orientation
    return image.convert("RGB")


def encode_jpeg(frame: np.ndarray, quality: int = 90) -> bytes:
    """Encodes uint8 [h, w, 3] RGB as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def decode_jpeg(data: bytes) -> np.ndarray:
    """Decodes the JPEG file `data` to uint8 [h, w, 3] RGB, read-only. Raises MediaError.

    The hot spot of the input pipeline. Pillow's decoder is called without its reader of headers,
    which is Python and a tenth of the time; whatever is unusual or damaged goes the long way.
    """
    with contextlib.suppress(Exception):
        if size := _usual_jpeg_size(data):
            return _packed(Image.frombytes("RGB", size, data, "jpeg", "RGB", ""))
    with _reasons(), _open_still(data, formats=("JPEG",)) as image:
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _packed(image: Image.Image) -> np.ndarray:
    """`np.asarray(image)` of an RGB image, without its detour over 64 KB pieces (4 %)."""
    encoder = Image._getencoder("RGB", "raw", ("RGB",))
    encoder.setimage(image.im, (0, 0, *image.size))
    _, _, data = encoder.encode(3 * image.width * image.height)
    return np.frombuffer(data, np.uint8).reshape(image.height, image.width, 3)


def _usual_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a three-channel JPEG file whose header is well-formed, else None."""
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    while data[at : at + 1] == b"\xff":
        if 0xC0 <= data[at + 1] <= 0xC2:  # start of frame: baseline, extended or progressive
            height, width = struct.unpack_from(">HH", data, at + 5)
            usual = data[at + 9] == 3 and 0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE
            return (width, height) if usual and height * width <= MAX_PIXELS else None
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return None


def confined(root: Path, relative: str) -> Path:
    """Returns the path of `relative` under `root`, following links.

    Raises:
      UserError: it is absolute, or leads out of the root through '..' or a link.
    """
    path = PurePosixPath(relative)
    try:
        base = root.resolve()
        target = (base / path).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"media path {relative!r} is not usable: {error}") from error
    if path.is_absolute() or not target.is_relative_to(base):
        raise UserError(f"media path {relative!r} leads out of the media root {root}")
    return target


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    """Turns whatever a decoder throws into a MediaError with a short reason.

    All exceptions, because damaged bytes make the two libraries raise nearly every built-in type.
    """
    try:
        yield
    except MediaError:
        raise
    except FileNotFoundError as error:
        raise MediaError("no such file") from error
    except Image.UnidentifiedImageError as error:
        raise MediaError("not an image (or its header is damaged)") from error
    except Exception as error:
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        what = "truncated" if "truncated" in text else "cannot be decoded"
        raise MediaError(f"{what}: {' '.join(text.split())[:120]}") from error


class _Clip:
    """An open clip, read once from its beginning, that knows whether its end was cut off."""

    def __init__(self, container, stream):
        self._container, self.stream = container, stream
        self.shown = 0  # frames that the packets read so far promise
        self._times: list[int | None] = []  # of those
        self._cut = False

    def packets(self) -> Iterator[av.Packet]:
        """Yields the packets of the video stream, up to where the file was cut off."""
        read = end = 0
        for packet in self._container.demux():
            end = max(end, (packet.pos or 0) + packet.size)
            if packet.is_corrupt:
                self._cut = True
                return
            if packet.stream is not self.stream or not packet.size:
                continue
            read += 1
            if not packet.is_discard:
                self.shown += 1
                self._times.append(packet.dts if packet.pts is None else packet.pts)
            _check_length(self.shown, self.stream)
            yield packet
        # Fewer packets than the header says is also what an edit list that drops the end looks
        # like; but then the dropped ones still lie in the file, behind the last one read.
        self._cut = read < self.stream.frames and end >= (self._container.size or 0)

    def frames(self) -> Iterator[av.VideoFrame]:
        """Yields the frames in presentation order.

        Raises:
          MediaError: after the last frame that can be had, if more should follow.
        """
        count, size = 0, None
        for packet in itertools.chain(self.packets(), [None]):  # None: what is still inside
            for frame in self.stream.codec_context.decode(packet):
                size = size or (frame.width, frame.height)
                if (frame.width, frame.height) != size:
                    raise MediaError("the frame size changes within the clip")
                if frame.is_corrupt:
                    raise MediaError("damaged: a frame lacks the frames it refers to")
                count += 1
                yield frame
        self.check_whole(count)

    def check_whole(self, count: int) -> None:
        """Raises MediaError if the file was cut off, having given `count` frames."""
        if self._cut:
            promised = self.stream.frames
            what = f"header says {promised} frames, {count} decode" if promised else "cut off"
            raise MediaError(f"truncated: {what}")

    def rate(self) -> float:
        """Frames per second, once all packets are read.

        The header's, which is exact where frames are equally long, unless the frames' times tell
        another story: recordings of a browser or a screen have none, or 1000.

        Raises:
          MediaError: neither says.
        """
        header = float(self.stream.average_rate or 0)
        measured = self._measured_rate()
        agree = measured is None or abs(header / (measured or 1) - 1) < _RATE_TOLERANCE
        if header and (agree or (header < _ABSURD_RATE and not self._even())):
            return header
        rate = measured or header or float(self.stream.guessed_rate or self.stream.base_rate or 0)
        if not rate:
            raise MediaError("neither header nor frames tell the frame rate")
        return rate

    def _even(self) -> bool:
        """Whether the frames' times neither repeat nor jump, as those of files put together do."""
        gaps = np.diff(np.sort(self._times))
        return bool(gaps.min() > 0 and gaps.max() <= 10 * np.median(gaps))

    def _measured_rate(self) -> float | None:
        times = self._times
        if len(times) < _TIMED_FRAMES or None in times or max(times) == min(times):
            return None
        return (len(times) - 1) / float((max(times) - min(times)) * self.stream.time_base)


@contextlib.contextmanager
def _open_clip(media: Path | bytes) -> Iterator[_Clip]:
    """Opens a clip for one thread, its size within the limits."""
    if isinstance(media, Path) and not media.is_file():
        raise MediaError("not a file" if media.exists() else "no such file")
    # 'file:' keeps a path such as 'concat:a|b' from being read as an address.
    source = f"file:{media}" if isinstance(media, Path) else io.BytesIO(media)
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    # Decoders refuse a larger frame before they take memory for it, whatever the container says.
    options["max_pixels"] = str(MAX_CLIP_PIXELS)
    try:
        container = av.open(source, options=options)
    except av.error.PermissionError:
        raise
    except av.error.FFmpegError as error:
        raise MediaError("not a video (or its header is damaged)") from error
    with container:
        stream = next(iter(container.streams.video), None)
        if stream is None or stream.codec_context is None:
            raise MediaError("no decodable video stream")
        _check_size(stream.codec_context.height, stream.codec_context.width, MAX_CLIP_PIXELS)
        _check_length(stream.frames, stream)
        stream.codec_context.options = {"max_pixels": options["max_pixels"]}
        # One thread: the workers around us already use every core, one clip each.
        stream.codec_context.thread_count = 1
        yield _Clip(container, stream)


@contextlib.contextmanager
def _open_still(media: Path | bytes, formats: Sequence[str] = _STILLS) -> Iterator[Image.Image]:
    if isinstance(media, Path) and not media.is_file():
        raise MediaError("not a file" if media.exists() else "no such file")
    # Not Pillow's own open file: it maps an uncompressed one to memory, and takes the sides of a
    # TIFF file that is to be turned by a quarter for each other.
    file = media.open("rb") if isinstance(media, Path) else io.BytesIO(media)
    with file, Image.open(file, formats=formats) as image:
        _check_size(image.height, image.width, MAX_PIXELS)
        if image.mode in ("I", "F"):
            raise MediaError(
                "pixels of 32 bits (integers or floats), whose range is unknown; convert the file "
                "to 8 or 16 bits"
            )
        yield image


def _check_declared_size(path: Path) -> None:
    if not path.is_file():
        return  # `_open_clip` says it better
    with path.open("rb") as file:
        declared = declared_size(file)
        size = file.seek(0, io.SEEK_END)
    if declared is not None and size < declared:
        raise MediaError(f"truncated: {size} of {declared} bytes")


def _check_size(height: int, width: int, pixels: int) -> None:
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE) or height * width > pixels:
        raise MediaError(
            f"frame size {width}x{height} is beyond {MAX_SIDE} a side or {pixels // 10**6} Mpix"
        )


def _check_length(frames: int, stream: av.VideoStream) -> None:
    if frames > MAX_FRAMES:
        raise MediaError(f"{frames} frames, more than {MAX_FRAMES}")
    size = stream.codec_context.height * stream.codec_context.width
    if frames * size > MAX_DECODED_PIXELS:
        raise MediaError(
            f"{frames} frames of {size / 1e6:.1f} Mpix, more than "
            f"{MAX_DECODED_PIXELS // 10**9} Gpix in all"
        )


def _to_array(frame: av.VideoFrame, short_side: int | None) -> np.ndarray:
    width, height = frame.width, frame.height
    if short_side is not None:
        width, height = _scaled(width, height, short_side)
    array = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC")
    return np.ascontiguousarray(_upright(array, frame))


def _upright(array: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Turns and mirrors a frame as its display matrix says."""
    side = frame.side_data.get(SideData.DISPLAYMATRIX)
    if side is None:
        return array
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(side))
    if a * d - b * c < 0:  # front cameras; what is left after the flip is a rotation
        array = array[::-1]
    return np.rot90(array, round(-math.degrees(math.atan2(b, a)) / 90))


def _scaled(width: int, height: int, short_side: int) -> tuple[int, int]:
    """(width, height) with the shorter side at most `short_side`, the aspect kept."""
    scale = min(1.0, short_side / min(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))
