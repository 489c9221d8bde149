"""Launchers: when they start again, which exit code comes back, what a host does."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import local_pod
import pytest
import supervise
import tpu

LAUNCH = Path(__file__).parent.parent / "launch"

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


def test_what_cannot_be_started_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    for flags in (
        [f"--workdir={tmp_path}/run", "--", "/nonexistent"],
        [f"--workdir={tmp_path}/file/run", "--run-id=a", "--", "true"],
    ):
        assert supervise.main(flags) == supervise.USER_ERROR
    assert capsys.readouterr().err.count("\n") >= 2
    with pytest.raises(SystemExit, match="2"):
        local_pod.main(["--", "train", f"--workdir={tmp_path}/file/run"])
    assert "file/run.launch cannot be made: Not a directory" in capsys.readouterr().err


def test_storage_that_fails_once_does_not_end_a_pod(tmp_path, monkeypatch, capsys):
    def stale(*_):
        raise OSError(errno.ESTALE, "Stale file handle", "starts.jsonl")

    monkeypatch.setattr(supervise.Starts, "add", stale)
    flags = [f"--workdir={tmp_path}/run", "--once", "--run-id=a", "--", "true"]
    assert supervise.main(flags) == 1  # 2 would be final
    assert "Stale file handle" in capsys.readouterr().err


def test_once_counts_starts_across_supervisors(tmp_path):
    flags = ("--once", "--run-id=a", "--worker=0-1", "--limit=2")
    codes = [run_supervisor(tmp_path, *flags, script="exit(1)").returncode for _ in range(3)]
    assert codes == [1, 1, 2]  # 2 is final for the platform
    (tmp_path / "run" / "checkpoints" / "5").mkdir(parents=True)
    assert run_supervisor(tmp_path, *flags, script="exit(1)").returncode == 1
    other = ("--once", "--run-id=b", "--worker=0-1", "--limit=2")
    assert run_supervisor(tmp_path, *other, script="exit(0)").returncode == 0


@pytest.mark.parametrize("torn", [b'{"time": 17', b"\xff\x00\n", b"[3]\n", b"{}\n", b"\n"])
def test_a_torn_record_of_a_start_costs_itself_alone(tmp_path, torn):
    record = supervise.Starts(tmp_path / "run", "a", "")
    assert record.count(5) == 0
    for _ in range(2):
        record.add(5)
    assert record.count(5) == 2
    path = tmp_path / "run.launch" / "starts.jsonl"
    path.write_bytes(path.read_bytes() + torn)
    assert record.count(5) == 2
    record.add(5)
    assert record.count(5) == 3 and record.count(6) == 0


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

    def call(*words, script=None, stdout=subprocess.PIPE):
        program = root / ".venv" / "bin" / "instap"
        if script is not None:
            program.write_text(f"#!{sys.executable}\n{script}")
            program.chmod(0o755)
        return subprocess.Popen(
            ["bash", root / "launch" / "host.sh", *words],
            env=os.environ | {"HOME": str(tmp_path), "TMPDIR": str(tmp_path)},
            stdout=stdout,
            text=True,
            start_new_session=True,
        )

    call.root = tmp_path
    return call


@pytest.mark.parametrize("flag", ["--workdir=", "--workdir "])
def test_host_says_its_checkpoints_and_its_exit_code(a_host, tmp_path, flag):
    folder = f"{tmp_path}/my run"
    flags = [flag + folder] if flag.endswith("=") else [flag.strip(), folder]
    script = (
        "import sys, os\nprint(sys.argv[1:])\n"
        f"os.mkdir({folder!r} + '/checkpoints/30')\nsys.exit(75)"
    )
    (tmp_path / "my run" / "checkpoints" / "9").mkdir(parents=True)
    (tmp_path / "my run" / "checkpoints" / "20").mkdir()
    run = a_host("run", "7", "train", *flags, "--n=1", script=script)
    lines = run.communicate()[0].splitlines()
    assert run.returncode == 75
    assert tpu._START.match(lines[0])[1] == "20"
    assert lines[1].endswith(str(["train", *flags, "--n=1"]))
    assert tpu._EXIT.match(lines[2]).groups()[1:] == ("75", "30")
    assert str(tmp_path) in (tmp_path / "instap.log").read_text()


WAITS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *a: sys.exit(75))
print("ready", flush=True)
time.sleep(60)
"""


SECOND = "print('second')"


