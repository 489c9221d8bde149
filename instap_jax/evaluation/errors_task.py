"""Task 'errors': every wrong instance retrieval sorted by rules, with a gallery of cases."""

from collections.abc import Sequence

import jax
import numpy as np

from instap_jax.data.records import CorruptRecordError, RecordSource, open_source
from instap_jax.errors import UserError
from instap_jax.evaluation.context import Context, Suite
from instap_jax.evaluation.errors import (
    CLASSES,
    DIRECTIONS,
    RULES,
    Error,
    Instance,
    describe_instances,
    sort_errors,
    wrong_retrievals,
)
from instap_jax.evaluation.features import whole_caption
from instap_jax.evaluation.gallery import Case, write_cases
from instap_jax.evaluation.results import Measurement
from instap_jax.evaluation.strips import OTHER, read_frames, strip, uniform_frames

CASES = 2  # shown of every suite, direction and class, drawn with a fixed seed


def measure(context: Context) -> list[Measurement]:
    """The wrong instance retrievals of every suite, in both directions, top 1.

    Raises:
      UserError: the run embeds no instances, or a suite has fewer than two.
    """
    if context.config.stage != "align":
        raise UserError(
            f"task errors needs a run of stage 'align': stage {context.config.stage!r} embeds no "
            "instances and their sentences"
        )
    measured, cases = [], []
    for suite in context.suites:
        measurement, shown = _measure_suite(context, suite)
        measured.append(measurement)
        cases += shown
    if jax.process_index() == 0:
        write_cases(context.workdir, "errors", cases)
    return measured


def _measure_suite(context: Context, suite: Suite) -> tuple[Measurement, list[Case]]:
    found = context.features(suite)
    if found.instance is None or len(found.instance) < 2:
        raise UserError(f"suite {suite.split}: fewer than two instances, nothing to confuse")
    source = open_source(suite.directory, suite.split, suite.kind)
    instances = read_instances(source, found.frames)
    metrics, cases = {}, []
    pairs = {
        "t2v": (found.instance_text, found.instance),
        "v2t": (found.instance, found.instance_text),
    }
    for direction, (queries, candidates) in pairs.items():
        errors, metrics[direction] = sort_errors(instances, *wrong_retrievals(queries, candidates))
        for error in choose_cases(errors):
            cases.append(_case(suite, direction, source, instances, error, found.frames))
    length = context.encoder.text_length
    measurement = Measurement(
        protocol=context.protocol(
            suite,
            unit="wrong instance retrievals",
            scoring="dual encoder, cosine, top 1",
            frames=found.frames,
            notes=f"caption cut to {length} tokens; regions of the instances; uniform frames; "
            f"{RULES}",
        ),
        metrics=metrics,
        counts={"instances": len(instances), "samples": len(source)},
        remarks=[f"instances: {context.encoder.instances}"],
    )
    return measurement, cases


def read_instances(source: RecordSource, frames: int) -> list[Instance]:
    """The instances of a split, in the order of `SuiteFeatures.instance`.

    Raises:
      UserError: a record cannot be read.
    """
    found = []
    for index in range(len(source)):
        try:
            record = source[index]
        except CorruptRecordError as error:
            raise UserError(f"{error}; a suite is measured whole or not at all") from error
        chosen = uniform_frames(record, frames)
        captions = [whole_caption(captions) for captions in record.instance_captions]
        boxes, present = record.boxes[:, chosen], record.present[:, chosen]
        found += describe_instances(index, captions, record.instance_extra, boxes, present)
    return found


def choose_cases(errors: Sequence[Error]) -> list[Error]:
    """`CASES` errors of every class, drawn at random with a fixed seed: not the prettiest ones."""
    chosen: list[Error] = []
    for number, kind in enumerate(CLASSES):
        mine = [error for error in errors if error.kind == kind]
        order = np.random.default_rng([0, number]).permutation(len(mine))
        chosen += [mine[i] for i in sorted(order[:CASES])]
    return chosen


def _case(
    suite: Suite,
    direction: str,
    source: RecordSource,
    instances: Sequence[Instance],
    error: Error,
    frames: int,
) -> Case:
    query, retrieved = instances[error.query], instances[error.retrieved]
    pictures = {
        label: strip(read_frames(source, one.record, frames), one.boxes, one.present, **colour)
        for label, one, colour in (
            ("the right instance", query, {}),
            ("retrieved instead", retrieved, {"colour": OTHER}),
        )
    }
    return Case(
        suite=suite.split,
        group=error.kind,
        key=f"{direction}/{error.query}",
        texts={
            "direction": DIRECTIONS[direction],
            "sentence of the right instance": query.caption,
            "sentence of the retrieved one": retrieved.caption,
            "why": error.reason,
        },
        pictures=pictures,
        numbers={"cosine above the right one": round(error.margin, 4)},
    )
