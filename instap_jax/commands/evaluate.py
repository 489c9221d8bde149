"""`instap evaluate --workdir=DIR --task=retrieval,probe --videos=PACKED:video_1k`."""

from absl import flags

from instap_jax.config_check import local_workdir
from instap_jax.types import Kind


def define_flags(values: flags.FlagValues) -> None:
    def text(name: str, default: str | None, help_text: str, *, required: bool = False) -> None:
        flags.DEFINE_string(name, default, help_text, required=required, flag_values=values)

    text("workdir", None, "directory of a trained run", required=True)
    flags.DEFINE_list("task", "retrieval", "retrieval, probe", flag_values=values)
    text("videos", "", "video suites: DIR:SPLIT, separated by commas")
    text("images", "", "image suites")
    text("probe_videos", "", "DIR:SPLIT of videos whose entities the probes are fitted on")
    text("probe_images", "", "the same for images")
    flags.DEFINE_integer(
        "batch_size", 32, "samples a step, over all devices", lower_bound=1, flag_values=values
    )
    flags.DEFINE_integer(
        "frames",
        None,
        "frames of a clip (default: as in training)",
        lower_bound=1,
        flag_values=values,
    )


def run(values: flags.FlagValues) -> None:
    from instap_jax.evaluation.tasks import evaluate

    evaluate(
        local_workdir(values["workdir"].value),
        values["task"].value,
        suites={Kind.VIDEO: values["videos"].value, Kind.IMAGE: values["images"].value},
        probe_fit={
            Kind.VIDEO: values["probe_videos"].value,
            Kind.IMAGE: values["probe_images"].value,
        },
        batch_size=values["batch_size"].value,
        frames=values["frames"].value,
    )