@pytest.mark.parametrize("how", ["stop", "run"])
def test_host_ends_what_runs_when_asked_and_before_another_start(a_host, how):
    first = a_host("run", "1", "train", script=WAITS)
    assert "start from" in first.stdout.readline() and "ready" in first.stdout.readline()
    second = a_host("stop") if how == "stop" else a_host("run", "2", "train", script=SECOND)
    assert second.wait(timeout=30) == 0
    code, output = first.wait(timeout=30), first.stdout.read()
    if how == "run":
        assert "second" in second.stdout.read()
        assert a_host("run", "1", "train").wait(timeout=30) == 1  # has had its time
    else:
        assert code == 75 and "exit code 75" in output


SAVES = """
import pathlib, signal, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda *a: asked.append(1))
print("ready", flush=True)
while not asked:
    time.sleep(0.05)
end = time.monotonic() + 3
while time.monotonic() < end:  # the checkpoint
    time.sleep(0.05)
print("saved, asked", len(asked), flush=True)
sys.exit(75)
"""


def test_host_a_broken_connection_costs_the_run_nothing(a_host):
    """gcloud repeats what it was to do: `run` of the same start, and `stop`."""
    first = a_host("run", "1", "train", script=SAVES)
    assert "start from" in first.stdout.readline() and "ready" in first.stdout.readline()
    os.killpg(first.pid, signal.SIGKILL)  # what the connection had started
    first.stdout.close()
    again = a_host("run", "1", "train")
    assert "connected again" in again.stdout.readline()
    stops = [a_host("stop"), a_host("stop")]
    assert [stop.wait(timeout=30) for stop in stops] == [0, 0]
    assert again.wait(timeout=30) == 75
    assert "saved, asked 1\n" in again.stdout.read()
    late = a_host("run", "1", "train")  # and once more, after its end
    assert late.wait(timeout=30) == 75 and "exit code 75" in late.stdout.read()


def test_host_a_connection_that_breaks_before_the_run_begins_loses_no_start(a_host):
    read, write = os.pipe()
    os.close(read)  # who writes there is killed by SIGPIPE
    assert a_host("run", "1", "train", script="print('runs')", stdout=write).wait(timeout=30) != 0
    os.close(write)
    again = a_host("run", "1", "train")
    assert again.wait(timeout=30) == 0 and "runs" in again.stdout.read()


def test_host_the_same_start_twice_at_once_is_one_run(a_host):
    script = f"open({str(a_host.root / 'begun')!r}, 'a').write('x')\nimport time; time.sleep(1)"
    first, second = (a_host("run", "1", "train", script=script) for _ in range(2))
    assert first.wait(timeout=30) == second.wait(timeout=30) == 0
    assert (a_host.root / "begun").read_text() == "x"


def test_host_a_run_that_could_not_be_found_again_does_not_start(a_host):
    state = a_host.root / f"instap-{os.getuid()}"
    Path(f"{state}.pid").mkdir()  # a full disk, say
    run = a_host("run", "1", "train", script=f"open({str(a_host.root / 'begun')!r}, 'w')")
    assert run.wait(timeout=60) == 1 and "cannot write" in run.stdout.read()
    assert not (a_host.root / "begun").exists()


# --- the environment


@pytest.fixture
def install(tmp_path):
    """Sources install.sh as slurm.py does, without `set -e`, where python and pip are scripts."""
    shutil.copy(LAUNCH / "install.sh", tmp_path)
    for name in ("setup.cfg", "constraints.txt"):
        (tmp_path / name).touch()
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\ncase $1$2 in\n"
        "  -mvenv) mkdir -p $3/bin; cp $0 $3/bin/python; [ -z $VENV_FAILS ] || exit 1\n"
        '    echo "PATH=$3/bin:\\$PATH" >$3/bin/activate; echo venv >>log;;\n'
        "  -mpip) echo pip >>log; [ -z $PIP_FAILS ] || exit 1;;\n"
        "esac\n"
    )
    python.chmod(0o755)

    def call(how="", **environment):
        command = f"{how}cd {tmp_path} && EXTRAS='[cuda]' && . ./install.sh"
        environment |= {"PATH": os.environ["PATH"], "PYTHON": f"{tmp_path}/python"}
        environment["VENV"] = f"{tmp_path}/env"
        done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True)
        log = tmp_path / "log"
        return done.returncode, log.read_text().split() if log.exists() else []

    return call


@pytest.mark.parametrize("how", ["", "set -euo pipefail; "])
def test_an_installation_that_failed_is_made_again_and_one_that_passed_is_not(install, how):
    assert install(how, PIP_FAILS="1", VENV_FAILS="") == (1, ["venv", "pip"])
    for _ in range(2):
        assert install(how, PIP_FAILS="", VENV_FAILS="") == (0, ["venv", "pip", "pip"])


def test_an_environment_that_was_half_made_is_made_again(install):
    assert install(VENV_FAILS="1", PIP_FAILS="") == (2, [])
    assert install(VENV_FAILS="", PIP_FAILS="") == (0, ["venv", "pip"])
