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
    from chaos import compare, remove, write

    del args
    whole, _ = trainings.whole("distill", "whole-distill")
    place, backing, results = trainings.out / "disk", trainings.out / "backing", {}
    shutil.rmtree(backing, ignore_errors=True)
    remove(place)
    backing.mkdir()
    bound = ["mount", "--bind", str(backing), str(place)]
    for name, attach, harm, mend in (
        ("full", _tmpfs(place, "600k"), None, _remount(place, "size=64m")),
        ("read-only", _tmpfs(place, "64m"), _remount(place, "ro"), _remount(place, "rw")),
        ("vanished", bound, ["umount", "-l", str(place)], bound),
    ):
        remove(place)
        place.mkdir()
        subprocess.run(attach, check=True)
        try:
            results[name] = _train_on(trainings, place, name, harm, mend)
            if results[name]["exit_after_mending"] == 0:
                results[name] |= compare(place, whole)
        finally:
            subprocess.run(["umount", "-l", str(place)])
        write(trainings.out / "disk.json", results)


def _tmpfs(place: Path, size: str) -> list[str]:
    return ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]


def _remount(place: Path, option: str) -> list[str]:
    return ["mount", "-o", f"remount,{option}", str(place)]


def _train_on(trainings, place: Path, name: str, harm: list[str] | None, mend: list[str]) -> dict:
    """A training that meets the fault, and the same command once it is mended."""
    from chaos import notes_of

    changes = {"checkpoint__keep": 100, "checkpoint__retries": 0}
    if name == "read-only":  # no file of a file system may be open for writing as it turns so
        process = trainings.start("distill", place, 0, stop_at=8, **changes)
        process.join()
        subprocess.run(harm, check=True)
        process = trainings.start("distill", place, 1, **changes)
    else:
        process = trainings.start("distill", place, 1, **changes)
        while harm and process.exitcode is None and not _has_step(place):
            time.sleep(0.02)
        if harm:
            subprocess.run(harm, check=True)
    process.join()
    found = {"exit": process.exitcode, "said": _last_error(notes_of(place) / "output.log")}
    subprocess.run(mend, check=True)
    process = trainings.start("distill", place, 2, **changes)
    process.join()
    return found | {"exit_after_mending": process.exitcode}


def _has_step(workdir: Path) -> bool:
    return any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


def _last_error(log: Path) -> str:
    said = [line for line in log.read_text().splitlines() if line.startswith("instap train:")]
    return said[-1] if said else "nothing"


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    fail_every_write(Path(sys.argv[1]), Path(sys.argv[2]))
