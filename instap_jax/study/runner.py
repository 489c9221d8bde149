"""Runs the commands of a study, each in a process of its own, some at a time.

A fresh process for every training: no compiled program or JAX state of one run reaches the next.
Children are in sessions of their own, so that Ctrl-C reaches this process alone, which hands it on:
a training then saves the step it is in.
"""

import collections
import contextlib
import dataclasses
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import instap_jax
from instap_jax import config_check
from instap_jax.errors import UserError
from instap_jax.progress import Progress
from instap_jax.study.runs import Run
from instap_jax.train.stop import StopRequest

_POLL_SECONDS = 1.0
# Of every process that shares the machine with others, besides the cores it may run on.
_ONE_SHARE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# XLA's CPU programs take fresh memory every step; in huge pages that is a fifth faster.
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_SINGLE_CORE = "--xla_cpu_multi_thread_eigen=false"


@dataclasses.dataclass
class _Active:
    """A run whose command is being executed; `slot`: which share of the cores it has."""

    run: Run
    slot: int
    phase: str
    process: subprocess.Popen
    step: int


@contextlib.contextmanager
def locked(out: Path) -> Iterator[int]:
    """Holds a study's directory for one process; gives the descriptor that children inherit.

    A training that outlives this process keeps it locked, so that no second one joins it.

    Raises:
      UserError: it cannot be made, or another study runs there.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise UserError(f"--out={out}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{out}: another `instap ablate` or a run of it is at work") from error
        yield descriptor
    finally:
        os.close(descriptor)


class Runner:
    """Executes runs, `jobs` at a time.

    With more than one job on a CPU every slot has its own share of the cores: two single-core
    trainings do more than one after the other on two cores.

    Args:
      logs: directory for what the commands print, one file for each run and phase.
      lock: of `locked`.
    """

    def __init__(
        self,
        *,
        jobs: int,
        logs: Path,
        lock: int,
        stop: StopRequest,
    ):
        self._logs, self._lock, self._stop = logs, lock, stop
        cores = _cores()
        if jobs > max(len(cores), 1):
            raise UserError(f"--jobs={jobs}: there are {len(cores)} cores")
        share = len(cores) // jobs
        self._shares = [cores[i * share : (i + 1) * share] for i in range(jobs)]
        self._free = list(range(jobs))
        self._active: list[_Active] = []
        stop.at_once = self._kill

    def execute(
        self, runs: Sequence[Run], label: str, finished: Callable[[], object] = lambda: None
    ) -> dict[str, str]:
        """Trains and evaluates what is not done yet; calls `finished` after every run that is.

        Returns:
          Name -> one line, of every run that failed; the others went on.

        Raises:
          KeyboardInterrupt: `stop` asked; trainings have saved their step.
        """
        self._failed: dict[str, str] = {}
        self._finished = finished
        waiting = collections.deque(run for run in runs if not run.done())
        steps = sum(run.last - min(run.step(), run.last) for run in waiting)
        self._logs.mkdir(parents=True, exist_ok=True)
        with Progress(label, steps, unit="steps") as progress:
            try:
                while (waiting or self._active) and not self._stop:
                    while waiting and self._free:
                        self._start(waiting.popleft())
                    time.sleep(_POLL_SECONDS)
                    progress.update(self._advance(), note=self._note(len(waiting)))
            finally:
                self._end()
        if self._stop:
            raise KeyboardInterrupt
        return self._failed

    def _start(self, run: Run, slot: int | None = None) -> None:
        """Starts what is next of a run: training, or its evaluation."""
        slot = self._free.pop(0) if slot is None else slot
        phase = "evaluate" if run.trained() else "train"
        command = run.evaluate_command() if phase == "evaluate" else run.train_command()
        with self._log(run).open("a") as log:
            print("$", *command, file=log, flush=True)
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(slot),
                start_new_session=True,
                pass_fds=(self._lock,),
            )
        if len(self._shares) > 1:
            # Before it has started its threads, which take it over.
            os.sched_setaffinity(process.pid, self._shares[slot])
        step = min(run.step(), run.last)
        self._active.append(_Active(run=run, slot=slot, phase=phase, process=process, step=step))

    def _environment(self, slot: int) -> Mapping[str, str]:
        # The package that is running, whatever lies in the working directory.
        package = str(Path(instap_jax.__file__).parent.parent)
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        same = _HUGE_PAGES | os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": path}
        if len(self._shares) == 1:
            return same
        flags = os.environ.get("XLA_FLAGS", "")
        single = _SINGLE_CORE if len(self._shares[slot]) == 1 else ""
        return same | _ONE_SHARE | {"XLA_FLAGS": f"{flags} {single}".strip()}

    def _advance(self) -> int:
        """Sees to what has ended; the training steps done since the last call."""
        steps = 0
        for active in list(self._active):
            code = active.process.poll()
            now = active.run.last if active.run.trained() else active.run.step()
            steps += max(now - active.step, 0)
            active.step = max(now, active.step)
            if code is None:
                continue
            self._active.remove(active)
            fault = self._fault(active, code)
            if fault:
                self._failed[active.run.name] = fault
                print(f"\n{fault}", file=sys.stderr)
                self._free.append(active.slot)
            elif active.run.done():
                self._free.append(active.slot)
                self._finished()
            else:
                self._start(active.run, active.slot)
        return steps

    def _fault(self, active: _Active, code: int) -> str | None:
        """What went wrong with a command that ended, in one line."""
        run, log = active.run, self._log(active.run)
        if code:
            return f"FAILED {run.name} ({active.phase}, exit {code}): {_last_line(log)}; see {log}"
        if active.phase == "train" and not run.trained():
            return f"FAILED {run.name} (train): it left no checkpoint of step {run.last}; see {log}"
        try:
            if active.phase == "evaluate":
                run.mark_evaluated()
            else:  # the file of --config may have been edited meanwhile
                config_check.check_workdir(run.config, run.workdir)
        except UserError as error:
            return f"FAILED {run.name} ({active.phase}): {error}"
        return None

    def _note(self, waiting: int) -> str:
        now = ", ".join(f"{a.run.name} {a.phase} {a.step}/{a.run.last}" for a in self._active)
        return f"{now}; {waiting} runs waiting" if waiting else now

    def _log(self, run: Run) -> Path:
        return self._logs / f"{run.name.replace('/', '-')}.log"

    def _end(self) -> None:
        """Stops what still runs and waits for it."""
        for active in self._active:
            active.process.terminate()
        for active in self._active:
            active.process.wait()

    def _kill(self) -> None:
        """Ends what still runs at once; its data workers see that their parent is gone."""
        for active in list(self._active):
            active.process.kill()


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return [0]  # no way to share them out: one job


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"
