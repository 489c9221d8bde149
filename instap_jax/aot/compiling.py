"""Compiles a lowered step and measures what came out; keeps the figures for the next time."""

import dataclasses
import glob
import hashlib
import json
import os
import re
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from instap_jax.aot import hlo, kernels, topology
from instap_jax.aot.lowering import LoweredStep
from instap_jax.train.flops import peak_flops

VERSION = 7  # of the figures: raise it when their meaning changes
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_LARGEST, _HOTTEST = 8, 20  # buffers and operations kept
_HBM, _HOST = 0, 5  # memory spaces, by their numbers in XLA's dumps


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepFigures:
    """What one compiled step needs of one chip.

    Attributes:
      fits: False: the compiler ran out of memory, and gave `temporary` alone.
      hbm: bytes by class: parameters, optimizer, teacher, batch (together `arguments`), outputs,
        aliased (outputs in the place of arguments), temporary, code, peak (all of them at most).
      limit: bytes that a program may use.
      host: bytes in the host's memory for a chip ('memory'), that a step writes to it ('out') and
        reads from it ('in').
      largest: (bytes, shapes) of the largest temporary buffers.
      model_flops, executed_flops: a chip's share, see `LoweredStep`.
      collectives: traffic by kind, axes and network, bytes a chip receives in a step.
      cycles: the compiler's estimate of all but collectives and kernels; 0 where it gave none.
      hottest: (cycles, operation) of what costs most of them.
      kernels: Pallas calls (`kernels.KernelCall`): cycles of one, and how often it runs.
      seconds: of compilation. rss: largest resident memory of this process so far, bytes.
    """

    kind: str
    samples: int
    chips: int
    mesh: dict[str, int]
    fits: bool
    hbm: dict[str, int]
    limit: int
    host: dict[str, float]
    largest: list[tuple[int, str]]
    model_flops: float
    executed_flops: float
    collectives: list[dict[str, Any]]
    cycles: int
    hottest: list[tuple[int, str]]
    kernels: list[dict[str, Any]]
    peak_flops: float
    clock: float
    ici: float
    lower_seconds: float
    seconds: float
    rss: int
    compiler: str

    @property
    def spare(self) -> float:
        """Fraction of the chip's memory that is left; negative: too little."""
        return 1 - self.hbm["peak"] / self.limit

    def traffic(self, network: str) -> float:
        """Bytes that a chip receives over 'ICI' or 'DCN'."""
        return sum(c["bytes"] for c in self.collectives if c["network"] == network)

    @property
    def compute_time(self) -> float:
        """Seconds: the compiler's cycles, and those of the kernels."""
        return (self.cycles + self.kernel_cycles) / self.clock

    @property
    def host_speed(self) -> float | None:
        """Bytes a second, each way, that hide the host's traffic behind all of the computation."""
        moved = max(self.host["out"], self.host["in"])
        return moved / self.compute_time if self.cycles else None

    @property
    def kernel_cycles(self) -> int:
        return sum(kernel["times"] * kernel["cycles"] for kernel in self.kernels)

    @property
    def ici_time(self) -> float:
        """Seconds that the traffic takes when all links of a chip are busy."""
        return self.traffic("ICI") / self.ici

    def utilisation(self, *, hidden: bool) -> float | None:
        """Model FLOPs over what the chip could do; traffic behind computation (hidden) or after."""
        time = self.compute_time + (0 if hidden else self.ici_time)
        return self.model_flops / (time * self.peak_flops) if self.cycles else None


def measure(step: LoweredStep, where: topology.Topology, cache: Path | None) -> StepFigures:
    """Compiles a step, or reads the figures of the same program from the cache.

    An out-of-memory is a result too (`fits`), any other error of the compiler is raised.
    """
    path = cache / f"{_fingerprint(step, where)}.json" if cache else None
    if path and path.exists():
        return StepFigures(**json.loads(path.read_text()))
    figures = _measure(step, where)
    if path:
        aside = path.with_suffix(f".{os.getpid()}.partial")
        aside.write_text(json.dumps(dataclasses.asdict(figures)))
        os.replace(aside, path)
    return figures


