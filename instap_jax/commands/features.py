"""`instap features`: embeddings of a folder of media, or of an annotation file, from a run."""

import os
import sys
from pathlib import Path

from absl import flags

from instap_jax.data.media import confined
from instap_jax.data.schema import read_annotations
from instap_jax.errors import UserError

_SHOWN_FAULTS = 20


def define_flags(values: flags.FlagValues) -> None:
    def text(name: str, help_text: str, *, required: bool = False) -> None:
        flags.DEFINE_string(name, None, help_text, required=required, flag_values=values)

    def count(name: str, default: int | None, help_text: str, *, least: int = 1) -> None:
        flags.DEFINE_integer(name, default, help_text, lower_bound=least, flag_values=values)

    text("workdir", "Workdir of a run of stage 'align'.", required=True)
    text("media", "Directory of the media.", required=True)
    text("annotations", "Annotation file: also texts and instances. Default: all of --media.")
    text("split", "Of the annotation file, only samples of this split.")
    text("out", "Directory to be made.", required=True)
    count("frames", None, "T of a video; default: as many as the run was trained on.")
    count("short_side", 256, "Pixels: a longer short side of a frame is scaled down to this.")
    count("batch_size", 32, "Samples computed together, over all devices.")
    count("threads", os.cpu_count() or 1, "Threads that decode.")


def run(values: flags.FlagValues) -> None:
    from instap_jax import inference
    from instap_jax.extract import Reading, extract, find_media

    root, split = Path(values.media), values.split and values.split.replace("-", "_")
    if values.annotations is None:
        if split is not None:
            raise UserError("--split is of an annotation file: give --annotations")
        samples = find_media(root)
    else:
        samples = [s for s in read_annotations(values.annotations) if split in (None, s.split)]
        if not samples:
            raise UserError(f"{values.annotations}: no sample of --split={split}")
    for sample in samples:  # now, not when all before it has been embedded
        confined(root, sample.media)
    model = inference.load(values.workdir, batch_size=values.batch_size)
    reading = Reading(
        frames=values.frames or model.config.data.frames,
        short_side=values.short_side,
        threads=values.threads,
    )
    about = {"workdir": values.workdir, "media": values.media}
    about |= {"annotations": values.annotations, "split": split}
    summary = extract(model, samples, root, Path(values.out), reading, about)
    for sample, reason in summary.faults[:_SHOWN_FAULTS]:
        print(f"{sample.media}: {reason}", file=sys.stderr)
    if len(summary.faults) > _SHOWN_FAULTS:
        print(f"... and {len(summary.faults) - _SHOWN_FAULTS} more", file=sys.stderr)
    print(
        f"{values.out}: {summary.samples} samples, {summary.instances} instances; "
        f"{len(summary.faults)} could not be read (faults.jsonl)"
    )
