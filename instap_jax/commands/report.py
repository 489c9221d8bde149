"""`instap report`: one self-contained HTML page on one or more runs."""

from absl import flags

from instap_jax.evaluation.report import write_report


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `instap report`."""
    flags.DEFINE_list("workdirs", None, "Run directories, separated by commas.", flag_values=values)
    flags.DEFINE_string("out", "report.html", "HTML file to write.", flag_values=values)
    flags.DEFINE_string(
        "annotations", None, "Annotation file to show samples of.", flag_values=values
    )
    flags.DEFINE_string("media", None, "Directory of its media files.", flag_values=values)
    flags.mark_flag_as_required("workdirs", flag_values=values)


def run(values: flags.FlagValues) -> None:
    """Writes the page and says where it is."""
    out = write_report(
        values.workdirs, values.out, annotations=values.annotations, media=values.media
    )
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, open it in a browser")
