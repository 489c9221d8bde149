"""A split read once, whole and in order, for evaluation. NumPy only, no JAX."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from instap_jax.data.groups import GroupBuilder, GroupRef, SampleRef, Use
from instap_jax.data.pipeline import open_tokenizer
from instap_jax.data.reading import Begin, Reader
from instap_jax.data.records import RecordSource
from instap_jax.types import Batch, Kind, Record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What a suite's record says besides its arrays; `instances` in the order of the batch.

    Attributes:
      captions: the global caption(s), whole.
      instances: of every one.
    """

    id: str
    captions: tuple[str, ...]
    instances: tuple["InstanceFacts", ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstanceFacts:
    """`attributes`: those that the annotation gave the entity; {} without."""

    id: str
    category: str
    captions: tuple[str, ...]
    attributes: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class SuiteBatch:
    """One step of one host. `facts`: of the batch's valid samples, in order."""

    batch: Batch
    facts: list[Facts]


def read_suite(
    config: ConfigDict,
    source: RecordSource,
    *,
    frames: int,
    groups: int,
    group_size: int,
    workers: int,
    rows: Sequence[int] | None = None,
) -> Iterator[SuiteBatch]:
    """Goes once through a split that is not empty, in order, every record read once.

    Frames are the middles of T = `frames` equal segments (1 for images), texts whole captions cut
    to `tokenizer.length`, and every instance is there: n is what the fullest group of the batch
    has. An instance that no chosen frame shows is present in the one nearest to its appearance.
    A step is `groups` consecutive groups, of which a host takes its `rows`. What is missing at the
    end is padded with samples of `sample_valid` False and `fault` 0.

    Args:
      config: of the run: canvas, tokenizer, buffering.
      groups: of a step, over all hosts.
      workers: processes that read and decode; 0: one thread.
      rows: numbers, within a step, of the groups that this host reads; None: all.

    Raises:
      UserError: no tokenizer.
    """
    mine = tuple(range(groups) if rows is None else map(int, rows))
    builder = GroupBuilder(
        sources=[source],
        tokenizer=open_tokenizer(config),
        use=Use.EVALUATE,
        group_size=group_size,
        frames=frames if source.kind is Kind.VIDEO else 1,
        sampling="uniform",
        canvas=tuple(config.data.canvas),
        length=config.tokenizer.length,
        budget=None,
        caption_sampling=config.data.caption_sampling,
        classes=tuple(config.classify.classes),
        seed=0,
    )
    steps = math.ceil(len(source) / (groups * group_size))
    reader = Reader(
        _ReadStep(builder),
        _tasks(len(source), steps, groups, group_size, mine),
        shape=builder.shapes(len(mine))["frames"][0],
        workers=min(workers, steps),
        prefetch=config.data.prefetch,
        timeout=config.data.decode_timeout,
    )
    with contextlib.closing(reader):
        for batch in reader:
            facts = batch.pop("facts")
            yield SuiteBatch(batch, facts)


def _tasks(
    length: int, steps: int, groups: int, size: int, mine: Sequence[int]
) -> Iterator[list[GroupRef]]:
    """This host's groups of every step."""
    for step in range(steps):
        refs = []
        for group in mine:
            start = (step * groups + group) * size
            records = range(min(start, length), min(start + size, length))
            samples = [SampleRef(corpus=0, record=r, epoch=0, turn=r) for r in records]
            refs.append(GroupRef(first=start, samples=samples))
        yield refs


@dataclasses.dataclass(frozen=True)
class _ReadStep:
    """Reads a step's groups, and beside the arrays the facts; runs in the workers."""

    builder: GroupBuilder

    def __call__(self, groups: Sequence[GroupRef], frames: np.ndarray, begin: Begin) -> dict:
        batch, records = self.builder.build_with_records(groups, frames, begin)
        return batch | {"facts": [_facts(record) for record in records]}


def pad_instances(batch: Batch, budget: int) -> Batch:
    """The batch with instance slots up to `budget` a group; the new ones are not valid."""
    padded = dict(batch)
    for name in (
        "boxes",
        "present",
        "instance_valid",
        "parent",
        "instance_text",
        "instance_text_hash",
    ):
        array = batch[name]
        width = [(0, 0)] * array.ndim
        width[1] = (0, budget - array.shape[1])
        padded[name] = np.pad(array, width)
    return padded


def _facts(record: Record) -> Facts:
    return Facts(
        id=record.id,
        captions=tuple(record.captions),
        instances=tuple(
            InstanceFacts(
                id=id, category=category, captions=tuple(captions), attributes=_attributes(extra)
            )
            for id, category, captions, extra in zip(
                record.instance_ids,
                record.categories,
                record.instance_captions,
                record.instance_extra,
                strict=True,
            )
        ),
    )


def _attributes(extra) -> dict[str, Any]:
    """The key is the annotator's own: only a JSON object has named attributes to probe."""
    attributes = extra.get("attributes")
    return dict(attributes) if isinstance(attributes, dict) else {}


def all_captions(facts: Sequence[Facts]) -> list[str]:
    """The whole caption of every record: of several, all of them in a row."""
    return [" ".join(caption.strip() for caption in one.captions) for one in facts]
