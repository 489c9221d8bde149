"""`launch/tpu.py`: what it would run, and what it does with what Google Cloud answers."""

import os
import shlex
import subprocess
import time

import pytest
import tpu
from launchers import TPU, TRAIN, dry, fake, flags_of


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
