"""What `instap compile` says: a table, JSON, and advice when a step does not fit."""

import dataclasses
import math
import re
from typing import Any

from ml_collections import ConfigDict

from instap_jax.aot.compiling import StepFigures
from instap_jax.aot.topology import Topology
from instap_jax.types import Kind

_GIB = 1 << 30
_SHOWN = 6  # of the largest buffers and of the operations that cost most
LEFT_OUT = (
    "times are the TPU compiler's estimate (its cycles / the clock), not a measurement: without "
    "collectives, transfers and waiting; of Pallas kernels from their instructions or their traffic"
)


def as_json(topology: Topology, figures: list[StepFigures]) -> dict[str, Any]:
    """All figures and those that follow from them; see `StepFigures` for names and units."""
    return {
        "topology": topology.name,
        "slices": topology.slices,
        "chips": topology.chips,
        "estimate": LEFT_OUT,
        "steps": [dataclasses.asdict(one) | _derived(one) for one in figures],
    }


def _derived(one: StepFigures) -> dict[str, Any]:
    return {
        "spare": one.spare,
        "ici_bytes": one.traffic("ICI"),
        "dcn_bytes": one.traffic("DCN"),
        "host_bytes_per_second": one.host_speed,
        "kernel_seconds": one.kernel_cycles / one.clock,
        "compute_seconds": one.compute_time if one.cycles else None,
        "ici_seconds": one.ici_time,
        "utilisation_hidden": one.utilisation(hidden=True),
        "utilisation_exposed": one.utilisation(hidden=False),
    }


def table(topology: Topology, figures: list[StepFigures]) -> str:
    """Lines of text: every step with its memory, FLOPs, traffic and estimated time."""
    lines = [f"{topology.label}: {topology.chips} chips, {figures[0].compiler}"]
    for one in figures:
        mesh = " x ".join(f"{axis} {size}" for axis, size in one.mesh.items())
        lines.append(f"\n{one.kind} step, {one.samples:,} samples, mesh {mesh}")
        lines += [f"  {name:<12}{value}" for name, value in _rows(one)]
    return "\n".join([*lines, f"\n{LEFT_OUT}"])


def _rows(one: StepFigures) -> list[tuple[str, str]]:
    hbm = one.hbm
    split = ", ".join(f"{name} {_gib(hbm[name])}" for name in _ARGUMENTS)
    rows = [
        ("HBM", f"{_gib(hbm['peak'])} of {_gib(one.limit)} GiB a chip, {one.spare:.0%} spare"),
        ("arguments", f"{_gib(hbm['arguments'])}: {split}"),
        ("temporary", f"{_gib(hbm['temporary'])}" + _rest(hbm)),
    ]
    rows += [("", f"{_gib(size):>8}  {shapes}") for size, shapes in one.largest[:_SHOWN]]
    model, executed = one.model_flops, one.executed_flops
    rows.append(("FLOPs", f"{model:.4g} of the model a chip, {executed:.4g} with remat"))
    if one.fits:
        rows += _program_rows(one)
    rows.append(
        ("made in", f"{one.lower_seconds:.0f} s + {one.seconds:.0f} s, RSS {_gib(one.rss)} GiB")
    )
    return rows


_ARGUMENTS = ("parameters", "optimizer", "teacher", "batch")


def _rest(hbm: dict[str, int]) -> str:
    if "code" not in hbm:
        return ""
    fresh = hbm["outputs"] - hbm["aliased"]
    return (
        f"; outputs {_gib(hbm['outputs'])} (not in place {_gib(fresh)}), code {_gib(hbm['code'])}"
    )