def _fingerprint(step: LoweredStep, where: topology.Topology) -> str:
    facts = (VERSION, where.label, jax.__version__, topology.compiler_version())
    facts += (dict(step.mesh.shape), step.compiler_options, step.lowered.as_text())
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def _measure(step: LoweredStep, where: topology.Topology) -> StepFigures:
    start = time.perf_counter()
    facts = {"fits": True, "collectives": [], "cycles": 0, "hottest": [], "kernels": []}
    facts["host"] = {"memory": 0, "out": 0, "in": 0}
    # We count on its directory for the report of buffers, and for a text of last resort.
    with tempfile.TemporaryDirectory(prefix="instap-compile-") as dump:
        options = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
        try:
            with topology.compiler_environment():
                compiled = step.lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            facts |= {"fits": False, "hbm": _hbm_of_failure(step, str(error))}
        else:
            allocated = temporaries(_read(dump, "*buffer-assignment.txt"))
            facts["hbm"] = _hbm(step, compiled, allocated.get(_HBM, 0))
        seconds = time.perf_counter() - start
        if facts["fits"]:
            facts |= _program_facts(_text(compiled, dump), step.mesh, where)
            facts["host"]["memory"] = allocated.get(_HOST, 0)
            facts["kernels"] = [
                dataclasses.asdict(call) for call in kernels.measure(step.jaxpr, where)
            ]
        largest = largest_buffers(_read(dump, "*memory-usage-report.txt"))
    return StepFigures(
        kind=str(step.kind),
        samples=step.samples,
        chips=where.chips,
        mesh=dict(step.mesh.shape),
        limit=where.chip.hbm,
        largest=largest,
        model_flops=step.model_flops / where.chips,
        executed_flops=step.executed_flops / where.chips,
        peak_flops=peak_flops(step.mesh.devices.flat[0]),
        clock=where.chip.clock,
        ici=where.chip.ici,
        lower_seconds=step.seconds,
        seconds=seconds,
        rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        compiler=f"libtpu {topology.compiler_version()}, jax {jax.__version__}",
        **facts,
    )


def _hbm(step: LoweredStep, compiled: jax.stages.Compiled, temporary: int) -> dict[str, int]:
    stats = compiled.memory_analysis()
    classes = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporary": temporary,
        "code": stats.generated_code_size_in_bytes,
    }
    peak = sum(classes.values()) - 2 * classes["aliased"]
    return step.argument_bytes | classes | {"peak": peak}


def _hbm_of_failure(step: LoweredStep, message: str) -> dict[str, int]:
    """From the compiler's message; raised again where it is about something else."""
    needed = out_of_memory(message)
    if needed is None:
        raise
    arguments = sum(step.argument_bytes.values())
    classes = {"arguments": arguments, "temporary": needed - arguments, "peak": needed}
    return step.argument_bytes | classes


def out_of_memory(message: str) -> int | None:
    """Bytes that a compiler's out-of-memory message asks for; None for another message.

    It speaks of temporaries, but arguments are among them (measured).
    """
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", message)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        return None
    return int(float(found[1]) * _UNITS[found[2]])


def _text(compiled: jax.stages.Compiled, dump: str) -> str:
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:  # large programs for v5p and v6e
        return _read(dump, "*after_codegen.txt")


def _read(dump: str, pattern: str) -> str:
    """The largest file of that name: of the step, not of a helper program."""
    found = sorted(glob.glob(f"{dump}/{pattern}"), key=os.path.getsize)
    return Path(found[-1]).read_text() if found else ""


def _program_facts(text: str, mesh: jax.sharding.Mesh, where: topology.Topology) -> dict[str, Any]:
    module = hlo.parse(text)
    visits = list(hlo.walk(module))
    total: dict[tuple[str, str, str], dict[str, Any]] = {}
    for one in hlo.collectives(visits, dict(mesh.shape), where.slices):
        entry = total.setdefault(
            (one.network, one.kind, one.axes),
            {"kind": one.kind, "axes": one.axes, "network": one.network, "bytes": 0.0, "times": 0},
        )
        entry["bytes"] += one.bytes
        entry["times"] += one.times
    return {
        "collectives": sorted(total.values(), key=lambda c: -c["bytes"]),
        "host": hlo.host_traffic(module, visits),
        "cycles": hlo.cycles(visits),
        "hottest": hlo.hottest(visits, _HOTTEST),
    }


def temporaries(assignment: str) -> dict[int, int]:
    """Bytes that a compiled program allocates for its temporaries, by memory space.

    Read from the compiler's buffer assignment, as `memory_analysis` of libtpu 0.0.42 counts what
    lies unused between them twice: 15.9 GiB instead of 12.7 for stage 2 on v5e:4x4.
    """
    found = re.findall(
        r"^allocation \d+: size (\d+),(?: color (\d+),)?.* preallocated-temp:", assignment, re.M
    )
    return {int(space or _HBM): int(size) for size, space in found}


def largest_buffers(report: str) -> list[tuple[int, str]]:
    """(bytes, the largest shapes that share it) of the compiler's memory-usage report.

    Its first table is of the temporaries; the others are of arguments and results.
    """
    table = report.partition("shapes_list")[2].partition("Memory Space")[0].split("\n\n")[0]
    rows = re.findall(r";\s*([\d.]+)([KMG])iB;\s*\d+;\s*\d+; (.*)", table)
    return [
        (int(float(size) * _UNITS[unit]), _largest_shapes(shapes))
        for size, unit, shapes in rows[:_LARGEST]
    ]


def _largest_shapes(shapes: str, count: int = 3) -> str:
    names = [re.sub(r"^\d+×", "", part) for part in shapes.split(", ")]
    return ", ".join(sorted(names, key=hlo.size, reverse=True)[:count])
