"""The real program in two processes of four devices: the same numbers, the same end for both."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import tiny_config

from instap_jax import config_check, sharding
from instap_jax.errors import EXIT_PREEMPTED
from instap_jax.train import checkpoint, loop
from instap_jax.train.metrics import read_metrics
from instap_jax.train.stop import StopRequest

TARGET = 16  # the step at which runs are compared
HEARTBEAT = 10  # seconds until a dead process is noticed
# Relative tolerances; an update of Adam's is as large where a gradient is next to nothing.
COMPARED = {"loss": 1e-5, "grad_norm": 2e-5, "param_norm": 1e-6, "update_norm": 1e-3}


def small_config(small_set: Path, **changes):
    c = tiny_config("teacher", **{"data.videos": f"{small_set}/packed:train"} | changes)
    c.data.update(images="", group_size=1, workers=1)
    c.tokenizer.path = f"{small_set}/tokenizer.model"
    c.text.vocab_size = 321  # which tensor=2 does not divide
    c.mesh.update(fsdp=-1, tensor=2)
    c.steps, c.checkpoint.every = 200, TARGET
    c.distributed.heartbeat_timeout = HEARTBEAT
    return c


class Pod:
    """`instap train` in two processes."""

    def __init__(self, config, workdir: Path):
        self.workdir = workdir
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        script = workdir.with_suffix(".py")
        script.write_text(
            "from ml_collections import ConfigDict\n"
            f"def get_config(): return ConfigDict({config.to_dict()!r})\n"
        )
        command = [sys.executable, "-m", "instap_jax", "train"]
        command += [f"--config={script}", f"--workdir={workdir}"]
        self.processes = []
        for index in range(2):
            variables = {
                "XLA_FLAGS": re.sub(r"--xla_force\S+", "", os.environ["XLA_FLAGS"]),
                "JAX_NUM_CPU_DEVICES": "4",
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
            }
            self.processes.append(
                subprocess.Popen(
                    command,
                    env=os.environ | variables,
                    stdout=workdir.with_suffix(f".{index}.log").open("a"),
                    stderr=subprocess.STDOUT,
                )
            )

    def log(self, index: int) -> str:
        return self.workdir.with_suffix(f".{index}.log").read_text()

    def wait_for(self, step: int) -> None:
        """Until the metrics of a step are there."""
        while not any(line["step"] >= step for line in self._metrics()):
            for index, process in enumerate(self.processes):
                assert process.poll() is None, self.log(index)
            time.sleep(0.02)

    def _metrics(self) -> list[dict]:
        exists = (self.workdir / "metrics.jsonl").exists()
        return read_metrics(self.workdir) if exists else []

    def codes(self, timeout: float = 240) -> list[int]:
        try:
            return [process.wait(timeout) for process in self.processes]
        finally:
            self.close()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def whole(small_set, tmp_path_factory) -> Path:
    """A run of two processes that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    pod = Pod(small_config(small_set, stop_at=TARGET), workdir)
    assert pod.codes() == [0, 0], pod.log(0) + pod.log(1)
    return workdir


def train_on_one_device(small_set, workdir: Path, monkeypatch, *, last: int) -> list[dict]:
    """Trains, or goes on, in this process; returns the metrics."""
    make_mesh = sharding.make_mesh
    with monkeypatch.context() as patch:
        patch.setattr(loop.sharding, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
        config = small_config(small_set, stop_at=last)
        config.mesh.tensor = 1
        config_check.check(config)
        loop.train(config, workdir, StopRequest())
    return read_metrics(workdir)


def assert_close(first: list[dict], second: list[dict]) -> None:
    for one, two in zip(first, second, strict=True):
        assert one["step"] == two["step"]
        for name, tolerance in COMPARED.items():
            assert two[name] == pytest.approx(one[name], rel=tolerance), (one["step"], name)


def test_numbers_are_those_of_one_device(small_set, whole, tmp_path, monkeypatch):
    """And so of eight in one process: tests/test_train_step.py compares those with one."""
    alone = train_on_one_device(small_set, tmp_path, monkeypatch, last=3)
    together = read_metrics(whole)
    assert [line["step"] for line in together] == list(range(1, TARGET + 1))
    assert_close(alone, together[:3])


def test_one_process_writes_and_speaks(whole):
    assert {path.name for path in whole.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "tokenizer.model",
        "checkpoints",
    }
    first, second = (whole.with_suffix(f".{n}.log").read_text() for n in (0, 1))
    assert f"steps 1 to {TARGET}" in first and "train teacher" in first
    # Gloo's threads write into each other's lines.
    gloo = ("Gloo", "peer ranks")
    said = [line for line in second.splitlines() if not any(word in line for word in gloo)]
    assert len(said) == 1 and said[0].startswith("process 1 of 2"), second


def test_preempted_resumed_killed(small_set, whole, tmp_path, monkeypatch):
    """SIGTERM to one process, another start, SIGKILL to one process, on with one: in one run."""
    workdir = tmp_path / "run"
    pod = Pod(small_config(small_set), workdir)
    pod.wait_for(2)
    pod.processes[1].send_signal(signal.SIGTERM)
    assert pod.codes() == [EXIT_PREEMPTED] * 2, pod.log(0) + pod.log(1)
    assert "SIGTERM: stopping at the end of the step" in pod.log(1)
    step, _ = checkpoint.read_meta(str(workdir))
    assert 2 <= step < TARGET
    assert f"goes on from step {step}" in pod.log(0)
    assert read_metrics(workdir)[-1]["step"] == step

    pod = Pod(small_config(small_set), workdir)
    pod.wait_for(TARGET + 1)
    pod.processes[0].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    codes = pod.codes(4 * HEARTBEAT)
    assert time.monotonic() - killed < 2 * HEARTBEAT
    assert codes[0] == -signal.SIGKILL and codes[1] not in (0, 2, EXIT_PREEMPTED), codes
    for a, b in zip(_saved(whole), _saved(workdir), strict=True):
        np.testing.assert_array_equal(a, b)
    assert _position(whole) == _position(workdir)

    next_step = read_metrics(workdir)[TARGET]
    alone = train_on_one_device(small_set, workdir, monkeypatch, last=TARGET + 1)
    assert_close([next_step], alone[TARGET:])


def _saved(workdir: Path) -> list[np.ndarray]:
    stored = checkpoint.StoredParams(str(workdir))
    assert stored.step == TARGET
    return [stored.read(name) for name in sorted(stored.shapes)]


def _position(workdir: Path) -> dict:
    (path,) = (workdir / "checkpoints" / str(TARGET) / "data").glob("metadata")
    return json.loads(path.read_text())
