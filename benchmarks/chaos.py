"""Kills, failing storage and long runs: does a training lose anything?

    python benchmarks/chaos.py --out=DIR [--parts=kills,pod,...] [--kills=200]

Every part writes DIR/PART.json as it goes and is taken up where it stopped; DIR/report.md has them
all. `docs/reliability.md` says what the parts do and what they found.
  kills   SIGKILL at random moments of tiny trainings of both stages
  pod     the same to one process of a pod of two
  layouts trainings that go on, on 8, 4, 2 and 1 devices
  writes  every file operation of a save fails (needs a C compiler)
  disk    a full, a read-only and a vanished file system (needs the right to mount)
  soak    memory and open files over 5,000 steps
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import statistics
import sys
import time
from pathlib import Path

import chaos_child
from chaos_child import EVERY, STAGES, STEPS

import instap_jax
from instap_jax.progress import Progress
from instap_jax.train.metrics import TIMES

PRELOAD = (
    "chaos_child", "instap_jax.main", "instap_jax.train.loop", "instap_jax.commands.train",
    "instap_jax.evaluation.validation",
)  # fmt: skip


class Trainings:
    """Starts trainings from a process that has imported everything, as forks of it."""

    def __init__(self, out: Path):
        self.out, self.made = out, out / "made"
        out.mkdir(parents=True, exist_ok=True)
        _check_code(out / "code.txt")
        os.environ.update(
            JAX_PLATFORMS="cpu",
            JAX_COMPILATION_CACHE_DIR=str(out / "xla_cache"),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
            # Unoptimised code compiles four times faster; what is checked is equality.
            XLA_FLAGS="--xla_backend_optimization_level=0",
            PYTHONPATH=os.pathsep.join(filter(None, [*sys.path, os.environ.get("PYTHONPATH")])),
        )
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOAD))
        if not (self.made / "teacher" / "checkpoints").exists():
            shutil.rmtree(self.made, ignore_errors=True)
            self.made.mkdir(parents=True)
            process = self._context.Process(target=chaos_child.prepare, args=(self.made,))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit("the data could not be made")

    def start(self, stage: str, workdir: Path, attempt: int = 0, environment=None, **changes):
        """A running process; its notes are in `WORKDIR.notes`."""
        command = chaos_child.arguments(stage, self.made, workdir, **changes)
        args = (command, notes_of(workdir), attempt, environment or {})
        process = self._context.Process(target=chaos_child.train, args=args)
        process.start()
        return process

    def whole(self, stage: str, name: str, **changes) -> tuple[Path, float]:
        """An uninterrupted training, made once: its workdir, and its seconds with a warm cache."""
        workdir = self.out / name
        seconds = workdir.parent / f"{name}.seconds"
        if not seconds.exists():
            for _ in range(2):  # the first one fills the compile cache
                remove(workdir)
                begun = time.monotonic()
                process = self.start(stage, workdir, **changes)
                process.join()
                if process.exitcode:
                    raise SystemExit(f"{workdir} failed: {notes_of(workdir)}/output.log")
            seconds.write_text(f"{time.monotonic() - begun:.2f}")
        return workdir, float(seconds.read_text())


def _check_code(path: Path) -> None:
    """Other code may round differently: its trainings are not compared with this one's."""
    total = hashlib.sha256()
    for file in sorted(Path(instap_jax.__file__).parent.rglob("*.py")):
        total.update(file.read_bytes())
    if path.exists() and path.read_text() != total.hexdigest():
        raise SystemExit(f"{path.parent} holds results of other code; name another --out")
    path.write_text(total.hexdigest())


def notes_of(workdir: Path) -> Path:
    return workdir.parent / f"{workdir.name}.notes"


def remove(workdir: Path) -> None:
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.rmtree(notes_of(workdir), ignore_errors=True)


