"""Launchers of platforms: what they would run, and what they do with what the platform answers."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parent.parent / "launch"
sys.path.insert(0, str(LAUNCH))  # scripts, not a package: they run where nothing is installed

import gke  # noqa: E402
import local_pod  # noqa: E402
import slices  # noqa: E402
import slurm  # noqa: E402
import supervise  # noqa: E402
import tpu  # noqa: E402

from instap_jax.aot.topology import parse  # noqa: E402

TRAIN = ["train", "--config=configs/stage1_l16.py", "--workdir=/shared/my run"]


# --- what they would run


def dry(launcher, capsys, *argv):
    """What `launcher ... --dry-run` prints: its commands as lists of words, and the rest."""
    assert launcher.main([*argv[:1], "--dry-run", *argv[1:], "--", *TRAIN]) == 0
    text = capsys.readouterr().out
    commands, _, rest = text.partition("<<'END'\n")
    return [shlex.split(line, comments=True) for line in commands.splitlines()], rest


def flags_of(words):
    return dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))


TPU = ("run", "--name=n", "--project=p", "--zone=europe-west4-b")


def test_tpu_slice(capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)  # nothing is run
    monkeypatch.setattr(subprocess, "Popen", None)
    commands, _ = dry(tpu, capsys, *TPU, "--accelerator=v5e-256", "--env=A=b c", "--setup=mnt")
    create, _, describe, mount, archive, copy, setup, run = commands
    for words in (create, describe, mount, copy, setup, run):
        group = "queued-resources" if words in (create, describe) else "tpu-vm"
        assert words[:4] == ["gcloud", "compute", "tpus", group]
        assert flags_of(words)["project"] == "p" and flags_of(words)["zone"] == "europe-west4-b"
    assert [words[4] for words in (create, describe, copy, setup, run)] == [
        "create", "describe", "scp", "ssh", "ssh",
    ]  # fmt: skip
    flags = flags_of(create)
    assert flags["accelerator-type"] == "v5litepod-256"
    assert flags["runtime-version"] == "v2-alpha-tpuv5-lite"
    assert flags["node-id"] == "n" and "node-count" not in flags and "spot" not in flags
    assert archive[0] == "git" and copy[5:7] == ["DIR/instap.tar.gz", "n:instap.tar.gz"]
    for words in (mount, copy, setup, run):
        assert flags_of(words)["worker"] == "all"
        kind = "scp" if words is copy else "ssh"
        assert f"--{kind}-flag=-oServerAliveInterval=30" in words  # a lost host is noticed
    for words in (mount, setup, run):
        assert words[4:6] == ["ssh", "n"]
    assert flags_of(mount)["command"] == "bash -c mnt || exit 1"
    *host, start = shlex.split(flags_of(run)["command"])[: -len(TRAIN)]
    assert host == ["env", "A=b c", "bash", "instap/launch/host.sh", "run"] and int(start)
    assert shlex.split(flags_of(run)["command"])[-len(TRAIN) :] == TRAIN


def test_tpu_multislice_on_spot_capacity(capsys):
    commands, _ = dry(tpu, capsys, *TPU, "--accelerator=v5p-128", "--slices=4", "--spot")
    flags = flags_of(commands[0])
    assert flags["node-count"] == "4" and flags["node-prefix"] == "n" and "node-id" not in flags
    assert "spot" in flags and flags["accelerator-type"] == "v5p-128"
    nodes = [f"n-{index}" for index in range(4)]  # Cloud's names of them
    for action, times in (("scp", 1), ("ssh", 2)):  # without --setup
        of_action = [words for words in commands if words[4:5] == [action]]
        at = 6 if action == "scp" else 5
        assert [words[at].partition(":")[0] for words in of_action] == times * nodes


@pytest.mark.parametrize("action", ["stop", "delete"])
def test_tpu_stop_and_delete(action, capsys):
    assert tpu.main([action, *TPU[1:], "--slices=2", "--dry-run"]) == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    if action == "delete":
        assert [words[3:6] for words in commands] == [["queued-resources", "delete", "n"]]
        return
    assert [words[3:6] for words in commands] == [["tpu-vm", "ssh", f"n-{i}"] for i in range(2)]
    for words in commands:
        assert flags_of(words)["command"] == "bash instap/launch/host.sh stop"


def test_tpu_what_fails_before_the_run_is_no_fault_of_the_input(capsys, tmp_path):
    """--setup and the installation, as a host's shell runs them; of no archive tar says 2."""
    setup = "false || echo 'a  b'; exit 2"
    commands, _ = dry(tpu, capsys, *TPU, "--accelerator=v5e-4", f"--setup={setup}")
    host = tmp_path / "instap"
    for name in (".venv", "launch", "instap_jax", "runs"):
        (host / name).mkdir(parents=True)
    (host / "launch" / "host.sh").write_text("echo an earlier run: $1")
    for index, said in ((3, "a  b\n"), (-2, "an earlier run: stop\n")):
        command = ["bash", "-c", flags_of(commands[index])["command"]]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (1, said)
    assert {path.name for path in host.iterdir()} == {".venv", "launch", "runs"}


