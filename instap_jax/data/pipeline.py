"""The grain pipeline: packed corpora -> endless, resumable, shardable stream of `types.Batch`.

One stream of samples is defined by the configuration alone: every corpus reshuffled each epoch,
repeated, and mixed by weight. Batch k is the samples [k * g * b, (k + 1) * g * b) of that stream,
cut into g groups. A host reads the groups that its devices hold, so that the global batch is the
same, bit for bit, on any number of hosts and workers, and the position is one integer.

grain's `ElasticIterator` promises the same, but it stacks finished elements into a batch (a second
copy of all pixels) and hands groups to hosts in turn (so that their order in the global batch
depends on the number of hosts). Slicing the stream before anything is decoded needs none of that.
The reading itself is `reading.Reader`'s, which can replace a worker that hangs or dies.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from ml_collections import ConfigDict

from instap_jax.data.groups import GroupBuilder, GroupRef, SampleRef, Use
from instap_jax.data.reading import Reader
from instap_jax.data.records import RecordSource, open_source
from instap_jax.data.tokenizer import Tokenizer, check_ids, check_vocab_size, load_tokenizer
from instap_jax.errors import UserError
from instap_jax.types import Batch, Fault, Kind

# Stages whose loss reads no text: they run without a tokenizer.
_STAGES_WITHOUT_TEXT = ("distill", "classify")
_SHUFFLE = 2  # tag of the random stream; `groups` has the others


@dataclasses.dataclass(frozen=True)
class Corpus:
    """One packed corpus of a mixture; `weight` is relative to the others of its kind."""

    directory: str
    split: str
    weight: float = 1.0


def parse_corpora(text: str) -> tuple[Corpus, ...]:
    """Parses 'DIR:SPLIT=WEIGHT,DIR2:SPLIT'; '' gives ().

    Raises:
      UserError: naming the part that is not of this form.
    """
    return tuple(_parse_corpus(part.strip(), text) for part in text.split(",") if text.strip())


def _parse_corpus(part: str, text: str) -> Corpus:
    # The last colon: DIR may have others.
    match = re.fullmatch(r"(?P<dir>.+):(?P<split>[A-Za-z0-9_-]+)(?:=(?P<weight>[^=]*))?", part)
    if match is None:
        raise UserError(f"corpus {part!r} of {text!r} does not look like DIR:SPLIT or DIR:SPLIT=2")
    try:
        weight = float(match["weight"] if match["weight"] is not None else 1)
    except ValueError:
        weight = math.nan
    if not 1e-6 <= weight <= 1e6:
        raise UserError(f"corpus {part!r}: weight {match['weight']!r} is no number in 1e-6 to 1e6")
    return Corpus(match["dir"], match["split"].replace("-", "_"), weight)


def make_loader(
    config: ConfigDict,
    *,
    kind: Kind,
    groups: int,
    group_size: int,
    rows: Sequence[int],
) -> "Loader":
    """Opens the corpora of `config.data` of one kind and returns their loader.

    Args:
      config: the resolved configuration.
      groups: g of the global batch.
      group_size: b, samples of a group.
      rows: numbers, within a batch, of the groups that this host reads.

    Raises:
      UserError: no corpus of this kind, one cannot be opened or is empty, no tokenizer.
    """
    data, key = config.data, "videos" if kind is Kind.VIDEO else "images"
    corpora = parse_corpora(data[key])
    if not corpora:
        raise UserError(f"data.{key} names no corpus; set it to DIR:SPLIT of packed data")
    rate = data.max_fault_rate
    sources = [open_source(c.directory, c.split, kind, max_missing=rate) for c in corpora]
    for corpus, source in zip(corpora, sources):
        if not len(source):
            raise UserError(f"{corpus.directory}:{corpus.split} has no {kind} samples")
    builder = GroupBuilder(
        sources=sources,
        tokenizer=open_tokenizer(config),
        use=Use.TRAIN,
        group_size=group_size,
        frames=data.frames if kind is Kind.VIDEO else 1,
        sampling=data.sampling,
        canvas=tuple(data.canvas),
        length=config.tokenizer.length,
        budget=math.ceil(group_size * data.instances_per_sample),
        caption_sampling=data.caption_sampling,
        classes=tuple(config.classify.classes),
        seed=config.seed,
    )
    return Loader(
        samples=_mixed_samples(corpora, [len(s) for s in sources], config.seed, data.shuffle),
        builder=builder,
        groups=groups,
        rows=rows,
        workers=data.workers,
        prefetch=data.prefetch,
        timeout=data.decode_timeout,
    )


def open_tokenizer(config: ConfigDict) -> Tokenizer | None:
    if not config.tokenizer.path and config.stage in _STAGES_WITHOUT_TEXT:
        return None
    tokenizer = load_tokenizer(config.tokenizer)
    check_vocab_size(tokenizer, config.text.vocab_size)
    check_ids(tokenizer, config.tokenizer)
    return tokenizer


def _mixed_samples(
    corpora: Sequence[Corpus], lengths: Sequence[int], seed: int, shuffle: bool
) -> grain.MapDataset:
    """Returns the endless stream of `SampleRef`s; nothing is read yet.

    `mix` asks corpus c for its turns 0, 1, 2, ... in order, however the others are weighted, so
    that a corpus has its own epochs: turn // length.
    """
    streams = [
        grain.MapDataset.range(length)
        .repeat()
        .map_with_index(_Turns(corpus=corpus, length=length, seed=seed if shuffle else None))
        for corpus, length in enumerate(lengths)
    ]
    return grain.MapDataset.mix(streams, [corpus.weight for corpus in corpora])


class _Turns:
    """Maps a turn of a corpus's endless stream to a record; `seed` None: in record order."""

    def __init__(self, *, corpus: int, length: int, seed: int | None):
        self._corpus, self._length, self._seed = corpus, length, seed
        # Each corpus keeps its own, whatever the number of corpora; two of them, because one batch
        # may hold the end of an epoch and the beginning of the next.
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def __call__(self, turn: int, record: int) -> SampleRef:
        epoch = turn // self._length
        if self._seed is not None:
            record = self._order(epoch)[record]
        return SampleRef(corpus=self._corpus, record=int(record), epoch=epoch, turn=turn)

    def _shuffled(self, epoch: int) -> np.ndarray:
        """Returns the order of the records in an epoch: 4 bytes each, in the main process.

        grain's own shuffle needs no memory, but milliseconds for each sample of a small corpus.
        """
        rng = np.random.default_rng([self._seed, _SHUFFLE, self._corpus, epoch])
        return rng.permutation(np.arange(self._length, dtype=np.uint32))


