"""Trains on Cloud TPU: one slice, or several joined by the data-center network (multislice).

    python launch/tpu.py run --name=NAME --project=P --zone=Z --accelerator=v5litepod-256 \\
      [--slices=2] [--spot] [--setup='mount ...'] -- train --config=... --workdir=/shared/run
    python launch/tpu.py stop   --name=NAME --project=P --zone=Z   saves, ends; the slices stay
    python launch/tpu.py delete --name=NAME --project=P --zone=Z   gives the slices back

`run` asks for a queued resource, waits for it, copies this commit to every host, installs it and
runs `instap VERB` on all hosts at once; their output comes back, each line with its host. When the
run fails it is started again and resumes; slices that were preempted (--spot) are asked for anew.
See `supervise.py` for when it gives up. --dry-run prints the commands of a first start.
`stop` needs the --slices of the run.

JAX finds the other hosts and slices by itself. Standard library and `gcloud` only.
"""

import argparse
import re
import shlex
import sys
import tempfile
import time
from pathlib import Path

from shell import ABSENT, Shell
from slices import Slice, slice_of
from supervise import (
    DONE,
    INTERRUPTED,
    USER_ERROR,
    Signals,
    add_flags,
    pod_code,
    policy_of,
    say,
    split_command,
    supervise,
)

STOP = "bash instap/launch/host.sh stop"
# A host that is gone is noticed within three minutes, and the network forgets no quiet connection.
_SSH = ("ServerAliveInterval=30", "ServerAliveCountMax=6", "ConnectTimeout=15")
DELAY = 60.0  # seconds before a restart: it takes a while until preempted slices are called so
POLL = 30.0  # seconds between looks at a queued resource
LOOKS = 20  # that fail one after the other make a failed start: ten minutes without an answer
LOST = 255  # exit code of a host that was cut off, as ssh's own
GONE = ("SUSPENDED", "FAILED")  # states that do not come back by themselves
_EXIT = re.compile(r"\[(\S+)\] exit code (\d+), checkpoint (\d*)")
_START = re.compile(r"\[\S+\] start from checkpoint (\d*)")


def main(argv: list[str] | None = None) -> int:
    flags, verb = split_command(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("run", "stop", "delete"))
    parser.add_argument("--name", required=True, help="of the queued resource")
    parser.add_argument("--project", required=True)
    parser.add_argument("--zone", required=True)
    parser.add_argument("--accelerator", help="of each slice, such as v5litepod-256")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--spot", action="store_true")
    parser.add_argument(
        "--create-flag",
        action="append",
        default=[],
        metavar="--FLAG=VALUE",
        help="for queued-resources create, such as --network=N; repeatable",
    )
    parser.add_argument(
        "--setup",
        default="",
        metavar="COMMAND",
        help="run on every host before each start; mounts the shared storage",
    )
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="environment of the run; repeatable",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    add_flags(parser, delay=DELAY)
    args = parser.parse_args(flags)
    resource = QueuedResource(args, Shell(args.dry_run))
    if args.action != "run":
        return resource.stop() if args.action == "stop" else resource.delete()
    if not verb or not args.accelerator or args.slices < 1:
        parser.error("run needs --accelerator, --slices of 1 or more, and a verb after --")
    try:
        one = slice_of(args.accelerator)
    except ValueError as error:
        parser.error(str(error))
    return Run(args, resource, one, verb).supervise()


