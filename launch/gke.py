"""Trains on Cloud TPU slices of a GKE cluster: a JobSet, as xpk makes them.

    python launch/gke.py run --name=NAME --accelerator=v5litepod-256 [--slices=2] [--spot] \\
      --image=IMAGE --claim=VOLUME_CLAIM -- train --config=... --workdir=/shared/run
    python launch/gke.py stop --name=NAME      SIGTERM to all Pods, which save; deletes the JobSet

`run` fills in `jobset.yaml`, applies it with kubectl, shows the log of the first host, and exits
with the run's exit code. JobSet restarts all slices when a Pod fails, but not after a fault of the
input (2), nor, by `supervise.py --once` in each Pod, after --limit starts without a new checkpoint.
--claim names a PersistentVolumeClaim (ReadWriteMany: Filestore, or a bucket through the GCS FUSE
driver) that every Pod sees as /shared. --dry-run prints the manifest and the commands.

Standard library and `kubectl` only; the cluster needs JobSet 0.6 or newer.
"""

import argparse
import json
import string
import sys
import time
from pathlib import Path

from local_pod import workdir_of
from shell import Shell
from slices import Slice, slice_of
from supervise import add_limit, pod_code, say, split_command

POLL = 15.0
MAX_RESTARTS = 1000  # the limit that counts is the one without progress
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
        hosts=one.hosts,
        chips=one.chips_per_host,
        accelerator=one.gke,
        topology=one.topology,
        spot=_SPOT if args.spot else "",
        image=args.image,
        claim=args.claim,
        command=json.dumps(_command(args, verb, run_id)),
        env=env,
    )


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

    def run(self, text: str) -> int:
        """Applies the manifest, shows the first host's log until the end, gives the exit code."""
        self._shell.check(self._words("apply", "--filename=-"), stdin=text)
        try:
            while not (state := self._state()):
                self._shell.run(self._words("logs", "--follow", "--ignore-errors", self._first))
                if self._args.dry_run:
                    print("# again until the JobSet is Completed or Failed; then")
                    self._codes()
                    return 0
                time.sleep(POLL)
        except KeyboardInterrupt:
            say(f"{self._args.name} goes on; `python launch/gke.py stop` ends it")
            return 130
        code = 0 if state == "Completed" else pod_code(self._codes()) or 1
        say(f"{self._args.name} is {state}, exit code {code}")
        return code

    def stop(self) -> int:
        return self._shell.run(self._words("delete", "jobset", self._args.name))

    def _state(self) -> str:
        """Completed, Failed, or '' while it is neither."""
        path = "jsonpath={.status.terminalState}"
        return self._shell.output(self._words("get", "jobset", self._args.name, f"--output={path}"))

    def _codes(self) -> list[int]:
        """Exit codes of the Pods that have ended."""
        path = "{.items[*].status.containerStatuses[0].state.terminated.exitCode}"
        words = self._words("get", "pods", self._pods, f"--output=jsonpath={path}")
        return [int(text) for text in self._shell.output(words).split()]

    def _words(self, *words: str) -> list[str]:
        return ["kubectl", f"--namespace={self._args.namespace}", *words]


if __name__ == "__main__":
    sys.exit(main())
