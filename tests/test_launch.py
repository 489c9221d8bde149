"""Launchers: what they would run, when they start again, and which exit code comes back."""

import os
import shlex
import signal
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


# --- the supervisor


def attempts(codes, steps):
    """An attempt that ends with each of `codes` in turn, and leaves each of `steps` behind."""
    state = {"calls": 0, "step": None}

    def attempt():
        state["step"] = steps[state["calls"]]
        state["calls"] += 1
        return codes[state["calls"] - 1]

    return attempt, (lambda: state["step"]), state


def supervised(codes, steps, **policy):
    attempt, progress, state = attempts(codes, steps)
    waits = []
    code = supervise.supervise(
        attempt,
        progress=progress,
        policy=supervise.Policy(**policy),
        sleep=waits.append,
    )
    return code, state["calls"], waits


@pytest.mark.parametrize("code", [0, 2, 130])
def test_final_exit_codes_end_it(code):
    assert supervised([code], [None]) == (code, 1, [])


@pytest.mark.parametrize("code", [1, 75, 134, 137, -9])
def test_anything_else_starts_again(code):
    got, calls, _ = supervised([code, 0], [10, 20])
    assert (got, calls) == (0, 2)


def test_gives_up_without_progress_with_the_commands_exit_code_and_backs_off():
    assert supervised([75, 1, 137], [None] * 3, limit=3, delay=5) == (137, 3, [5, 10])
    assert supervised([1] * 5, [7] * 5, limit=4, delay=5, max_delay=12)[1:] == (5, [5, 5, 10, 12])


def test_progress_resets_count_and_delay():
    steps = [None, None, 10, 10, 20, 20, 20, 20]
    assert supervised([1] * 8, steps, limit=2, delay=5) == (1, 2, [5])
    assert supervised([1] * 8, steps, limit=3, delay=5) == (1, 8, [5, 10, 5, 5, 5, 5, 10])


def test_progress_is_the_newest_complete_checkpoint(tmp_path):
    assert supervise.newest_step(tmp_path / "none") is None
    for name in ("9", "100", "200.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert supervise.newest_step(tmp_path) == 100


def run_supervisor(tmp_path, *flags, script):
    command = [sys.executable, LAUNCH / "supervise.py", f"--workdir={tmp_path}/run", *flags]
    return subprocess.run(
        [*command, "--", sys.executable, "-c", script], capture_output=True, text=True
    )


def test_supervisor_restarts_a_command_and_returns_its_code(tmp_path):
    script = (
        "import pathlib, sys\n"
        f"folder = pathlib.Path({str(tmp_path / 'run' / 'checkpoints')!r})\n"
        "folder.mkdir(parents=True, exist_ok=True)\n"
        "count = len(list(folder.iterdir()))\n"
        "(folder / str(count)).mkdir()\n"
        "sys.exit([75, 1, 0][count])"
    )
    done = run_supervisor(tmp_path, "--delay=0.01", script=script)
    assert done.returncode == 0
    assert done.stderr.count("start from") == 3
    assert "exit code 75 at step 0; again in" in done.stderr
    assert run_supervisor(tmp_path, "--preempted-is-final", script="exit(75)").returncode == 75


def test_once_counts_starts_across_supervisors(tmp_path):
    flags = ("--once", "--run-id=a", "--worker=0-1", "--limit=2")
    codes = [run_supervisor(tmp_path, *flags, script="exit(1)").returncode for _ in range(3)]
    assert codes == [1, 1, 2]  # 2 is final for the platform
    (tmp_path / "run" / "checkpoints" / "5").mkdir(parents=True)
    assert run_supervisor(tmp_path, *flags, script="exit(1)").returncode == 1
    other = ("--once", "--run-id=b", "--worker=0-1", "--limit=2")
    assert run_supervisor(tmp_path, *other, script="exit(0)").returncode == 0


def test_sigterm_reaches_the_command_and_nothing_starts_again(tmp_path):
    script = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *a: sys.exit(75))\n"
        "print('ready', flush=True)\ntime.sleep(30)"
    )
    words = [
        LAUNCH / "supervise.py",
        f"--workdir={tmp_path}/run",
        "--",
        sys.executable,
        "-c",
        script,
    ]
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 75


