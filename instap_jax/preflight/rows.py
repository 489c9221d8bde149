"""Outcomes of checks: one row each, the same rows on every host, put together for one table."""

import dataclasses
import enum
import json
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from instap_jax.errors import UserError

_NAME_WIDTH = 14
_MESSAGE_BYTES = 1 << 16  # of a host's rows, as JSON


class Status(enum.StrEnum):
    """In rising order of weight."""

    PASS = "pass"
    SKIPPED = "-"  # not tried, because of what failed before
    WARN = "warn"
    FAIL = "FAIL"


_WEIGHT = {status: weight for weight, status in enumerate(Status)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One check.

    Attributes:
      found: what was found, in plain words.
      remedy: what to do about it; '' where nothing is to be done.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""


def passed(name: str, found: str) -> Row:
    return Row(name=name, status=Status.PASS, found=found)


def warned(name: str, found: str, remedy: str) -> Row:
    return Row(name=name, status=Status.WARN, found=found, remedy=remedy)


def failed(name: str, found: str, remedy: str = "") -> Row:
    return Row(name=name, status=Status.FAIL, found=found, remedy=remedy)


def skipped(name: str) -> Row:
    return Row(name=name, status=Status.SKIPPED, found="not tried: something above failed")


def attempt(name: str, check: Callable[[], Row]) -> Row:
    """The row of a check that may raise: what it raised is what was found."""
    try:
        return check()
    except UserError as error:  # says what to do in its own words
        return failed(name, " ".join(str(error).split()))
    except Exception as error:  # whatever a broken host makes of it must not end the other checks
        return failed(name, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")


def of_all_hosts(rows: Sequence[Row]) -> list[Row]:
    """The rows of all processes, which must have the same names, put together.

    Every process must call it. The worst outcome of a check counts, and the row says of which
    hosts it is.
    """
    if jax.process_count() == 1:
        return list(rows)
    everyone = gather([dataclasses.asdict(row) for row in rows])
    return [_together([Row(**host[i]) for host in everyone]) for i in range(len(rows))]


def gather(value) -> list:
    """JSON-able values of all processes, by process index."""
    data = json.dumps(value).encode()
    if len(data) > _MESSAGE_BYTES:
        raise ValueError(f"{len(data)} bytes to tell the other hosts")
    buffer = np.full(_MESSAGE_BYTES, ord(" "), np.uint8)
    buffer[: len(data)] = np.frombuffer(data, np.uint8)
    return [json.loads(bytes(row)) for row in multihost_utils.process_allgather(buffer)]


def _together(rows: Sequence[Row]) -> Row:
    row = max(rows, key=lambda row: _WEIGHT[Status(row.status)])
    hosts = [index for index, other in enumerate(rows) if other.status == row.status]
    found = row.found
    if len(hosts) < len(rows):
        others = f" and {len(hosts) - 1} more" if len(hosts) > 1 else ""
        found = f"host {hosts[0]}{others} of {len(rows)}: {found}"
    return dataclasses.replace(row, status=Status(row.status), found=found)


def failing(rows: Sequence[Row]) -> bool:
    return any(row.status == Status.FAIL for row in rows)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of text: a row each, and below those that need it what to do."""
    for row in rows:
        yield f"{row.status:<4}  {row.name:<{_NAME_WIDTH}}  {row.found}"
        if row.remedy:
            yield f"{'':{_NAME_WIDTH + 6}}  -> {row.remedy}"
