"""Files that ask for more than a machine has: each must be refused, fast and in little memory.

  python benchmarks/bombs.py

Every file is read in a process of its own, by what `instap pack` and the loader call. Printed are
the reason, the seconds, and how much more memory the process had at its peak than before.
"""

import json
import multiprocessing
import os
import re
import struct
import sys
import tempfile
import time
import zlib
from pathlib import Path

import av
import numpy as np
from PIL import Image

from instap_jax.data import media, records, schema
from instap_jax.data.shard import Options, Reject, make_record
from instap_jax.errors import UserError
from instap_jax.types import Kind, Record

# name: (reason to expect; None: it is within the limits), most MB of memory
BOMBS = {
    "png_100000x100000_header": ("exceeds limit", 50),
    "png_16384x6103_whole": (None, 1300),
    "png_20000x20000_whole": ("exceeds limit", 50),
    "gif_65535x65535": ("exceeds limit", 50),
    "jpeg_65500x65500_header": ("exceeds limit", 50),
    "mp4_12288x8192": ("frame size 12288x8192 is beyond", 150),
    "mp4_12288x8192_says_64x64": ("frame size 12288x8192 is beyond", 150),
    "mp4_64x64_says_65535x65535": (None, 150),
    "mp4_says_a_thousand_million_frames": ("not a video", 50),
    "mp4_8192x4320": (None, 400),
    "gif_clip_of_a_million_frames": ("frames", 150),
    "fifo": ("not a file", 50),
    "link_out_of_the_root": ("leads out of the media root", 50),
    "record_that_inflates_to_a_gigabyte": ("boxes of shape", 50),
    "annotation_line_of_a_gigabyte": ("longer than 64 MiB", 150),
    "instances_times_frames": ("more than 4000000 boxes", 150),
}
MOST_SECONDS = 60.0


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        return 0 if check(Path(scratch)) else 1


def check(root: Path) -> bool:
    """Makes the files below `root` and reads each; True if all went as expected."""
    root.mkdir(parents=True, exist_ok=True)
    print(f"\n{'file':38}{'bytes':>10}{'seconds':>9}{'MB':>7}  reason")
    fine = True
    for name, (reason, memory) in BOMBS.items():
        path = make(root, name)
        size = os.lstat(path).st_size
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as fresh:
            found, seconds, more = fresh.apply(read, (root, path.name, name))
        right = (found is None) if reason is None else (reason in (found or ""))
        right &= more <= memory and seconds <= MOST_SECONDS
        fine &= right
        mark = "" if right else f"   EXPECTED {reason}, at most {memory} MB"
        text = (found or "read").replace(str(root), "ROOT")[:110]
        print(f"{name:38}{size:>10}{seconds:>9.2f}{more:>7.0f}  {text}{mark}", flush=True)
    return fine


