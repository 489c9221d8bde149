"""The parts of `chaos.py` in which storage fails."""

import collections
import contextlib
import ctypes
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from instap_jax.progress import Progress

SOURCE = Path(__file__).with_name("failing_writes.c")
MODES = {"one operation, EIO": (errno.EIO, 0), "it and all later ones, ENOSPC": (errno.ENOSPC, 1)}


def part_writes(trainings, args) -> None:
    """Every file operation of a save fails once, and once with all that follow it."""
    del args
    library = trainings.out / "failing_writes.so"
    compiled = subprocess.run(["cc", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl", "-pthread"])
    if compiled.returncode:
        raise SystemExit("part 'writes' needs a C compiler")
    result = trainings.out / "writes.json"
    subprocess.run(
        [sys.executable, __file__, str(trainings.out / "writes"), str(result)],
        env=os.environ | {"LD_PRELOAD": str(library)},
        check=True,
    )


def fail_every_write(directory: Path, result: Path) -> None:
    """Runs with the library loaded: saves a tiny state over and over."""
    from instap_jax.train.saving import Checkpointer

    library = ctypes.CDLL(None)
    library.chaos_failed.restype = ctypes.c_char_p
    shutil.rmtree(directory, ignore_errors=True)
    saver = Checkpointer(str(directory / "before"), every=2, keep=2)
    for step in (2, 4):
        saver.save(_state(step), step, data={}, meta={}, wait=True)
    saver.close()
    checkpoints = str(directory / "run" / "checkpoints").encode()
    table: dict[str, dict] = {}
    for mode, (error, sticky) in MODES.items():
        outcomes: collections.Counter[str] = collections.Counter()
        by_operation: dict[str, collections.Counter[str]] = {}
        number = 1
        with Progress(mode, unit="operations", interval=10) as progress:
            while True:
                outcome = _save_under(library, directory, checkpoints, number, error, sticky)
                name = library.chaos_failed().decode()
                if not name:
                    break  # a save has fewer operations than this
                outcomes[outcome] += 1
                by_operation.setdefault(name, collections.Counter())[outcome] += 1
                number += 1
                progress.update()
                table[mode] = {
                    "operations": number - 1,
                    "outcomes": dict(outcomes),
                    "by_operation": {name: dict(counts) for name, counts in by_operation.items()},
                }
                result.write_text(json.dumps(table, indent=1) + "\n")


def _save_under(library, directory: Path, prefix: bytes, number: int, error: int, sticky: int):
    """Saves step 6 after 2 and 4 while an operation fails; says how it ended, in words."""
    from instap_jax.errors import UserError
    from instap_jax.train.saving import Checkpointer

    shutil.rmtree(directory / "run", ignore_errors=True)
    shutil.copytree(directory / "before", directory / "run")
    workdir = str(directory / "run")
    saver = Checkpointer(workdir, every=2, keep=2)
    library.chaos_arm(prefix, number, error, sticky)
    try:
        saver.save(_state(6), 6, data={}, meta={}, wait=True)
        outcome = "saved"
    except UserError as fault:
        outcome = "one line" if "\n" not in str(fault) else "SEVERAL LINES"
    except BaseException as fault:
        outcome = f"{type(fault).__name__} INSTEAD OF ONE LINE"
    library.chaos_disarm()
    with contextlib.suppress(UserError):
        saver.close()
    saver = Checkpointer(workdir, every=2, keep=2)
    state, _ = saver.restore(_state(0))
    saver.close()
    step = int(state.step)
    if float(state.params["kernel"].get_value()[0]) != step:
        return "WRONG CONTENT"
    if step not in ((6,) if outcome == "saved" else (4, 6)):
        return f"LOST, BACK AT {step}"
    return f"{outcome}; goes on from {'the new one' if step == 6 else 'the one before'}"


def _state(step: int):
    import jax.numpy as jnp
    from flax import nnx

    from instap_jax.train.state import TrainState

    return TrainState(
        step=jnp.int32(step),
        params=nnx.State({"kernel": nnx.Param(jnp.full(3, float(step)))}),
        opt_state=(jnp.float32(step),),
        refused=jnp.int32(0),
    )


def part_disk(trainings, args) -> None:
    """A training on a small file system that is full, turns read-only, or goes away."""
    from chaos import compare, notes_of, remove, write

    del args
    whole, _ = trainings.whole("distill", "whole-distill")
    place, results = trainings.out / "small", {}
    place.mkdir(exist_ok=True)
    for name, harm, mend in (
        ("full", None, ["mount", "-o", "remount,size=64m", str(place)]),
        ("read-only", ["mount", "-o", "remount,ro", str(place)],
         ["mount", "-o", "remount,rw", str(place)]),
        ("vanished", ["umount", "-l", str(place)], None),
    ):  # fmt: skip
        remove(trainings.out / "disk")
        backing = trainings.out / "backing"
        shutil.rmtree(backing, ignore_errors=True)
        backing.mkdir()
        if name == "vanished":
            attach = ["mount", "--bind", str(backing), str(place)]
        else:
            size = "size=600k" if name == "full" else "size=64m"
            attach = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(place)]
        subprocess.run(attach, check=True)
        try:
            changes = {"checkpoint__keep": 100, "checkpoint__retries": 0}
            process = trainings.start("distill", place / "disk", 0, **changes)
            while harm and process.exitcode is None and not _has_step(place / "disk"):
                time.sleep(0.02)
            if harm:
                subprocess.run(harm, check=True)
            process.join()
            results[name] = {"exit": process.exitcode}
            if mend or name == "vanished":
                subprocess.run(mend or attach, check=True)
            log = notes_of(place / "disk") / "output.log"
            results[name]["said"] = _last_error(log)
            process = trainings.start("distill", place / "disk", 1, **changes)
            process.join()
            results[name]["exit_after_mending"] = process.exitcode
            if process.exitcode == 0:
                results[name] |= compare(place / "disk", whole)
        finally:
            subprocess.run(["umount", "-l", str(place)])
        write(trainings.out / "disk.json", results)


def _has_step(workdir: Path) -> bool:
    return any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


def _last_error(log: Path) -> str:
    said = [line for line in log.read_text().splitlines() if line.startswith("instap train:")]
    return said[-1] if said else "nothing"


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    fail_every_write(Path(sys.argv[1]), Path(sys.argv[2]))
