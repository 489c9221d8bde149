"""Starts a command again until it is done: back-off, and a limit on restarts without progress.

    python launch/supervise.py --workdir=DIR [--limit=3] -- COMMAND [ARGUMENT ...]

Exit codes 0 (done), 2 (a fault of the input: another start would meet it again) and 130 (Ctrl-C)
are final; anything else, 75 (preempted) included, is followed by another start, which resumes from
the newest checkpoint of DIR. Progress is a newer checkpoint there. After --limit starts in a row
from the same checkpoint it gives up with the command's exit code.

A pod as a whole has one supervisor where one process starts it all (local_pod.py, tpu.py, Slurm).
Where the platform restarts (GKE), `--once --run-id=ID` runs the command once and keeps the count in
DIR.launch/starts.jsonl, so that the limit holds across restarts there, too; it then exits with 2.

Standard library only: it runs where nothing is installed yet.
"""

import argparse
import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

DONE, USER_ERROR, PREEMPTED, INTERRUPTED = 0, 2, 75, 130  # instap_jax/errors.py
FINAL = (DONE, USER_ERROR, INTERRUPTED)
# Errors of the system that another start would meet again.
_MISTAKES = (
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """When to start again.

    Attributes:
      limit: starts in a row from the same checkpoint before giving up.
      delay, max_delay: seconds before the first such restart, doubled each time, and at most.
      final: exit codes that end it.
    """

    limit: int = 3
    delay: float = 5.0
    max_delay: float = 300.0
    final: tuple[int, ...] = FINAL

    def wait(self, starts: int) -> float:
        """Seconds before the next start, after `starts` from the same checkpoint."""
        return min(self.delay * 2 ** max(starts - 1, 0), self.max_delay)


def newest_step(workdir: Path) -> int | None:
    """The newest complete checkpoint of a run: its directory is a number once it is complete."""
    folder = workdir / "checkpoints"
    try:
        steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
    except OSError:
        return None
    return max(steps, default=None)


def supervise(
    attempt: Callable[[], int],
    *,
    progress: Callable[[], int | None],
    policy: Policy,
    stopped: Callable[[], bool] = lambda: False,
    sleep: Callable[[float], None] = time.sleep,
    starts: int = 0,
) -> int:
    """Calls `attempt` until its exit code is final or it makes no progress; returns that code.

    Args:
      attempt: runs the command once and returns its exit code.
      progress: the newest checkpoint's step.
      stopped: whether a signal has asked this supervisor itself to end.
      starts: that were made before from the present checkpoint.
    """
    while True:
        before = progress()
        say(f"start from {_step(before)}")
        code = exit_code(attempt())
        after = progress()
        starts = starts + 1 if after == before else 0  # from where the next one starts
        if code in policy.final or stopped():
            say(f"ended with exit code {code} at {_step(after)}")
            return code
        if starts >= policy.limit:
            say(f"exit code {code}; gave up after {starts} starts from {_step(after)}")
            return code
        seconds = policy.wait(starts)
        say(f"exit code {code} at {_step(after)}; again in {seconds:g} s")
        sleep(seconds)
        if stopped():
            return code


def exit_code(code: int) -> int:
    """As a shell says it: a process that signal n ended has 128 + n."""
    return 128 - code if code < 0 else code


def pod_code(codes: list[int]) -> int:
    """One exit code for processes that ended with `codes`, in the order in which they ended.

    A fault of the input and Ctrl-C explain what the others then died of; else the first failure
    does. Preempted is a pod of which every process was, or had finished.
    """
    failures = [code for code in codes if code != DONE]
    for cause in (USER_ERROR, INTERRUPTED):
        if cause in failures:
            return cause
    crashes = [code for code in failures if code != PREEMPTED]
    return (crashes or failures or [DONE])[0]


def say(text: str) -> None:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S")
    print(f"[supervisor {stamp}] {text}", file=sys.stderr, flush=True)


def _step(step: int | None) -> str:
    return "no checkpoint" if step is None else f"step {step}"


class Signals:
    """Context in which SIGTERM and SIGINT are handed on: `hand_on(number)` for each, which by
    default sends it to the processes that `running` lists."""

    def __init__(self, hand_on: Callable[[int], None] | None = None):
        self.running: list[subprocess.Popen] = []
        self._hand_on = hand_on or self._send
        self._asked = False

    def __enter__(self) -> "Signals":
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def asked(self) -> bool:
        return self._asked

    def sleep(self, seconds: float) -> None:
        """Sleeps, but not on after a signal."""
        end = time.monotonic() + seconds
        while not self._asked and time.monotonic() < end:
            time.sleep(0.05)

    def _handle(self, number: int, frame) -> None:
        del frame
        self._asked = True
        self._hand_on(number)

    def _send(self, number: int) -> None:
        for process in self.running:
            if process.poll() is None:
                process.send_signal(number)


class Starts:
    """The record of starts, one JSON line each, in `WORKDIR.launch/starts.jsonl`.

    Beside the workdir, not in it: `instap train` refuses a workdir with strange files.
    """

    def __init__(self, workdir: Path, run_id: str, worker: str):
        self._path = launch_dir(workdir) / f"starts{'-' + worker if worker else ''}.jsonl"
        self._run_id = run_id

    def count(self, step: int | None) -> int:
        """Starts of this run, the last ones in a row, from the checkpoint `step`."""
        try:
            texts = self._path.read_text(errors="replace").splitlines()
        except OSError:
            return 0
        count = 0
        for line in map(_parsed, reversed(texts)):
            if line.get("run_id") != self._run_id:  # of another run, or torn by a crash
                continue
            if line.get("step") != step:
                break
            count += 1
        return count

    def add(self, step: int | None) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = {"time": time.time(), "run_id": self._run_id, "step": step}
        with self._path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
            torn = file.read(1) not in (b"", b"\n")  # by a crash: it costs itself alone
            file.write(b"\n" * torn + json.dumps(line).encode() + b"\n")


def _parsed(line: str) -> dict:
    """A line of the record; {} where it cannot be read."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def launch_dir(workdir: Path) -> Path:
    """Where launchers keep logs and records of a run: a sibling of its workdir."""
    return workdir.absolute().with_name(workdir.absolute().name + ".launch")


def add_limit(parser: argparse.ArgumentParser) -> None:
    """The flag of `Policy.limit`, for a launcher whose platform does the waiting."""
    parser.add_argument(
        "--limit",
        type=_positive,
        default=Policy.limit,
        metavar="N",
        help="give up after N starts from the same checkpoint (%(default)s)",
    )


def add_flags(parser: argparse.ArgumentParser, *, delay: float = Policy.delay) -> None:
    """The flags of `Policy`, for every launcher that supervises."""
    add_limit(parser)
    parser.add_argument(
        "--delay",
        type=float,
        default=delay,
        metavar="SECONDS",
        help="before the first restart; doubled each time (%(default)s)",
    )


def policy_of(args: argparse.Namespace) -> Policy:
    return Policy(limit=args.limit, delay=args.delay)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def split_command(argv: list[str]) -> tuple[list[str], list[str]]:
    """(flags of the launcher, the command after `--`)."""
    if "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def main(argv: list[str] | None = None) -> int:
    try:
        return _main(argv)
    except OSError as error:  # no such command, no place for the record of starts
        say(f"{error.filename}: {error.strerror}")
        return USER_ERROR if error.errno in _MISTAKES else 1  # shared storage fails at times


def _main(argv: list[str] | None) -> int:
    flags, command = split_command(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--workdir", required=True, type=Path, help="whose checkpoints are progress"
    )
    parser.add_argument("--once", action="store_true", help="the platform restarts, not we")
    parser.add_argument("--run-id", default="", help="counts starts across supervisors")
    parser.add_argument("--worker", default="", help="which of the pod's, in the record's name")
    parser.add_argument(
        "--preempted-is-final",
        action="store_true",
        help="hand 75 back: this place is about to go away",
    )
    add_flags(parser)
    args = parser.parse_args(flags)
    if not command:
        parser.error("no command after --")
    policy = policy_of(args)
    if args.preempted_is_final:
        policy = dataclasses.replace(policy, final=(*FINAL, PREEMPTED))
    step, starts = newest_step(args.workdir), 0
    record = Starts(args.workdir, args.run_id, args.worker) if args.run_id else None
    if record:
        starts = record.count(step)
        if starts >= policy.limit:
            say(f"gave up: {starts} starts of {args.run_id} from {_step(step)}")
            return USER_ERROR
    with Signals() as signals:

        def attempt() -> int:
            if record:
                record.add(newest_step(args.workdir))
            process = subprocess.Popen(command, start_new_session=True)
            signals.running = [process]
            return process.wait()

        if args.once:
            return exit_code(attempt())
        return supervise(
            attempt,
            progress=lambda: newest_step(args.workdir),
            policy=policy,
            stopped=signals.asked,
            sleep=signals.sleep,
            starts=starts,
        )


if __name__ == "__main__":
    sys.exit(main())