def _program_rows(one: StepFigures) -> list[tuple[str, str]]:
    rows = [
        (
            "traffic" if number == 0 else "",
            f"{c['network']} {c['kind']} over {c['axes']}: {c['bytes'] / 1e6:,.1f} MB "
            f"in {c['times']:,}",
        )
        for number, c in enumerate(one.collectives)
    ]
    milliseconds = 1e3 / one.clock
    for kernel in one.kernels:
        each = milliseconds * kernel["cycles"]
        name = f"{kernel['name']}, grid {'x'.join(map(str, kernel['grid']))}"
        rows.append(("kernel", f"{kernel['times']} x {each:,.2f} ms: {name}"))
    compute, ici = 1e3 * one.compute_time, 1e3 * one.ici_time
    kernel = milliseconds * one.kernel_cycles
    of_kernels = f", kernels {kernel:,.1f} of it" if one.kernels else ""
    rows.append(
        ("time", f"{compute:,.1f} ms{of_kernels}; ICI {ici:,.1f} ms at least, hidden or not")
    )
    rows += [
        ("", f"{milliseconds * cycles:>8,.1f} ms  {name}") for cycles, name in one.hottest[:_SHOWN]
    ]
    if one.traffic("DCN") and one.cycles:
        speed = 8e-9 * one.traffic("DCN") / one.compute_time
        rows.append(("", f"DCN hidden at {speed:.1f} Gbit/s a chip or more"))
    if one.host["out"] + one.host["in"]:
        rows.append(("host", _host_row(one)))
    if one.cycles:
        hidden, exposed = one.utilisation(hidden=True), one.utilisation(hidden=False)
        rows.append(
            ("utilisation", f"{hidden:.1%} with ICI hidden, {exposed:.1%} with none hidden")
        )
    return rows


def _host_row(one: StepFigures) -> str:
    out, back = one.host["out"], one.host["in"]
    said = (
        f"{_gib(one.host['memory'])} GiB of the host's memory a chip, {out / 1e9:.2f} GB to it and "
        f"{back / 1e9:.2f} GB from it a step"
    )
    speed = one.host_speed
    return said + (f"; hidden at {speed / 1e9:.1f} GB/s each way, at least" if speed else "")


def advice(config: ConfigDict, one: StepFigures) -> str:
    """What does not fit, by how much, and what to change: one line."""
    over = one.hbm["peak"] - one.limit
    shards = one.mesh["replica"] * one.mesh["fsdp"]
    per_chip = one.samples / shards
    changes = []
    if _replicates(one, shards):
        changes.append(
            "the largest buffer has the rows of all chips: an activation lost its placement "
            "(constrain it with sharding.constrain_batch)"
        )
    if _has_scores(one) and config.compute.attention == "xla":
        changes.append("compute.attention=pallas (scores of all token pairs are the largest)")
    if config.compute.remat not in ("none", "offload"):
        changes.append("compute.remat=none, or offload")
    if one.kind == Kind.VIDEO and config.stage == "align" and not config.compute.crop_frames:
        changes.append("compute.crop_frames=128 (crops in parts, computed again)")
    state = sum(one.hbm[name] for name in ("parameters", "optimizer", "teacher"))
    if state < one.limit:
        # Powers of two: what is left of the memory over what the batch needs.
        parts = 1 << math.ceil(math.log2((one.hbm["peak"] - state) / (one.limit - state)))
        smaller = max(1, int(per_chip / parts)) * shards
        changes.append(f"data.batch_size={smaller} or fewer")
        if one.hbm["batch"] < one.limit - state:
            changes.append(f"optimizer.accumulate={config.optimizer.accumulate * parts}")
    if state > one.limit / 4:
        changes.append(f"more chips in mesh.fsdp (now {one.mesh['fsdp']})")
    return (
        f"the {one.kind} step needs {_gib(one.hbm['peak'])} GiB a chip, {_gib(over)} more than "
        f"there are ({_gib(one.limit)}); change one or more of: {'; '.join(changes)}"
    )


def _replicates(one: StepFigures, shards: int) -> bool:
    """Whether the largest buffer has an axis of the whole batch, that should be split."""
    if not one.largest or shards == 1:
        return False
    dims = {int(d) for d in re.findall(r"[\[,](\d+)", one.largest[0][1])}
    return one.samples in dims


def _has_scores(one: StepFigures) -> bool:
    """Whether the largest buffers have an array [..., N, N] with many tokens N."""
    pairs = [pair for _, shapes in one.largest[:3] for pair in re.findall(r"(\d+),(\d+)\]", shapes)]
    return any(a == b and int(a) > 512 for a, b in pairs)


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f}"
