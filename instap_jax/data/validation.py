"""Checks a whole annotation file against its media, and counts what it holds."""

import collections
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from instap_jax.data import media, schema
from instap_jax.data.captions import split_sentences
from instap_jax.data.processes import SAMPLE_SECONDS, exit_after, pool
from instap_jax.errors import UserError
from instap_jax.types import Kind, Sample

# Below this many samples, starting processes takes longer than the work.
_SMALL = 64


@dataclasses.dataclass(slots=True)
class Counts:
    """What one split holds of one kind; `frames` is the shortest and longest clip."""

    samples: int = 0
    faulty: int = 0
    instances: int = 0
    sentences: int = 0
    boxes: int = 0
    frames: tuple[int, int] | None = None

    def add(self, sample: Sample, found: media.MediaInfo | None, faulty: bool) -> None:
        self.samples += 1
        self.faulty += faulty
        self.instances += len(sample.instances)
        self.boxes += sum(len(instance.frames) for instance in sample.instances)
        for captions in (sample.captions, *(i.captions for i in sample.instances)):
            self.sentences += sum(len(split_sentences(text)) for text in captions)
        if found is not None:
            low, high = self.frames or (found.frames, found.frames)
            self.frames = min(low, found.frames), max(high, found.frames)


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """One fault of one sample: 1-based line of the file, sample id, reason."""

    line: int
    id: str
    reason: str


_HEADER = (
    "split", "kind", "samples", "faulty", "instances", "per sample", "sentences", "boxes", "frames"
)  # fmt: skip

Table = dict[tuple[str, Kind], Counts]


def validate(
    annotations: Path, root: Path, on_fault: Callable[[Fault], None], on_sample: Callable[[], None]
) -> Table:
    """Checks every sample of an annotation file; decodes every file of media.

    Args:
      annotations: the annotation file.
      root: the media root.
      on_fault: called for each fault, in the order of the file.
      on_sample: called after each sample, for progress.

    Returns:
      Counts by (split, kind).

    Raises:
      UserError: a fault of the file, or the media root is no directory.
    """
    if not root.is_dir():
        raise UserError(f"media root {root} is not a directory")
    table: Table = collections.defaultdict(Counts)
    unique = schema.UniqueIds()
    for sample, faults, found in _examined(annotations, root):
        duplicate = unique.check(sample)
        faults = ([duplicate] if duplicate else []) + faults
        for reason in faults:
            on_fault(Fault(sample.line, sample.id, reason))
        table[sample.split, sample.kind].add(sample, found, bool(faults))
        on_sample()
    return dict(table)


def count_lines(path: Path) -> int:
    """Number of samples of an annotation file, without parsing it; 0 if it cannot be read.

    Raises:
      UserError: a line is longer than `schema.MAX_LINE_BYTES`.
    """
    try:
        with path.open("rb") as lines:
            return sum(1 for line in schema.lines_of(lines, path) if line.strip())
    except OSError:
        return 0


def table_lines(table: Table) -> list[str]:
    """Formats the counts as aligned text, one row per split and kind, header first."""
    rows = [_HEADER]
    for (split, kind), counts in sorted(table.items()):
        mean = f"{counts.instances / counts.samples:.2f}"
        low, high = counts.frames or ("-", "-")
        frames = f"{low}" if low == high else f"{low}-{high}"
        numbers = (counts.samples, counts.faulty, counts.instances, mean, counts.sentences)
        rows.append((split, str(kind), *map(str, numbers), str(counts.boxes), frames))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


_Examined = tuple[Sample, list[str], media.MediaInfo | None]


def _examined(annotations: Path, root: Path) -> Iterator[_Examined]:
    jobs = _jobs(annotations, root)
    if count_lines(annotations) < _SMALL:
        yield from (_examine(*job) for job in jobs)
        return
    workers = len(os.sched_getaffinity(0))
    with pool(workers) as submit:
        yield from _in_order(submit, jobs, window=8 * workers)


def _jobs(annotations: Path, root: Path) -> Iterator[tuple[Sample, Path]]:
    for sample in schema.read_annotations(annotations):
        try:
            path = media.confined(root, sample.media)
        except UserError as error:
            raise UserError(f"{annotations}:{sample.line}: {error}") from error
        yield sample, path


def _examine_in_process(sample: Sample, path: Path) -> _Examined:
    exit_after(SAMPLE_SECONDS)
    try:
        return _examine(sample, path)
    finally:
        exit_after(0)


def _examine(sample: Sample, path: Path) -> _Examined:
    try:
        found = media.verify(path, sample.kind)
    except media.MediaError as error:
        return sample, [f"{sample.media}: {error}"], None
    return sample, schema.check_sample(sample, found), found


def _in_order(
    submit: Callable[..., Future], jobs: Iterable[tuple[Sample, Path]], window: int
) -> Iterator[_Examined]:
    """An ordered `map` that reads no more than `window` jobs ahead: a file may hold millions."""
    pending: collections.deque = collections.deque()
    try:
        for job in jobs:
            pending.append((job[0].line, submit(_examine_in_process, *job)))
            if len(pending) >= window:
                yield pending.popleft()[1].result()
        while pending:
            yield pending.popleft()[1].result()
    except BrokenProcessPool as error:
        lines = f"{pending[0][0] - 1}-{pending[-1][0]}" if pending else "the last ones"
        raise UserError(
            f"a process died while decoding the media of one of the lines {lines} (out of "
            f"memory, or a file that crashes the decoder or keeps it for {SAMPLE_SECONDS} s)"
        ) from error