class Loader:
    """Endless iterator over this host's part of every batch: its `rows` of the g groups.

    `get_state` is the position after the batch that was last returned; a loader with the same
    configuration that is given it goes on with the next batch, whatever its number of hosts and
    workers. Where the batch size differs too, it goes on with the next sample. Close it when done.
    """

    def __init__(
        self,
        *,
        samples: grain.MapDataset,
        builder: GroupBuilder,
        groups: int,
        rows: Sequence[int],
        workers: int,
        prefetch: int,
        timeout: float,
    ):
        """Use `make_loader`. `samples` is the endless stream of `SampleRef`s."""
        self._samples, self._builder = samples, builder
        self._groups, self._rows = groups, tuple(int(row) for row in rows)
        self._reading = {"workers": workers, "prefetch": prefetch, "timeout": timeout}
        self._next_sample = 0
        self._reader: Reader | None = None

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        """Returns the next batch, leading axis len(rows)."""
        if self._reader is None:
            shape, _ = self._builder.shapes(len(self._rows))["frames"]
            tasks = self._tasks(self._next_sample)
            self._reader = Reader(self._builder.build, tasks, shape=shape, **self._reading)
        batch = next(self._reader)
        self._next_sample += self._groups * self._builder.group_size
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the position as JSON-able values; the same on every host."""
        return {"next_sample": self._next_sample}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that `get_state` gave."""
        self.close()
        self._next_sample = int(state["next_sample"])

    def close(self) -> None:
        """Stops the workers. The loader can go on afterwards: it starts new ones."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    @property
    def workers_replaced(self) -> int:
        """Workers that hung or died since the loader was last opened."""
        return self._reader.replaced if self._reader else 0

    def sample_id(self, corpus: int, record: int) -> str:
        """Returns the id of the sample that `Batch.corpus` and `Batch.record` name."""
        return self._builder.sources[corpus].record_id(record)

    def unknown_label(self, corpus: int, record: int) -> str:
        """Says which sample has a label that is no class, in one line."""
        return unknown_label(self._builder.sources[corpus], record, self._builder.classes)

    def _tasks(self, first: int) -> Iterator[list[GroupRef]]:
        """This host's groups of every batch, from sample number `first` on."""
        size = self._builder.group_size
        while True:
            starts = [first + row * size for row in self._rows]
            yield [
                GroupRef(first=start, samples=[self._samples[start + i] for i in range(size)])
                for start in starts
            ]
            first += self._groups * size


