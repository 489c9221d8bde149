"""Which sample goes into which shard: one pass over the annotation file. No JAX."""

import hashlib
import math
import os
from array import array

import numpy as np
import tensorflow_datasets as tfds

from instap_jax.data import records, schema
from instap_jax.data.shard import Options, Task
from instap_jax.errors import UserError
from instap_jax.progress import Progress
from instap_jax.types import Kind, Sample

# Samples of a shard: about 100 MB at the default options, but in a small set fewer, so that every
# core gets a shard.
SHARD_SIZE = {Kind.VIDEO: 256, Kind.IMAGE: 4096}
_MIN_SHARDS, _MIN_SHARD_SIZE = 16, 32


class Index:
    """What one pass over the annotation file finds: its faults, and where its samples are.

    Two integers a sample and its id are all that stays in memory.

    Attributes:
      lines: per kind and split, its samples as flat pairs (line number, byte offset).
      duplicates: rejects for ids that were already used.
      total: samples, duplicates included.
      sha256: of the file.
    """

    def __init__(self, path: str):
        self.path = path
        self.lines: dict[tuple[Kind, str], array] = {}
        self.duplicates: list[dict] = []
        self.total = 0
        offsets, self.sha256 = _line_offsets(path)
        self._state = _file_state(path)
        unique = schema.UniqueIds()
        with Progress("checking annotations", len(offsets), unit="lines") as progress:
            for sample in schema.read_annotations(path):
                progress.update()
                self.total += 1
                _check_split(sample, path)
                pairs = self.lines.setdefault((sample.kind, sample.split), array("q"))
                if reason := unique.check(sample):
                    reject = {"id": sample.id, "line": sample.line, "reason": reason}
                    self.duplicates.append(reject)
                else:
                    pairs.extend((sample.line, offsets[sample.line - 1]))

    def check_unchanged(self) -> None:
        """Raises UserError if the file was written to since it was indexed."""
        if _file_state(self.path) != self._state:
            raise UserError(f"{self.path} was changed while it was being packed; pack it again")


def _line_offsets(path: str) -> tuple[array, str]:
    """Returns the byte offset of every line (of the first: past a byte-order mark), and sha256."""
    offsets, position, digest = array("q"), 0, hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for raw in schema.lines_of(file, path):
                mark = 3 if not offsets and raw.startswith(b"\xef\xbb\xbf") else 0
                offsets.append(position + mark)
                position += len(raw)
                digest.update(raw)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    return offsets, digest.hexdigest()


def _file_state(path: str) -> tuple[int, int]:
    state = os.stat(path)
    return state.st_size, state.st_mtime_ns


def _check_split(sample: Sample, path: str) -> None:
    if sample.split == "all" or not sample.split.strip("_"):
        raise UserError(
            f"{path}:{sample.line}: key 'split': {sample.split!r} cannot name a TFDS split "
            "('all' stands for every split together); choose another name"
        )


def make_tasks(
    index: Index,
    media_root: str,
    directory: str,
    *,
    options: Options,
    shard_size: int | None,
    seed: int,
    pack: str,
) -> list[Task]:
    """Deals the samples of every kind and split, shuffled, into shards of nearly equal size.

    Args:
      directory: where the shards go, under `data/KIND/`, and their reports, under `reports/`.
      pack: hash of what the set is packed from.
    """
    if shard_size is not None and shard_size < 1:
        raise UserError(f"shard_size must be at least 1 sample, not {shard_size}")
    tasks = []
    for kind, split in sorted(index.lines):
        lines = np.array(index.lines[kind, split], np.int64).reshape(-1, 2)
        rng = np.random.default_rng([seed, list(Kind).index(kind), *split.encode()])
        lines = lines[rng.permutation(len(lines))]
        count = _shard_count(len(lines), kind, shard_size)
        names = shard_names(f"{directory}/data/{kind}", split).sharded_filenames(count)
        for name, part in zip(names, np.array_split(lines, count or 1)):
            tasks.append(
                Task(
                    annotations=index.path,
                    media_root=media_root,
                    options=options,
                    kind=kind,
                    split=split,
                    lines=part,
                    path=f"{directory}/data/{kind}/{name}",
                    report=f"{directory}/reports/{kind}-{name}.json",
                    pack=pack,
                )
            )
    return tasks


def _shard_count(samples: int, kind: Kind, shard_size: int | None) -> int:
    """Number of shards; a function of the data alone, so that any number of processes agrees."""
    if shard_size is not None:
        return math.ceil(samples / shard_size)
    few = min(_MIN_SHARDS, math.ceil(samples / _MIN_SHARD_SIZE))
    return max(few, math.ceil(samples / SHARD_SIZE[kind]))


def shard_names(directory: str, split: str) -> tfds.core.ShardedFileTemplate:
    """How TFDS names the shards of a split."""
    return tfds.core.ShardedFileTemplate(
        data_dir=directory,
        dataset_name=records.DATASET_NAME,
        split=split,
        filetype_suffix="array_record",
    )
