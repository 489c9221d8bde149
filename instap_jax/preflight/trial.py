"""The real thing, small: batches of the real loader, steps of the real program."""

import contextlib
import dataclasses
import io
import math
import time

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instap_jax.preflight.rows import Row, failed, passed, warned
from instap_jax.train.feed import Fed, Feed
from instap_jax.train.initialise import initial_params, load_frozen
from instap_jax.train.program import Program
from instap_jax.train.state import TrainState
from instap_jax.types import Kind

TIMED_STEPS = 3  # of each kind, after the one that compiles
_NEARLY_FULL = 0.95  # of a chip's memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Of one kind of batch: seconds of the first step, which compiles, and of a later one."""

    compile_seconds: float
    step_seconds: float
    samples: int


def parameters(config: ConfigDict, program: Program) -> tuple[Row, tuple[TrainState, object]]:
    """Makes the state of step 0 and reads the teacher, as training will."""
    quiet = io.StringIO()  # initial_params says where each module comes from
    frozen = load_frozen(config, program)
    state = program.init()
    if config.checkpoint.init_from or config.text.checkpoint:
        with contextlib.redirect_stdout(quiet):
            params = initial_params(
                config, program.objective, program.abstract.params, state.params
            )
        state = dataclasses.replace(state, params=params)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return passed("parameters", f"{count / 1e6:.1f} M, placed and read as training does"), (
        state,
        frozen,
    )


def first_batches(config: ConfigDict, mesh: Mesh) -> tuple[Row, dict[Kind, Fed]]:
    """A batch of every kind that the schedule has."""
    kinds = {
        kind
        for kind, text in ((Kind.VIDEO, config.data.videos), (Kind.IMAGE, config.data.images))
        if text
    }
    if len(kinds) == 2 and config.data.image_fraction in (0, 1):
        kinds = {Kind.IMAGE if config.data.image_fraction else Kind.VIDEO}
    with contextlib.closing(Feed(config, mesh, start_step=0, state=None)) as feed:
        batches: dict[Kind, Fed] = {}
        while set(batches) < kinds:
            fed = next(feed)
            batches.setdefault(fed.kind, fed)
        _judge(feed)
        faults = feed.fault_counts()
    found = ", ".join(f"{kind}: {fed.samples} samples" for kind, fed in sorted(batches.items()))
    if faults:
        said = ", ".join(f"{name} {count}" for name, count in faults.items())
        row = warned("batches", f"{found}; unreadable: {said}", "`instap validate` finds them all")
    else:
        row = passed("batches", found)
    return row, batches


def _judge(feed: Feed) -> None:
    """Raises what would end a training of these batches; on several hosts not the share of
    unreadable samples, which varies from one to the other and counts for all together."""
    if feed.fault:
        raise feed.fault
    if jax.process_count() == 1:
        feed.judge(feed.news())


def steps(
    program: Program, state: TrainState, frozen, batches: dict[Kind, Fed]
) -> tuple[Row, dict[Kind, Timing]]:
    """Runs and times the step on every kind of batch; losses and gradients must be finite."""
    timings, found = {}, []
    for kind, fed in sorted(batches.items()):
        seconds = []
        for _ in range(1 + TIMED_STEPS):
            start = time.perf_counter()
            state, metrics = program.step(state, frozen, fed.batch, program.seed)
            scalars = {name: float(value) for name, value in jax.device_get(metrics).items()}
            seconds.append(time.perf_counter() - start)
            bad = [name for name in ("loss", "grad_norm") if not math.isfinite(scalars[name])]
            if bad:
                return failed(
                    "step",
                    f"{kind} batch: {bad[0]} is {scalars[bad[0]]}",
                    "a smaller config.optimizer.learning_rate, other initial parameters, or data "
                    "that `instap validate` has checked",
                ), {}
        timing = Timing(
            compile_seconds=seconds[0],
            step_seconds=sum(seconds[1:]) / TIMED_STEPS,
            samples=fed.samples,
        )
        timings[kind] = timing
        found.append(
            f"{kind}: loss {scalars['loss']:.4g}, {timing.step_seconds:.3g} s a step, the first "
            f"with its compilation {timing.compile_seconds:.1f} s"
        )
    return passed("step", "; ".join(found)), timings


def device_memory() -> Row:
    """The most memory that the fullest of this host's chips has used, where it can tell."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    told = [(s["peak_bytes_in_use"], s["bytes_limit"]) for s in stats if s.get("bytes_limit")]
    if not told:
        return passed("chip memory", "this kind of device does not tell")
    peak, limit = max(told, key=lambda pair: pair[0] / pair[1])
    found = f"{peak / 1e9:.1f} of {limit / 1e9:.1f} GB used"
    if peak > _NEARLY_FULL * limit:
        return warned("chip memory", found, "config.compute.remat='none' or a smaller batch")
    return passed("chip memory", found)


def needed_rate(config: ConfigDict, timings: dict[Kind, Timing]) -> float:
    """Samples a second that the steps take, image and video steps mixed as configured."""
    share = {Kind.IMAGE: config.data.image_fraction, Kind.VIDEO: 1 - config.data.image_fraction}
    weights = {kind: share[kind] if len(timings) > 1 else 1.0 for kind in timings}
    samples = sum(weights[kind] * timing.samples for kind, timing in timings.items())
    return samples / sum(weights[kind] * t.step_seconds for kind, t in timings.items())


def throughput(config: ConfigDict, mesh: Mesh, *, seconds: float, need: float | None) -> Row:
    """Samples a second that the real loader puts on the devices, against what the steps take.

    Measured from an empty buffer, after the first batch. Global batches are counted: every host
    reads its part of each.
    """
    with contextlib.closing(Feed(config, mesh, start_step=0, state=None)) as feed:
        next(feed)
        start, count, batches = time.perf_counter(), 0, 0
        while not batches or time.perf_counter() - start < seconds:
            count += next(feed).samples
            batches += 1
        rate = count / (time.perf_counter() - start)
        _judge(feed)
    found = f"{rate:.0f} samples/s of {batches} batches"
    if need is None:
        return warned("input", found, "--need=SAMPLES compares it with what the steps take")
    found += f"; the steps take {need:.0f}"
    if rate >= need:
        return passed("input", found)
    return failed(
        "input",
        found,
        f"more config.data.workers (now {config.data.workers}), smaller stored frames "
        "(`instap pack --short_side`), or hosts with more cores",
    )
