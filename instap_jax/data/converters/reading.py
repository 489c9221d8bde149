"""What the converters share: checked JSON fields, clipping, sentences made of category names."""

import collections
import dataclasses
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from instap_jax.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to convert.

    Attributes:
      input: file or directory, as the format has it.
      captions: further captions, or None; what it holds depends on the format.
      media: media root, or None; read only by formats whose annotations lack sizes or names.
      classes: names of the classes, one a line, or None; read only by formats with labels.
      split: split of all samples.
      left_out: counts what could not be converted, by reason; filled as samples are drawn.
    """

    input: Path
    captions: Path | None = None
    media: Path | None = None
    classes: Path | None = None
    split: str = "train"
    left_out: collections.Counter = dataclasses.field(default_factory=collections.Counter)


def load_json(path: Path, kind: type) -> Any:
    """Reads a JSON file whose top level is a `kind` (dict or list). Raises UserError."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON that can be read: {error}") from error
    if not isinstance(value, kind):
        raise UserError(f"{path}: expected a JSON {_name(kind)}, got a {_name(type(value))}")
    return value


def field(value: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Returns value[key], checked. Raises UserError naming `where` and the key."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object, got a {_name(type(value))}")
    if key not in value:
        raise UserError(f"{where}: key {key!r} is missing")
    found = value[key]
    if not isinstance(found, kind) or isinstance(found, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(_name(one) for one in kinds)
        raise UserError(f"{where}: key {key!r}: expected a {wanted}, got a {_name(type(found))}")
    return found


def numbers(values: Any, count: int, where: str) -> list[float]:
    """Checks a list of `count` numbers. Raises UserError."""
    good = isinstance(values, list) and len(values) == count
    if not good or not all(type(x) in (int, float) for x in values):
        raise UserError(f"{where}: expected a list of {count} numbers, got {str(values)[:60]}")
    return [float(x) for x in values]


def clipped(xywh: Sequence[float], width: float | None, height: float | None) -> list[float] | None:
    """x y w h -> x0 y0 x1 y1 inside the frame; None if nothing is left of it.

    Annotators of tracks draw the whole object, also where the frame cuts it. A size of None
    leaves the box as it is.
    """
    x, y, w, h = xywh
    x1, y1 = x + w, y + h
    if width is not None and height is not None:
        x, y, x1, y1 = max(x, 0.0), max(y, 0.0), min(x1, float(width)), min(y1, float(height))
    return [x, y, x1, y1] if x1 > x and y1 > y else None


def gaps(frames: Sequence[int]) -> list[list[int]]:
    """Closed intervals between listed frames; for formats that list every visible frame."""
    return [[a + 1, b - 1] for a, b in itertools.pairwise(frames) if b > a + 1]


def category_caption(name: str) -> str:
    """An instance caption where the format has only a category: 'A dog.', 'An apple.', 'Skis.'"""
    plural = name.endswith("s") and not name.endswith(("ss", "us"))
    if plural or not name:
        return f"{name[:1].upper()}{name[1:]}."
    return f"{'An' if name[0].lower() in 'aeiou' else 'A'} {name}."


def categories_caption(kind: str, names: Iterable[str]) -> str:
    """A global caption where the format has none: 'This video shows person (3) and car (1).'"""
    counts = [f"{name} ({count})" for name, count in collections.Counter(names).most_common()]
    listed = ", ".join(counts[:-1]) + " and " + counts[-1] if len(counts) > 1 else counts[0]
    return f"This {kind} shows {listed}."


def caption_table(path: Path | None) -> dict[str, Any]:
    """Reads `--captions` of the formats without global captions: {sample id: text or texts}."""
    return {} if path is None else load_json(path, dict)


def relative_path(path: str, request: Request, where: str) -> str:
    """A media path relative to the media root; an absolute one is cut off at `--media`."""
    if not PurePosixPath(path).is_absolute():
        return path
    if request.media is None:
        raise UserError(f"{where}: path {path!r} is absolute; give its root with --media")
    root = PurePosixPath(request.media.absolute())
    if not PurePosixPath(path).is_relative_to(root):
        raise UserError(f"{where}: path {path!r} is not under --media {root}")
    return str(PurePosixPath(path).relative_to(root))


def _name(kind: type) -> str:
    names = {dict: "object", list: "list", str: "string", int: "whole number", float: "number"}
    return names.get(kind, "null" if kind is type(None) else kind.__name__)