# --- one exit code of many


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0], 0),
        ([134, 2, 134], 2),  # the others died of the one with the fault
        ([137, 134], 137),  # the first
        ([75, 75], 75),
        ([75, 0], 75),
        ([75, 134], 134),
        ([130, 1], 130),
    ],
)
def test_exit_code_of_a_pod(codes, expected):
    assert supervise.pod_code(codes) == expected


# --- the local pod


def pod(tmp_path, monkeypatch, script, *flags):
    monkeypatch.setattr(local_pod, "command", lambda verb: [sys.executable, "-u", "-c", script])
    verb = ["train", f"--workdir={tmp_path}/run"]
    return local_pod.main(["--processes=3", "--devices=2", "--delay=0.01", *flags, "--", *verb])


def test_every_process_has_its_place_and_its_log(tmp_path, monkeypatch, capfd):
    script = (
        "import os\nnames = ('PLATFORMS', 'NUM_CPU_DEVICES', 'NUM_PROCESSES', 'PROCESS_ID')\n"
        "print(*(os.environ['JAX_' + n] for n in names), os.environ['JAX_COORDINATOR_ADDRESS'])"
    )
    assert pod(tmp_path, monkeypatch, script) == 0
    logs = [(tmp_path / "run.launch" / f"process-{i}.log").read_text().split() for i in range(3)]
    assert [log[:4] for log in logs] == [["cpu", "2", "3", str(i)] for i in range(3)]
    assert len({log[4] for log in logs}) == 1  # the same coordinator
    assert f"[1] cpu 2 3 1 {logs[0][4]}" in capfd.readouterr().out


def test_one_dead_process_ends_the_others_and_restarts_the_pod(tmp_path, monkeypatch, capfd):
    # The first time process 1 is killed, and process 2 ignores SIGTERM; the second time all end.
    script = (
        "import os, pathlib, signal, sys, time\n"
        f"mark = pathlib.Path({str(tmp_path)!r}) / ('been' + os.environ['JAX_PROCESS_ID'])\n"
        "if mark.exists(): sys.exit(0)\n"
        "mark.touch()\n"
        "if os.environ['JAX_PROCESS_ID'] == '2': signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "time.sleep(0.5)\n"
        "if os.environ['JAX_PROCESS_ID'] == '1': os.kill(os.getpid(), 9)\n"
        "time.sleep(60)"
    )
    monkeypatch.setattr(local_pod, "KILL_AFTER", 0.2)
    start = time.monotonic()
    assert pod(tmp_path, monkeypatch, script, "--grace=0.2") == 0
    assert time.monotonic() - start < 20
    out, err = capfd.readouterr()
    assert "[1] exit code 137" in out and "[0] exit code 143" in out
    assert "[2] exit code 137" in out and out.count("exit code 0") == 3
    assert "exit code 137 at no checkpoint; again in" in err


def test_a_fault_of_the_input_is_not_started_again(tmp_path, monkeypatch, capfd):
    script = "import os, sys; sys.exit(2 if os.environ['JAX_PROCESS_ID'] == '2' else 1)"
    assert pod(tmp_path, monkeypatch, script) == 2
    assert capfd.readouterr().err.count("start from") == 1


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
    create, _, describe, archive, copy, setup, run = commands
    for words in (create, describe, copy, setup, run):
        assert words[:4] == ["gcloud", "compute", "tpus", "queued-resources"]
        assert flags_of(words)["project"] == "p" and flags_of(words)["zone"] == "europe-west4-b"
    assert [words[4] for words in (create, describe, copy, setup, run)] == [
        "create", "describe", "scp", "ssh", "ssh",
    ]  # fmt: skip
    flags = flags_of(create)
    assert flags["accelerator-type"] == "v5litepod-256"
    assert flags["runtime-version"] == "v2-alpha-tpuv5-lite"
    assert flags["node-id"] == "n" and "node-count" not in flags and "spot" not in flags
    assert archive[0] == "git" and copy[5:7] == ["DIR/instap.tar.gz", "n:instap.tar.gz"]
    for words in (setup, run):
        assert flags_of(words)["worker"] == flags_of(words)["node"] == "all"
        assert flags_of(words)["batch-size"] == "all"  # else hosts beyond 64 would wait
    assert flags_of(setup)["command"].startswith("mnt && ")
    assert shlex.split(flags_of(run)["command"]) == [
        "env", "A=b c", "bash", "instap/launch/host.sh", "run", *TRAIN,
    ]  # fmt: skip


