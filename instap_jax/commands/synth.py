"""`instap synth`: renders the embedded set (docs/embedded_set.md)."""

import os
from pathlib import Path

from absl import flags

from instap_jax.data.synthetic import generate
from instap_jax.data.synthetic.samples import Format
from instap_jax.progress import Progress


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("out", None, "Directory to make.", required=True, flag_values=values)
    form = Format()
    for name, default, text in (
        ("seed", 0, "The same seed gives the same bytes."),
        ("train_videos", 2000, "Clips of the split train."),
        ("train_images", 2000, "Stills of the split train."),
        ("suite_size", 200, "Samples of each of img_1k, img_zero_1k, video_1k (full size: 1000)."),
        ("val_size", 100, "Samples of each of val_video and val_img."),
        ("width", form.width, "Pixels; even."),
        ("height", form.height, "Pixels; even."),
        ("frames", form.frames, "Frames of a clip."),
        ("fps", form.fps, "Frames per second of a clip."),
        ("processes", os.cpu_count() or 1, "Processes that render and encode."),
    ):
        flags.DEFINE_integer(name, default, text, flag_values=values)


def run(values: flags.FlagValues) -> None:
    parts = generate.suites(
        train_videos=values.train_videos,
        train_images=values.train_images,
        suite_size=values.suite_size,
        val_size=values.val_size,
    )
    form = Format(width=values.width, height=values.height, frames=values.frames, fps=values.fps)
    generate.check_format(form)
    out = Path(values.out)
    with Progress("synth", sum(suite.count for suite in parts)) as progress:
        generate.generate(
            out, parts, form, seed=values.seed, processes=values.processes,
            on_sample=progress.update,
        )  # fmt: skip
    print(f"{out}: annotations.jsonl, media/")
    for suite in parts:
        print(f"  {suite.split:<12} {suite.kind:<6} {suite.count}")
