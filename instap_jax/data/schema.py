"""The annotation schema: JSON Lines, one sample a line (docs/annotations.md is its reference).

Two kinds of fault are kept apart. A fault of the file (not JSON, a wrong type, a media path that
leaves the root) says that the file is not what the user thinks it is: `UserError`, at once. A fault
of one sample (a box outside the frame, an empty caption) is listed and costs only that sample.
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO, NoReturn

import numpy as np

from instap_jax.data.captions import blank
from instap_jax.data.media import MediaInfo
from instap_jax.errors import UserError
from instap_jax.types import Instance, Kind, Sample

MAX_CAPTION_WORDS = 1000
MAX_CAPTION_CHARACTERS = 20_000
MAX_LINE_BYTES = 64 << 20
BOX_FORMATS = ("xyxy_pixels", "xywh_pixels", "xyxy_unit")
# A box may lie outside the frame by this fraction of the side: rounding of the annotation tool.
# It is clipped; further out, box and picture do not belong together.
BOX_TOLERANCE = 0.01

_SAMPLE_KEYS = ("id", "media", "kind", "split", "source", "caption", "box_format", "instances")
_INSTANCE_KEYS = ("id", "category", "caption", "boxes", "absent")
_INT32 = np.iinfo(np.int32)


class SampleFault(Exception):
    """One sample cannot be used; `reason` says why."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def read_annotations(path: Path | str) -> Iterator[Sample]:
    """Parses an annotation file, one line at a time. Blank lines are skipped.

    Raises:
      UserError: a fault of the file, as `FILE:LINE: what`. The check that the file exists and the
        checks of its lines happen as the iterator advances.
    """
    path = Path(path)
    empty = True
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(lines_of(file, path), start=1):
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")  # some editors' byte-order mark
                if raw.strip():
                    empty = False
                    yield parse_line(raw, f"{path}:{number}", number)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if empty:
        raise UserError(f"{path}: empty annotation file: no line holds a sample")


def lines_of(file: BinaryIO, path: Path | str) -> Iterator[bytes]:
    """Yields the lines of an annotation file; none so long that it fills the memory.

    Raises:
      UserError: a line is longer than `MAX_LINE_BYTES`.
    """
    for number in itertools.count(1):
        raw = file.readline(MAX_LINE_BYTES + 1)
        if len(raw) > MAX_LINE_BYTES:
            raise UserError(f"{path}:{number}: the line is longer than {MAX_LINE_BYTES >> 20} MiB")
        if not raw:
            return
        yield raw


def parse_line(raw: bytes, where: str, number: int) -> Sample:
    """Parses one line of an annotation file; `where` begins the message of a UserError."""
    try:
        text = raw.decode("utf-8")
        value = json.loads(text)
        if "\\u" in text:
            value = _whole_characters(value)
    except UnicodeError as error:
        raise UserError(f"{where}: not UTF-8 text: {error.reason}") from error
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        raise UserError(f"{where}: not JSON: {what} at column {error.colno}") from error
    except (RecursionError, ValueError) as error:  # nested too deep; an integer of 5,000 digits
        raise UserError(f"{where}: not JSON that can be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, got {_shown(value)}")
    return _sample(_Object(value, where, ""), number)


