"""A pod of N processes on this machine, k CPU devices each: the rehearsal of a real one.

    python launch/local_pod.py --processes=2 --devices=4 -- \\
      train --config=configs/tiny.py:stage1 --workdir=DIR ...

Each process is `instap VERB ...` with the environment that `instap_jax.distributed` reads. Their
output comes back with the number of the process before every line, and goes to
DIR.launch/process-N.log. When one process fails, the others are given --grace seconds to notice and
are then ended, and the whole pod is started again and resumes, as `supervise.py` says. SIGTERM and
Ctrl-C go to every process. Exit code: 0, or that of the process that explains the failure.
"""

import argparse
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from supervise import (
    DONE,
    Signals,
    add_flags,
    exit_code,
    launch_dir,
    newest_step,
    pod_code,
    policy_of,
    say,
    split_command,
    supervise,
)

POLL = 0.1  # seconds between looks at the processes
KILL_AFTER = 10.0  # seconds between SIGTERM and SIGKILL


def main(argv: list[str] | None = None) -> int:
    flags, verb = split_command(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=4, help="CPU devices of each process")
    parser.add_argument(
        "--grace",
        type=float,
        default=20.0,
        metavar="SECONDS",
        help="for the others to end once one has failed (%(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and end")
    add_flags(parser)
    args = parser.parse_args(flags)
    if not verb:
        parser.error("no verb after --, such as: -- train --config=... --workdir=...")
    if args.processes < 1 or args.devices < 1:
        parser.error("--processes and --devices must be 1 or more")
    workdir = workdir_of(verb)
    if args.dry_run:
        for index in range(args.processes):
            print(shown(environment(index, args, "127.0.0.1:PORT"), command(verb)))
        return 0
    logs = launch_dir(workdir)
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"{logs} cannot be made: {error.strerror}")
    with Signals() as signals:
        return supervise(
            lambda: Pod(args, verb, logs, signals).run(),
            progress=lambda: newest_step(workdir),
            policy=policy_of(args),
            stopped=signals.asked,
            sleep=signals.sleep,
        )


def workdir_of(verb: list[str]) -> Path:
    """The value of --workdir in the verb's flags, of several the last; `pod` where it has none."""
    workdir = "pod"
    for arg, after in zip(verb, [*verb[1:], workdir]):
        name, equals, value = arg.partition("=")
        if name in ("--workdir", "-workdir"):
            workdir = value if equals else after
    return Path(workdir)


def command(verb: list[str]) -> list[str]:
    return [sys.executable, "-u", "-m", "instap_jax", *verb]


def environment(index: int, args: argparse.Namespace, coordinator: str) -> dict[str, str]:
    """What makes process `index` one of the pod's."""
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(args.devices),
        "JAX_COORDINATOR_ADDRESS": coordinator,
        "JAX_NUM_PROCESSES": str(args.processes),
        "JAX_PROCESS_ID": str(index),
    }


def shown(variables: dict[str, str], words: list[str]) -> str:
    return " ".join([f"{name}={value}" for name, value in variables.items()] + [shlex.join(words)])


class Pod:
    """One start of all processes."""

    def __init__(self, args: argparse.Namespace, verb: list[str], logs: Path, signals: Signals):
        self._args, self._verb, self._logs, self._signals = args, verb, logs, signals
        self._readers: list[threading.Thread] = []

    def run(self) -> int:
        """Runs until all processes have ended; returns their common exit code."""
        coordinator = f"127.0.0.1:{_free_port()}"
        processes = [self._start(index, coordinator) for index in range(self._args.processes)]
        self._signals.running = processes
        codes = self._wait(processes)
        for reader in self._readers:
            reader.join(timeout=5)
        return pod_code(codes)

    def _start(self, index: int, coordinator: str) -> subprocess.Popen:
        process = subprocess.Popen(
            command(self._verb),
            env=os.environ | environment(index, self._args, coordinator),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C of the terminal comes through us alone, once
        )
        reader = threading.Thread(target=self._copy, args=(index, process), daemon=True)
        reader.start()
        self._readers.append(reader)
        return process

    def _copy(self, index: int, process: subprocess.Popen) -> None:
        """The lines of a process to its log and, with its number, to ours."""
        with (self._logs / f"process-{index}.log").open("ab") as log:
            for line in process.stdout:
                log.write(line)
                log.flush()
                text = line.decode(errors="replace").rstrip("\n")
                print(f"[{index}] {text}", flush=True)

    def _wait(self, processes: list[subprocess.Popen]) -> list[int]:
        """Exit codes in the order of ending; ends the rest after the first failure."""
        left, codes, deadline = dict(enumerate(processes)), [], None
        while left:
            for index, process in list(left.items()):
                if process.poll() is not None:
                    codes.append(exit_code(process.returncode))
                    del left[index]
                    print(f"[{index}] exit code {codes[-1]}", flush=True)
                    if codes[-1] != DONE and deadline is None:
                        deadline = time.monotonic() + self._args.grace
                        say(f"process {index} failed: the others have {self._args.grace:g} s")
            if deadline is not None and time.monotonic() > deadline:
                for process in left.values():
                    _end(process)
                deadline = float("inf")
            time.sleep(POLL)
        return codes


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(timeout=KILL_AFTER)
    except subprocess.TimeoutExpired:
        process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
