"""Kinetics: clips with one label each, from either of two files.

* The lists of UMT and VideoMAE, without a header: `path,label` or `path label` a line, the label
  being a name or, with `--classes`, a number: the place in that file, from 0.
* The official CSV, with the header label,youtube_id,time_start,time_end,...: its clips are named
  `ID_START_END.mp4`, the times as six digits.

The caption is 'A video of LABEL.': samples need one, though stage 'classify' does not read it.
"""

import csv
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from instap_jax.data.converters.reading import Request, relative_path
from instap_jax.errors import UserError

_OFFICIAL = ("label", "youtube_id", "time_start", "time_end")


def convert(request: Request) -> Iterator[dict[str, Any]]:
    """Yields one video sample for each line, in order."""
    lines = _lines(request.input)
    classes = None
    if request.classes is not None:
        classes = [line.strip() for line in _lines(request.classes) if line.strip()]
    official = tuple(lines[0].lower().split(",")[:4]) == _OFFICIAL if lines else False
    rows = _official(lines, request) if official else _listed(lines, request)
    for where, path, label in rows:
        name = _class_name(label, classes, where)
        yield {
            "id": str(PurePosixPath(path).with_suffix("")),
            "media": path,
            "kind": "video",
            "source": "kinetics",
            "caption": f"A video of {name}.",
            "label": name,
        }


def _listed(lines: list[str], request: Request) -> Iterator[tuple[str, str, str]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{request.input}:{number}"
        # A label of several words cannot be told from a path with spaces, but by a comma.
        parts = line.rsplit(",", 1) if "," in line else line.split()
        if len(parts) != 2:
            raise UserError(
                f"{where}: expected 'path,label', or 'path label' without further spaces, got "
                f"{line[:60]!r}"
            )
        yield where, relative_path(parts[0].strip(), request, where), parts[1].strip()


def _official(lines: list[str], request: Request) -> Iterator[tuple[str, str, str]]:
    for number, row in enumerate(csv.DictReader(lines), start=2):
        where = f"{request.input}:{number}"
        try:
            start, end = int(float(row["time_start"])), int(float(row["time_end"]))
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: time_start and time_end must be seconds") from error
        yield where, f"{row['youtube_id']}_{start:06d}_{end:06d}.mp4", row["label"] or ""


def _class_name(label: str, classes: list[str] | None, where: str) -> str:
    if not label:
        raise UserError(f"{where}: no label")
    if classes is None:
        if label.isdigit():
            raise UserError(f"{where}: label {label} is a number; name the classes with --classes")
        return label
    if label.isdigit() and int(label) < len(classes):
        return classes[int(label)]
    if label in classes:
        return label
    raise UserError(f"{where}: label {label!r} is none of the {len(classes)} classes")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from error