def read(root: Path, file: str, name: str) -> tuple[str | None, float, float]:
    """(Reason of the refusal, seconds, MB at the peak above what there was before)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, begun = _peak(), time.perf_counter()
    reason = None
    try:
        _read(root, file, name)
    except (media.MediaError, Reject, UserError, records.CorruptRecordError) as error:
        reason = str(error)
    return reason, time.perf_counter() - begun, _peak() - before


def _peak() -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1e3


def _read(root: Path, file: str, name: str) -> None:
    if name.startswith("annotation"):
        list(schema.read_annotations(root / file))
    elif name.startswith("record"):
        source = records.RecordSource(directory="", split="", kind=Kind.VIDEO, shards=[], pack=None)
        source._ends, source._length = [1], 1
        source._read = lambda *_: (root / file).read_bytes()
        source[0]
    else:
        still = name.startswith(("png", "jpeg", "gif_6"))
        line = {"id": 1, "media": file, "kind": "image" if still else "video", "caption": "A."}
        if name.startswith("instances"):
            boxes = [[0, 1, 1, 9, 9]]
            line["instances"] = [{"id": i, "caption": "B.", "boxes": boxes} for i in range(50_000)]
        sample = schema.parse_line(json.dumps(line).encode(), "line", 1)
        make_record(sample, str(root), Options(rate=None))


# --- the files ------------------------------------------------------------------------------------


def make(root: Path, name: str) -> Path:
    """Writes the file of that name; returns its path."""
    path = root / name
    kind, *rest = name.split("_")
    if kind == "png":
        size = tuple(map(int, rest[0].split("x")))
        _write_png(path, size, whole=rest[-1] == "whole")
    elif kind == "jpeg":
        _write_jpeg_header(path, 65500)
    elif kind == "gif" and rest[0] == "65535x65535":
        Image.new("P", (8, 8)).save(path, "GIF")
        data = bytearray(path.read_bytes())
        data[6:10] = b"\xff\xff\xff\xff"
        path.write_bytes(data)
    elif kind == "gif":
        _write_long_gif(path, media.MAX_FRAMES + 1)
    elif kind in ("mp4", "instances"):
        _write_mp4(path, name)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/dev/zero")
    elif kind == "record":
        path.write_bytes(_inflating_record())
    else:
        with path.open("wb") as file:
            file.truncate(1 << 30)  # a line of NUL bytes, which takes no room on the disk
    return path


def _write_png(path: Path, size: tuple[int, int], *, whole: bool) -> None:
    """A grey picture of one bit a pixel, all black: a thousandth of its size."""
    width, height = size
    rows = zlib.compressobj(9)
    data = b""
    if whole:
        row = bytes(1 + (width + 7) // 8)
        data = b"".join(rows.compress(row) for _ in range(height)) + rows.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    out = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        out += struct.pack(">I", len(body)) + kind + body
        out += struct.pack(">I", zlib.crc32(kind + body))
    path.write_bytes(out)


def _write_jpeg_header(path: Path, side: int) -> None:
    Image.new("RGB", (8, 8)).save(path, "JPEG")
    data = bytearray(path.read_bytes())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", side, side)
    path.write_bytes(data)


def _write_long_gif(path: Path, frames: int) -> None:
    """The same one-pixel picture again and again: 21 bytes a frame."""
    frame = b"\x21\xf9\x04\x00\x01\x00\x00\x00" + b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0)
    frame += b"\x02\x02\x44\x01\x00"
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    path.write_bytes(head + frame * frames + b"\x3b")


def _write_mp4(path: Path, name: str) -> None:
    width, height, frames = 64, 64, 100
    if "12288" in name:
        width, height, frames = 12288, 8192, 2
    elif "8192x4320" in name:
        width, height, frames = 8192, 4320, 3
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        frame = av.VideoFrame(width, height, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        for index in range(frames):
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    data = bytearray(path.read_bytes())
    if "says" in name:
        at = data.index(b"avc1", data.index(b"stsd")) + 28
        if "frames" in name:
            at = data.index(b"stsz") + 12
            data[at : at + 4] = struct.pack(">I", 10**9)
        else:
            said = 64 if name.endswith("64x64") else 65535
            data[at : at + 4] = struct.pack(">HH", said, said)
        path.write_bytes(data)


def _inflating_record() -> bytes:
    record = Record(
        id="a", media="a", kind=Kind.VIDEO, source="", captions=("A.",), encoding="jpeg",
        media_bytes=[b""], frame_index=np.zeros(1, np.int32), fps=1.0, size=(8, 8),
        instance_ids=(), categories=(), instance_captions=(),
        boxes=np.zeros((0, 1, 4), np.float32), present=np.zeros((0, 1), bool),
        extra={}, instance_extra=(),
    )  # fmt: skip
    example = records.tf_example_pb2.Example.FromString(records.serialize(record))
    feature = example.features.feature
    deflate = zlib.compressobj(9)
    zeros = bytes(1 << 20)
    values = b"".join(deflate.compress(zeros) for _ in range(1 << 10)) + deflate.flush()
    feature["boxes/value"].bytes_list.value[0] = values
    feature["boxes/shape"].int64_list.value[:] = [1 << 26, 1, 4]
    return example.SerializeToString()


if __name__ == "__main__":
    sys.exit(main())