def test_tpu_slices_run_together_and_the_first_fault_counts(tmp_path, monkeypatch, capfd):
    """Each slice waits for the other; one says a fault of the input."""
    script = f"""
import time
if words[0] == "describe":
    print("ACTIVE")
if " run " in " ".join(words):
    node, here = words[1], pathlib.Path({str(tmp_path)!r})
    (here / node).touch()
    end = time.monotonic() + 30
    while not all((here / f"n-{{i}}").exists() for i in range(2)) and time.monotonic() < end:
        time.sleep(0.01)
    code = 2 if node == "n-0" else 134
    print(f"[{{node}}] exit code {{code}}, checkpoint ")
    sys.exit(code)
"""
    fake(tmp_path, script)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    flags = ["--accelerator=v5e-4", "--slices=2", "--delay=0.01"]
    assert tpu.main([*TPU, *flags, "--", *TRAIN]) == 2
    assert "did not say" not in capfd.readouterr().err


def fake(folder, script, name="gcloud", first=4):
    """A `gcloud` on the PATH that does what the Python `script` says with `words`, and logs."""
    program = folder / name
    program.write_text(
        f"#!{sys.executable}\nimport pathlib, sys\nwords = sys.argv[{first}:]\n"
        f"log = pathlib.Path({str(folder / 'log')!r})\n"
        "before = log.read_text().split() if log.exists() else []\n"
        "log.write_text(' '.join([*before, words[0]]))\n" + script
    )
    program.chmod(0o755)
    return folder / "log"


def tpu_run(folder, monkeypatch, accelerator="v5e-4", flags=()):
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(tpu, "POLL", 0.01)
    flags = [f"--accelerator={accelerator}", "--delay=0.01", *flags]
    return tpu.main([*TPU, *flags, "--", *TRAIN])


def test_tpu_setup_comes_before_every_start(tmp_path, monkeypatch):
    """Of which the second finds everything installed."""
    script = """
if words[0] == "describe":
    print("ACTIVE")
if " run " in " ".join(words):
    print(f"[h0] exit code {1 if before.count('ssh') < 4 else 0}, checkpoint ")
if "mnt" in " ".join(words):
    assert before[-1] == "describe", before
"""
    log = fake(tmp_path, script)
    assert tpu_run(tmp_path, monkeypatch, flags=["--setup=mnt"]) == 0
    assert log.read_text() == "describe ssh scp ssh ssh describe ssh ssh"


def test_tpu_a_signal_breaks_off_what_goes_before_a_run(tmp_path, monkeypatch):
    """What gcloud has started holds its output."""
    script = """
import os, signal, subprocess
if words[0] == "describe":
    print("ACTIVE")
if words[0] == "scp":
    subprocess.Popen(["sleep", "60"])
    os.kill(os.getppid(), signal.SIGTERM)
    signal.pause()
"""
    fake(tmp_path, script)
    start = time.monotonic()
    assert tpu_run(tmp_path, monkeypatch) == 130
    assert time.monotonic() - start < 50


def test_tpu_preempted_slices_are_asked_for_again_and_resumed(tmp_path, monkeypatch, capfd):
    # First run: one of four hosts is lost with its slice, which is not gone at once. Second: all
    # four say 0.
    script = """
runs = before.count("ssh")
if words[0] == "describe":
    states = {0: "ACTIVE", 2: "SUSPENDED" if before[-1] == "describe" else "SUSPENDING"}
    print("ACTIVE" if before[-1] == "create" else states.get(runs, ""))
if words[0] == "ssh" and " run " in " ".join(words):
    first = "create" in before and before.count("create") == 1
    for host in range(3 if first else 4):
        print(f"[h{host}] start from checkpoint {'' if first else 40}")
        print(f"[h{host}] exit code {134 if first else 0}, checkpoint {40 if first else 80}")
    sys.exit(1 if first else 0)
"""
    log = fake(tmp_path, script)
    log.write_text("create")  # asked for before: describe says ACTIVE
    assert tpu_run(tmp_path, monkeypatch, "v5e-16") == 0
    err = capfd.readouterr().err
    assert "1 of 4 hosts did not say how they ended" in err
    assert "exit code 134 at step 40" in err and "ended with exit code 0 at step 80" in err
    first = "create describe scp ssh ssh"  # the last ssh runs
    assert log.read_text() == f"{first} describe describe delete {first}"


