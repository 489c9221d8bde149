"""`instap preview`: draws boxes, ids and captions over the frames."""

import sys
from pathlib import Path

from absl import flags

from instap_jax.data import preview
from instap_jax.errors import UserError
from instap_jax.types import Sample


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "annotations", None, "Annotation file (JSON Lines).", required=True, flag_values=values
    )
    flags.DEFINE_string(
        "media", None, "Directory that media paths are relative to.", required=True,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "out", None, "Directory to write; must not exist, or be empty.", required=True,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "count", 16, "Samples to draw, a fixed random choice.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_string("split", "", "Only samples of this split.", flag_values=values)
    flags.DEFINE_enum(
        "format", "png", preview.FORMATS,
        "png: a sheet of frames; mp4: the whole clip (images stay PNG).", flag_values=values,
    )  # fmt: skip


def run(values: flags.FlagValues) -> None:
    if not values.media:
        raise UserError("--media is empty: name the directory that media paths are relative to")

    def skip(sample: Sample, reason: str) -> None:
        print(f"skipped {values.annotations}:{sample.line} {sample.id} {reason}", file=sys.stderr)

    written = preview.write_previews(
        Path(values.annotations),
        Path(values.media),
        Path(values.out),
        count=values.count,
        split=values.split,
        form=values.format,
        on_skip=skip,
    )
    print(f"{written} previews in {values.out}")
