"""All checks in order. What a later one needs is tried first, on all hosts, before any goes on."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import instap_jax
from instap_jax import config_check, distributed, sharding
from instap_jax.data.pipeline import parse_corpora
from instap_jax.preflight import host, inputs, trial
from instap_jax.preflight.rows import (
    Row,
    attempt,
    failing,
    of_all_hosts,
    passed,
    skipped,
)
from instap_jax.train import checkpoint
from instap_jax.train.feed import abstract_batch
from instap_jax.train.peers import Watchdog
from instap_jax.train.profiling import use_compile_cache
from instap_jax.train.program import Program, build_program, offloaded_bytes
from instap_jax.types import Kind

_PROCESS_BYTES = 2 << 30  # of Python, JAX and the compiler, without arrays
_SILENCE = 1200.0  # seconds without a row: compiling a step takes minutes
_TRIALS = ("parameters", "batches", "step", "chip memory", "input")

Show = Callable[[Sequence[Row]], None]


def run(
    config: ConfigDict,
    workdir: Path,
    *,
    hosts: int | None = None,
    chips: int | None = None,
    need: float | None = None,
    seconds: float = 15.0,
    show: Show = lambda rows: None,
) -> list[Row]:
    """Tries everything that a run of `config` in `workdir` needs, and leaves nothing behind.

    Every process of a pod must call it, before anything asks JAX for devices.

    Args:
      hosts, chips: that are expected; None: whatever there is.
      need: samples a second that the input must give; None: what the timed steps take.
      seconds: for which the input is measured.
      show: given rows as they come, the same on every process once these have joined.

    Returns:
      All rows, the same on every process, but for those that could not join.
    """
    rows = _join(config)
    if failing(rows):
        show(rows)
        return rows
    # A host that fails within a check in which hosts meet leaves the others waiting there.
    with Watchdog(_SILENCE + seconds) as watchdog:
        more, mesh, program = _machine_and_inputs(config, workdir, hosts, chips)
        rows = of_all_hosts(rows + more)
        show(rows)
        if failing(rows):
            last = [skipped(name) for name in _TRIALS]
            show(last)
            return rows + last

        def show_more(rows: Sequence[Row]) -> None:
            watchdog.step()
            show(rows)

        with jax.set_mesh(mesh):
            return rows + _try(config, mesh, program, need, seconds, show_more)


def _join(config: ConfigDict) -> list[Row]:
    """The processes become one program."""
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    index = os.environ.get("JAX_PROCESS_ID", "0")
    wait = float(config.distributed.initialization_timeout)
    port = attempt(
        "coordinator",
        lambda: host.coordinator_port(address, int(index), wait),
    )
    if failing([port]):
        return [port]

    def join() -> Row:
        distributed.initialize(config.distributed)
        return passed("join", f"{jax.process_count()} process(es)")

    return [port, attempt("join", join)]


def _machine_and_inputs(
    config: ConfigDict, workdir: Path, hosts: int | None, chips: int | None
) -> tuple[list[Row], Mesh | None, Program | None]:
    """What needs no device; the mesh and the program for what does."""
    made: dict = {}

    def mesh() -> Row:
        made["mesh"] = sharding.make_mesh(config.mesh)
        with jax.set_mesh(made["mesh"]):
            made["program"] = build_program(config, made["mesh"])
        shape = " x ".join(f"{axis}={size}" for axis, size in made["mesh"].shape.items())
        return passed("mesh", shape)

    def start() -> Row:
        config_check.check_workdir(config, workdir)
        return passed("workdir", str(workdir))

    def cache() -> Row:
        row = host.compile_cache(config.compute.cache_dir or jax.config.jax_compilation_cache_dir)
        # The default is in the workdir, where nothing is to be left.
        if config.compute.cache_dir and "mesh" in made and not failing([row]):
            use_compile_cache(config, workdir, made["mesh"])
        return row

    def offloaded() -> int:
        if "program" not in made or config.compute.remat != "offload":
            return 0
        return _offloaded_bytes(config, made["mesh"], made["program"])

    placed = attempt("mesh", mesh)
    state = _bytes(made["program"].abstract) if "program" in made else 0
    share = state // jax.process_count()
    here = host.neighbours()  # Slurm starts a process for each GPU of a host
    checks = {
        "hosts": lambda: host.processes(hosts),
        "chips": lambda: host.chips(chips),
        "mesh": lambda: placed,
        "workdir": start,
        "storage": lambda: host.storage(workdir, share),
        "disk": lambda: host.disk(workdir, state * _checkpoints_to_come(config, workdir)),
        "host memory": lambda: host.memory(here * _host_bytes(config, share), here * offloaded()),
        "compile cache": cache,
        "data": lambda: inputs.corpora(config),
        "tokenizer": lambda: inputs.tokenizer(config),
        "checkpoints": lambda: inputs.checkpoints(config, workdir),
    }
    rows = [host.same_everywhere(_facts(config)), host.shared(workdir)]  # all hosts at once
    rows += [attempt(name, check) for name, check in checks.items()]
    return rows, made.get("mesh"), made.get("program")


def _try(config, mesh: Mesh, program: Program, need, seconds: float, show: Show) -> list[Row]:
    """Real batches and steps. After each check all hosts know whether all can go on."""
    made: dict = {}

    def parameters() -> Row:
        row, made["parameters"] = trial.parameters(config, program)
        return row

    def batches() -> Row:
        row, made["batches"] = trial.first_batches(config, mesh)
        return row

    def step() -> Row:
        row, made["timings"] = trial.steps(program, *made.pop("parameters"), made.pop("batches"))
        return row

    def throughput() -> Row:
        rate = need or trial.needed_rate(config, made["timings"])
        return trial.throughput(config, mesh, seconds=seconds, need=rate)

    rows: list[Row] = []
    checks = dict(zip(_TRIALS, (parameters, batches, step, trial.device_memory, throughput)))
    for name, check in checks.items():
        new = [skipped(name)] if failing(rows) else of_all_hosts([attempt(name, check)])
        show(new)
        rows += new
    return rows


def _facts(config: ConfigDict) -> dict[str, str]:
    text = json.dumps(config.to_dict(), sort_keys=True)
    return {
        "instap_jax": instap_jax.__version__,
        "jax": jax.__version__,
        "config": hashlib.sha256(text.encode()).hexdigest()[:12],
    }


def _bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _checkpoints_to_come(config: ConfigDict, workdir: Path) -> int:
    """How many must find room at a time, beside those of a run that goes on."""
    there = len(list((workdir / checkpoint.DIRECTORY).glob("[0-9]*")))
    return config.checkpoint.keep + 1 - min(there, config.checkpoint.keep)


def _host_bytes(config: ConfigDict, share: int) -> int:
    """An estimate of the memory that a process needs of its host.

    Batches in the workers' buffers and on their way to the device, the copy of its share of the
    state that an asynchronous checkpoint writes, and the process itself.
    """
    data = config.data
    height, width = data.canvas
    frames = data.frames if parse_corpora(data.videos) else 1
    batch = data.batch_size // jax.process_count() * frames * height * width * 3
    batches = max(data.workers, 1) * (data.prefetch + 1) + data.device_prefetch + 1
    return batch * batches + share + _PROCESS_BYTES


def _offloaded_bytes(config: ConfigDict, mesh: Mesh, program: Program) -> int:
    """What the steps of this host's devices keep in its memory; the larger of the two kinds."""
    corpora = {Kind.VIDEO: config.data.videos, Kind.IMAGE: config.data.images}
    with jax.set_mesh(mesh):
        each = [
            offloaded_bytes(program, abstract_batch(config, mesh, kind))
            for kind, text in corpora.items()
            if text
        ]
    return max(each, default=0) * jax.local_device_count() // sharding.data_shards(mesh)
