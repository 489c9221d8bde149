"""Pods whose storage fails, or that lose a process within a save: what another start mends is no
fault of the input, and nobody waits for one that is gone."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from instap_jax.errors import EXIT_STORAGE, EXIT_USER_ERROR

SCRIPT = Path(__file__).with_name("pod_storage.py")
SOON = 100  # seconds; orbax waits for twenty minutes


def run(scenario: str, count: int, folder: Path) -> tuple[list[int], list[str]]:
    """Exit codes and outputs of the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flags = re.sub(r"--xla_force\S+", "", os.environ.get("XLA_FLAGS", ""))
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_NUM_CPU_DEVICES": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, scenario, str(rank), str(count), port, folder / "run"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=SOON)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


def test_processes_agree_and_save_beside_each_other(tmp_path):
    codes, outputs = run("together", 2, tmp_path)
    assert codes == [0, 0], "\n".join(outputs)


@pytest.mark.parametrize("scenario", ["background", "at_the_end"])
def test_a_save_that_fails_one_process_is_noticed_at_once(tmp_path, scenario):
    codes, outputs = run(scenario, 2, tmp_path)
    assert codes[0] == EXIT_STORAGE and "Input/output error" in outputs[0], outputs[0]
    assert codes[1] not in (0, EXIT_USER_ERROR), outputs[1]


def test_storage_that_fails_process_0_before_the_run_is_final_for_none(tmp_path):
    codes, outputs = run("prepared", 2, tmp_path)
    assert codes[0] == EXIT_STORAGE and "Stale file handle" in outputs[0], outputs[0]
    assert codes[1] not in (0, EXIT_USER_ERROR), outputs[1]


@pytest.mark.parametrize("fails", [0, 1])
def test_a_process_that_fails_alone_ends_with_its_own_code(tmp_path, fails):
    codes, outputs = run(("first_fails", "second_fails")[fails], 2, tmp_path)
    assert codes[fails] == EXIT_USER_ERROR, outputs[fails]
    assert codes[1 - fails] not in (0, EXIT_USER_ERROR), outputs[1 - fails]


def test_a_fault_that_all_meet_waits_for_the_save(tmp_path):
    codes, outputs = run("all_fail", 2, tmp_path)
    assert codes == [EXIT_USER_ERROR] * 2, "\n".join(outputs)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]


def test_a_process_lost_within_a_save_is_no_fault_of_the_input(tmp_path):
    codes, outputs = run("killed", 3, tmp_path)
    assert codes[1] == -9
    for code, output in zip(codes[::2], outputs[::2]):
        assert code not in (0, EXIT_USER_ERROR), output
