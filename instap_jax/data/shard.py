"""One shard of packed samples: what a worker process of `instap pack` does. No JAX.

A shard is a pure function of its task, so that packing gives the same bytes whatever the number of
processes, and a run that was stopped continues where it was.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from instap_jax.data import media, records, schema
from instap_jax.errors import UserError
from instap_jax.types import Kind, Record, Sample

# group_size 1: every record can be read alone. Uncompressed: JPEG does not shrink further.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_MAX_RECORD_BYTES = 1 << 30  # a protocol buffer ends at 2 GiB; a loader holds many records

# Instances times stored frames: 64 MB of boxes. Few lines of text can ask for far more.
_MAX_BOXES = 4_000_000
_HELD_FRAMES = 512  # decoded frames of a clip held at once: 180 MB at 256x456


class Reject(Exception):
    """One sample cannot be packed; the text is the reason."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How samples are stored.

    Attributes:
      rate: sampling grid in frames per second, never above the native rate; None: every frame.
      short_side: pixels; longer short sides are scaled down to it, shorter ones kept.
      quality: JPEG quality, 1 to 95.
      encoding: 'jpeg' (frames of the grid as JPEG files) or 'mp4' (the clip's file as it is).
        An image is always stored as JPEG.
    """

    rate: float | None = 4.0
    short_side: int = 256
    quality: int = 90
    encoding: str = "jpeg"

    def __post_init__(self):
        """Raises UserError where an option is out of its range."""
        if self.rate is not None and not self.rate > 0:
            raise UserError(f"rate must be above 0 frames per second, not {self.rate}")
        if self.short_side < 16:
            raise UserError(f"short_side must be at least 16 pixels, not {self.short_side}")
        if not 1 <= self.quality <= 95:
            raise UserError(f"quality must be from 1 to 95 (JPEG), not {self.quality}")
        if self.encoding not in ("jpeg", "mp4"):
            raise UserError(f"encoding must be 'jpeg' or 'mp4', not {self.encoding!r}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One shard to write.

    Attributes:
      annotations: the annotation file.
      media_root: directory of the media.
      lines: int64 [m, 2], (line number from 1, byte offset) of every sample, in record order.
      path: the shard file.
      report: the JSON file that marks the shard as finished (see `write_shard`).
      pack: hash of what the set is packed from (`records.place_of`).
    """

    annotations: str
    media_root: str
    options: Options
    kind: Kind
    split: str
    lines: np.ndarray
    path: str
    report: str
    pack: str


def sampling_grid(frames: int, fps: float, rate: float | None) -> np.ndarray:
    """Frame indices of a clip at `rate` frames per second: int32 [f], f >= 1, from frame 0.

    Frame j of the grid is the one on screen at time j / rate of a clip whose frames are equally
    long; of another, `fps` is the mean. Never above the native rate: then, or where `rate` is None,
    every frame is taken. Frame 0 is always in, however short the clip.
    """
    step = 1.0 if rate is None else max(1.0, fps / rate)
    # The margin: 1001 steps of 2.4975 are 2500 frames, and floating point says a little less.
    index = np.floor(np.arange(int(frames / step) + 1) * step + 1e-6).astype(np.int32)
    return index[index < frames]


def make_record(sample: Sample, media_root: str, options: Options) -> Record:
    """Reads a sample's media and returns it as it is stored.

    Raises:
      Reject: its annotation does not fit its media, or it is too large.
      MediaError: its media cannot be read.
      UserError: its path leads out of the media root.
    """
    path = media.confined(Path(media_root), sample.media)
    info = media.probe(path, sample.kind)
    if reasons := schema.check_sample(sample, info):
        raise Reject("; ".join(reasons))
    index = sampling_grid(info.frames, info.fps, options.rate)
    if len(sample.instances) * len(index) > _MAX_BOXES:
        raise Reject(
            f"{len(sample.instances)} instances on {len(index)} frames: more than {_MAX_BOXES} "
            "boxes; lower the rate or cut it"
        )
    encoding = "jpeg" if sample.kind is Kind.IMAGE else options.encoding
    files, size = _encode(path, sample.kind, encoding, index, options)
    boxes, present = schema.boxes_on_grid(sample, index, info)
    return Record(
        id=sample.id,
        media=sample.media,
        kind=sample.kind,
        source=sample.source,
        captions=sample.captions,
        encoding=encoding,
        media_bytes=files,
        frame_index=index,
        fps=info.fps,
        size=size,
        instance_ids=tuple(i.id for i in sample.instances),
        categories=tuple(i.category for i in sample.instances),
        instance_captions=tuple(i.captions for i in sample.instances),
        boxes=boxes,
        present=present,
        extra=sample.extra,
        instance_extra=tuple(i.extra for i in sample.instances),
    )


def _encode(
    path: Path, kind: Kind, encoding: str, index: np.ndarray, options: Options
) -> tuple[list[bytes], tuple[int, int]]:
    """Returns the media as stored, and (height, width) of its frames."""
    if encoding == "mp4":
        if path.stat().st_size > _MAX_RECORD_BYTES:
            raise Reject(f"file is larger than {_MAX_RECORD_BYTES >> 20} MiB; cut the clip")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise Reject(f"cannot be read: {error.strerror}") from error
        # Decoded once, from the bytes that are stored: training must not be the first to learn
        # that a clip is damaged.
        last = media.read_frames(data, index[-1:])[0]
        return [data], last.shape[:2]
    files, size, total = [], (0, 0), 0
    for frame in _frames(path, kind, index, options.short_side):
        files.append(media.encode_jpeg(frame, options.quality))
        size = frame.shape[:2]
        total += len(files[-1])
        if total > _MAX_RECORD_BYTES:
            raise Reject(
                f"frames take more than {_MAX_RECORD_BYTES >> 20} MiB; lower the rate or cut it"
            )
    return files, size


def _frames(path: Path, kind: Kind, index: np.ndarray, short_side: int) -> Iterator[np.ndarray]:
    if kind is Kind.IMAGE:
        yield media.read_image(path, short_side)
    elif len(index) <= _HELD_FRAMES:
        yield from media.read_frames(path, index, short_side)
    else:  # one frame in memory at a time; slower, as it converts those between the wanted ones
        wanted = iter([*index.tolist(), -1])
        following = next(wanted)
        for number, frame in enumerate(media.iterate_frames(path, short_side)):
            if number == following:
                yield frame
                following = next(wanted)
        if following >= 0:
            raise media.MediaError(f"truncated: frame {following} is past the end")


def write_shard(task: Task, tick: Callable[[int], None]) -> dict[str, Any]:
    """Packs the samples of one shard; rejected ones are left out and reported.

    Both files are written aside and renamed, the shard first: where the report exists the shard
    is complete.

    Args:
      tick: called with the line number before every sample and with 0 at the end; what it raises
        ends the work, leaving nothing.

    Returns:
      The report: {file, kind, split, samples, instances, frames, bytes, sha256, rejects: [{id,
      line, reason}]}.

    Raises:
      UserError: a fault of the annotation file.
      OSError: the shard cannot be written.
    """
    report = {"file": f"{task.kind}/{os.path.basename(task.path)}"}
    report |= {"kind": task.kind, "split": task.split, "samples": 0, "instances": 0, "frames": 0}
    report["rejects"] = []
    aside = task.path + ".tmp"
    try:
        with _writer(aside) as write:
            for sample in _samples(task):
                tick(sample.line)
                try:
                    record = make_record(sample, task.media_root, task.options)
                except (Reject, media.MediaError, schema.SampleFault) as error:
                    reject = {"id": sample.id, "line": sample.line, "reason": str(error)}
                    report["rejects"].append(reject)
                except UserError as error:
                    raise UserError(f"{task.annotations}:{sample.line}: {error}") from error
                else:
                    place = records.place_of(task.pack, report["file"], report["samples"])
                    write(records.serialize(dataclasses.replace(record, place=place)))
                    report["samples"] += 1
                    report["instances"] += len(record.instance_ids)
                    report["frames"] += len(record.frame_index)
        tick(0)
        _check_written(aside, report["samples"])
        report["bytes"] = os.path.getsize(aside)
        with open(aside, "rb") as file:
            report["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        os.replace(aside, task.path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(aside)
    write_json(task.report, report)
    return report


def write_json(path: str, content: Any) -> None:
    """Writes a JSON file aside and renames it."""
    aside = path + ".tmp"
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
    os.replace(aside, path)


def _samples(task: Task) -> Iterator[Sample]:
    with open(task.annotations, "rb") as file:
        for line, offset in task.lines.tolist():
            file.seek(offset)
            yield schema.parse_line(file.readline(), f"{task.annotations}:{line}", line)


@contextlib.contextmanager
def _writer(path: str) -> Iterator[Callable[[bytes], None]]:
    """Yields the function that appends a record; the writer's errors become OSError."""

    def checked(call: Callable, *args) -> None:
        try:
            call(*args)
        except RuntimeError as error:  # its text: '... No space left on device; writing FILE; ...'
            raise OSError(f"cannot write {path}: {str(error).split(';')[0]}") from error

    open(path, "wb").close()  # raises a plain OSError where the writer's would be opaque
    writer = array_record_module.ArrayRecordWriter(path, _WRITER_OPTIONS)
    try:
        yield lambda data: checked(writer.write, data)
    except BaseException:
        with contextlib.suppress(RuntimeError):
            writer.close()
        raise
    checked(writer.close)


def _check_written(path: str, count: int) -> None:
    reader = array_record_module.ArrayRecordReader(path)
    try:
        if reader.num_records() != count:
            raise OSError(f"wrote {count} records to {path}, found {reader.num_records()}")
    finally:
        reader.close()
