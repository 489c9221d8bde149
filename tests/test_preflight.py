"""Preflight: every row passes where all is well, and says what is wrong where it is not."""

import errno
import json
import os
import shutil
import socket
from pathlib import Path

import jax
import pytest
from test_train import run as train
from tiny import tiny_config

from instap_jax import main, sharding
from instap_jax.errors import UserError
from instap_jax.models import depth
from instap_jax.preflight import host, inputs, rows, run, trial
from instap_jax.preflight.rows import Row, Status
from instap_jax.train.feed import abstract_batch
from instap_jax.train.inputs import identify
from instap_jax.train.program import build_program, offloaded_bytes
from instap_jax.types import Kind

GUARD_AFTER_THREE = {"refused": 3, "spikes": 0, "losses": {}}


def small_config(small_set, **changes):
    return tiny_config(
        "teacher",
        **{
            "data.videos": f"{small_set}/packed:train",
            "tokenizer.path": str(small_set / "tokenizer.model"),
        }
        | changes,
    )


@pytest.fixture(scope="module")
def flight(small_set, tmp_path_factory):
    """The rows of a preflight that passes, what was shown, and what it has left behind."""
    folder = tmp_path_factory.mktemp("flight")
    shown = []
    found = run.run(
        small_config(small_set), folder / "a" / "run", hosts=1, chips=8, need=0.001, seconds=1.0,
        show=shown.extend,
    )  # fmt: skip
    return found, shown, list(folder.rglob("*"))


def by_name(found):
    assert len({row.name for row in found}) == len(found)
    return {row.name: row for row in found}


def test_all_passes_and_nothing_is_left(flight):
    found, shown, left = flight
    assert [row.name for row in found if row.status is not Status.PASS] == []
    assert shown == found
    assert left == []


def test_rows_say_what_was_found(flight):
    found = by_name(flight[0])
    assert found["hosts"].found == "1 of 1" and found["chips"].found.startswith("8 of 8, cpu")
    assert "train 8 video, as the manifests say" in found["data"].found
    assert "video: loss" in found["step"].found
    assert "samples/s of" in found["input"].found
    assert found["mesh"].found == "replica=1 x fsdp=8 x tensor=1"


def test_batches_of_both_kinds_are_tried(small_set):
    images = {"data.images": f"{small_set}/packed:train", "data.image_fraction": 0.5}
    config = small_config(small_set, **images)
    row, batches = trial.first_batches(config, sharding.make_mesh(config.mesh))
    assert row.found == "image: 8 samples, video: 8 samples" and len(batches) == 2
    assert "8 video" in inputs.corpora(config).found and "8 image" in inputs.corpora(config).found


def machine(config, workdir, **expected):
    """The rows up to the step, which a failure among them keeps from being tried."""
    found = run.run(config, workdir, hosts=None, chips=expected.get("chips"), seconds=1.0)
    assert rows.failing(found)
    assert [row.status for row in found[-len(run._TRIALS) :]] == [Status.SKIPPED] * 5
    return by_name(found)