def test_tpu_multislice_on_spot_capacity(capsys):
    commands, _ = dry(tpu, capsys, *TPU, "--accelerator=v5p-128", "--slices=4", "--spot")
    flags = flags_of(commands[0])
    assert flags["node-count"] == "4" and flags["node-prefix"] == "n" and "node-id" not in flags
    assert "spot" in flags and flags["accelerator-type"] == "v5p-128"


@pytest.mark.parametrize("action", ["stop", "delete"])
def test_tpu_stop_and_delete(action, capsys):
    assert tpu.main([action, *TPU[1:], "--dry-run"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[4:6] == ["ssh" if action == "stop" else "delete", "n"]
    if action == "stop":
        assert flags_of(words)["command"] == "bash instap/launch/host.sh stop"


def fake_gcloud(folder, script):
    """A `gcloud` on the PATH that does what the Python `script` says with `words`, and logs."""
    program = folder / "gcloud"
    program.write_text(
        f"#!{sys.executable}\nimport pathlib, sys\nwords = sys.argv[4:]\n"
        f"log = pathlib.Path({str(folder / 'log')!r})\n"
        "before = log.read_text().split() if log.exists() else []\n"
        "log.write_text(' '.join([*before, words[0]]))\n" + script
    )
    program.chmod(0o755)
    return folder / "log"


def test_tpu_preempted_slices_are_asked_for_again_and_resumed(tmp_path, monkeypatch, capfd):
    # First run: one of four hosts is lost with its slice. Second: all four say 0.
    script = """
runs = before.count("ssh")
if words[0] == "describe":
    states = {0: "ACTIVE", 2: "SUSPENDED"}
    print("ACTIVE" if before[-1] == "create" else states.get(runs, ""))
if words[0] == "ssh" and " run " in " ".join(words):
    first = "create" in before and before.count("create") == 1
    for host in range(3 if first else 4):
        print(f"[h{host}] start from checkpoint {'' if first else 40}")
        print(f"[h{host}] exit code {134 if first else 0}, checkpoint {40 if first else 80}")
    sys.exit(1 if first else 0)
"""
    log = fake_gcloud(tmp_path, script)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(tpu, "POLL", 0.01)
    log.write_text("create")  # asked for before: describe says ACTIVE
    code = tpu.main([*TPU, "--accelerator=v5e-16", "--delay=0.01", "--", *TRAIN])
    err = capfd.readouterr().err
    assert code == 0
    assert "1 of 4 hosts did not say how they ended" in err
    assert "exit code 134 at step 40" in err and "ended with exit code 0 at step 80" in err
    first = "create describe scp ssh ssh"  # the last ssh runs
    assert log.read_text() == f"{first} describe delete {first}"


GKE = ("run", "--name=n", "--accelerator=v5p-256", "--image=i:1", "--claim=c")


def jobset_of(capsys, *flags):
    commands, rest = dry(gke, capsys, *GKE, *flags)
    assert commands[0] == ["kubectl", "--namespace=default", "apply", "--filename=-"]
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
    assert container["image"] == "i:1" and container["resources"]["limits"]["google.com/tpu"] == 4
    command = container["command"]
    at = command.index("--")
    assert command[at + 1 :] == ["instap", *TRAIN]
    names = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert names == {"SLICE": None, "HOST": None, "A": "b: 'c"}
    assert {"--once", "--limit=3", "--worker=$(SLICE)-$(HOST)"} <= set(command[:at])
    assert "--workdir=/shared/my run" in command[:at]
    assert pod_spec["volumes"][0]["persistentVolumeClaim"]["claimName"] == "c"


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


SLURM = ("--nodes=4", "--gpus=8", "--sbatch-flag=--partition=gpu", "--wait")


def test_slurm_script(capsys):
    commands, rest = dry(slurm, capsys, *SLURM)
    install, logs, submit = commands
    assert install[:2] == ["bash", "-c"] and 'EXTRAS="[cuda]"' in install[2]
    assert logs == ["mkdir", "-p", "/shared/my run.launch"]
    assert submit == ["sbatch", "--wait", "--partition=gpu"]
    script = rest.split("\nEND")[0]
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if "#SBATCH" in line]
    options = dict(line.partition("=")[::2] for line in lines)
    assert options["nodes"] == "4"
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8"
    assert options["signal"] == "TERM@120" and "requeue" in options
    assert options["open-mode"] == "append"  # a requeued job goes on in the same log
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


@pytest.mark.parametrize("launcher", [slurm, local_pod, supervise])
def test_a_limit_of_no_start_is_refused(launcher, capsys):
    with pytest.raises(SystemExit, match="2"):
        launcher.main(["--limit=0", "--", *TRAIN])
    assert "--limit: must be 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (75, True), (137, False)])
def test_slurm_script_requeues_what_was_preempted(tmp_path, capsys, code, requeued):
    """The script itself, with srun and scontrol played by others."""
    for name, body in {"srun": f"exit {code}", "scontrol": f'echo "$@" >{tmp_path}/log'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    _, rest = dry(slurm, capsys, "--limit=1")
    script = rest.split("\nEND")[0].replace("'/shared/my run'", f"'{tmp_path}/run'", 1)
    environment = os.environ | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
    }
    done = subprocess.run(["bash"], input=script, text=True, env=environment, capture_output=True)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "log").exists() == requeued
    if requeued:
        assert (tmp_path / "log").read_text() == "requeue 7\n"


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
    ],
)
def test_slices_as_google_cloud_lists_them(name, chips, topology, hosts):
    one = slices.slice_of(name)
    assert (one.chips, one.topology, one.hosts) == (chips, topology, hosts)
    # The launchers run without JAX and have a table of their own: the compiler's says the same.
    assert "x".join(map(str, parse(name).shape)) == topology


