"""Embeddings of a whole suite, record by record: the split is read once, on all hosts together.

Memory, in bytes, for N records of V visual tokens of width d, M instances, embeddings of width p:
every host holds 4 (2 N p + 2 M p + 2 M d) of embeddings; visual tokens, where they are asked for
(re-ranking), are kept on the host that computed them, N V d * itemsize / hosts, if that is within
the limit given, and are otherwise computed again from the media, one batch at a time.
"""

import collections
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instap_jax import sharding
from instap_jax.data.records import RecordSource, open_source
from instap_jax.data.suite import Facts, InstanceFacts, SuiteBatch, pad_instances, read_suite
from instap_jax.errors import UnreadableSample, UserError
from instap_jax.evaluation.encoder import PASSED_KEYS, Encoder
from instap_jax.progress import Progress
from instap_jax.types import Fault, Kind

Blocks = Callable[[], Iterator[jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuiteFeatures:
    """One suite; row i of `video` is record i, row j of `instance` and `entity` is instance j.

    Attributes:
      name: of the split. frames: T of a clip.
      facts: ids and captions of the N records.
      video, text: float32 [N, p], l2-normalised; row i of `text` is record i's whole caption (of
        several, all in a row). `text` is None where the encoder embeds no texts.
      entity: float32 [M, d].
      parent: int64 [M], the record of every instance.
      instance, instance_text: float32 [M, p], l2-normalised; row j of both is instance j; None
        where the encoder embeds no instances.
      crop: float32 [M, d], visual input of (9); None like `instance`.
      tokens: goes over the visual tokens [B, V, d] of the records, in order, B at a time, on the
        devices; the last block is padded. None where they were not asked for.
    """

    name: str
    frames: int
    facts: list[Facts]
    video: np.ndarray
    text: np.ndarray | None
    entity: np.ndarray
    parent: np.ndarray
    instance: np.ndarray | None = None
    instance_text: np.ndarray | None = None
    crop: np.ndarray | None = None
    tokens: Blocks | None = None

    @property
    def instance_facts(self) -> list[InstanceFacts]:
        """Of every instance, in the order of the rows."""
        return [instance for one in self.facts for instance in one.instances]

    @property
    def labels(self) -> list[dict[str, Any]]:
        """The `attributes` that the annotation gave every entity ({} without)."""
        return [instance.attributes for instance in self.instance_facts]


def whole_caption(captions: Sequence[str]) -> str:
    """One text of all captions, in their order."""
    return " ".join(caption.strip() for caption in captions)


def embed_suite(
    encoder: Encoder,
    directory: str,
    split: str,
    kind: Kind,
    *,
    batch_size: int,
    frames: int | None = None,
    workers: int | None = None,
    token_limit: int | None = None,
) -> SuiteFeatures:
    """Embeds every record of a split, once.

    Args:
      batch_size: records a step; a multiple of the data shards, over which it is divided.
      frames: T of a clip; None: as many as the run was trained on.
      workers: processes that read and decode; None: as in training (`data.workers`).
      token_limit: bytes of visual tokens that this host may keep; None: no tokens are wanted.

    Raises:
      UserError: the split cannot be opened or is empty, or one of its records cannot be read: a
        suite with holes is another suite.
    """
    source = open_suite(directory, split, kind)
    frames = (frames or encoder.config.data.frames) if kind is Kind.VIDEO else 1
    batches = functools.partial(suite_batches, encoder, source, frames, batch_size, workers)
    found: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    facts: list[Facts] = []
    kept = _Kept(encoder, len(source), token_limit)
    with Progress(f"embed {split}", len(source)) as progress:
        for step in batches():
            out = encoder.embed(encoder.put(step.batch), tokens=kept.wanted)
            kept.add(out.pop("tokens", None))
            out = jax.device_get(out)
            refuse_faults(out, source)
            valid = out["sample_valid"]
            out["parent"] = _parents(out, step, before=len(facts))
            for name in out.keys() - set(PASSED_KEYS) | {"parent"}:
                rows = valid if name == "video" else out["instance_valid"]
                found[name].append(out[name][rows])
            facts += _of_all_hosts(step)
            progress.update(int(valid.sum()))
    arrays = {name: np.concatenate(parts) for name, parts in found.items()}
    captions = [whole_caption(one.captions) for one in facts]
    features = SuiteFeatures(
        name=split,
        frames=frames,
        facts=facts,
        text=encoder.embed_texts(captions) if encoder.embeds_texts else None,
        tokens=kept.blocks(batches),
        **arrays,
    )
    if features.instance is None or not len(features.instance):
        return features
    sentences = [whole_caption(one.captions) for one in features.instance_facts]
    return dataclasses.replace(features, instance_text=encoder.embed_texts(sentences))


def open_suite(directory: str, split: str, kind: Kind) -> RecordSource:
    """The records of a split.

    Raises:
      UserError: it cannot be opened, or is empty.
    """
    source = open_source(directory, split, kind)
    if not len(source):
        raise UserError(f"{directory}:{split} has no {kind} samples: there is nothing to measure")
    return source


def suite_batches(
    encoder: Encoder, source: RecordSource, frames: int, batch_size: int, workers: int | None
) -> Iterator[SuiteBatch]:
    """This host's batches of a split, for an encoder: `read_batches`."""
    options = {"frames": frames, "batch_size": batch_size, "workers": workers}
    return read_batches(encoder.config, encoder.mesh, source, **options)


def read_batches(
    config: ConfigDict,
    mesh: Mesh,
    source: RecordSource,
    *,
    frames: int,
    batch_size: int,
    workers: int | None,
) -> Iterator[SuiteBatch]:
    """This host's batches of a split that all hosts of a mesh go through together.

    `read_suite` gives a host the instance slots n of its own fullest group. The parts of a global
    array are of one shape, so here the hosts agree: n is that of the fullest group of all hosts,
    and only ever grows, in multiples of b, so that few shapes are compiled.

    Args:
      config: of the run, see `read_suite`.
      batch_size: records a step, a multiple of the data shards: one group of b for each of them.
      workers: processes that read and decode; None: `data.workers`.
    """
    shards, budget = sharding.data_shards(mesh), 1
    size = batch_size // shards
    steps = read_suite(
        config,
        source,
        frames=frames,
        groups=shards,
        group_size=size,
        workers=config.data.workers if workers is None else workers,
        rows=sharding.host_rows(mesh, shards),
    )
    for step in steps:
        most = step.batch["boxes"].shape[1]
        if jax.process_count() > 1:
            most = int(multihost_utils.process_allgather(np.int32(most)).max())
        if most > budget:
            budget = -(-most // size) * size
        yield SuiteBatch(pad_instances(step.batch, budget), step.facts)


def _parents(out: dict[str, np.ndarray], step: SuiteBatch, before: int) -> np.ndarray:
    """The record of every instance slot: slots of a group name samples of their group."""
    size = step.batch["sample_valid"].shape[1]
    slots = len(out["parent"]) // (len(out["sample_valid"]) // size)
    group = np.arange(len(out["parent"])) // slots
    return before + group * size + out["parent"].astype(np.int64)


def _of_all_hosts(step: SuiteBatch) -> list[Facts]:
    """The facts of a step, in order of the records, on every host."""
    if jax.process_count() == 1:
        return step.facts
    records = step.batch["record"][step.batch["sample_valid"]].tolist()
    facts = zip(records, map(dataclasses.asdict, step.facts), strict=True)
    mine = np.frombuffer(json.dumps(list(facts)).encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int64(len(mine))))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(mine)] = mine
    rows = multihost_utils.process_allgather(padded)
    found: dict[int, Facts] = {}  # hosts that share a tensor axis have the same records
    for row, size in zip(rows, sizes):
        found |= {record: _facts(content) for record, content in json.loads(row[:size].tobytes())}
    return [found[record] for record in sorted(found)]


def _facts(content: dict[str, Any]) -> Facts:
    """What `dataclasses.asdict` and JSON have made of facts, as it was."""
    instances = (
        InstanceFacts(**one | {"captions": tuple(one["captions"])}) for one in content["instances"]
    )
    return Facts(id=content["id"], captions=tuple(content["captions"]), instances=tuple(instances))


def refuse_faults(out: dict[str, np.ndarray], source: RecordSource) -> None:
    """Raises UnreadableSample where `fault` of `out`, flat over samples, names one of `record`."""
    for place in np.flatnonzero(out["fault"]):
        record, fault = int(out["record"][place]), Fault(int(out["fault"][place]))
        raise UnreadableSample(
            f"{source.record_id(record)} cannot be read ({fault.name.lower()}); a suite is "
            "measured whole or not at all"
        )


class _Kept:
    """Visual tokens of the batches so far, on this host, while they stay within the limit."""

    def __init__(self, encoder: Encoder, records: int, limit: int | None):
        self.wanted = limit is not None
        self._encoder, self._records, self._limit = encoder, records, limit or 0
        self._arrays: list[np.ndarray] | None = []
        self._asked = self.wanted

    def add(self, tokens: jax.Array | None) -> None:
        if tokens is None or self._arrays is None:
            return
        # One of each that devices of a tensor axis have alike.
        shards = {shard.index[0].start or 0: shard.data for shard in tokens.addressable_shards}
        mine = sum(data.nbytes for data in shards.values())
        batches = -(-self._records // len(tokens))
        if mine * batches > self._limit:
            self._arrays, self.wanted = None, False  # of no use in the next batches
            return
        self._arrays.append(np.concatenate([np.asarray(shards[start]) for start in sorted(shards)]))

    def blocks(self, batches: Callable[[], Iterator[SuiteBatch]]) -> Blocks | None:
        """How to go over the tokens: those kept, or all of them computed again."""
        if not self._asked:
            return None

        def kept() -> Iterator[jax.Array]:
            for array in self._arrays:
                yield sharding.place_rows(array, self._encoder.mesh)

        def again() -> Iterator[jax.Array]:
            for step in batches():
                yield self._encoder.embed(self._encoder.put(step.batch), tokens=True)["tokens"]

        return again if self._arrays is None else kept
