"""Trains on Cloud TPU slices of a GKE cluster: a JobSet, as xpk makes them.

    python launch/gke.py run --name=NAME --accelerator=v5litepod-256 [--slices=2] [--spot] \\
      --image=IMAGE --claim=VOLUME_CLAIM -- train --config=... --workdir=/shared/run
    python launch/gke.py stop --name=NAME      SIGTERM to all Pods, which save; deletes the JobSet

`run` fills in `jobset.yaml`, applies it with kubectl, shows the log of the first host, and exits
with the run's exit code (130 when another deleted the JobSet). One of this name that goes on is
only watched; one that has ended is replaced. JobSet restarts all slices when a Pod fails, but not
after a fault of the input (2), nor, by `supervise.py --once` in each Pod, after --limit starts
without a new checkpoint.
--claim names a PersistentVolumeClaim (ReadWriteMany, such as Filestore) that every Pod sees as
/shared. --dry-run prints the manifest and the commands.

Standard library and `kubectl` only; the cluster needs JobSet 0.6 or newer.
"""

import argparse
import json
import re
import string
import sys
import time
from pathlib import Path

from local_pod import workdir_of
from shell import ABSENT, Shell
from slices import Slice, slice_of
from supervise import INTERRUPTED, USER_ERROR, add_limit, pod_code, say, split_command

POLL = 15.0  # seconds between looks at the JobSet
LOOKS = 40  # that fail one after the other end the watch: ten minutes without an answer
ENDED = ("Completed", "Failed")
MAX_RESTARTS = 1000  # the limit that counts is the one without progress
_TIMEOUT = "--config.distributed.initialization_timeout"
# Every line of a log begins with the time at which its host wrote it.
_STAMP = re.compile(r"\d{4}-\d\d-\d\dT\S+")
_SPOT = '\n                cloud.google.com/gke-spot: "true"'


def main(argv: list[str] | None = None) -> int:
    flags, verb = split_command(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("run", "stop"))
    parser.add_argument("--name", required=True, help="of the JobSet")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--accelerator", help="of each slice, such as v5litepod-256")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--spot", action="store_true")
    parser.add_argument("--image", help="see launch/Dockerfile")
    parser.add_argument("--claim", help="PersistentVolumeClaim, mounted as /shared")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="repeatable"
    )
    add_limit(parser)
    parser.add_argument("--dry-run", action="store_true", help="print, run nothing")
    args = parser.parse_args(flags)
    jobset = JobSet(args, Shell(args.dry_run))
    if args.action == "stop":
        return jobset.stop()
    if not (verb and args.accelerator and args.image and args.claim) or args.slices < 1:
        parser.error("run needs --accelerator, --image, --claim, and a verb after --")
    if not all("=" in text for text in args.env):
        parser.error("--env looks like NAME=VALUE")
    try:
        one = slice_of(args.accelerator)
    except ValueError as error:
        parser.error(str(error))
    if args.slices > 1 and one.gke_hosts == 1:
        parser.error(f"GKE joins slices of several hosts only; {one.name} has one")
    return jobset.run(manifest(args, one, verb, run_id=f"{args.name}-{int(time.time())}"))


def manifest(args: argparse.Namespace, one: Slice, verb: list[str], *, run_id: str) -> str:
    """The JobSet as YAML. Lists are filled in as JSON, which YAML contains."""
    variables = [dict(zip(("name", "value"), text.split("=", 1))) for text in args.env]
    env = "".join(f"\n                    - {json.dumps(variable)}" for variable in variables)
    template = Path(__file__).with_name("jobset.yaml").read_text()
    return string.Template(template).substitute(
        name=args.name,
        namespace=args.namespace,
        max_restarts=MAX_RESTARTS,
        limit=args.limit,
        slices=args.slices,
        hosts=one.gke_hosts,
        chips=one.chips // one.gke_hosts,
        accelerator=one.gke,
        topology=one.topology,
        spot=_SPOT if args.spot else "",
        image=args.image,
        claim=args.claim,
        command=json.dumps(_command(args, _patient(verb, args.slices), run_id)),
        env=env,
    )


def _patient(verb: list[str], slices: int) -> list[str]:
    """Of several slices, one may have to wait for another's nodes longer than for its processes.

    Only for a verb that is given a configuration: the others have no such flag.
    """
    names = {arg.partition("=")[0].replace("--", "-", 1) for arg in verb}
    if slices == 1 or "-config" not in names or _TIMEOUT[1:] in names:
        return verb
    return [*verb, f"{_TIMEOUT}=3600"]


