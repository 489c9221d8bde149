"""Batches on the mesh: which kind of batch a step takes, and transfer ahead of the step."""

import collections
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instap_jax import sharding
from instap_jax.data.groups import GroupBuilder, Use
from instap_jax.data.pipeline import FaultMonitor, make_loader
from instap_jax.errors import UserError
from instap_jax.train.kinds import kind_of_step
from instap_jax.types import Batch, Kind


class Fed(NamedTuple):
    """A batch on the devices, and what it takes to go on after it.

    Attributes:
      batch: global arrays, leading axis split over the data axes.
      samples: samples in the global batch.
      places: int32 [m, 2], (corpus, record) of this process's samples, see `Feed.sample_ids`.
      state: position of every loader after this batch, JSON-able.
    """

    batch: Batch
    kind: Kind
    samples: int
    places: np.ndarray
    state: dict[str, Any]


def batch_shape(config: ConfigDict, mesh: Mesh) -> tuple[int, int]:
    """(groups g, samples per group b) of a global batch.

    By default one group per data shard and accumulation part; `config.data.group_size` fixes b, so
    that groups stay the same when the number of devices changes.

    Raises:
      UserError: when the batch does not divide, or leaves matching without negatives.
    """
    size = config.data.batch_size
    parts = sharding.data_shards(mesh) * config.optimizer.accumulate
    group = config.data.group_size or max(size // parts, 1)
    if size % group or (size // group) % parts:
        raise UserError(
            f"config.data.batch_size={size} cannot be cut into groups of {group} over {parts} "
            f"parts ({sharding.data_shards(mesh)} data shards x "
            f"{config.optimizer.accumulate} accumulation steps); "
            f"choose a multiple of {parts * group}"
        )
    if group < 2 and config.stage == "align" and (config.align.vtm or config.align.inst_vtm):
        raise UserError(
            "config.align.vtm and config.align.inst_vtm draw negatives from a sample's group, and "
            f"config.data.batch_size={size} over {parts} parts leaves groups of one; "
            f"choose at least {2 * parts}, or set both weights to 0"
        )
    return size // group, group


def abstract_batch(config: ConfigDict, mesh: Mesh, kind: Kind) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and placement of the global batch of one step (`types.Batch`)."""
    groups, group_size = batch_shape(config, mesh)
    builder = GroupBuilder(
        sources=[],
        tokenizer=None,
        use=Use.TRAIN,
        group_size=group_size,
        frames=config.data.frames if kind is Kind.VIDEO else 1,
        sampling=config.data.sampling,
        canvas=tuple(config.data.canvas),
        length=config.tokenizer.length,
        budget=math.ceil(group_size * config.data.instances_per_sample),
        caption_sampling=config.data.caption_sampling,
        classes=tuple(config.classify.classes),
        seed=config.seed,
    )
    where = sharding.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
        for name, (shape, dtype) in builder.shapes(groups).items()
    }


class Feed:
    """Iterates over batches on the devices, `config.data.device_prefetch` ahead of the step.

    Args:
      config: the resolved configuration.
      mesh: where batches go.
      start_step: number of the first step, which the schedule of kinds counts from.
      state: of an earlier `Fed.state`, to go on exactly after that batch.

    Attributes:
      fault: why the run must end, once a sample of this process cannot be trained on. Other
        processes have to end at the same step, so that the loop raises it and not the feed.
    """

    fault: UserError | None = None

    def __init__(self, config: ConfigDict, mesh: Mesh, *, start_step: int, state: dict | None):
        self._config = config
        self._mesh = mesh
        groups, group_size = batch_shape(config, mesh)
        corpora = {Kind.VIDEO: config.data.videos, Kind.IMAGE: config.data.images}
        self._loaders = {
            kind: make_loader(
                config,
                kind=kind,
                groups=groups,
                group_size=group_size,
                rows=sharding.host_rows(mesh, groups),
            )
            for kind, text in corpora.items()
            if text
        }
        if not self._loaders:
            raise UserError("config.data.videos and config.data.images are both empty: no data")
        for kind, loader in self._loaders.items():
            if state is not None:
                loader.set_state(state[kind])
        self._monitors = {kind: FaultMonitor(loader) for kind, loader in self._loaders.items()}
        self._totals = dict.fromkeys(self._loaders, (0, 0))
        self._states = {kind: loader.get_state() for kind, loader in self._loaders.items()}
        self._step = start_step
        self._ready: collections.deque[Fed] = collections.deque()

    def __next__(self) -> Fed:
        while len(self._ready) <= self._config.data.device_prefetch:
            self._ready.append(self._fetch())
        return self._ready.popleft()

    def fault_counts(self) -> dict[str, int]:
        """Samples without data so far in this process, by reason."""
        total: collections.Counter[str] = collections.Counter()
        for monitor in self._monitors.values():
            total.update(monitor.counts())
        return dict(total)

    def news(self) -> list[int]:
        """For every kind the samples that could not be read and all samples, of this process,
        since the last call: what `judge` takes, summed over processes."""
        return [n for monitor in self._monitors.values() for n in monitor.news()]

    def judge(self, news: Sequence[int]) -> None:
        """Raises UserError where more than `config.data.max_fault_rate` of the samples of a kind,
        of all processes, could not be read."""
        pairs = zip(news[::2], news[1::2], strict=True)
        for (kind, monitor), (faults, samples) in zip(self._monitors.items(), pairs, strict=True):
            before = self._totals[kind]
            self._totals[kind] = before[0] + faults, before[1] + samples
            monitor.check(self._config.data.max_fault_rate, *self._totals[kind])

    def sample_ids(self, fed: Fed) -> list[str]:
        """Ids of this process's samples of a batch, in order."""
        loader = self._loaders[fed.kind]
        return [loader.sample_id(int(corpus), int(record)) for corpus, record in fed.places]

    def close(self) -> None:
        for loader in self._loaders.values():
            loader.close()

    def _fetch(self) -> Fed:
        kind = kind_of_step(self._config, self._step)
        batch = next(self._loaders[kind])
        self._monitors[kind].update(batch)
        self.fault = self.fault or self._monitors[kind].fault
        self._states = self._states | {kind: self._loaders[kind].get_state()}
        self._step += 1
        placed = jax.tree.map(lambda array: sharding.place_rows(array, self._mesh), batch)
        return Fed(
            batch=placed,
            kind=kind,
            samples=math.prod(placed["sample_valid"].shape),
            places=np.stack([batch["corpus"], batch["record"]], axis=-1).reshape(-1, 2),
            state=dict(self._states),
        )
