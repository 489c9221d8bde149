"""Trains on the GPUs of a Slurm cluster: one process a GPU.

    python launch/slurm.py --nodes=4 --gpus=8 [--sbatch-flag=--partition=P] [--time=24:00:00] \\
      [--wait] -- train --config=... --workdir=/shared/run

Installs into the repository's .venv, which the nodes must see, and submits a batch script. In it
`supervise.py` starts `srun instap VERB` again when it fails. 120 s before the time limit Slurm
sends SIGTERM: the run saves, ends with 75, and the job puts itself back into the queue, as Slurm
itself does after a preemption or a lost node (--requeue). Log: DIR.launch/slurm-JOB.log; --wait
stays until the end and exits with the job's exit code. --dry-run prints script and commands.

JAX finds the other processes by Slurm's variables. Standard library and Slurm's commands only.
"""

import argparse
import shlex
import string
import sys
from pathlib import Path

from local_pod import workdir_of
from shell import Shell
from supervise import PREEMPTED, add_limit, launch_dir, split_command

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str] | None = None) -> int:
    flags, verb = split_command(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--name", default="instap", help="of the job")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="of each node")
    parser.add_argument("--cpus", type=int, default=8, help="of each process")
    parser.add_argument("--time", default="24:00:00")
    parser.add_argument(
        "--sbatch-flag",
        action="append",
        default=[],
        metavar="--FLAG=VALUE",
        help="such as --partition=P or --account=A; repeatable",
    )
    add_limit(parser)
    parser.add_argument("--wait", action="store_true", help="until the job ends")
    parser.add_argument("--dry-run", action="store_true", help="print, run nothing")
    args = parser.parse_args(flags)
    if not verb:
        parser.error("no verb after --, such as: -- train --config=... --workdir=...")
    if args.nodes < 1 or args.gpus < 1:
        parser.error("--nodes and --gpus must be 1 or more")
    shell = Shell(args.dry_run)
    workdir = ROOT / workdir_of(verb)  # where the job is, whatever directory this is called in
    logs = launch_dir(workdir)
    install = f'cd {shlex.quote(str(ROOT))} && EXTRAS="[cuda]" && . launch/install.sh'
    shell.check(["bash", "-c", install])
    shell.check(["mkdir", "-p", str(logs)])
    # A script on standard input; --wait gives its exit code back.
    wait = ["--wait"] if args.wait else []
    # Not in the script: a line of #SBATCH ends at a space.
    names = [f"--job-name={args.name}", f"--output={logs / 'slurm-%j.log'}"]
    words = ["sbatch", *names, *wait, *args.sbatch_flag]
    return shell.run(words, stdin=script(args, verb, workdir))


def script(args: argparse.Namespace, verb: list[str], workdir: Path) -> str:
    """The batch script."""
    template = Path(__file__).with_name("job.sbatch").read_text()
    return string.Template(template).substitute(
        nodes=args.nodes,
        gpus=args.gpus,
        cpus=args.cpus,
        time=args.time,
        root=shlex.quote(str(ROOT)),
        workdir=shlex.quote(str(workdir)),
        limit=args.limit,
        preempted=PREEMPTED,
        verb=shlex.join(verb),
    )


if __name__ == "__main__":
    sys.exit(main())
