"""Converters from common annotation formats into our schema, one module each.

A converter reads a `Request` and yields JSON objects of the schema (docs/annotations.md), which
`convert_file` checks by parsing them before it writes them.
"""

import collections
import contextlib
import difflib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from instap_jax.data import schema
from instap_jax.data.converters import coco, kinetics, mot, umt, visual_genome, youtube_vis
from instap_jax.data.converters.reading import Request
from instap_jax.errors import UserError

Converter = Callable[[Request], Iterator[dict[str, Any]]]

CONVERTERS: dict[str, Converter] = {
    "coco": coco.convert,
    "visual_genome": visual_genome.convert,
    "mot": mot.convert,
    "youtube_vis": youtube_vis.convert,
    "umt": umt.convert,
    "kinetics": kinetics.convert,
}


def converter(name: str) -> Converter:
    """Returns the converter called `name`.

    Raises:
      UserError: there is none; names the nearest.
    """
    if name not in CONVERTERS:
        near = difflib.get_close_matches(name.lower().replace("-", "_"), CONVERTERS, 1, 0.3)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown --from {name!r}; {hint}known: {', '.join(CONVERTERS)}")
    return CONVERTERS[name]


def convert_file(
    name: str, request: Request, out: Path, on_sample: Callable[[], None]
) -> collections.Counter:
    """Writes what converter `name` makes of `request` to `out`, which appears only when whole.

    Returns:
      Counts of 'samples', 'instances' and 'boxes' written. What was left out is in
      `request.left_out`.

    Raises:
      UserError: a fault of the input, or `out` exists or cannot be written, or nothing was
        converted.
    """
    convert = converter(name)
    if not request.input.exists():
        raise UserError(f"--input {request.input} does not exist")
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        if out.exists():
            raise UserError(f"--out {out} exists; name a new file")
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with aside.open("w", encoding="utf-8") as lines:
            counts = _write(lines, convert(request), request, on_sample)
        if not counts["samples"]:
            raise UserError(f"{request.input}: nothing to convert{_left_out(request)}")
        os.replace(aside, out)
    except OSError as error:  # the converters have turned theirs into UserErrors
        raise UserError(f"--out {out}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()
    return counts


def _write(
    lines, objects: Iterator[dict], request: Request, on_sample: Callable[[], None]
) -> collections.Counter:
    counts: collections.Counter = collections.Counter(samples=0, instances=0, boxes=0)
    unique = schema.UniqueIds()
    for number, value in enumerate(objects, start=1):
        where = f"{request.input}: sample {value['id']!r}"
        raw = json.dumps(value | {"split": request.split}).encode()
        sample = schema.parse_line(raw, where, number)
        if unique.check(sample):
            raise UserError(f"{where}: this id occurs twice")
        lines.write(json.dumps(schema.sample_to_json(sample), ensure_ascii=False) + "\n")
        counts["samples"] += 1
        counts["instances"] += len(sample.instances)
        counts["boxes"] += sum(len(instance.frames) for instance in sample.instances)
        on_sample()
    return counts


def _left_out(request: Request) -> str:
    parts = [f"{count} {what}" for what, count in sorted(request.left_out.items())]
    return f" (left out: {', '.join(parts)})" if parts else ""
