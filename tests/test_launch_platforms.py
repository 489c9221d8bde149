"""Launchers of platforms: what they would run, and what they do with what the platform answers."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import gke
import local_pod
import pytest
import slices
import slurm
import supervise
import tpu
import yaml
from launchers import TPU, TRAIN, dry, fake

from instap_jax.aot.topology import parse

LAUNCH = Path(__file__).parent.parent / "launch"


# --- what they would run


GKE = ("run", "--name=n", "--accelerator=v5p-256", "--image=i:1", "--claim=c")


def jobset_of(capsys, *flags):
    commands, rest = dry(gke, capsys, *GKE, *flags)
    assert commands[0][2:5] == ["get", "jobset", "n"]  # whether there is one
    assert commands[1] == ["kubectl", "--namespace=default", "apply", "--filename=-"]
    return yaml.safe_load(rest.split("\nEND")[0])


def test_gke_jobset(capsys):
    jobset = jobset_of(capsys, "--slices=2", "--spot", "--env=A=b: 'c")
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset["kind"] == "JobSet"
    annotation = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert jobset["metadata"]["annotations"][annotation] == "cloud.google.com/gke-nodepool"
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert replicated["replicas"] == 2 and job["backoffLimit"] == 0
    assert job["parallelism"] == job["completions"] == 32
    pod_spec = job["template"]["spec"]
    assert pod_spec["restartPolicy"] == "Never" and pod_spec["terminationGracePeriodSeconds"] >= 120
    assert pod_spec["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x8",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod_spec["containers"]
    assert container["securityContext"] == {"privileged": True}  # the runtime locks memory
    assert container["image"] == "i:1" and container["resources"]["limits"]["google.com/tpu"] == 4
    command = container["command"]
    at = command.index("--")
    wait = "--config.distributed.initialization_timeout=3600"  # for the nodes of the other slice
    assert command[at + 1 :] == ["instap", *TRAIN, wait]
    names = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert names == {"SLICE": None, "HOST": None, "A": "b: 'c"}
    assert {"--once", "--limit=3", "--worker=$(SLICE)-$(HOST)"} <= set(command[:at])
    assert "--workdir=/shared/my run" in command[:at]
    assert pod_spec["volumes"][0]["persistentVolumeClaim"]["claimName"] == "c"


def test_gke_joins_slices_of_several_hosts_only(capsys):
    with pytest.raises(SystemExit, match="2"):
        gke.main([*GKE, "--accelerator=v6e-4", "--slices=2", "--dry-run", "--", *TRAIN])
    assert "v6e-4 has one" in capsys.readouterr().err


def test_gke_restarts_all_slices_but_not_after_a_final_exit_code(capsys):
    spec = jobset_of(capsys)["spec"]
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    assert spec["failurePolicy"]["maxRestarts"] > 100
    (replicated,) = spec["replicatedJobs"]
    assert replicated["replicas"] == 1
    job = replicated["template"]["spec"]
    (final,) = job["podFailurePolicy"]["rules"]
    assert final["action"] == "FailJob" and final["onExitCodes"]["operator"] == "In"
    assert set(final["onExitCodes"]["values"]) == set(supervise.FINAL) - {0}
    assert final["onExitCodes"]["containerName"] == "instap"
    assert "cloud.google.com/gke-spot" not in job["template"]["spec"]["nodeSelector"]


@pytest.mark.parametrize(
    ("slices", "flags", "added"),
    [
        (1, ["--config=f"], False),
        (2, ["--config=f"], True),
        (2, ["-config", "f"], True),
        (2, ["--workdir=w", "--task=retrieval"], False),  # evaluate has no such flag
        (2, ["--config=f", "--config.distributed.initialization_timeout=9"], False),
        (2, ["--config=f", "--config.distributed.initialization_timeout", "9"], False),
    ],
)
def test_gke_processes_wait_for_the_nodes_of_other_slices(slices, flags, added):
    added = ["--config.distributed.initialization_timeout=3600"] * added
    assert gke._patient(["verb", *flags], slices) == ["verb", *flags, *added]


@pytest.mark.parametrize(
    ("name", "hosts", "chips"),
    [("v5litepod-1", 1, 1), ("v5e-4", 1, 4), ("v5e-8", 2, 4), ("v6e-8", 2, 4), ("v5p-128", 16, 4)],
)
def test_gke_machines_have_four_chips(capsys, name, hosts, chips):
    (replicated,) = jobset_of(capsys, f"--accelerator={name}")["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert job["parallelism"] == job["completions"] == hosts
    assert container["resources"]["limits"]["google.com/tpu"] == chips


def gke_run(folder, monkeypatch, script):
    """The exit code of `run` with such a kubectl, and what it was called for."""
    log = fake(folder, "looks = before.count('get')\n" + script, "kubectl", first=2)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(gke, "POLL", 0.01)
    return gke.main([*GKE, "--", *TRAIN]), log.read_text()


@pytest.mark.parametrize(
    ("states", "commands", "code"),
    [
        (["NotFound", "", "Completed"], "get apply get logs get logs", 0),
        (["", "Completed"], "get get logs", 0),  # goes on: watched
        (["Failed", "Completed"], "get delete apply get logs", 0),  # cannot be changed
        (["NotFound", "", "NotFound"], "get apply get logs get", 130),  # stopped by another
        (["refused"], "get", 2),
        (["NotFound", "refused", "Completed"], "get apply get logs get logs", 0),
        (
            ["NotFound", "refused", "", "refused", "refused"],
            "get apply" + " get logs" * 3 + " get",
            1,
        ),
    ],
)
def test_gke_run_by_what_is_there(tmp_path, monkeypatch, states, commands, code, capfd):
    script = (
        f"state = {states}[looks] if words[0] == 'get' else ''\n"
        "if state in ('NotFound', 'refused'): sys.exit(f'Error from server ({state}): n')\n"
        "print(state)\n"
        "if words[0] == 'delete': assert '--cascade=foreground' in words\n"
    )
    monkeypatch.setattr(gke, "LOOKS", 2)
    assert gke_run(tmp_path, monkeypatch, script) == (code, commands)
    assert "NotFound" not in capfd.readouterr().err


def test_gke_shows_every_line_of_the_log_once(tmp_path, monkeypatch, capfd):
    script = """
