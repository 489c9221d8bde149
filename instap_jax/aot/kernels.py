"""The time of Pallas kernels, which the compiler's own estimate leaves out.

A kernel runs the same instruction bundles, one a cycle, for every place of its grid: or waits for
the memory, if reading its arguments and writing its results once takes longer. The number of
bundles is in a dump that libtpu writes only when told so before it starts, and then for the whole
program, gigabytes for ours. So every kernel of a program is compiled by itself in a process of its
own:

    LIBTPU_INIT_ARGS=... python -m instap_jax.aot.kernels TOPOLOGY DIR

reads DIR/*.export (`jax.export`) and writes the dump below DIR. On a v4 or v5p the compiler splits
the first parallel axis of a grid over the chip's two cores: its dump names the places that one core
visits. The bundles count what is only done at some places for every place; that the memory waits at
the first block, or is asked for the same block again, is not counted.
"""

import dataclasses
import glob
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
from jax.extend import core
from jax.sharding import SingleDeviceSharding

from instap_jax.aot import topology

_DUMP = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true"


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelCall:
    """A Pallas kernel as a step calls it.

    Attributes:
      times: how often in one step.
      cycles: of one call.
    """

    name: str
    shapes: str
    grid: tuple[int, ...]
    times: int
    cycles: int


def measure(jaxpr: core.Jaxpr, where: topology.Topology) -> list[KernelCall]:
    """The kernels of a traced step, compiled one by one."""
    calls: dict[tuple, list] = {}
    for equation, times in _find(jaxpr, 1):
        shapes = ", ".join(variable.aval.str_short() for variable in equation.invars)
        key = (equation.params["name"], shapes, tuple(equation.params["grid_mapping"].grid))
        calls.setdefault(key, [equation, 0])[1] += times
    if not calls:
        return []
    schedules = _schedules([equation for equation, _ in calls.values()], where)
    found = []
    for ((name, shapes, grid), (equation, times)), schedule in zip(calls.items(), schedules):
        moving = _bytes(equation) / where.chip.hbm_speed * where.chip.clock
        cycles = max(schedule.bundles * schedule.places, int(moving))
        found.append(KernelCall(name=name, shapes=shapes, grid=grid, times=times, cycles=cycles))
    return found


class _Schedule(NamedTuple):
    """Of one core: bundles of a kernel, and how many places of the grid it visits."""

    bundles: int
    places: int


def _bytes(equation: core.JaxprEqn) -> int:
    """Of the arguments and results."""
    avals = [variable.aval for variable in (*equation.invars, *equation.outvars)]
    return sum(aval.size * aval.dtype.itemsize for aval in avals)


def _find(jaxpr: core.Jaxpr, times: int) -> Iterator[tuple[core.JaxprEqn, int]]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation, times
            continue
        count = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for inner in core.jaxprs_in_params(equation.params):
            yield from _find(inner, count)


def _schedules(equations: list[core.JaxprEqn], where: topology.Topology) -> list[_Schedule]:
    """Of each kernel, by a process of its own."""
    with tempfile.TemporaryDirectory(prefix="instap-kernels-") as directory:
        root = Path(directory)
        for number, equation in enumerate(equations):
            (root / str(number)).mkdir()
            (root / f"{number}.export").write_bytes(_exported(equation))
        command = [sys.executable, "-m", "instap_jax.aot.kernels", where.name, directory]
        environment = os.environ | {"LIBTPU_INIT_ARGS": _DUMP.format(root / "dump")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"compiling the kernels failed:\n{done.stderr[-2000:]}")
        lines = (line.split() for line in done.stdout.splitlines())
        return [_Schedule(int(bundles), int(places)) for bundles, places in lines]


def _exported(equation: core.JaxprEqn) -> bytes:
    def call(*args):
        return equation.primitive.bind(*args, **equation.params)

    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]
    return bytes(jax.export.export(jax.jit(call), platforms=["tpu"])(*avals).serialize())


def main(name: str, directory: str) -> None:
    """Compiles every exported kernel of a directory; prints bundles and places of each, one a line.

    The dump's file of the kernel is the one with the most bundles: the others are small copies.
    """
    root = Path(directory)
    device = topology.devices(topology.parse(name))[0]
    place, seen = SingleDeviceSharding(device), set()
    for path in sorted(root.glob("*.export"), key=lambda p: int(p.stem)):
        exported = jax.export.deserialize(bytearray(path.read_bytes()))
        args = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in exported.in_avals]
        jitted = jax.jit(exported.call, in_shardings=place)
        with topology.compiler_environment():
            jitted.trace(*args).lower(lowering_platforms=("tpu",)).compile()
        files = set(root.glob("dump/*schedule-analysis_final_bundles.txt")) - seen
        seen |= files
        largest = max(files, key=lambda file: _count(file.read_text()))
        program = re.sub(r"-\d+-schedule-analysis_final_bundles.txt$", "", largest.name)
        (original,) = root.glob(f"dump/{glob.escape(program)}-*-original.txt")
        print(_count(largest.read_text()), _places(original.read_text()), flush=True)


def _count(text: str) -> int:
    return int(re.search(r"total scheduled bundles: *(\d+)", text)[1])


def _places(text: str) -> int:
    """From the windows of the arguments, which all go over the same places."""
    (bounds,) = set(re.findall(r"^iteration_bounds: \((.*)\)$", text, re.MULTILINE))
    return math.prod(int(bound) for bound in bounds.split(",") if bound.strip())


if __name__ == "__main__":
    main(*sys.argv[1:])
