"""Whether the memory of a training process stays flat: resident set over many steps.

    python benchmarks/host_memory.py --packed=PACKED --teacher=TEACHER --out=DIR [--steps=2000]

Trains the student of `configs/tiny.py:stage1` with batch 8 (memory that leaks does so a step, not
a sample) and reads the resident set and the open files of the process and its children once a
second. Prints the growth between the first and the last fifth of the steps, and writes the series.
"""

import argparse
import json
import os
import statistics
import threading
import time
from pathlib import Path

from stage1_probe import tiny_stage1

from instap_jax import config_check
from instap_jax.train.loop import train
from instap_jax.train.metrics import read_metrics
from instap_jax.train.stop import StopRequest

PAGE = os.sysconf("SC_PAGE_SIZE")


def family() -> list[int]:
    """Process ids of this process and its children."""
    found, waiting = [], [os.getpid()]
    while waiting:
        process = waiting.pop()
        found.append(process)
        for task in Path(f"/proc/{process}/task").glob("*/children"):
            waiting += [int(child) for child in task.read_text().split()]
    return found


def sample() -> dict[str, float]:
    resident = files = 0
    for process in family():
        try:
            resident += int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE
            files += len(os.listdir(f"/proc/{process}/fd"))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended between the two looks
    return {"time": time.time(), "megabytes": resident / 1e6, "files": files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packed", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    config = tiny_stage1(args.packed, args.teacher, 0)
    config.steps = args.steps
    config.data.batch_size = 8
    config.data.workers = args.workers
    config_check.check(config)
    loaded = config_check.LoadedConfig(config=config, file="configs/tiny.py:stage1", overrides={})
    config_check.record(loaded, args.out)

    series, done = [], threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            series.append(sample())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        train(config, args.out, StopRequest())
    finally:
        done.set()
        watcher.join()
    lines = read_metrics(args.out)
    (args.out / "memory.json").write_text(json.dumps(series))
    bounds = [lines[round(share * (len(lines) - 1))] for share in (0.1, 0.3, 0.8, 1.0)]
    print("| steps | resident set, MB: median (highest) | open files: median |")
    print("|---|---|---|")
    for start, end in (bounds[:2], bounds[2:]):
        part = [s for s in series if start["time"] <= s["time"] <= end["time"]]
        size = [s["megabytes"] for s in part]
        files = statistics.median(s["files"] for s in part)
        middle = statistics.median(size)
        print(
            f"| {start['step']} to {end['step']} | {middle:.0f} ({max(size):.0f}) | {files:.0f} |"
        )
    waits = [line["data_wait_seconds"] / line["step_seconds"] for line in lines[len(lines) // 10 :]]
    print(f"\ndata wait: {100 * statistics.mean(waits):.2f} % of step time, batch 8")


if __name__ == "__main__":
    main()
