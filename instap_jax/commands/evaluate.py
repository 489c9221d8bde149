"""`instap evaluate --workdir=DIR --task=retrieval,probe --videos=PACKED:video_1k`."""

import dataclasses

from absl import flags

from instap_jax.config_check import local_workdir


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags; those that tasks read are the fields of `evaluation.context.Options`."""

    def text(name: str, default: str | None, help_text: str, *, required: bool = False) -> None:
        flags.DEFINE_string(name, default, help_text, required=required, flag_values=values)

    def number(name: str, default: int | None, help_text: str) -> None:
        flags.DEFINE_integer(name, default, help_text, lower_bound=1, flag_values=values)

    text("workdir", None, "directory of a trained run", required=True)
    flags.DEFINE_list("task", "retrieval", "retrieval, probe", flag_values=values)
    text("videos", "", "video suites: DIR:SPLIT, separated by commas")
    text("images", "", "image suites")
    number("batch_size", 32, "samples a step, over all devices")
    number("frames", None, "frames of a clip (default: as in training)")
    text("probe_videos", "", "DIR:SPLIT of videos whose entities the probes are fitted on")
    text("probe_images", "", "the same for images")


def run(values: flags.FlagValues) -> None:
    workdir = local_workdir(values["workdir"].value)
    from instap_jax.evaluation.context import Options, parse_suites
    from instap_jax.evaluation.tasks import evaluate

    options = {field.name: values[field.name].value for field in dataclasses.fields(Options)}
    suites = parse_suites(values["videos"].value, values["images"].value)
    evaluate(workdir, values["task"].value, suites, Options(**options))