def lines(path: Path) -> list[dict]:
    """JSON lines; the last may be torn."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(text))
    return found


def compare(workdir: Path, whole: Path, processes: int = 1) -> dict[str, int]:
    """Counts what a training that was interrupted has otherwise than the uninterrupted one."""
    wrong_batches = lost = repeated = different = 0
    for process in range(processes):
        expected = {
            line["step"]: line["ids"]
            for line in lines(notes_of(whole) / f"batches-{process}.jsonl")
        }
        taken = lines(notes_of(workdir) / f"batches-{process}.jsonl")
        wrong_batches += sum(line["ids"] != expected[line["step"]] for line in taken)
        lost += len(expected.keys() - {line["step"] for line in taken})
        for before, after in itertools.pairwise(taken):
            if before["attempt"] == after["attempt"]:  # a step follows a step
                repeated += after["step"] != before["step"] + 1
        final = f"final-{process}"
        same = (notes_of(workdir) / final).read_text() == (notes_of(whole) / final).read_text()
        different += not same
    return {
        "wrong_batches": wrong_batches,
        "lost_batches": lost,
        "repeated_batches": repeated,
        "different_states": different,
        "different_metrics": int(timeless(workdir) != timeless(whole)),
        "different_best": int(best(workdir) != best(whole)),
    }


def timeless(workdir: Path) -> list[dict]:
    return [
        {key: value for key, value in line.items() if key not in TIMES}
        for line in lines(workdir / "metrics.jsonl")
    ]


def best(workdir: Path) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints-best").glob("*"))


def committed(workdir: Path) -> int:
    """The newest step whose checkpoint has its final name."""
    found = [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
    return max(found, default=0)


def kill_once(process, workdir: Path, after: float) -> dict | None:
    """Kills a training some seconds from now; None: it ended before."""
    process.join(after)
    if process.exitcode is not None:
        return None
    phase = notes_of(workdir) / "phase-0"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    where = phase.read_text().strip() if phase.exists() else "start"
    writing = any((workdir / "checkpoints").glob("*tmp*"))
    return {"phase": where, "writing_a_checkpoint": writing, "committed": committed(workdir)}


def run_killed(trainings: Trainings, stage: str, index: int) -> dict:
    """One training, killed several times, then left to its end and compared."""
    rng = random.Random(f"{stage}-{index}")
    whole, seconds = trainings.whole(stage, f"whole-{stage}")
    workdir = trainings.out / f"killed-{stage}"
    remove(workdir)
    kills, late_starts = [], 0
    for attempt in range(rng.randint(4, 12) + 1):
        last = committed(workdir)
        changes = {
            "data__workers": rng.choice((0, 0, 0, 1)),
            "data__prefetch": rng.choice((1, 4)),
            "data__device_prefetch": rng.choice((0, 2)),
        }
        process = trainings.start(stage, workdir, attempt, **changes)
        killed = kill_once(process, workdir, rng.uniform(0, seconds))
        taken = [
            line["step"]
            for line in lines(notes_of(workdir) / "batches-0.jsonl")
            if line["attempt"] == attempt
        ]
        late_starts += bool(taken) and taken[0] != last + 1
        if killed is None:
            break
        kills.append(killed)
    else:
        process = trainings.start(stage, workdir, attempt + 1)
        process.join()
    result = {"stage": stage, "index": index, "exit": process.exitcode, "kills": kills}
    if process.exitcode == 0:
        result |= compare(workdir, whole)
    else:
        shutil.copytree(workdir, trainings.out / f"failed-{stage}-{index}", dirs_exist_ok=True)
    return result | {"not_from_last_checkpoint": late_starts}


def part_kills(trainings: Trainings, args: argparse.Namespace) -> None:
    path = trainings.out / "kills.json"
    runs = read(path)
    with Progress("kills", args.kills, unit="kills", interval=20) as progress:
        progress.update(sum(len(run["kills"]) for run in runs))
        while sum(len(run["kills"]) for run in runs) < args.kills:
            stage = STAGES[len(runs) % len(STAGES)]
            runs.append(run_killed(trainings, stage, len(runs)))
            write(path, runs)
            report(trainings.out)
            progress.update(len(runs[-1]["kills"]), note=f"{len(runs)} trainings")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start_pod(trainings: Trainings, workdir: Path, attempt: int) -> list:
    port = free_port()
    return [
        trainings.start(
            "distill",
            workdir,
            attempt,
            {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
            },
            distributed__heartbeat_timeout=10,
        )
        for index in range(2)
    ]


def wait_all(processes: list, limit: float) -> float | None:
    """Seconds until all have ended; None, and they are killed, where some had not in time."""
    begun = time.monotonic()
    for process in processes:
        process.join(max(0.0, limit - (time.monotonic() - begun)))
    hanging = [process for process in processes if process.exitcode is None]
    for process in hanging:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    return None if hanging else time.monotonic() - begun


def part_pod(trainings: Trainings, args: argparse.Namespace) -> None:
    """Kills one process of two; the other has to end by itself, and both together go on."""
    path, whole = trainings.out / "pod.json", trainings.out / "whole-pod"
    seconds = trainings.out / "whole-pod.seconds"
    if not seconds.exists():
        for _ in range(2):
            remove(whole)
            begun = time.monotonic()
            processes = start_pod(trainings, whole, 0)
            wait_all(processes, 600)
            if any(process.exitcode for process in processes):
                raise SystemExit(f"the pod failed: {notes_of(whole)}/output.log")
        seconds.write_text(f"{time.monotonic() - begun:.2f}")
    runs, workdir = read(path), trainings.out / "killed-pod"
    with Progress("pod", args.pod_kills, unit="kills", interval=20) as progress:
        progress.update(sum(len(run["kills"]) for run in runs))
        while sum(len(run["kills"]) for run in runs) < args.pod_kills:
            rng = random.Random(f"pod-{len(runs)}")
            remove(workdir)
            kills = []
            for attempt in range(5):
                processes = start_pod(trainings, workdir, attempt)
                victim = rng.randrange(2)
                if attempt < 4:
                    processes[victim].join(rng.uniform(0, float(seconds.read_text())))
                else:
                    wait_all(processes, 600)
                if processes[victim].exitcode is not None:
                    wait_all(processes, 60)
                    break
                os.kill(processes[victim].pid, signal.SIGKILL)
                processes[victim].join()
                kills.append({"victim": victim, "survivor_ended_after": wait_all(processes, 90)})
            codes = [process.exitcode for process in processes]
            result = {"exit": max(codes, key=abs), "kills": kills}
            result |= compare(workdir, whole, 2) if not any(codes) else {}
            runs.append(result)
            write(path, runs)
            report(trainings.out)
            progress.update(len(kills))


def part_layouts(trainings: Trainings, args: argparse.Namespace) -> None:
    """A quarter of the steps on each layout; batches are the same, losses to rounding."""
    del args
    results = {}
    for stage in STAGES:
        alone = {"data__group_size": 1, "evaluation__every": None}
        whole, _ = trainings.whole(stage, f"whole-{stage}-alone", **alone)
        workdir = trainings.out / f"moved-{stage}"
        remove(workdir)
        for attempt, devices in enumerate((8, 4, 2, 1)):
            process = trainings.start(
                stage,
                workdir,
                attempt,
                {"CHAOS_DEVICES": str(devices)},
                stop_at=STEPS * (attempt + 1) // 4,
                data__workers=attempt % 2,
                **alone,
            )
            process.join()
            if process.exitcode:
                raise SystemExit(f"{workdir} failed: {notes_of(workdir)}/output.log")
        found = compare(workdir, whole)
        losses = [
            [line["loss"] for line in lines(run / "metrics.jsonl")] for run in (workdir, whole)
        ]
        results[stage] = {name: found[name] for name in ("wrong_batches", "lost_batches")} | {
            "steps": len(losses[0]),
            "largest_relative_difference_of_the_loss": max(
                abs(a - b) / abs(b) for a, b in zip(*losses, strict=True)
            ),
        }
        write(trainings.out / "layouts.json", results)


def part_soak(trainings: Trainings, args: argparse.Namespace) -> None:
    workdir = trainings.out / "soak"
    remove(workdir)
    process = trainings.start(
        "distill", workdir, steps=args.steps, checkpoint__every=250, log__every=50
    )
    memory = notes_of(workdir) / "memory.jsonl"
    with Progress("soak", args.steps, unit="steps", interval=20) as progress:
        done = 0
        while process.exitcode is None:
            process.join(5)
            found = lines(memory)
            now = found[-1]["step"] if found else 0
            progress.update(now - done)
            done = now
    found = lines(memory)
    fifth = max(len(found) // 5, 1)
    result = {"exit": process.exitcode, "steps": found[-1]["step"], "samples": len(found)}
    # The first fifth holds the compilation and the filling of buffers: the second is the start.
    for name in ("megabytes", "files", "threads"):
        first, last = (
            statistics.median(line[name] for line in part)
            for part in (found[fifth : 2 * fifth], found[-fifth:])
        )
        result[name] = {"second_fifth": first, "last_fifth": last}
    write(trainings.out / "soak.json", result)


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text()) if path.exists() else []


def write(path: Path, content) -> None:
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(aside, path)


def report(out: Path) -> str:
    """Writes report.md from what the parts have left so far."""
    text = [f"# Chaos report\n\n{STEPS} steps a training, a checkpoint every {EVERY}.\n"]
    faults = (
        "wrong_batches", "lost_batches", "repeated_batches", "different_states",
        "different_metrics", "different_best", "not_from_last_checkpoint",
    )  # fmt: skip
    for part in ("kills", "pod"):
        runs = read(out / f"{part}.json")
        if not runs:
            continue
        kills = [kill for run in runs for kill in run["kills"]]
        text.append(f"## {part}\n\n{len(kills)} kills in {len(runs)} trainings\n")
        text.append("| | count |\n|---|---|")
        text.append(f"| trainings that did not end well | {sum(r['exit'] != 0 for r in runs)} |")
        text += [f"| {name} | {sum(run.get(name, 0) for run in runs)} |" for name in faults]
        if part == "kills":
            text.append(f"| killed while writing a checkpoint | "
                        f"{sum(kill['writing_a_checkpoint'] for kill in kills)} |")  # fmt: skip
            phases = sorted({kill["phase"] for kill in kills})
            counts = (f"{name} {sum(k['phase'] == name for k in kills)}" for name in phases)
            text.append(f"| killed during | {', '.join(counts)} |")
        else:
            ends = [kill["survivor_ended_after"] for kill in kills]
            text.append(f"| survivors that hung | {ends.count(None)} |")
            known = [end for end in ends if end is not None]
            text.append(f"| longest time to the survivor's end | {max(known, default=0):.0f} s |")
        text.append("")
    for part in ("layouts", "writes", "disk", "soak"):
        if (out / f"{part}.json").exists():
            content = (out / f"{part}.json").read_text()
            text.append(f"## {part}\n\n```json\n{content}```\n")
    page = "\n".join(text)
    (out / "report.md").write_text(page)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of results")
    parser.add_argument("--parts", default="kills,pod,layouts,writes,disk,soak")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--pod_kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5000, help="of the soak")
    args = parser.parse_args()
    parts = {"kills": part_kills, "pod": part_pod, "layouts": part_layouts, "soak": part_soak}
    import chaos_storage

    parts |= {"writes": chaos_storage.part_writes, "disk": chaos_storage.part_disk}
    unknown = set(args.parts.split(",")) - parts.keys()
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    args.out = args.out.absolute()
    trainings = Trainings(args.out)
    for part in args.parts.split(","):
        parts[part](trainings, args)
    print(report(args.out))


if __name__ == "__main__":
    main()
