"""A step that a run could not take, computed again part by part: what is not finite, and by whom.

The batch and the state before the step come from the run's dump (`train/dump.py`), the randomness
from the step's number, so any number of devices computes the same step.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instap_jax import config_check, sharding
from instap_jax.data.pipeline import parse_corpora
from instap_jax.data.records import open_source
from instap_jax.errors import UserError
from instap_jax.train import dump
from instap_jax.train.initialise import load_frozen
from instap_jax.train.kinds import kind_of_step
from instap_jax.train.optimizer import make_optimizer
from instap_jax.train.program import Program, build_program
from instap_jax.train.step import make_gradient, step_key
from instap_jax.types import Batch, Kind

SHOWN = 8  # samples and arrays that are named
GROUP_FIELDS = ("dropped",)  # of a batch; the rest is of its samples
INSTANCE_FIELDS = (
    "boxes", "present", "instance_valid", "parent", "instance_text", "instance_text_hash",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
    """What a step comes to.

    Attributes:
      step: its number, from 1.
      devices: that computed it.
      terms: loss, its terms and the norms of gradient and update.
      params, gradient, update: name of every array with elements that are not finite -> (how many,
        of how many), before, in and after the step.
      samples: ids of samples that alone, without the others, give a loss or gradient that is not
        finite; several in one tuple do so only together. At most `SHOWN`; () where the samples
        are not to blame.
      origin: where the first such number arises, where that was asked for and is known.
    """

    step: int
    devices: int
    terms: dict[str, float]
    params: dict[str, tuple[int, int]]
    gradient: dict[str, tuple[int, int]]
    update: dict[str, tuple[int, int]]
    samples: tuple[tuple[str, ...], ...]
    origin: str | None = None


def replay(workdir: Path, step: int, *, trace: bool = False) -> Replay:
    """Computes the dumped step of a run again, on as many of the devices as divide its groups.

    Args:
      trace: also find the operation (jax_debug_nans: op by op, slowly).

    Raises:
      UserError: no such run or dump, it is damaged, or the teacher is not there.
    """
    config = config_check.read(workdir)
    dump.read_meta(workdir, step)  # its checksums
    shapes = dump.batch_shapes(workdir, step)
    mesh, program = _fitting(config, shapes["sample_valid"].shape[0])
    with jax.set_mesh(mesh):
        where = sharding.batch_sharding(mesh)
        places = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
            for name, leaf in shapes.items()
        }
        loaded = dump.read(workdir, step, program.abstract, places)
        compute, update = _programs(config, program, step)
        compute = functools.partial(compute, load_frozen(config, program))
        terms, grads = compute(loaded.params, loaded.batch)
        updates, update_norm = update(grads, loaded.opt_state, loaded.params)
        params = _not_finite(loaded.params)
        samples: tuple[tuple[str, ...], ...] = ()
        origin = None
        if not params and not _is_finite(terms):
            samples = _blamed(config, compute, loaded.params, loaded.batch, step)
            origin = _origin(compute, loaded.params, loaded.batch) if trace else None
        return Replay(
            step=step,
            devices=mesh.size,
            terms={k: float(v) for k, v in terms.items()} | {"update_norm": float(update_norm)},
            params=params,
            gradient=_not_finite(grads),
            update=_not_finite(updates),
            samples=samples,
            origin=origin,
        )


def _programs(config: ConfigDict, program: Program, step: int) -> tuple[Callable, Callable]:
    """The two halves of the step, compiled: terms and gradient, and the update with its norm."""
    gradient = make_gradient(config, program.objective, program.graphdef, program.frozen_graphdef)
    optimizer = make_optimizer(config)

    @jax.jit
    def compute(frozen, params, batch):
        key = step_key(program.seed, step - 1)
        loss, terms, grads = gradient(params, frozen, batch, key)
        return terms | {"loss": loss, "grad_norm": optax.tree.norm(grads)}, grads

    @jax.jit
    def update(grads, opt_state, params):
        updates, _ = optimizer.update(grads, opt_state, params)
        return updates, optax.tree.norm(updates)

    return compute, update


def _fitting(config: ConfigDict, groups: int) -> tuple[Mesh, Program]:
    """The stage on the most devices that its groups and parameters can be divided among."""
    parts = groups // config.optimizer.accumulate
    config.mesh.update(replica=1, fsdp=-1, tensor=1, slices=1)
    for count in range(len(jax.devices()), 0, -1):
        if parts % count:
            continue
        try:
            mesh = sharding.make_mesh(config.mesh, jax.devices()[:count])
            with jax.set_mesh(mesh):
                return mesh, build_program(config, mesh)
        except (UserError, AssertionError):  # JAX asserts that TPU chips are a whole rectangle
            if count == 1:
                raise
    raise AssertionError("one device always divides")


def _is_finite(terms: dict[str, jax.Array]) -> bool:
    return all(math.isfinite(float(terms[name])) for name in ("loss", "grad_norm"))


def _not_finite(tree) -> dict[str, tuple[int, int]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    counts = jax.jit(lambda arrays: [jnp.sum(~jnp.isfinite(a)) for a in arrays])(
        [leaf for _, leaf in leaves]
    )
    return {
        jax.tree_util.keystr(path): (int(count), leaf.size)
        for (path, leaf), count in zip(leaves, counts, strict=True)
        if int(count)
    }


def _blamed(
    config: ConfigDict, compute: Callable, params, batch: Batch, step: int
) -> tuple[tuple[str, ...], ...]:
    """Ids of the smallest sets of samples found by halving that are not finite by themselves."""
    host = jax.device_get(batch)
    valid = host["sample_valid"]

    def is_bad(places: Sequence[int]) -> bool:
        only = np.zeros(valid.size, bool)
        only[list(places)] = True
        part = _alone(host, only.reshape(valid.shape))
        part = {name: jax.device_put(array, batch[name].sharding) for name, array in part.items()}
        return not _is_finite(compute(params, part)[0])

    name = _names(config, batch, kind_of_step(config, step - 1))
    found = []
    for places in smallest(is_bad, list(np.flatnonzero(valid))):
        found.append(tuple(name(place) for place in places[:SHOWN]))
        if len(found) == SHOWN:
            break
    return tuple(found)


def _alone(batch: Batch, only: np.ndarray) -> Batch:
    """The batch with all samples but `only`, bool [g, b], as if they could not be read: zeros.

    To mark them as not valid is not enough: a NaN times zero is still one in the gradient.
    """
    instances = np.take_along_axis(only, batch["parent"], axis=1)
    part = {}
    for name, array in batch.items():
        chosen = instances if name in INSTANCE_FIELDS else only
        if name in GROUP_FIELDS:
            part[name] = array
        else:
            chosen = chosen.reshape(chosen.shape + (1,) * (array.ndim - 2))
            part[name] = np.where(chosen, array, np.zeros((), array.dtype))
    return part


def smallest(is_bad: Callable[[Sequence[int]], bool], places: list[int]) -> Iterator[list[int]]:
    """Yields the bad sets, halved as long as a half is bad by itself."""
    if not places or not is_bad(places):
        return
    half = len(places) // 2
    parts = (places[:half], places[half:]) if half else ()
    innocent = True
    for part in parts:
        for found in smallest(is_bad, part):
            innocent = False
            yield found
    if innocent:
        yield places


def _names(config: ConfigDict, batch: Batch, kind: Kind) -> Callable[[int], str]:
    corpora = parse_corpora(config.data.videos if kind is Kind.VIDEO else config.data.images)
    places = [np.asarray(jax.device_get(batch[name])).reshape(-1) for name in ("corpus", "record")]

    def name(place: int) -> str:
        corpus, record = (int(column[place]) for column in places)
        one = corpora[corpus]
        try:
            return open_source(one.directory, one.split, kind).record_id(record)
        except UserError:  # the data are no longer there
            return f"{one.directory}:{one.split} record {record}"

    return name


def _origin(compute: Callable, params, batch: Batch) -> str | None:
    """The line of the program and the operation that first give a NaN; an inf is not searched."""
    try:
        with jax.debug_nans(True):
            jax.block_until_ready(compute(params, batch))
    except FloatingPointError as error:
        frame, trace = None, error.__traceback__
        while trace:
            if "instap_jax" in trace.tb_frame.f_code.co_filename:
                frame = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
            trace = trace.tb_next
        return f"{str(error).splitlines()[0]} ({frame})"
    return None
