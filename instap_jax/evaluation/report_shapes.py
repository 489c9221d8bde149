"""Shapes of the JSON files that a report reads: what is wrong is named before anything uses it."""

from collections.abc import Callable, Mapping
from typing import Any


def check_fields(found: Any, kinds: Mapping[str, str], *, within: str = "") -> None:
    """Checks the fields of a JSON object; those that are missing are not looked at.

    Args:
      kinds: {field: how the message describes it, a key of `_KINDS`}.
      within: what the object is called in the message; '' for the whole file.

    Raises:
      ValueError: it is no object, or a field is not of its kind.
    """
    if not isinstance(found, dict):
        raise ValueError(f"{within or 'it'} is no object")
    for name, kind in kinds.items():
        if name in found and not _KINDS[kind](found[name]):
            place = f"{name!r} of {within}" if within else repr(name)
            raise ValueError(f"{place} is not {kind}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, float)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def _object_of(inner: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(inner, value.values()))


def _list_of(inner: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(inner, value))


_KINDS: dict[str, Callable[[Any], bool]] = {
    "text": _is_text,
    "text or null": lambda value: value is None or _is_text(value),
    "a whole number": _is_whole,
    "an object": _is_object,
    "an object of texts": _object_of(_is_text),
    "an object of numbers": _object_of(_is_number),
    "an object of whole numbers": _object_of(_is_whole),
    "an object of pairs": _object_of(_is_pair),
    "a list of texts": _list_of(_is_text),
    "a list of objects": _list_of(_is_object),
}
