"""Numbers of a report: one rule for what cannot be shown or drawn.

A number that is not finite, or absurdly large, is a dash in tables and left out of plots.
"""

from collections.abc import Callable, Iterable
from typing import Any

DASH = "—"
_LARGEST = 1e100  # nothing that is measured comes near it, and sums below it do not overflow


def known(value: Any) -> bool:
    """Whether `value` is a number that can be shown and drawn."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= _LARGEST


def number(value: Any, form: str = ".1f") -> str:
    """A number as text, a dash where it is not `known`.

    Raises:
      TypeError: it is no number.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{value!r} is no number")
    return f"{value:{form}}" if known(value) else DASH


def best(values: Iterable[Any], better: Callable = max) -> Any:
    """The best of the known values; None where there is none."""
    return better((value for value in values if known(value)), default=None)