lines = [f"2026-11-22T10:00:0{second}.{part}00000000Z line {second}.{part}"
         for second in range(3) for part in (0, 9)]
if words[0] == "get":
    print("Completed" if looks == 3 else "")
if words[0] == "logs":
    assert "--tail=-1" in words
    since = [word for word in words if word.startswith("--since-time=")]
    first = since[0].partition("=")[2][:19] if since else ""  # whole seconds
    end = {2: 3, 3: 5, 4: 6}[looks]
    print(*(text for text in lines[:end] if text[:19] >= first), sep="\\n")
    print("error of kubectl", looks, file=sys.stderr)
"""
    assert gke_run(tmp_path, monkeypatch, script)[0] == 0
    out = capfd.readouterr().out.splitlines()
    shown = [line for line in out if line.startswith("line")]
    assert shown == [f"line {second}.{part}" for second in range(3) for part in (0, 9)]
    assert "error of kubectl 2" in out
    assert sum("--since-time=" in line for line in out) == 2


def test_a_platform_whose_command_is_not_there_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    for launcher, flags in ((tpu, (*TPU, "--accelerator=v5p-256")), (gke, GKE)):
        with pytest.raises(SystemExit, match="2"):
            launcher.main([*flags, "--", *TRAIN])
        assert ": no such command; install it first" in capsys.readouterr().err


SLURM = ("--nodes=4", "--gpus=8", "--sbatch-flag=--partition=gpu", "--wait")


def test_slurm_script(capsys):
    commands, rest = dry(slurm, capsys, *SLURM)
    install, logs, submit = commands
    assert install[:2] == ["bash", "-c"] and 'EXTRAS="[cuda]"' in install[2]
    assert logs == ["mkdir", "-p", "/shared/my run.launch"]
    log = "--output=/shared/my run.launch/slurm-%j.log"  # a space, which #SBATCH would not take
    assert submit == ["sbatch", "--job-name=instap", log, "--wait", "--partition=gpu"]
    script = rest.split("\nEND")[0]
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if "#SBATCH" in line]
    options = dict(line.partition("=")[::2] for line in lines)
    assert options["nodes"] == "4"
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8"
    assert options["signal"] == "TERM@120" and "requeue" in options
    assert not {"output", "job-name"} & set(options)
    assert options["open-mode"] == "append"  # a requeued job goes on in the same log
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


@pytest.mark.parametrize("launcher", [slurm, local_pod, supervise])
def test_a_limit_of_no_start_is_refused(launcher, capsys):
    with pytest.raises(SystemExit, match="2"):
        launcher.main(["--limit=0", "--", *TRAIN])
    assert "--limit: must be 1 or more" in capsys.readouterr().err


@pytest.fixture
def slurm_job(tmp_path, monkeypatch, capsys):
    """Runs the batch script of `verb` in a repository on a node where python3 is of no use."""
    root, node = tmp_path / "my repository", tmp_path / "node"
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / "launch").symlink_to(LAUNCH)
    (root / ".venv" / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setattr(slurm, "ROOT", root)
    node.mkdir()

    def call(verb, code, *flags):
        assert slurm.main(["--dry-run", *flags, "--", *verb]) == 0
        commands, _, rest = capsys.readouterr().out.partition("<<'END'\n")
        srun = f'printf "%s\\n" "$PWD" "$@" >{node}/srun.log; exit {code}'
        scontrol = f'echo "$@" >{node}/scontrol.log'
        for name, body in {"srun": srun, "scontrol": scontrol, "python3": "exit 9"}.items():
            (node / name).write_text(f"#!/bin/sh\n{body}\n")
            (node / name).chmod(0o755)
        path = f"{node}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "SLURM_JOB_ID": "7"}
        script = rest.split("\nEND")[0]
        done = subprocess.run(["bash"], input=script, text=True, env=environment, cwd=node)
        assert done.returncode == code
        return root, node, [shlex.split(line) for line in commands.splitlines()]

    return call


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (75, True), (137, False)])
def test_slurm_script_requeues_what_was_preempted(slurm_job, tmp_path, code, requeued):
    """The script itself, with srun and scontrol played by others."""
    _, node, _ = slurm_job(["train", f"--workdir={tmp_path}/run"], code, "--limit=1", "--cpus=5")
    assert "--cpus-per-task=5" in (node / "srun.log").read_text().split()  # not inherited
    assert (node / "scontrol.log").exists() == requeued
    if requeued:
        assert (node / "scontrol.log").read_text() == "requeue 7\n"


@pytest.mark.parametrize("flag", [["--workdir=runs/my run"], ["--workdir", "runs/my run"]])
def test_slurm_a_relative_workdir_is_one_place_for_job_log_and_supervisor(slurm_job, flag):
    root, node, (_, mkdir, sbatch) = slurm_job(["train", *flag], 0)
    logs = root / "runs" / "my run.launch"
    assert mkdir == ["mkdir", "-p", str(logs)]
    assert f"--output={logs}/slurm-%j.log" in sbatch
    srun = (node / "srun.log").read_text().splitlines()
    assert srun[0] == str(root) and srun[-len(flag) :] == flag  # the job is there, too
    (record,) = logs.iterdir()
    assert record.name == "starts.jsonl"


def test_local_pod_dry_run(capsys):
    commands, _ = dry(local_pod, capsys, "--processes=2", "--devices=4")
    for index, words in enumerate(commands):
        environment = dict(word.split("=", 1) for word in words[:5])
        assert environment == {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "4",
            "JAX_COORDINATOR_ADDRESS": "127.0.0.1:PORT",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
        }
        assert words[-len(TRAIN) :] == TRAIN and words[6:9] == ["-u", "-m", "instap_jax"]


# --- names of slices


@pytest.mark.parametrize(
    ("name", "chips", "topology", "hosts"),
    [
        ("v5litepod-1", 1, "1x1", 1),
        ("v5litepod-8", 8, "2x4", 1),
        ("v5litepod-16", 16, "4x4", 4),
        ("v5litepod-128", 128, "8x16", 32),
        ("v6e-256", 256, "16x16", 64),
        ("v5p-8", 4, "2x2x1", 1),
        ("v5p-128", 64, "4x4x4", 16),
        ("v5p-512", 256, "4x8x8", 64),
        ("v4-32", 16, "2x2x4", 4),
        ("v5p-1024", 512, "8x8x8", 128),
    ],
)
def test_slices_as_google_cloud_lists_them(name, chips, topology, hosts):
    one = slices.slice_of(name)
    assert (one.chips, one.topology, one.hosts) == (chips, topology, hosts)
    # The launchers run without JAX and have a table of their own: the compiler's says the same.
    assert "x".join(map(str, parse(name).shape)) == topology


@pytest.mark.parametrize(
    ("name", "topology"),
    [
        ("v5p-384", "4x4x12"),
        ("v5p-768", "4x8x12"),
        ("v5p-1152", "4x12x12"),
        ("v5p-2304", "8x12x12"),
        ("v5p-3840", "8x12x20"),
        ("v5p-12288", "16x16x24"),
    ],
)
def test_slices_of_cubes_that_are_no_power_of_two(name, topology):
    """As xpk lists them."""
    assert slices.slice_of(name).topology == topology


@pytest.mark.parametrize(
    "name",
    ["v5litepod-2", "v5e-512", "v5p-7", "v5p-192", "v5p-12416", "v6e-100", "v9-8", "v5p", ""],
)
def test_what_is_no_slice_is_one_line(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        tpu.main([*TPU, f"--accelerator={name}", "--dry-run", "--", *TRAIN])
    assert stopped.value.code == 2
    assert name in capsys.readouterr().err.splitlines()[-1]
