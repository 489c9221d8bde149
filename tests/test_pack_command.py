"""`instap pack` as a command: its output, and what stopping it leaves."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pack_data import FAULTY, LINES, annotations, make_media, tree, video_line

from instap_jax import main
from instap_jax.data import builder, records
from instap_jax.data.shard import Options
from instap_jax.types import Kind


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory, root) -> Path:
    directory = tmp_path_factory.mktemp("packed")
    file = annotations(directory / "a.jsonl", LINES)
    out = directory / "out"
    builder.pack(str(file), str(root), str(out), options=Options(), shard_size=3, processes=1)
    return out


def arguments(tmp_path: Path, root: Path, *more: str) -> list[str]:
    paths = {"annotations": tmp_path / "a.jsonl", "media": root, "out": tmp_path / "out"}
    return ["pack", *(f"--{name}={path}" for name, path in paths.items()), *more]


def test_command_prints_a_table_or_one_line(root, tmp_path, capsys):
    annotations(tmp_path / "a.jsonl", LINES + FAULTY)
    flags = arguments(tmp_path, root, "--processes=1", "--rate=0")
    assert main.main(flags) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("instap pack: 1 of 19 samples rejected so far")
    assert main.main([*flags, "--max_reject_rate=0.25"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert "line 16: cut: truncated" in " ".join(error)
    assert error[-1].startswith("instap pack: 5 of 19 samples rejected")
    assert os.listdir(tmp_path) == ["a.jsonl"]
    assert main.main([*flags, "--max_reject_rate=0.3"]) == 0
    out = capsys.readouterr().out
    assert "video  train                    8         14         85" in out  # 7 x 12 frames + 1
    assert "rejected 5 samples" in out
    assert main.main(["pack", "--media=x"]) == 2
    assert "annotations" in capsys.readouterr().err


def start(tmp_path: Path, root: Path, *more: str, **kwargs) -> subprocess.Popen:
    command = [sys.executable, "-m", "instap_jax", *arguments(tmp_path, root, *more)]
    return subprocess.Popen(
        command, start_new_session=True, stderr=subprocess.PIPE, text=True, **kwargs
    )


def test_no_process_imports_jax_or_tensorflow(packed, root, tmp_path):
    """Stand-ins that leave a mark where they are imported; TFDS must take the second for absent."""
    traps = tmp_path / "traps"
    traps.mkdir()
    for name in ("jax", "tensorflow"):
        (traps / f"{name}.py").write_text(
            f"open({str(tmp_path / name)!r}, 'w').close()\nraise ImportError('trap')\n"
        )
    annotations(tmp_path / "a.jsonl", LINES)
    run = start(
        tmp_path,
        root,
        "--processes=2",
        "--shard_size=3",
        env=os.environ | {"PYTHONPATH": str(traps)},
    )
    assert run.wait() == 0, run.stderr.read()
    assert not (tmp_path / "jax").exists()
    assert tree(tmp_path / "out") == tree(packed)


@pytest.mark.parametrize("victim", ["main, Ctrl-C", "main, killed", "worker, killed"])
def test_stopped_command_leaves_no_process_and_can_continue(root, tmp_path, victim):
    lines = [video_line(f"{i}", media="long.mp4", instances=[]) for i in range(48)]
    annotations(tmp_path / "a.jsonl", lines)
    run = start(tmp_path, root, "--processes=2", "--shard_size=8")
    reports = tmp_path / "out.partial/reports"
    wait_until(lambda: reports.is_dir() and len(list(reports.glob("*.json"))))
    if victim == "worker, killed":
        os.kill(
            next(pid for pid in group(run.pid) if b"spawn_main" in cmdline(pid)), signal.SIGKILL
        )
    elif victim == "main, Ctrl-C":
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to all of them
    else:
        run.kill()
    code, error = run.wait(), run.stderr.read()
    wait_until(lambda: not group(run.pid))
    expected = {"main, Ctrl-C": 130, "main, killed": -signal.SIGKILL, "worker, killed": 2}
    assert code == expected[victim], error
    assert "Traceback" not in error
    if victim == "worker, killed":
        assert "annotation lines being packed" in error and "same command again" in error
    assert not (tmp_path / "out").exists()
    done = len(list(reports.glob("*.json")))
    assert 1 <= done < 6
    again = start(tmp_path, root, "--processes=2", "--shard_size=8")
    assert again.wait() == 0
    assert f"packing  {48 - 8 * done} samples" in again.stderr.read()
    assert len(records.open_source(str(tmp_path / "out"), "train", Kind.VIDEO)) == 48


def test_full_disk_is_one_line_and_can_continue(packed, root, tmp_path):
    annotations(tmp_path / "a.jsonl", LINES)
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY));"
        "from instap_jax.main import main; sys.exit(main(sys.argv[1:]))"
    )
    flags = arguments(tmp_path, root, "--processes=1", "--shard_size=3")
    run = subprocess.run([sys.executable, "-c", limited, *flags], capture_output=True, text=True)
    assert run.returncode == 2
    last = run.stderr.splitlines()[-1]
    assert "cannot write" in last and "same command again" in last
    assert "Traceback" not in run.stderr
    assert not list(tmp_path.rglob("*.tmp"))
    assert main.main(flags) == 0
    assert tree(tmp_path / "out") == tree(packed)


def wait_until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


def group(leader: int) -> list[int]:
    """Living processes of a process group."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, _, rest = stat.read_text().partition(" (")
            state, _, group = rest.rpartition(") ")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(group) == leader and state != "Z":
            pids.append(int(pid))
    return pids