class QueuedResource:
    """The gcloud commands about one queued resource."""

    def __init__(self, args: argparse.Namespace, shell: Shell):
        self._args, self.shell = args, shell

    def create(self, one: Slice) -> int:
        """Asks for it; the exit code."""
        args = self._args
        nodes = ["--node-id=" + args.name]
        if args.slices > 1:
            nodes = [f"--node-count={args.slices}", "--node-prefix=" + args.name]
        words = [f"--accelerator-type={one.name}", f"--runtime-version={one.runtime}", *nodes]
        spot = ["--spot"] if args.spot else []
        return self.shell.run(self._words("create", *words, *spot, *args.create_flag))

    def wait(self, signals: Signals) -> int:
        """Until its hosts are there; the exit code that says why they are not."""
        say(f"waiting until {self._args.name} is ACTIVE")
        failed = 0
        while not signals.asked():
            state = self.state()
            if state == "ACTIVE":
                return DONE
            if state == ABSENT:
                say(f"{self._args.name} was deleted while we waited for it")
                return USER_ERROR  # whoever did it does not want it made again
            if state in GONE:
                say(f"{self._args.name} is {state}: {shlex.join(self._words('describe'))} says why")
                return 1
            failed = failed + 1 if state is None else 0
            if failed == LOOKS:
                return 1
            signals.sleep(POLL)
        return INTERRUPTED

    def state(self) -> str | None:
        """ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED ...; ABSENT; None where gcloud cannot say."""
        return self.shell.look(
            self._words("describe", "--format=value(state.state)"), absent="NOT_FOUND"
        )

    def ssh(self, command: str) -> list[list[str]]:
        """A command for all hosts, to be run for all slices at once.

        Slice by slice: `queued-resources ssh` would begin on at most 64 hosts, and on the others
        when these have ended.
        """
        flags = [f"--ssh-flag=-o{option}" for option in _SSH]
        words = ("--worker=all", *flags, "--command=" + command)
        return [self._vm("ssh", node, *words) for node in self._nodes()]

    def copy(self, source: str, target: str) -> list[list[str]]:
        flags = [f"--scp-flag=-o{option}" for option in _SSH]
        words = ("--worker=all", *flags)
        return [self._vm("scp", source, f"{node}:{target}", *words) for node in self._nodes()]

    def stop(self) -> int:
        return self.shell.stream(self.ssh(STOP))

    def ask_to_stop(self) -> None:
        self.shell.start(self.ssh(STOP))

    def delete(self) -> int:
        return self.shell.run(self._words("delete", "--force", "--quiet"))

    def _nodes(self) -> list[str]:
        """Names of the slices."""
        name, slices = self._args.name, self._args.slices
        return [name] if slices == 1 else [f"{name}-{index}" for index in range(slices)]

    def _words(self, action: str, *flags: str) -> list[str]:
        return self._gcloud("queued-resources", action, self._args.name, *flags)

    def _vm(self, action: str, *words: str) -> list[str]:
        return self._gcloud("tpu-vm", action, *words)

    def _gcloud(self, group: str, action: str, *words: str) -> list[str]:
        where = [f"--project={self._args.project}", f"--zone={self._args.zone}"]
        return ["gcloud", "compute", "tpus", group, action, *words, *where]