class FaultMonitor:
    """Counts the samples that could not be read, and stops a run that has too many of them.

    Attributes:
      fault: a label that is no class: of the class list or of the annotations, not of one sample.
    """

    # Fewer samples than this never stop a run: one bad sample of the first batch is no rate.
    MIN_SAMPLES = 200
    SHOWN = 10  # ids in the message

    def __init__(self, loader: Loader):
        self._loader = loader
        self._samples = 0
        self._counts: collections.Counter[str] = collections.Counter()
        self._first: dict[tuple[int, int], str] = {}
        self._told = 0, 0
        self.fault: UserError | None = None

    def update(self, batch: Batch) -> None:
        """Counts the faults of one batch of this host."""
        self._samples += batch["fault"].size
        for place in np.argwhere(batch["fault"]):
            name = Fault(batch["fault"][*place]).name
            self._counts[name] += 1
            if name == Fault.UNKNOWN_LABEL.name and not self.fault:
                sample = int(batch["corpus"][*place]), int(batch["record"][*place])
                self.fault = UserError(self._loader.unknown_label(*sample))
            if len(self._first) < self.SHOWN:
                sample = int(batch["corpus"][*place]), int(batch["record"][*place])
                self._first.setdefault(sample, name)

    def counts(self) -> dict[str, int]:
        """Returns samples without data so far, by the name of their `Fault`."""
        return dict(self._counts)

    def news(self) -> tuple[int, int]:
        """(samples that could not be read, all samples) since the last call."""
        before, self._told = self._told, (self._counts.total(), self._samples)
        return self._told[0] - before[0], self._told[1] - before[1]

    def check(self, max_rate: float, faults: int, samples: int) -> None:
        """Raises UserError with counts and first ids where more than this share was unreadable.

        Not before `MIN_SAMPLES` samples were seen.

        Args:
          faults, samples: of all hosts: on each of many the share varies far more.
        """
        if samples < self.MIN_SAMPLES or faults <= max_rate * samples:
            return
        reasons = ", ".join(f"{name} {count}" for name, count in self._counts.most_common())
        ids = ", ".join(
            f"{self._loader.sample_id(*sample)} ({name})" for sample, name in self._first.items()
        )
        here = "" if samples == self._samples else f" {self._counts.total()} on this host:"
        raise UserError(
            f"{faults} of {samples} samples could not be read, more than "
            f"data.max_fault_rate={max_rate:g}:{here} {reasons or 'none'}; first: {ids or 'none'}"
        )


def unknown_label(source: RecordSource, record: int, classes: Sequence[str]) -> str:
    """The message for a record whose label is none of the classes."""
    found = source[record]
    label = found.extra.get("label")
    what = "no 'label'" if label is None else f"label {label!r}"
    return (
        f"{found.id} has {what}; config.classify.classes knows {len(classes)} classes, "
        f"{classes[0]!r} to {classes[-1]!r}"
    )
