"""How long a clip's file must be by what its container says, so that a cut one is noticed.

The demuxer reads a file that ends early as a shorter clip. MP4 lists every frame in its header,
which `media` compares; these other containers say at least how many bytes follow. MPEG-TS, FLV and
GIF say nothing.
"""

import io
import struct
from typing import BinaryIO

_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


def declared_size(file: BinaryIO) -> int | None:
    """Bytes that the file must have at least; None where its container does not say.

    Matroska and WebM: the end of the segment, unless it was written live. AVI: of its RIFF chunks.
    Fragmented MP4: of the last box that begins in the file.
    """
    head = file.read(12)
    file.seek(0)
    if head.startswith(_EBML):
        return _matroska(file)
    if head.startswith(b"RIFF") and head.endswith(b"AVI "):
        return _avi(file)
    if head[4:8] in (b"ftyp", b"styp"):
        return _fragmented_mp4(file)
    return None


def _matroska(file: BinaryIO) -> int | None:
    while len(name := file.read(4)) == 4:
        size = _ebml_size(file)
        if size is None or name not in (_EBML, _SEGMENT):
            return None
        end = file.tell() + size
        if name == _SEGMENT:
            return end
        file.seek(end)
    return None


def _ebml_size(file: BinaryIO) -> int | None:
    """A size of 1 to 8 bytes, whose first bit set says how many; all ones: not known."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    length = 9 - first[0].bit_length()
    value = int.from_bytes(first + file.read(length - 1)) & ((1 << 7 * length) - 1)
    return None if value == (1 << 7 * length) - 1 else value


def _avi(file: BinaryIO) -> int | None:
    """A long file has several RIFF chunks. One that was never finished has no size."""
    end = 0
    while len(head := file.read(8)) == 8 and head.startswith(b"RIFF"):
        size = int.from_bytes(head[4:], "little")
        if size in (0, 0xFFFFFFFF):
            return None
        end = file.seek(size + size % 2, io.SEEK_CUR)
    # Some encoders count these eight bytes of the head too.
    return end - 8 if end else None


def _fragmented_mp4(file: BinaryIO) -> int | None:
    """Of a file that has fragments: the header of another one counts its frames."""
    whole = file.seek(0, io.SEEK_END)
    fragments, end = False, 0
    while end < whole:
        file.seek(end)
        size, kind = struct.unpack(">I4s", file.read(8).ljust(8, b"\0"))
        if size == 1:
            size = int.from_bytes(file.read(8))
        if size < 8 or not kind.isalnum():  # to the end of the file, or no box any more
            break
        fragments |= kind == b"moof"
        end += size
    return end if fragments else None
