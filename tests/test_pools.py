"""Pools of worker processes: Ctrl-C at any moment, and workers that die."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from media_files import make_image
from test_pack_command import cmdline, group, wait_until

from instap_jax.data import processes
from instap_jax.data.synthetic import generate
from instap_jax.main import main


def workers(leader: int) -> list[int]:
    return [pid for pid in group(leader) if b"spawn_main" in cmdline(pid)]


def deaf(pid: int) -> bool:
    """Whether a process blocks or ignores Ctrl-C, or has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return True
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigBlk", "SigIgn"))]
    return any(mask >> (signal.SIGINT - 1) & 1 for mask in masks)


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> dict[str, list[str]]:
    """What each command with a pool is given, to work for far longer than any test."""
    root = tmp_path_factory.mktemp("pools")
    make_image(root / "still.jpg", size=(1000, 1500))
    line = {"media": "still.jpg", "kind": "image", "caption": "A still.", "instances": []}
    path = root / "a.jsonl"
    path.write_text("".join(json.dumps(line | {"id": i}) + "\n" for i in range(4000)))
    media = [f"--annotations={path}", f"--media={root}"]
    return {
        "validate": media,
        "pack": [*media, "--processes=2", "--shard_size=100", f"--out={root}/packed"],
        "synth": ["--processes=2", f"--out={root}/synth"],
    }


@pytest.mark.parametrize(
    "verb, moment",
    [("validate", "start"), ("validate", "work"), ("pack", "start"), ("synth", "work")],
)
def test_ctrl_c_is_one_line_at_any_moment(flags, verb, moment):
    # On two cores, whatever the machine has.
    code = (
        "import os, sys; os.sched_getaffinity = lambda _: {0, 1}\n"
        "from instap_jax.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, verb, *flags[verb]]
    run = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: workers(run.pid))
    assert all(deaf(pid) for pid in workers(run.pid))
    if moment == "work":
        time.sleep(2)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to all of them
    try:
        _, error = run.communicate(timeout=20)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 130, error
    assert error.splitlines()[-1] == f"instap {verb}: interrupted"
    assert "Traceback" not in error
    wait_until(lambda: not group(run.pid))


def test_ctrl_c_waits_for_the_end_of_the_block():
    after = False
    with pytest.raises(KeyboardInterrupt), processes.interrupts_held():
        os.kill(os.getpid(), signal.SIGINT)
        threading.Thread(target=signal.raise_signal, args=(signal.SIGINT,)).start()
        time.sleep(0.05)
        after = True
    assert after and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def _sleep_or_die(number: int, size: int = 0) -> bytes:
    if number < 0:
        os._exit(1)
    time.sleep(number)
    return b"0" * size


def _die(*_) -> None:
    os._exit(1)


@pytest.mark.parametrize("last", [1, 19])  # while results are sent; while workers sleep
def test_leaving_a_pool_by_an_exception_ends_it_at_once(last):
    begun = time.monotonic()
    with pytest.raises(KeyError), processes.pool(2) as submit:
        results = [submit(_sleep_or_die, 0, 10_000_000) for _ in range(20)]
        sleeping = [submit(_sleep_or_die, 40) for _ in range(20)]
        results[last].result()
        time.sleep(0.01 * last)
        raise KeyError
    assert time.monotonic() < begun + 30
    assert all(future.done() for future in sleeping)


def test_a_worker_that_dies_ends_a_pool_with_many_tasks():
    with pytest.raises(BrokenProcessPool), processes.pool(2) as submit:
        futures = [submit(_sleep_or_die, -(number == 5)) for number in range(2000)]
        for future in futures:
            future.result()


def test_a_worker_that_dies_while_rendering_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "_draw_chunk", _die)
    assert main(["synth", f"--out={tmp_path}/out", "--processes=2"]) == 2
    assert "process that renders died" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
