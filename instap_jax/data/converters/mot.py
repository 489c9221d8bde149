"""MOTChallenge tracks: `--input` one sequence directory, or a directory of them.

A sequence has `gt/gt.txt` and `seqinfo.ini`. Its sample's media is `NAME.mp4`, a clip made of the
sequence's images (docs/annotations.md has the command). Rows whose flag is 0 are the benchmark's
own "ignore" and are left out. Frames and pixels count from 1 there, from 0 here. A frame without a
row of a track means that the object is not in the picture. `--captions` may hold
{sequence name: caption}; otherwise captions are made from the class names.
"""

import collections
import configparser
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from instap_jax.data.converters.reading import (
    Request,
    caption_table,
    categories_caption,
    category_caption,
    clipped,
    gaps,
)
from instap_jax.errors import UserError

# MOT16/17/20, of the official development kit. MOT15 has -1 there: all are pedestrians.
_CLASSES = {
    1: "pedestrian", 2: "person on a vehicle", 3: "car", 4: "bicycle", 5: "motorbike",
    6: "non-motorized vehicle", 7: "static person", 8: "distractor", 9: "occluder",
    10: "occluder on the ground", 11: "full occluder", 12: "reflection", 13: "crowd",
    -1: "pedestrian",
}  # fmt: skip
_NO_ENTITY = (8, 9, 10, 11, 12, 13)


def convert(request: Request) -> Iterator[dict[str, Any]]:
    """Yields one video sample for each sequence, in the order of their names."""
    captions = caption_table(request.captions)
    sequences = sorted(file.parent for file in request.input.glob("*/seqinfo.ini"))
    if (request.input / "seqinfo.ini").is_file():
        sequences = [request.input]
    if not sequences:
        raise UserError(
            f"{request.input}: no sequence here: found no seqinfo.ini, nor */seqinfo.ini"
        )
    for directory in sequences:
        name, size = _sequence(directory / "seqinfo.ini")
        instances = _tracks(directory / "gt" / "gt.txt", size, request)
        texts = captions.get(name)
        if not texts and instances:
            texts = categories_caption("video", (item["category"] for item in instances))
        if not texts:
            request.left_out["sequences without caption and tracks"] += 1
            continue
        yield {
            "id": name,
            "media": f"{name}.mp4",
            "kind": "video",
            "source": "mot",
            "caption": texts,
            "instances": instances,
        }


def _sequence(path: Path) -> tuple[str, tuple[int, int]]:
    """Name and (width, height) of a sequence."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
        section = parser["Sequence"]
        return section["name"], (int(section["imWidth"]), int(section["imHeight"]))
    except (OSError, UnicodeError, configparser.Error, KeyError, ValueError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"{path}: needs [Sequence] name, imWidth, imHeight: {text}") from error


def _tracks(path: Path, size: tuple[int, int], request: Request) -> list[dict[str, Any]]:
    boxes: dict[int, dict[int, list[float]]] = collections.defaultdict(dict)
    classes: dict[int, int] = {}
    for where, row in _rows(path):
        frame, track, flag, label = int(row[0]), int(row[1]), row[6], int(row[7])
        if not flag or label in _NO_ENTITY:
            request.left_out["rows that the benchmark ignores"] += 1
            continue
        if label not in _CLASSES:
            raise UserError(f"{where}: unknown class {label}")
        box = clipped((row[2] - 1, row[3] - 1, row[4], row[5]), *size)
        if box is None:
            request.left_out["boxes without area in the frame"] += 1
            continue
        if frame - 1 in boxes[track]:
            raise UserError(f"{where}: a second box of track {track} in frame {frame}")
        boxes[track][frame - 1] = box
        classes.setdefault(track, label)
    return [
        {
            "id": track,
            "category": _CLASSES[classes[track]],
            "caption": category_caption(_CLASSES[classes[track]]),
            "boxes": [[frame, *boxes[track][frame]] for frame in sorted(boxes[track])],
            "absent": gaps(sorted(boxes[track])),
        }
        for track in sorted(classes)
    ]


def _rows(path: Path) -> Iterator[tuple[str, list[float]]]:
    """The rows of gt.txt: frame, track, left, top, width, height, flag, class, more."""
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            for number, row in enumerate(csv.reader(lines), start=1):
                where = f"{path}:{number}"
                try:
                    values = [float(cell) for cell in row]
                    if len(values) == 10:  # MOT15: no class, but a place in the world
                        values[7] = -1.0
                    whole = all(values[column].is_integer() for column in (0, 1, 7))
                except (ValueError, IndexError):
                    whole = False
                if row and not whole:
                    raise UserError(
                        f"{where}: expected frame,id,left,top,width,height,flag,class"
                        f"[,visibility], got {','.join(row)[:60]!r}"
                    )
                if row:
                    yield where, values
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