def _command(args: argparse.Namespace, verb: list[str], run_id: str) -> list[str]:
    """Of a Pod. Kubernetes fills in $(NAME); each host keeps a count of its own."""
    supervisor = ["python", "/instap/launch/supervise.py", "--once", f"--run-id={run_id}"]
    worker = "--worker=$(SLICE)-$(HOST)"
    where = [f"--workdir={workdir_of(verb)}", f"--limit={args.limit}", worker]
    return [*supervisor, *where, "--", "instap", *verb]


class JobSet:
    """The kubectl commands about one JobSet."""

    def __init__(self, args: argparse.Namespace, shell: Shell):
        self._args, self._shell = args, shell
        self._pods = f"--selector=jobset.sigs.k8s.io/jobset-name={args.name}"
        host = "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
        self._first = f"{self._pods},{host}"
        self._seen = ""  # the time of the newest line of the log

    def run(self, text: str) -> int:
        """Applies the manifest, shows the first host's log until the end, gives the exit code."""
        if self._args.dry_run:
            return self._show(text)
        state = self._state()
        if state is None:
            return USER_ERROR  # kubectl has said why
        if state == "":
            say(
                f"{self._args.name} goes on as it was started; `gke.py stop` makes room for another"
            )
        else:
            self._apply(text, replace=state in ENDED)
        try:
            return self._watch()
        except KeyboardInterrupt:
            say(f"{self._args.name} goes on; `python launch/gke.py stop` ends it")
            return INTERRUPTED

    def _show(self, text: str) -> int:
        """The commands of a first start."""
        self._state()
        self._apply(text, replace=False)
        self._logs()
        print("# again until the JobSet is Completed or Failed; then")
        self._codes()
        return 0

    def _apply(self, text: str, *, replace: bool) -> None:
        if replace:  # what ended cannot be changed, and its Jobs' names are taken until they go
            name = self._args.name
            self._shell.check(self._words("delete", "jobset", name, "--cascade=foreground"))
        self._shell.check(self._words("apply", "--filename=-"), stdin=text)

    def _watch(self) -> int:
        failed = 0
        while (state := self._state()) not in (*ENDED, ABSENT):
            failed = failed + 1 if state is None else 0
            if failed == LOOKS:
                say(f"kubectl does not answer; {self._args.name} may go on: the same command looks")
                return 1
            self._logs()
            time.sleep(POLL)
        if state == ABSENT:
            say(f"{self._args.name} was deleted: there is no such JobSet any more")
            return INTERRUPTED
        self._logs()  # what came since
        code = 0 if state == "Completed" else pod_code(self._codes()) or 1
        say(f"{self._args.name} is {state}, exit code {code}")
        return code

    def stop(self) -> int:
        return self._shell.run(self._words("delete", "jobset", self._args.name))

    def _state(self) -> str | None:
        """Completed, Failed, '' while it is neither; ABSENT; None where kubectl cannot say."""
        path = "jsonpath={.status.terminalState}"
        words = self._words("get", "jobset", self._args.name, f"--output={path}")
        return self._shell.look(words, absent="(NotFound)")

    def _logs(self) -> None:
        """The first host's log from where the last look ended, as long as its Pod writes.

        By the times of its lines, not by ours: the clocks differ. --since-time counts in whole
        seconds, and so gives lines again that were there.
        """
        since = [f"--since-time={self._seen}"] if self._seen else []
        flags = ["--follow", "--ignore-errors", "--timestamps", "--tail=-1", *since]
        before = self._seen

        def line(text: str) -> None:
            stamp, _, rest = text.partition(" ")
            if not _STAMP.fullmatch(stamp):
                print(text, flush=True)
            elif stamp > before:
                self._seen = stamp
                print(rest, flush=True)

        self._shell.stream([self._words("logs", *flags, self._first)], line)

    def _codes(self) -> list[int]:
        """Exit codes of the Pods that have ended."""
        path = "{.items[*].status.containerStatuses[0].state.terminated.exitCode}"
        words = self._words("get", "pods", self._pods, f"--output=jsonpath={path}")
        return [int(text) for text in self._shell.output(words).split()]

    def _words(self, *words: str) -> list[str]:
        return ["kubectl", f"--namespace={self._args.namespace}", *words]


if __name__ == "__main__":
    sys.exit(main())
