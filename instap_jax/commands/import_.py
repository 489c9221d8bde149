"""`instap import`: turns other annotation formats into ours."""

from pathlib import Path

from absl import flags

from instap_jax.data import converters
from instap_jax.data.converters.reading import Request
from instap_jax.progress import Progress


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "from", None, f"Format: {', '.join(converters.CONVERTERS)}.", required=True,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "input", None, "File or directory, as the format has it.", required=True,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "captions", None,
        "coco: the captions file. visual_genome, mot, youtube_vis: JSON {sample id: caption}.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "media", None,
        "Media root. visual_genome: find and measure the images; umt, kinetics: cut off absolute "
        "paths.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "classes", None, "kinetics: names of the classes, one a line, where labels are numbers.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "out", None, "Annotation file to write; must not exist.", required=True, flag_values=values
    )
    flags.DEFINE_string("split", "train", "Split of all samples.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    request = Request(
        input=Path(values.input),
        captions=Path(values.captions) if values.captions else None,
        media=Path(values.media) if values.media else None,
        classes=Path(values.classes) if values.classes else None,
        split=values.split,
    )
    with Progress("import") as progress:
        counts = converters.convert_file(
            values["from"].value, request, Path(values.out), progress.update
        )
    print(f"{values.out}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    for what, count in sorted(request.left_out.items()):
        print(f"left out: {count} {what}")
