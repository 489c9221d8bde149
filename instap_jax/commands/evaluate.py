"""`instap evaluate --workdir=DIR --task=retrieval,probe --videos=PACKED:video_1k`."""

import dataclasses

from absl import flags

from instap_jax import config_check


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags; those that tasks read are the fields of `evaluation.context.Options`."""

    def text(name: str, default: str | None, help_text: str, *, required: bool = False) -> None:
        flags.DEFINE_string(name, default, help_text, required=required, flag_values=values)

    def number(name: str, default: int | None, help_text: str, *, low: int = 1) -> None:
        flags.DEFINE_integer(name, default, help_text, lower_bound=low, flag_values=values)

    text("workdir", None, "directory of a trained run", required=True)
    flags.DEFINE_list(
        "task",
        "retrieval",
        "retrieval, probe, choice, errors, attention; of fine-tuned runs grounding, classification",
        flag_values=values,
    )
    text("videos", "", "video suites: DIR:SPLIT, separated by commas")
    text("images", "", "image suites")
    number("batch_size", 32, "samples a step, over all devices")
    number("frames", None, "frames of a clip (default: as in training)")
    number(
        "text_length",
        None,
        "retrieval, choice, errors: tokens that texts are cut to (default: the preset's, or as in "
        "training)",
        low=2,
    )
    number("workers", None, "processes that read and decode (default: as in training)", low=0)
    flags.DEFINE_enum(
        "checkpoint",
        "newest",
        ["newest", "best"],
        "the newest checkpoint, or the best by the run's validation metric",
        flag_values=values,
    )
    _define_retrieval_flags(values, text, number)
    text("probe_videos", "", "DIR:SPLIT of videos whose entities the probes are fitted on")
    text("probe_images", "", "the same for images")
    number("attention_cases", 6, "attention: instances of every suite that are drawn", low=0)
    number("clips", 1, "classification: clips of a video that are averaged (UMT: 4)")
    number("crops", 1, "classification: crops of a frame that are averaged (UMT: 3)")


def _define_retrieval_flags(values: flags.FlagValues, text, number) -> None:
    def switch(name: str, help_text: str) -> None:
        flags.DEFINE_boolean(name, False, help_text, flag_values=values)

    text("protocol", "", "retrieval preset, as msrvtt-1k-a; docs/evaluation.md lists them")
    text("expected_ids", "", "file with the sample ids that the suite must hold, one a line")
    switch("merge_equal_texts", "equal texts are one query, correct with all samples that have it")
    number("top_k", None, "candidates re-ranked by VTM (default: 128 if trained; 0: none)", low=0)
    switch("dual_softmax", "also score by dual softmax, which sees all queries of the suite")
    flags.DEFINE_float(
        "token_memory",
        4.0,
        "GiB of host memory for visual tokens; beyond it they are computed again from the media",
        lower_bound=0.0,
        flag_values=values,
    )
    switch("save_scores", "keep embeddings and score matrices in WORKDIR/eval/retrieval/")


def run(values: flags.FlagValues) -> None:
    workdir = config_check.local_workdir(values["workdir"].value)
    config = config_check.read(workdir)
    # Only now JAX: a wrong path has already been reported.
    from instap_jax import distributed
    from instap_jax.evaluation.context import Options, parse_suites
    from instap_jax.evaluation.tasks import evaluate

    options = {field.name: values[field.name].value for field in dataclasses.fields(Options)}
    suites = parse_suites(values["videos"].value, values["images"].value)
    with distributed.joined(config.distributed):
        evaluate(workdir, values["task"].value, suites, Options(**options))
