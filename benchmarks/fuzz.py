"""Feeds damaged input to every parser that reads what others wrote: nothing but our own error.

  python benchmarks/fuzz.py [--inputs=1000000] [--targets=annotation,boxes] [--processes=2]

Input number i of a target is a mutation of a valid one, drawn from (seed, target, i) alone, so that
a run is the same on any number of processes and `--first` goes on where another ended. A target
(`fuzz_targets.py`) raises `UserError` or the fault that its documentation names; whatever else
comes out, an answer that breaks a promise, or one that takes longer than `--limit` seconds, is
printed with the smallest input that still does it, and the exit code is 1.
"""

import argparse
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import fuzz_targets

from instap_jax.data.processes import exit_with_parent
from instap_jax.progress import Progress

CHUNK_SECONDS = 2.0  # of work handed to a process at once, about
SHRINK_TRIES = 2000


class TooSlow(Exception):
    """A target took longer than the limit for one input."""


def main() -> int:
    args = _arguments()
    shares = {name: fuzz_targets.SHARES[name] for name in args.targets.split(",")}
    total = sum(shares.values())
    tasks = [
        chunk
        for name, share in shares.items()
        for chunk in _chunks(name, args.first, max(1, round(args.inputs * share / total)))
    ]
    random.Random(0).shuffle(tasks)  # so that the time left is told from all targets alike
    done, seconds, failures = Counter(), Counter(), {}
    with (
        tempfile.TemporaryDirectory() as scratch,
        Progress("fuzzing", sum(stop - start for _, start, stop in tasks), unit="inputs") as bar,
    ):
        for name, count, spent, found in _work_all(tasks, args, scratch):
            done[name] += count
            seconds[name] += spent
            for failure in found:
                failures.setdefault((name, failure["where"]), failure)
            bar.update(count, f"{len(failures)} failures" if failures else "")
    _print(done, seconds, failures)
    if args.json:
        figures = {n: {"inputs": done[n], "cpu_seconds": round(seconds[n], 1)} for n in done}
        args.json.write_text(json.dumps({"seed": args.seed, "targets": figures}, indent=1) + "\n")
    return 1 if failures else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=float, default=1e6, help="over all targets")
    parser.add_argument("--targets", default=",".join(fuzz_targets.SHARES))
    parser.add_argument("--first", type=int, default=0, help="number of each target's first input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--limit", type=float, default=20.0, help="seconds for one input")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    unknown = set(args.targets.split(",")) - fuzz_targets.SHARES.keys()
    if unknown:
        parser.error(f"no target {', '.join(unknown)}; known: {', '.join(fuzz_targets.SHARES)}")
    return args


def _chunks(name: str, first: int, count: int) -> Iterator[tuple[str, int, int]]:
    size = max(1, round(CHUNK_SECONDS * fuzz_targets.RATES[name]))
    for start in range(first, first + count, size):
        yield name, start, min(start + size, first + count)


def _work_all(tasks, args: argparse.Namespace, scratch: str) -> Iterator[tuple]:
    """Yields (target, inputs, seconds, failures) of every task as it is finished."""
    if args.processes == 1:
        _enter(scratch)
        yield from (_work(task, args.seed, args.limit) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        args.processes, context, initializer=_enter, initargs=(scratch,)
    ) as pool:
        # A process that dies (a crash of a C library) ends the run with its traceback.
        futures = [pool.submit(_work, task, args.seed, args.limit) for task in tasks]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()


def _enter(scratch: str) -> None:
    if multiprocessing.parent_process() is not None:
        exit_with_parent()
    fuzz_targets.prepare(tempfile.mkdtemp(dir=scratch))
    signal.signal(signal.SIGALRM, _alarm)


def _alarm(*_) -> None:
    raise TooSlow


def _work(task: tuple[str, int, int], seed: int, limit: float) -> tuple:
    """Runs inputs [start, stop) of a target; each failure is shrunk and described once."""
    name, start, stop = task
    target, failures, begun = fuzz_targets.make(name), {}, time.process_time()
    for index in range(start, stop):
        data = target.draw(random.Random(f"{seed}/{name}/{index}"))
        where = outcome(target.run, data, limit)
        if where and where not in failures:
            small = shrink(data, lambda d, w=where: outcome(target.run, d, limit) == w)
            failures[where] = {"where": where, "index": index, "input": repr(small)}
    return name, stop - start, time.process_time() - begun, list(failures.values())


def outcome(run: Callable[[bytes], None], data: bytes, limit: float) -> str:
    """Returns '' where `run` keeps its promise, else the exception and the place it came from."""
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        with contextlib.suppress(*fuzz_targets.DOCUMENTED):
            run(data)
        return ""
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "instap_jax" in f.filename] or frames
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        return f"{type(error).__name__} at {place}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def shrink(data: bytes, fails: Callable[[bytes], bool]) -> bytes:
    """Leaves out pieces of an input, halving their size, as long as it goes on failing."""
    tries, size = SHRINK_TRIES, max(1, len(data) // 2)
    while tries > 0:
        at, smaller = 0, False
        while at < len(data) and tries > 0:
            less = data[:at] + data[at + size :]
            tries -= 1
            if fails(less):
                data, smaller = less, True
            else:
                at += size
        if size == 1 and not smaller:
            break
        size = max(1, size // 2)
    return data


def _print(done: Counter, seconds: Counter, failures: dict) -> None:
    print(f"{'target':16}{'inputs':>12}{'CPU s':>10}{'inputs/CPU s':>14}{'failures':>10}")
    for name in done:
        found = sum(target == name for target, _ in failures)
        rate = done[name] / max(seconds[name], 1e-9)
        print(f"{name:16}{done[name]:>12,}{seconds[name]:>10.0f}{rate:>14,.0f}{found:>10}")
    print(f"{'all':16}{done.total():>12,}{seconds.total():>10.0f}{'':14}{len(failures):>10}")
    for (name, where), failure in failures.items():
        print(f"\n{name}: {where}, input {failure['index']}:\n  {failure['input']}")


if __name__ == "__main__":
    sys.exit(main())