def _whole_characters(value: Any) -> Any:
    """Puts U+FFFD for halves of surrogate pairs: JSON can escape them, but they are no characters.

    Whoever cuts a caption in UTF-16 may leave half an emoji, which says nothing anyway.
    """
    text = json.dumps(value, ensure_ascii=False)
    return json.loads(text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"))


def check_sample(sample: Sample, info: MediaInfo) -> list[str]:
    """Returns every fault of a parsed sample, given what its media file holds; [] is none."""
    faults = []
    if (sample.kind is Kind.IMAGE) != (info.fps == 0):
        found = "an image" if info.fps == 0 else "a video"
        faults.append(f"kind is '{sample.kind}' but the media file is {found}")
    faults += _check_captions(sample.captions)
    seen = set()
    for instance in sample.instances:
        name = f"instance {instance.id!r}: "
        if instance.id in seen:
            faults.append(f"duplicate instance id {instance.id!r}")
        seen.add(instance.id)
        checks = (
            _check_captions(instance.captions)
            + _check_frames(instance, info.frames)
            + _check_boxes(instance, sample.unit_boxes, info)
        )
        faults += [name + fault for fault in checks]
    return faults


class UniqueIds:
    """Finds sample ids that occur twice in a file."""

    def __init__(self):
        self._lines: dict[str, int] = {}

    def check(self, sample: Sample) -> str | None:
        """Returns the fault if an earlier sample had this id, else None."""
        first = self._lines.setdefault(sample.id, sample.line)
        return None if first == sample.line else f"duplicate id, first used on line {first}"


def boxes_on_grid(
    sample: Sample, frame_index: np.ndarray, info: MediaInfo
) -> tuple[np.ndarray, np.ndarray]:
    """Puts the boxes of all instances on a grid of frames.

    Between listed frames a box is interpolated linearly. Before the first, after the last and in
    `absent` intervals the instance is not in the picture; there the nearest box is held. One that
    is only seen between two frames of the grid counts as present at the nearest of them, as boxes
    of key frames would otherwise be lost.

    Args:
      frame_index: int32 [f], frame indices in the clip.

    Returns:
      boxes float32 [k, f, 4], x0 y0 x1 y1 as fractions of the frame, clipped to [0, 1], and
      present bool [k, f].

    Raises:
      SampleFault: an instance has no boxes, or its frames do not increase.
    """
    grid = np.asarray(frame_index, np.int64)
    count, length = len(sample.instances), len(grid)
    boxes = np.zeros((count, length, 4), np.float32)
    present = np.zeros((count, length), bool)
    side = (1, 1, 1, 1) if sample.unit_boxes else (info.width, info.height) * 2
    for row, instance in enumerate(sample.instances):
        frames = instance.frames.astype(np.int64)
        if not len(frames) or (np.diff(frames) <= 0).any():
            raise SampleFault(f"instance {instance.id!r}: frames are missing or do not increase")
        query, present[row] = _nearest_visible(instance, grid)
        if length and not present[row].any():
            present[row, np.abs(query - grid).argmin()] = True
        for column in range(4):
            boxes[row, :, column] = np.interp(query, frames, instance.boxes[:, column])
    return np.clip(boxes / np.float32(side), 0, 1, dtype=np.float32), present


def sample_to_json(sample: Sample) -> dict[str, Any]:
    """Returns the JSON object of an annotation line; parsing it gives an equal sample again."""
    return {
        "id": sample.id,
        "media": sample.media,
        "kind": str(sample.kind),
        "split": sample.split,
        "source": sample.source,
        "caption": _one_or_list(sample.captions),
        "box_format": "xyxy_unit" if sample.unit_boxes else "xyxy_pixels",
        "instances": [_instance_to_json(instance) for instance in sample.instances],
        **sample.extra,
    }


def _instance_to_json(instance: Instance) -> dict[str, Any]:
    value = {
        "id": instance.id,
        "category": instance.category,
        "caption": _one_or_list(instance.captions),
        # str gives the shortest decimal that is this float32: 12.3, not 12.300000190734863.
        "boxes": [
            [int(frame), *(float(str(number)) for number in box)]
            for frame, box in zip(instance.frames, np.asarray(instance.boxes, np.float32))
        ],
    }
    if instance.absent:
        value["absent"] = [list(interval) for interval in instance.absent]
    return value | dict(instance.extra)


def _one_or_list(captions: Sequence[str]) -> str | list[str]:
    return captions[0] if len(captions) == 1 else list(captions)


# --- parsing -------------------------------------------------------------------------------------


class _Object:
    """A JSON object and its place, so that every complaint names file, line and key."""

    def __init__(self, value: dict[str, Any], where: str, prefix: str):
        self._value, self._where, self._prefix = value, where, prefix

    def fail(self, key: str, text: str) -> NoReturn:
        raise UserError(f"{self._where}: key '{self._prefix}{key}': {text}")

    def get(self, key: str) -> Any:
        return self._value.get(key)

    def extra(self, known: Sequence[str]) -> dict[str, Any]:
        return {key: value for key, value in self._value.items() if key not in known}

    def text(self, key: str, default: str) -> str:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            self.fail(key, f"expected a string, got {_shown(value)}")
        return value

    def required_text(self, key: str) -> str:
        value = self.text(key, "")
        if not value.strip():
            self.fail(key, "missing or empty")
        return value

    def id(self) -> str:
        value = self.get("id")
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self.required_text("id")

    def texts(self, key: str) -> tuple[str, ...]:
        """A string or a list of strings; blank ones say nothing and are left out."""
        value = self.get(key)
        if value is None:
            return ()
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
            self.fail(key, f"expected a string or a list of strings, got {_shown(value)}")
        return tuple(text for text in values if not blank(text))

    def items(self, key: str) -> list[Any]:
        value = self.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            self.fail(key, f"expected a list, got {_shown(value)}")
        return value

    def children(self, key: str) -> Iterator["_Object"]:
        for index, value in enumerate(self.items(key)):
            if not isinstance(value, dict):
                self.fail(f"{key}[{index}]", f"expected an object, got {_shown(value)}")
            yield _Object(value, self._where, f"{self._prefix}{key}[{index}].")

    def choice(self, key: str, default: str, known: Sequence[str]) -> str:
        value = self.text(key, default)
        if value not in known:
            self.fail(key, f"{_shown(value)} is none of {', '.join(known)}")
        return value

    def integer(self, key: str, value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            self.fail(key, f"expected a frame index, got {_shown(value)}")
        if not _INT32.min <= value <= _INT32.max:
            self.fail(key, f"frame index {_shown(value)} does not fit 32 bits")
        return value


def _sample(line: _Object, number: int) -> Sample:
    box_format = line.choice("box_format", BOX_FORMATS[0], BOX_FORMATS)
    instances = tuple(_instance(item, box_format) for item in line.children("instances"))
    return Sample(
        id=line.id(),
        media=_media(line),
        kind=Kind(line.choice("kind", "", [str(kind) for kind in Kind])),
        split=_split(line),
        source=line.text("source", ""),
        captions=line.texts("caption"),
        unit_boxes=box_format == "xyxy_unit",
        instances=instances,
        line=number,
        extra=line.extra(_SAMPLE_KEYS),
    )


def _media(line: _Object) -> str:
    media = line.required_text("media")
    path = PurePosixPath(media)
    if path.is_absolute() or PureWindowsPath(media).drive:
        line.fail("media", f"{media!r} is absolute; it must be relative to --media")
    if ".." in path.parts:
        line.fail("media", f"{media!r} leads out of the media root ('..')")
    if "\0" in media:
        line.fail("media", "holds a NUL character")
    return media


def _split(line: _Object) -> str:
    split = line.text("split", "train").replace("-", "_")
    if not re.fullmatch("[a-z0-9_]{1,64}", split):
        line.fail("split", f"{split!r}: use up to 64 lower-case letters, digits, '-' and '_' only")
    return split


def _instance(item: _Object, box_format: str) -> Instance:
    rows = [_box_row(item, index, row) for index, row in enumerate(item.items("boxes"))]
    boxes = np.array([row[1:] for row in rows], np.float64).reshape(-1, 4)
    with np.errstate(all="ignore"):  # infinities are for check_sample to report
        if box_format == "xywh_pixels":
            boxes[:, 2:] += boxes[:, :2]
        boxes = boxes.astype(np.float32)
    return Instance(
        id=item.id(),
        category=item.text("category", ""),
        captions=item.texts("caption"),
        frames=np.array([row[0] for row in rows], np.int32),
        boxes=boxes,
        absent=tuple(_interval(item, i, pair) for i, pair in enumerate(item.items("absent"))),
        extra=item.extra(_INSTANCE_KEYS),
    )


def _box_row(item: _Object, index: int, row: Any) -> tuple[int, float, float, float, float]:
    key = f"boxes[{index}]"
    if not isinstance(row, list) or len(row) != 5:
        item.fail(key, f"expected [frame, four numbers], got {_shown(row)}")
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in row[1:]):
        item.fail(key, f"expected four numbers after the frame index, got {_shown(row)}")
    try:
        return item.integer(key, row[0]), *map(float, row[1:])
    except OverflowError:
        item.fail(key, f"a number is too large: {_shown(row)}")


def _interval(item: _Object, index: int, pair: Any) -> tuple[int, int]:
    key = f"absent[{index}]"
    if not isinstance(pair, list) or len(pair) != 2:
        item.fail(key, f"expected [first frame, last frame], got {_shown(pair)}")
    return item.integer(key, pair[0]), item.integer(key, pair[1])


def _shown(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a very large integer"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


# --- checks against the media --------------------------------------------------------------------


def _check_captions(captions: Sequence[str]) -> list[str]:
    if not captions:
        return ["empty caption"]
    words = max(len(text.split()) for text in captions)
    if words > MAX_CAPTION_WORDS:
        return [f"caption of {words} words, more than {MAX_CAPTION_WORDS}"]
    characters = max(map(len, captions))
    if characters > MAX_CAPTION_CHARACTERS:
        return [f"caption of {characters} characters, more than {MAX_CAPTION_CHARACTERS}"]
    return []


def _check_frames(instance: Instance, length: int) -> list[str]:
    faults = []
    frames = instance.frames
    if not len(frames):
        return ["no boxes"]
    if (np.diff(frames.astype(np.int64)) <= 0).any():
        faults.append("frame indices of the boxes do not increase")
    outside = frames[(frames < 0) | (frames >= length)]
    if len(outside):
        faults.append(f"frame index {outside[0]} outside the clip of {length} frames")
    if any(a <= frames[0] and frames[-1] <= b for a, b in _joined(instance.absent)):
        faults.append("absent in all of its frames")
    for first, last in instance.absent:
        if not 0 <= first <= last < length:
            faults.append(
                f"absent interval [{first}, {last}] is reversed or outside the clip of "
                f"{length} frames"
            )
    return faults


def _check_boxes(instance: Instance, unit: bool, info: MediaInfo) -> list[str]:
    """Names the first box of each fault; the clipped box must have an area, too."""
    boxes = instance.boxes.astype(np.float64)
    side = np.array((1, 1) if unit else (info.width, info.height), np.float64)
    low, high = boxes[:, :2], boxes[:, 2:]
    finite = np.isfinite(boxes).all(1)
    area = (high > low).all(1)
    margin = BOX_TOLERANCE * side
    inside = (low >= -margin).all(1) & (high <= side + margin).all(1)
    inside &= (np.minimum(high, side) > np.maximum(low, 0)).all(1)
    faults = []
    for name, bad in (
        ("box with a number that is not finite", ~finite),
        ("box of zero area or with its corners swapped", finite & ~area),
        ("box outside the frame", finite & area & ~inside),
    ):
        rows = np.flatnonzero(bad)
        if len(rows):
            numbers = ", ".join(f"{number:g}" for number in boxes[rows[0]])
            more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
            place = "unit frame" if unit else f"{info.width}x{info.height} frame"
            faults.append(
                f"{name}: x0 y0 x1 y1 = [{numbers}] at frame {instance.frames[rows[0]]} "
                f"of a {place}{more}"
            )
    return faults


# --- trajectories --------------------------------------------------------------------------------


def _joined(absent: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorts the gaps and merges those that touch, so that the frame beside a gap is in none."""
    gaps: list[tuple[int, int]] = []
    for first, last in sorted(absent):
        if gaps and first <= gaps[-1][1] + 1:
            gaps[-1] = (gaps[-1][0], max(gaps[-1][1], last))
        else:
            gaps.append((first, last))
    return gaps


def _nearest_visible(instance: Instance, query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moves every queried frame to the nearest one at which the instance is in the picture.

    Returns the moved frames int64 [f], and bool [f]: which did not have to move.
    """
    begin, end = int(instance.frames[0]), int(instance.frames[-1])
    moved = np.clip(query, begin, end)
    visible = moved == query
    for first, last in _joined(instance.absent):
        before, after = first - 1, last + 1
        inside = (moved >= first) & (moved <= last)
        visible &= ~inside
        backwards = (moved - before <= after - moved) if before >= begin else False
        backwards |= after > end
        moved[inside] = np.broadcast_to(np.where(backwards, before, after), moved.shape)[inside]
    return moved, visible