HOST_RUNS = """
if words[0] == "ssh" and " run " in " ".join(words):
    print("[h0] exit code 0, checkpoint 80")
"""


@pytest.mark.parametrize(
    ("script", "commands", "code"),
    [
        (  # asked for before, by the same command: only waited for
            'print("ACTIVE" if "describe" in before else "WAITING_FOR_RESOURCES")',
            "describe describe scp ssh ssh",
            0,
        ),
        (  # deleted by another while we wait
            'print("PROVISIONING") if not before else sys.exit("NOT_FOUND: n")',
            "describe describe",
            2,
        ),
        (  # cannot be had: asked for again, but not for ever
            'print("FAILED") if before else sys.exit("NOT_FOUND: n")',
            "describe create describe" + 2 * " describe delete create describe",
            1,
        ),
    ],
)
def test_tpu_asks_for_slices_only_where_there_are_none(
    tmp_path, monkeypatch, script, commands, code
):
    log = fake(tmp_path, f"if words[0] == 'describe': {script}\n{HOST_RUNS}")
    assert tpu_run(tmp_path, monkeypatch) == code
    assert log.read_text() == commands


@pytest.mark.parametrize(
    ("fails", "commands"),
    [
        ("describe", "describe describe scp ssh ssh"),
        ("scp", "describe scp describe scp ssh ssh"),
        ("ssh", "describe scp ssh describe scp ssh ssh"),  # the installation
    ],
)
def test_tpu_a_command_that_fails_once_is_a_failed_start(
    tmp_path, monkeypatch, fails, commands, capfd
):
    script = (
        f"if words[0] == '{fails}' and words[0] not in before: sys.exit('refused')\n"
        "if words[0] == 'describe': print('ACTIVE')\n"
    )
    log = fake(tmp_path, script + HOST_RUNS)
    assert tpu_run(tmp_path, monkeypatch) == 0
    assert log.read_text() == commands
    assert "refused" in "".join(capfd.readouterr())


def test_tpu_goes_on_waiting_where_a_look_fails(tmp_path, monkeypatch, capfd):
    script = (
        "if words[0] == 'describe': sys.exit('refused') if len(before) == 1 else "
        "print('ACTIVE' if len(before) > 1 else 'PROVISIONING')\n"
    )
    log = fake(tmp_path, script + HOST_RUNS)
    assert tpu_run(tmp_path, monkeypatch) == 0
    assert log.read_text() == "describe describe describe scp ssh ssh"
    assert capfd.readouterr().err.count("start from") == 1


@pytest.mark.parametrize(
    ("during", "active"),
    [
        ("describe describe", 5),  # it would have to wait on
        ("describe describe", 1),  # it becomes ACTIVE with the signal
        ("describe describe scp ssh", 1),  # while it installs
    ],
)
def test_tpu_a_signal_before_the_run_ends_it_there(tmp_path, monkeypatch, during, active, capfd):
    script = (
        "import os, signal\nnow = log.read_text()\n"
        f"if now == '{during}': os.kill(os.getppid(), signal.SIGTERM)\n"
        f"if words[0] == 'describe': print('ACTIVE' if len(before) >= {active} else 'CREATING')\n"
    )
    log = fake(tmp_path, script + HOST_RUNS)
    assert tpu_run(tmp_path, monkeypatch) == 130
    assert log.read_text() == during
    assert f"command={tpu.STOP}" not in capfd.readouterr().out  # nothing runs that could be asked


def test_tpu_a_signal_during_the_run_asks_the_hosts_to_stop(tmp_path, monkeypatch, capfd):
    script = (
        "import os, signal\n"
        "if words[0] == 'describe': print('ACTIVE')\n"
        "if ' run ' in ' '.join(words):\n"
        "    os.kill(os.getppid(), signal.SIGTERM)\n"
        "    print('[h0] exit code 75, checkpoint 80')\n"
    )
    fake(tmp_path, script)
    assert tpu_run(tmp_path, monkeypatch) == 75
    assert f"command={tpu.STOP}" in capfd.readouterr().out


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
