"""`instap pack`: annotations and media -> sharded ArrayRecord (docs/packing.md)."""

import sys

from absl import flags

from instap_jax.data import builder
from instap_jax.data.shard import Options

_SHOWN_REJECTS = 20


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `instap pack`."""
    default = Options()
    flags.DEFINE_string("annotations", None, "Annotation file (JSON Lines).", flag_values=values)
    flags.DEFINE_string("media", None, "Directory of the media files.", flag_values=values)
    flags.DEFINE_string("out", None, "Directory to make; it must not exist.", flag_values=values)
    flags.DEFINE_float(
        "rate",
        default.rate,
        "Frames stored per second of a clip, never more than it has; 0: every frame.",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "short_side",
        default.short_side,
        "Pixels: a longer short side of a frame is scaled down to this.",
        flag_values=values,
    )
    flags.DEFINE_integer("quality", default.quality, "JPEG quality, 1-95.", flag_values=values)
    flags.DEFINE_enum(
        "encoding",
        default.encoding,
        ["jpeg", "mp4"],
        "How clips are stored: frames as JPEG files, or the clip's file as it is.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "processes", 0, "Worker processes; 0: one per core.", lower_bound=0, flag_values=values
    )
    flags.DEFINE_integer(
        "shard_size",
        None,
        "Samples of a shard; default: 256 clips or 4,096 images.",
        flag_values=values,
    )
    flags.DEFINE_float(
        "max_reject_rate",
        0.01,
        "Share of the samples that may be unusable before packing fails.",
        lower_bound=0,
        upper_bound=1,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "seed", 0, "Seed of the order of the records.", lower_bound=0, flag_values=values
    )
    flags.mark_flags_as_required(["annotations", "media", "out"], flag_values=values)


def run(values: flags.FlagValues) -> None:
    """Packs, and prints what is in the new directory."""
    options = Options(
        rate=values.rate or None,
        short_side=values.short_side,
        quality=values.quality,
        encoding=values.encoding,
    )
    try:
        manifest = builder.pack(
            values.annotations,
            values.media,
            values.out,
            options=options,
            shard_size=values.shard_size,
            processes=values.processes,
            max_reject_rate=values.max_reject_rate,
            seed=values.seed,
        )
    except builder.TooManyRejects as error:
        for reject in error.rejects[:_SHOWN_REJECTS]:
            print(f"line {reject['line']}: {reject['id']}: {reject['reason']}", file=sys.stderr)
        if len(error.rejects) > _SHOWN_REJECTS:
            print(f"... and {len(error.rejects) - _SHOWN_REJECTS} more", file=sys.stderr)
        raise
    _print_table(manifest)
    rejected = manifest["rejects"]
    if rejected["total"]:
        print(f"rejected {rejected['total']} samples (rejects.jsonl):")
        for reason, count in rejected["reasons"].items():
            print(f"  {count:>7}  {reason}")


def _print_table(manifest: dict) -> None:
    print(f"{'kind':<6} {'split':<16} {'samples':>9} {'instances':>10} {'frames':>10} {'MB':>10}")
    for kind, splits in manifest["counts"].items():
        for split, n in splits.items():
            print(
                f"{kind:<6} {split:<16} {n['samples']:>9} {n['instances']:>10} {n['frames']:>10} "
                f"{n['bytes'] / 1e6:>10.1f}"
            )
