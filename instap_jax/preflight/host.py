"""Checks of the machines: processes, devices, storage, disk, memory, compile cache."""

import contextlib
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from instap_jax.preflight.rows import Row, failed, gather, passed, warned

STORAGE_BYTES = 64 << 20  # written and read to measure the rate
SLOW_CHECKPOINT = 300.0  # seconds; a checkpoint that takes longer is worth a warning
PORT_TIMEOUT = 3.0
_MEGA = 1e6
_GIGA = 1e9


def coordinator_port(address: str | None, process: int, wait: float) -> Row:
    """Process 0 will listen at `address`; the others must reach it. Before they join."""
    name = "coordinator"
    if not address:
        return passed(name, "one process, or found by the platform's own means")
    host, _, port = address.rpartition(":")
    if process == 0:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", int(port)))
            except OSError as error:
                return failed(
                    name,
                    f"port {port} of this host cannot be listened at: {error.strerror}",
                    "end what an earlier run left, or set JAX_COORDINATOR_ADDRESS to another port",
                )
        return passed(name, f"{address} is free")
    end = time.monotonic() + wait
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=PORT_TIMEOUT).close()
            return passed(name, f"{address} answers")
        except OSError as error:
            if time.monotonic() > end:
                return failed(
                    name,
                    f"{address} does not answer within {wait:g} s: {error}",
                    "is process 0 up, and does the firewall let its port through?",
                )
            time.sleep(0.2)


def processes(expected: int | None) -> Row:
    return _count("hosts", jax.process_count(), expected, "--hosts")


def chips(expected: int | None) -> Row:
    devices = jax.devices()
    kind = f"{devices[0].platform} ({devices[0].device_kind})"
    return _count("chips", len(devices), expected, "--chips", f", {kind}")


def _count(name: str, found: int, expected: int | None, flag: str, more: str = "") -> Row:
    if expected is None:
        return passed(name, f"{found}{more}; {flag} compares with what you expect")
    if found == expected:
        return passed(name, f"{found} of {expected}{more}")
    return failed(
        name,
        f"{found} found, {expected} expected{more}",
        "start one process on every host, all with the same environment, and see that none of "
        "their chips is held by another process",
    )


def same_everywhere(facts: dict[str, str]) -> Row:
    """Whether all hosts have the same versions and the same configuration."""
    everyone = gather(facts) if jax.process_count() > 1 else [facts]
    for key in facts:
        values = [host[key] for host in everyone]
        for index, value in enumerate(values):
            if value != values[0]:
                return failed(
                    "same program",
                    f"{key} is {values[0]} on host 0 and {value} on host {index}",
                    "install the same commit on all hosts and give them the same command",
                )
    return passed("same program", ", ".join(f"{k} {v}" for k, v in facts.items()))


def storage(workdir: Path, checkpoint_bytes: int) -> Row:
    """Writes, reads, renames and deletes at the workdir, and measures the rate.

    Args:
      checkpoint_bytes: this host's share of a checkpoint.
    """
    name, remedy = "storage", f"see that every host may write at {workdir}, or use other storage"
    try:
        with tempfile.TemporaryDirectory(prefix=".preflight-", dir=_existing(workdir)) as folder:
            write, read, fault = _try_storage(Path(folder))
    except OSError as error:
        return failed(name, f"{workdir}: {error.strerror or error}", remedy)
    if fault:
        return failed(name, f"{workdir}: {fault}", remedy)
    found = f"write {write / _MEGA:.0f} MB/s, read {read / _MEGA:.0f} MB/s, rename, delete"
    seconds = checkpoint_bytes / write
    if seconds > SLOW_CHECKPOINT:
        return warned(
            name,
            f"{found}; a checkpoint takes {seconds / 60:.0f} min",
            "use faster storage, or a larger config.checkpoint.every",
        )
    return passed(name, f"{found}; a checkpoint takes {seconds:.1f} s")