def test_several_faults_are_all_told_at_once(small_set, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    (tmp_path / "cache").touch()
    config = small_config(
        small_set,
        **{
            "data.videos": f"{small_set}/packed:trian",
            "tokenizer.path": "/nowhere.model",
            "checkpoint.init_from": "/nowhere",
            "compute.cache_dir": str(tmp_path / "cache" / "x"),
            "mesh.tensor": 3,
        },
    )
    found = machine(config, tmp_path / "run", chips=16)
    wrong = {name: row.found for name, row in found.items() if row.status is Status.FAIL}
    assert set(wrong) == {
        "chips", "mesh", "workdir", "compile cache", "data", "tokenizer", "checkpoints",
    }  # fmt: skip
    assert wrong["chips"].startswith("8 found, 16 expected")
    assert "did you mean 'train'?" in wrong["data"] and "config.json" in wrong["workdir"]
    assert "/nowhere.model" in wrong["tokenizer"] and "/nowhere" in wrong["checkpoints"]


def test_a_data_set_that_lost_samples(small_set, tmp_path):
    shutil.copytree(small_set / "packed", tmp_path / "packed")
    path = tmp_path / "packed" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["counts"]["video"]["train"]["samples"] += 1
    path.write_text(json.dumps(manifest))
    config = small_config(small_set, **{"data.videos": f"{tmp_path}/packed:train"})
    row = inputs.corpora(config)
    assert row.status is Status.FAIL
    assert "has 8 video samples, its manifest says 9" in row.found
    path.unlink()
    assert inputs.corpora(config).status is Status.WARN


def test_a_teacher_that_is_missing(small_set, tmp_path):
    config = tiny_config("stage1", **{"data.videos": f"{small_set}/packed:train"})
    row = inputs.checkpoints(config, tmp_path)
    assert row.status is Status.FAIL and "config.teacher.checkpoint" in row.found


@pytest.fixture(scope="module")
def stopped(small_set, tmp_path_factory):
    """The workdir of a run that has taken two steps of six, with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copy(small_set / "tokenizer.model", folder)
    config = small_config(
        small_set, **{"tokenizer.path": f"{folder}/tokenizer.model", "checkpoint.every": 1}
    )
    config.stop_at = 2
    train(config, folder / "run")
    return config, folder / "run"


def test_a_run_that_goes_on_is_looked_at_as_training_does(small_set, stopped, tmp_path, capsys):
    config, workdir = stopped
    row = inputs.checkpoints(config, workdir)
    assert row == rows.passed(
        "checkpoints", "the workdir holds a run, which will go on from step 2"
    )
    damaged = tmp_path / "damaged"
    shutil.copytree(workdir, damaged)
    for step in (2, 1):  # what training passes over, preflight does too, and leaves where it is
        (damaged / "checkpoints" / str(step) / "optimizer" / "_METADATA").write_bytes(b"")
        row = rows.attempt("checkpoints", lambda: inputs.checkpoints(config, damaged))
        assert (row.status is Status.FAIL) == (step == 1)
        assert ("go on from step 1" in row.found) == (step == 2)
    assert "holds no intact checkpoint" in row.found
    assert "checkpoints/2 is damaged and passed over for 1" in capsys.readouterr().err
    assert {path.name for path in (damaged / "checkpoints").iterdir()} >= {"1", "2"}


def test_a_run_that_training_would_refuse_fails_here(small_set, stopped, tmp_path, monkeypatch):
    config, workdir = stopped
    monkeypatch.setattr(
        inputs.checkpoint, "read_resumed",
        lambda name: (2, {"inputs": identify(config)}, {"guard": GUARD_AFTER_THREE}),
    )  # fmt: skip
    with pytest.raises(UserError, match="has skipped 3 updates"):
        inputs.checkpoints(config, workdir)
    monkeypatch.undo()
    other = config.copy_and_resolve_references()
    other.tokenizer.path = str(tmp_path / "other.model")
    annotations = f"--annotations={small_set}/set/annotations.jsonl"
    assert main.main(["tokenizer", annotations, f"--out={other.tokenizer.path}",
                      "--vocab_size=310"]) == 0  # fmt: skip
    with pytest.raises(UserError, match="is not the tokenizer that"):
        inputs.checkpoints(other, workdir)


def test_input_too_slow_for_the_steps(small_set):
    config = small_config(small_set)
    mesh = sharding.make_mesh(config.mesh)
    row = trial.throughput(config, mesh, seconds=0.1, need=1e9)
    assert row.status is Status.FAIL and "config.data.workers" in row.remedy
    timing = trial.Timing(compile_seconds=9.0, step_seconds=0.5, samples=8)
    assert trial.needed_rate(config, {rows_kind("video"): timing}) == 16


def rows_kind(name):
    return next(kind for kind in trial.Kind if kind.value == name)


def test_need_mixes_image_and_video_steps_as_configured(small_set):
    config = small_config(small_set, **{"data.image_fraction": 0.75})
    timings = {
        rows_kind("video"): trial.Timing(compile_seconds=1.0, step_seconds=3.0, samples=10),
        rows_kind("image"): trial.Timing(compile_seconds=1.0, step_seconds=1.0, samples=10),
    }
    assert trial.needed_rate(config, timings) == pytest.approx(10 / 1.5)


class _Broken:
    """A program whose step gives a loss that is not finite."""

    seed = 0

    def step(self, state, frozen, batch, seed):
        return state, {"loss": jax.numpy.float32("nan"), "grad_norm": jax.numpy.float32(1)}


class _Fed:
    batch, samples = None, 8


def test_a_loss_that_is_not_finite():
    row, timings = trial.steps(_Broken(), None, None, {rows_kind("video"): _Fed()})
    assert row.status is Status.FAIL and "loss is nan" in row.found and timings == {}


# --- machines


def test_storage_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "STORAGE_BYTES", 1 << 20)
    assert host.storage(tmp_path / "new" / "run", 0).status is Status.PASS
    slow = host.storage(tmp_path, 1 << 60)
    assert slow.status is Status.WARN and "a checkpoint takes" in slow.found

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    row = host.storage(tmp_path, 0)
    assert row.status is Status.FAIL and "No space left" in row.found
    assert list(tmp_path.iterdir()) == []


def test_storage_that_copies_instead_of_renaming(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "STORAGE_BYTES", 1 << 20)
    monkeypatch.setattr(os, "replace", lambda a, b: shutil.copy(a, b))
    row = host.storage(tmp_path, 0)
    assert row.status is Status.FAIL and "renamed" in row.found


def test_too_little_disk_and_memory(tmp_path):
    assert host.disk(tmp_path, 1 << 60).status is Status.FAIL
    assert host.memory(1 << 60).status is Status.FAIL
    assert host.disk(tmp_path, 1).status is host.memory(1).status is Status.PASS


def test_what_the_chips_keep_in_the_hosts_memory_counts(small_set, tmp_path, monkeypatch):
    monkeypatch.setattr(depth, "OFFLOADED_FROM", 1)
    config = small_config(small_set, **{"compute.remat": "offload"})
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        program = build_program(config, mesh)
        kept = offloaded_bytes(program, abstract_batch(config, mesh, Kind.VIDEO))
    assert kept  # of eight devices, all of them this host's
    asked = []

    def memory(*args):
        asked.append(args)
        return rows.failed("host memory", "enough of it", "end here")

    monkeypatch.setattr(host, "memory", memory)
    run.run(config, tmp_path / "run", need=0.001)
    assert asked[0][1] == kept


def test_processes_of_one_host_share_its_memory(small_set, tmp_path, monkeypatch):
    """Slurm starts one for each GPU."""
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(host, "gather", lambda name: [name, "elsewhere", name])
    assert host.neighbours() == 2
    monkeypatch.undo()
    needed = []
    monkeypatch.setattr(
        host, "memory", lambda need, more: needed.append(need) or rows.failed("host memory", "")
    )
    for count in (1, 4):
        monkeypatch.setattr(host, "neighbours", lambda count=count: count)
        run.run(small_config(small_set), tmp_path / "run", need=0.001)
    assert needed[1] == 4 * needed[0] > 0


def test_a_host_short_of_memory_is_told_what_to_do(monkeypatch):
    monkeypatch.setattr(host, "_free_memory", lambda: 10 << 30)
    assert host.memory(6 << 30, 3 << 30).status is Status.PASS
    row = host.memory(6 << 30, 5 << 30)
    assert row.status is Status.FAIL and "5.4 of it by the chips" in row.found
    assert "compute.remat" in row.remedy and "compute.remat" not in host.memory(11 << 30).remedy


def test_files_that_were_read_are_no_used_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "_CGROUP", tmp_path)
    free = host._free_memory()
    for name, text in (
        ("memory.max", "1000\n"), ("memory.current", "900\n"),
        ("memory.stat", "anon 500\nactive_file 100\ninactive_file 250\n"),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
    assert host._free_memory() == 450 < free
    (tmp_path / "memory.max").write_text("max\n")
    assert host._free_memory() > 450


def test_a_run_that_goes_on_has_its_checkpoints_already(tmp_path):
    config = tiny_config("stage1", **{"checkpoint.keep": 3})
    assert run._checkpoints_to_come(config, tmp_path) == 4
    for step in (2, 4, 6, 8):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
        assert run._checkpoints_to_come(config, tmp_path) == max(4 - step // 2, 1)


def test_a_checkpoint_that_only_some_hosts_see(tmp_path, monkeypatch):
    (tmp_path / "here" / "checkpoints").mkdir(parents=True)
    paths = [str(tmp_path / "nowhere"), str(tmp_path / "here")]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(inputs, "gather", lambda mine: [mine, [False, False]])
    found = inputs._not_everywhere(paths)
    assert found == f"{paths[1]} is there on host 0, not on host 1"
    monkeypatch.setattr(inputs, "gather", lambda mine: [mine, mine])
    assert inputs._not_everywhere(paths) == ""


def test_labels_that_no_class_has_end_the_run_here(small_set):
    changes = {"data.videos": f"{small_set}/packed:train", "classify.classes": ("dog", "cat")}
    config = tiny_config("classify", **changes)
    mesh = sharding.make_mesh(config.mesh)
    for trying in (
        lambda: trial.first_batches(config, mesh)[0],
        lambda: trial.throughput(config, mesh, seconds=0.1, need=None),
    ):
        row = rows.attempt("batches", trying)
        assert row.status is Status.FAIL and "config.classify.classes knows 2" in row.found


def test_coordinator():
    with socket.socket() as listener:
        listener.bind(("", 0))
        port = listener.getsockname()[1]
        address = f"127.0.0.1:{port}"
        assert host.coordinator_port(address, 1, wait=0).status is Status.FAIL  # nobody listens
        listener.listen()
        assert host.coordinator_port(address, 1, wait=0).status is Status.PASS
        row = host.coordinator_port(address, 0, wait=0)
        assert row.status is Status.FAIL and f"port {port}" in row.found
    assert host.coordinator_port(address, 0, wait=0).status is Status.PASS
    assert host.coordinator_port(None, 0, wait=0).status is Status.PASS


# --- rows


def test_the_worst_host_counts_and_is_named():
    fine = rows.passed("disk", "9 GB")
    full = rows.failed("disk", "0 GB", "free some")
    assert rows._together([fine, fine]) == fine
    assert rows._together([fine, full, fine]).found == "host 1 of 3: 0 GB"
    both = rows._together([fine, full, full])
    assert both.status is Status.FAIL and both.found == "host 1 and 1 more of 3: 0 GB"
    assert both.remedy == "free some"


def test_table():
    lines = list(
        rows.table(
            [rows.passed("a", "x"), Row(name="b", status=Status.FAIL, found="y", remedy="z")]
        )
    )
    assert lines[0].split() == ["pass", "a", "x"] and lines[1].split() == ["FAIL", "b", "y"]
    assert lines[2].strip() == "-> z"


def test_the_command_fails_with_2_and_counts(small_set, tmp_path, capsys):
    configs = Path(__file__).parent.parent / "configs"
    code = main.main(
        ["preflight", f"--config={configs}/tiny.py:stage1", f"--workdir={tmp_path}/run",
         f"--config.data.videos={small_set}/packed:nope", "--hosts=2"]
    )  # fmt: skip
    out = capsys.readouterr().out
    assert code == 2
    assert "FAIL  hosts           1 found, 2 expected" in out
    assert "-     step            not tried" in out
    assert out.splitlines()[-1].endswith("3 fail")