@pytest.mark.parametrize("name", ["v5litepod-2", "v5e-512", "v5p-7", "v6e-100", "v9-8", "v5p", ""])
def test_what_is_no_slice_is_one_line(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        tpu.main([*TPU, f"--accelerator={name}", "--dry-run", "--", *TRAIN])
    assert stopped.value.code == 2
    assert name in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.sh")))
def test_shell_scripts_parse(script):
    assert subprocess.run(["bash", "-n", LAUNCH / script]).returncode == 0


# --- a host of a slice


@pytest.fixture
def a_host(tmp_path):
    """Calls host.sh with a home of its own, where `instap` is a script of the test's."""
    root = tmp_path / "instap"
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / "launch").mkdir()
    (root / "launch" / "host.sh").write_text((LAUNCH / "host.sh").read_text())

    def call(*words, script=None):
        program = root / ".venv" / "bin" / "instap"
        if script is not None:
            program.write_text(f"#!{sys.executable}\n{script}")
            program.chmod(0o755)
        return subprocess.Popen(
            ["bash", root / "launch" / "host.sh", *words],
            env=os.environ | {"HOME": str(tmp_path), "TMPDIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            text=True,
        )

    return call


def test_host_says_its_checkpoints_and_its_exit_code(a_host, tmp_path):
    script = (
        "import sys, os\nprint(sys.argv[1:])\n"
        "os.mkdir(sys.argv[-1][10:] + '/checkpoints/30')\nsys.exit(75)"
    )
    (tmp_path / "my run" / "checkpoints" / "9").mkdir(parents=True)
    (tmp_path / "my run" / "checkpoints" / "20").mkdir()
    run = a_host("run", "train", f"--workdir={tmp_path}/my run", script=script)
    lines = run.communicate()[0].splitlines()
    assert run.returncode == 75
    assert tpu._START.match(lines[0])[1] == "20"
    assert lines[1].endswith(f"['train', '--workdir={tmp_path}/my run']")
    assert tpu._EXIT.match(lines[2]).groups()[1:] == ("75", "30")
    assert str(tmp_path) in (tmp_path / "instap.log").read_text()


WAITS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *a: sys.exit(75))
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["stop", "run"])
def test_host_ends_what_runs_when_asked_and_before_another_start(a_host, how):
    first = a_host("run", "train", script=WAITS)
    assert "start from" in first.stdout.readline() and "ready" in first.stdout.readline()
    second = a_host("run", "train", script="print('second')") if how == "run" else a_host("stop")
    assert second.wait(timeout=30) == 0
    assert first.wait(timeout=30) == 75
    assert "exit code 75" in first.stdout.read()
    if how == "run":
        assert "second" in second.stdout.read()