def _try_storage(folder: Path) -> tuple[float, float, str]:
    """(bytes written a second, bytes read a second, what is wrong or '')."""
    block = os.urandom(1 << 20)
    blocks = STORAGE_BYTES // len(block)
    aside, there = folder / "aside", folder / "there"
    start = time.perf_counter()
    with aside.open("wb") as file:
        for _ in range(blocks):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    write = STORAGE_BYTES / (time.perf_counter() - start)
    os.replace(aside, there)
    whole = not aside.exists() and there.stat().st_size == STORAGE_BYTES
    start = time.perf_counter()
    with there.open("rb") as file:
        same = all(file.read(len(block)) == block for _ in range(blocks))
    read = STORAGE_BYTES / (time.perf_counter() - start)
    there.unlink()
    faults = {
        "a renamed file is not whole": not whole,
        "it reads back other bytes": not same,
        "a deleted file is still there": there.exists(),
    }
    return write, read, next((fault for fault, is_there in faults.items() if is_there), "")


def shared(workdir: Path) -> Row:
    """Whether all hosts see the same storage at the workdir. Every process must call it."""
    name = "shared storage"
    if jax.process_count() == 1:
        return passed(name, "one host")
    token = gather(os.urandom(8).hex())[0]
    mark = _existing(workdir) / f".preflight-{token}"
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):  # said by `storage`; the others wait for us
            mark.touch()
    multihost_utils.sync_global_devices("preflight mark written")
    seen = mark.exists()
    multihost_utils.sync_global_devices("preflight mark seen")
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):  # a read-only file system says so though none is there
            mark.unlink(missing_ok=True)
    if seen:
        return passed(name, "what host 0 writes, the others see")
    return failed(
        name,
        f"{workdir} is not the storage that host 0 sees there",
        "mount the same storage at the same path on all hosts",
    )


def disk(workdir: Path, need: int) -> Row:
    """Free space at the workdir against the checkpoints that will be kept, bytes."""
    free = shutil.disk_usage(_existing(workdir)).free
    found = f"{free / _GIGA:.1f} GB free, {need / _GIGA:.1f} GB needed for checkpoints"
    if free >= need:
        return passed("disk", found)
    return failed("disk", found, "free some, or lower config.checkpoint.keep")


def neighbours() -> int:
    """Processes of the pod on this host, ours included. Every process must call it."""
    if jax.process_count() == 1:
        return 1
    name = socket.gethostname()
    return gather(name).count(name)


def memory(need: int, offloaded: int = 0) -> Row:
    """Free memory of this host against an estimate, bytes; `offloaded`: what the chips keep in it
    with `compute.remat='offload'`, beside the rest."""
    free = _free_memory()
    total = f"{(need + offloaded) / _GIGA:.1f} GB"
    if free is None:
        return warned("host memory", "cannot be read here", f"see that {total} are free")
    found, fix = f"{free / _GIGA:.1f} GB free, about {total} needed", ""
    if offloaded:
        found += f", {offloaded / _GIGA:.1f} of it by the chips"
        fix = "config.compute.remat='none' with config.compute.crop_frames=128 instead; or "
    if free >= need + offloaded:
        return passed("host memory", found)
    return failed("host memory", found, fix + "lower config.data.workers or config.data.prefetch")


def compile_cache(directory: str | None) -> Row:
    """Whether compiled programs can be kept where the configuration says."""
    name = "compile cache"
    if not directory:
        return passed(name, "none set: on accelerators a run keeps its own, in its workdir")
    if "://" in directory:
        return warned(name, f"{directory} is not tried", "see that hosts may write there")
    try:
        with tempfile.NamedTemporaryFile(prefix=".preflight-", dir=_existing(Path(directory))):
            pass
    except OSError as error:
        return failed(
            name,
            f"{directory} cannot be written to: {error.strerror}",
            "set config.compute.cache_dir to storage that all hosts may write to",
        )
    return passed(name, f"{directory} can be written to")


_CGROUP = Path("/sys/fs/cgroup")  # of the container


def _existing(path: Path) -> Path:
    """The path, or of its parents the nearest that exists: nothing is made to be tried."""
    while not path.exists():
        path = path.parent
    return path


def _free_memory() -> int | None:
    """Bytes that the host can still give, within the limit of our container."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free  # no limit
    cache = int(stat.get("active_file", 0)) + int(stat.get("inactive_file", 0))
    return min(free, limit - used + cache)  # files that were read are let go for us
