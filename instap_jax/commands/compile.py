"""`instap compile --config=FILE --topology=NAME`: a stage, compiled for TPUs that are not there."""

import json
import os
import sys
from pathlib import Path

from absl import flags

from instap_jax import config_check
from instap_jax.errors import EXIT_USER_ERROR, UserError
from instap_jax.progress import Progress

CACHE = "~/.cache/instap_jax/compile"


def define_flags(values: flags.FlagValues) -> None:
    config_check.define_flag(values)

    def text(name: str, default: str | None, help_text: str, *, required: bool = False) -> None:
        flags.DEFINE_string(name, default, help_text, required=required, flag_values=values)

    text("topology", None, "v5e:16x16, v5litepod-256, v6e-256, v5p-128, ...", required=True)
    flags.DEFINE_integer(
        "slices",
        1,
        "slices of that shape, joined by the network",
        lower_bound=1,
        flag_values=values,
    )
    text("kinds", None, "video, image or both (default: what the corpora or the stage give)")
    text("json", None, "file for the figures")
    text("cache", CACHE, "directory of figures that were made before; '' for none")


def run(values: flags.FlagValues) -> int:
    config = config_check.load(values).config
    if values.slices > 1:
        config.mesh.slices = values.slices
    os.environ["JAX_PLATFORMS"] = "cpu"  # the chips are described, not there
    from instap_jax.aot import compiling, lowering, report, topology

    where = topology.parse(values.topology, values.slices)
    out = _writable(values.json)
    cache = _made(values.cache)
    kinds, figures = _kinds(values.kinds, lowering.kinds(config)), []
    with Progress(f"compile for {where.label}", len(kinds), unit="steps") as progress:
        for kind in kinds:
            with progress.waiting(f"tracing the {kind} step"):
                step = lowering.lower(config, where, kind)
            with progress.waiting(f"compiling the {kind} step"):
                figures.append(compiling.measure(step, where, cache))
            progress.update()
    print(report.table(where, figures))
    if out:
        aside = out.with_suffix(".partial")
        aside.write_text(json.dumps(report.as_json(where, figures), indent=1))
        os.replace(aside, out)
    too_large = [one for one in figures if not one.fits]
    for one in too_large:
        print(f"instap compile: {report.advice(config, one)}", file=sys.stderr)
    return EXIT_USER_ERROR if too_large else 0


def _kinds(text: str | None, default: tuple) -> tuple:
    from instap_jax.types import Kind

    try:
        return tuple(Kind(part.strip()) for part in text.split(",")) if text else default
    except ValueError as error:
        raise UserError(f"--kinds={text}: {error}; choose from {', '.join(Kind)}") from error


def _made(directory: str) -> Path | None:
    if not directory:
        return None
    path = Path(directory).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--cache={directory}: {error.strerror}") from error
    return path


def _writable(path: str | None) -> Path | None:
    """Found out before minutes of compiling."""
    if path is None:
        return None
    out = Path(path)
    if out.is_dir():
        raise UserError(f"--json={path} is a directory")
    if not out.parent.is_dir():
        raise UserError(f"--json={path}: no such directory")
    return out