class Run:
    """A verb on all hosts, started again until it is done."""

    def __init__(self, args, resource: QueuedResource, one: Slice, verb: list[str]):
        self._args, self._resource, self._slice, self._verb = args, resource, one, verb
        self._shell = resource.shell
        self._signals = Signals(lambda number: self._ask_to_stop())
        self._installed = self._runs = self._lost = False
        self._newest: int | None = None

    def supervise(self) -> int:
        if self._args.dry_run:
            return self._show()
        with self._signals:
            code = supervise(
                self._attempt,
                progress=lambda: self._newest,
                policy=policy_of(self._args),
                stopped=self._signals.asked,
                sleep=self._signals.sleep,
            )
        if self._signals.asked() and self._lost:  # what runs there no longer tells us, but runs
            self._resource.stop()
        say(f"the slices are still yours: python launch/tpu.py delete --name={self._args.name} ...")
        return code

    def _show(self) -> int:
        """The commands of a first start."""
        self._resource.create(self._slice)
        print("# until the next command says ACTIVE:")
        self._resource.state()
        self._set_up()
        self._install()
        return self._shell.stream(self._resource.ssh(self._command()))

    def _ask_to_stop(self) -> None:
        """The hosts save and end, and their exit codes then come back as ever; what goes before a
        run is broken off."""
        if self._runs:
            self._resource.ask_to_stop()
        else:
            self._shell.end()

    def _attempt(self) -> int:
        """One start. Each step gives an exit code: what fails here is tried again, as a run is."""
        for step in (self._get_slices, self._set_up, self._install):
            code = INTERRUPTED if self._signals.asked() else step()
            if self._signals.asked():
                return INTERRUPTED
            if code:
                return code
        return self._run()

    def _get_slices(self) -> int:
        """Asks for the slices, unless that was done, and waits for them."""
        state = self._resource.state()
        while state == "SUSPENDING" and not self._signals.asked():  # cannot be deleted yet
            self._signals.sleep(POLL)
            state = self._resource.state()
        if state == "ACTIVE":
            return DONE
        self._installed = False
        if state is None:
            return 1
        if state in GONE:
            if code := self._resource.delete():
                return code
            state = ABSENT
        if state == ABSENT and (code := self._resource.create(self._slice)):
            return code
        return self._resource.wait(self._signals)

    def _run(self) -> int:
        self._runs = True
        try:
            return INTERRUPTED if self._signals.asked() else self._run_on_hosts()
        finally:
            self._runs = False

    def _run_on_hosts(self) -> int:
        codes: dict[str, int] = {}
        gcloud = self._shell.stream(
            self._resource.ssh(self._command()), lambda line: self._read(line, codes)
        )
        hosts = self._slice.hosts * self._args.slices
        lost = hosts - len(codes)
        self._lost = bool(lost)
        if lost:
            say(f"{lost} of {hosts} hosts did not say how they ended (gcloud: {gcloud})")
        return pod_code([*codes.values(), *[LOST] * lost])

    def _read(self, line: str, codes: dict[str, int]) -> None:
        """Shows a line of a host, and takes exit codes and checkpoints from it."""
        print(line, flush=True)
        step = ""
        if match := _EXIT.match(line):
            codes[match[1]], step = int(match[2]), match[3]
        elif match := _START.match(line):
            step = match[1]
            if self._signals.asked():  # it was asked before there was anything to be ended
                self._resource.ask_to_stop()
        if step:
            self._newest = max(self._newest or 0, int(step))

    def _set_up(self) -> int:
        """--setup, before every start: a host that was started anew has lost its mounts."""
        if not self._args.setup:
            return DONE
        command = f"bash -c {shlex.quote(self._args.setup)} || exit 1"  # 2 would be final
        return self._shell.stream(self._resource.ssh(command))

    def _install(self) -> int:
        """This commit and its dependencies on every host."""
        if self._installed:
            return DONE
        with tempfile.TemporaryDirectory() as folder:
            archive = f"{'DIR' if self._args.dry_run else folder}/instap.tar.gz"
            root = str(Path(__file__).resolve().parent.parent)
            tar = ["git", "-C", root, "archive", "--format=tar.gz", f"--output={archive}", "HEAD"]
            copy = self._resource.copy(archive, "instap.tar.gz")
            if code := self._shell.run(tar) or self._shell.stream(copy):
                return code
        # An earlier launcher's run saves and ends. Its modules go; runs may lie beside them.
        end = "{ ! [ -e instap/launch/host.sh ] || " + STOP + "; }"
        unpack = ["rm -rf instap/instap_jax", "tar -xzf instap.tar.gz -C instap"]
        steps = ["mkdir -p instap", end, *unpack, "bash instap/launch/host.sh setup"]
        # 1, whatever a step says: the 2 of a tar is no fault of the input.
        install = self._resource.ssh(f"{{ {' && '.join(steps)}; }} || exit 1")
        code = self._shell.stream(install)
        self._installed = code == DONE
        return code

    def _command(self) -> str:
        variables = [shlex.quote(text) for text in self._args.env]
        prefix = " ".join(["env", *variables, ""]) if variables else ""
        start = time.time_ns() // 1_000_000
        return f"{prefix}bash instap/launch/host.sh run {start} {shlex.join(self._verb)}"


if __name__ == "__main__":
    sys.exit(main())
