"""The main job in small: render, pack, train, resume, evaluate, report."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from embedded import make_embedded
from tiny import tiny_config

from instap_jax import config_check, main, sharding
from instap_jax.data.records import open_source
from instap_jax.errors import UserError
from instap_jax.progress import Progress
from instap_jax.train import checkpoint, dump, loop, replay
from instap_jax.train.clock import StepClock
from instap_jax.train.kinds import kind_of_step
from instap_jax.train.metrics import TIMES, read_metrics
from instap_jax.train.program import build_program
from instap_jax.train.stop import StopRequest
from instap_jax.types import Kind


def instap(*args: str) -> None:
    assert main.main(args) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A directory with the embedded set, packed, and a tokenizer."""
    return make_embedded(
        tmp_path_factory.mktemp("made"), "--train_videos=24", "--train_images=24",
        "--suite_size=12", "--val_size=12",
    )  # fmt: skip


def teacher_config(made: Path, **changes):
    data = {
        "data.videos": f"{made}/packed:train",
        "data.images": f"{made}/packed:train",
        "tokenizer.path": f"{made}/tokenizer.model",
    }
    return tiny_config("teacher", **(data | changes))


def student_config(made: Path, teacher: Path, **changes):
    data = {"data.videos": f"{made}/packed:train", "teacher.checkpoint": str(teacher)}
    return tiny_config("stage1", **(data | changes))


def run(config, workdir: Path):
    """What `instap train` does."""
    config_check.check(config)
    config_check.record(
        config_check.LoadedConfig(config=config, file="test", overrides={}), workdir
    )
    return jax.device_get(loop.train(config, workdir, StopRequest()))


@pytest.fixture(scope="module")
def teacher(made) -> Path:
    workdir = made / "teacher"
    run(teacher_config(made), workdir)
    return workdir


def assert_same(first, second) -> None:
    pairs = zip(jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(second), strict=True)
    for (path, a), b in pairs:
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def timeless(workdir: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(workdir)]


def test_teacher_leaves_what_is_documented(teacher):
    assert {path.name for path in teacher.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
    }
    assert sorted(int(p.name) for p in (teacher / "checkpoints").iterdir()) == [2, 4, 6]
    lines = read_metrics(teacher)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    assert {1.0} == {line.get("kind_image", 0) + line.get("kind_video", 0) for line in lines}
    assert 0 <= lines[-1]["data_wait_seconds"] <= lines[-1]["step_seconds"]
    step, meta = checkpoint.read_meta(str(teacher))
    assert (step, meta["stage"]) == (6, "teacher")


@pytest.mark.parametrize("stage", ["teacher", "distill"])
def test_resumed_equals_uninterrupted_bit_for_bit(made, teacher, tmp_path, stage):
    def config(**changes):
        if stage == "teacher":
            return teacher_config(made, **changes)
        return student_config(made, teacher, **changes)

    whole = run(config(), tmp_path / "whole")
    parts = tmp_path / "parts"
    run(config(stop_at=3), parts)  # between two regular checkpoints, mid-epoch
    # Steps after the last checkpoint are lost in a crash: they are run again.
    again = run(config(**{"data.device_prefetch": 0, "data.prefetch": 1}), parts)
    assert_same(whole, again)
    assert timeless(tmp_path / "whole") == timeless(parts)


def test_lines_tell_both_kinds_whatever_step_writes_them(made, tmp_path):
    """Every second step is of images, and every second step writes a line."""
    every_other = {"log.every": 2, "data.image_fraction": 0.5}
    run(teacher_config(made, **every_other), tmp_path / "whole")
    lines = read_metrics(tmp_path / "whole")
    assert [line["step"] for line in lines] == [1, 2, 4, 6]
    assert all(line["loss_video"] != line["loss_image"] for line in lines[2:])
    assert all(line["kind_video"] == line["kind_image"] == 0.5 for line in lines[2:])
    run(teacher_config(made, stop_at=3, **every_other), tmp_path / "parts")  # amid a line
    run(teacher_config(made, **every_other), tmp_path / "parts")
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts")


def test_no_step_runs_while_another_kind_compiles(made, tmp_path, monkeypatch):
    """It would run untimed: compiling is left out of the times. Of each the user is told."""
    events, told = [], []
    ready, calling, waiting = jax.block_until_ready, StepClock.calling, Progress.waiting
    monkeypatch.setattr(
        Progress, "waiting", lambda self, what: told.append(what) or waiting(self, what)
    )
    monkeypatch.setattr(jax, "block_until_ready", lambda x: events.append("ready") or ready(x))
    monkeypatch.setattr(
        StepClock, "calling", lambda self, kind: events.append(kind) or calling(self, kind)
    )
    run(teacher_config(made, stop_at=3, **{"data.image_fraction": 0.5}), tmp_path / "run")
    for kind in (Kind.VIDEO, Kind.IMAGE):
        assert events[events.index(kind) - 1] == "ready"
    assert sorted(told) == ["compiling the image step", "compiling the video step"]


def test_crash_costs_the_steps_since_the_last_checkpoint(made, teacher, tmp_path, monkeypatch):
    whole = run(student_config(made, teacher), tmp_path / "whole")
    workdir = tmp_path / "run"
    fetch, fetched = loop.Feed.__next__, []

    def crash(self):
        fetched.append(1)
        if len(fetched) == 6:
            raise KeyboardInterrupt
        return fetch(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Feed, "__next__", crash)
        with pytest.raises(KeyboardInterrupt):
            run(student_config(made, teacher), workdir)
    assert checkpoint.read_meta(str(workdir))[0] == 4
    assert_same(whole, run(student_config(made, teacher), workdir))
    assert timeless(tmp_path / "whole") == timeless(workdir)


def test_other_device_layout_goes_on_with_the_same_batches(made, teacher, tmp_path):
    """From 8 data shards to 4 x 2; with groups of one sample the batches are the same on both."""

    def config(fsdp: int, tensor: int, **changes):
        mesh = {"data.group_size": 1, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
        return student_config(made, teacher, **(mesh | changes))

    moved, stayed = tmp_path / "moved", tmp_path / "stayed"
    run(config(8, 1, stop_at=2), moved)
    first = run(config(4, 2), moved)
    second = run(config(8, 1), stayed)
    for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(second.params)):
        np.testing.assert_allclose(a, b, atol=2e-4)
    for a, b in zip(timeless(moved), timeless(stayed)):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_finished_run_does_nothing_again(teacher, made, capsys):
    run(teacher_config(made), teacher)
    assert "already trained to step 6" in capsys.readouterr().out


def test_init_from_takes_parameters_only(made, teacher, tmp_path):
    config = teacher_config(made, stop_at=1, **{"checkpoint.init_from": str(teacher)})
    config.optimizer.warmup_steps = 2  # the first step's rate is 0: parameters stay
    state = run(config, tmp_path)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        abstract = build_program(config, mesh).abstract
        assert_same(state.params, checkpoint.read_params(str(teacher), abstract.params))
    assert int(state.step) == 1


def test_wrong_teacher_never_loads(made, teacher, tmp_path):
    with pytest.raises(UserError, match=r"config\.teacher\.checkpoint"):
        run(student_config(made, teacher, **{"teacher.checkpoint": ""}), tmp_path / "a")
    with pytest.raises(UserError, match="no such run"):
        run(student_config(made, tmp_path / "nowhere"), tmp_path / "b")
    with pytest.raises(UserError, match=r"do not fit this config.*another shape"):
        run(student_config(made, teacher, **{"teacher.projection": 24}), tmp_path / "c")
    with pytest.raises(UserError, match=r"1 missing|left over|another shape"):
        run(student_config(made, teacher, **{"teacher.depth": 3}), tmp_path / "d")


def test_changed_tokenizer_or_teacher_is_noticed(made, teacher, tmp_path):
    other = tmp_path / "teacher"
    shutil.copytree(teacher, other)
    config = student_config(made, other, stop_at=1)
    run(config, tmp_path / "student")
    shutil.rmtree(other / "checkpoints" / "6")  # as if it had been another step
    with pytest.raises(UserError, match=r"is at step 4, but .* was trained with its step 6"):
        run(student_config(made, other), tmp_path / "student")
    model = tmp_path / "tokenizer.model"
    shutil.copy(made / "tokenizer.model", model)
    config = teacher_config(made, stop_at=1, **{"tokenizer.path": str(model)})
    run(config, tmp_path / "text")
    annotations = f"--annotations={made}/set/annotations.jsonl"
    model.unlink()
    instap("tokenizer", annotations, f"--out={model}", "--vocab_size=310")
    with pytest.raises(UserError, match="is not the tokenizer that"):
        run(teacher_config(made, **{"tokenizer.path": str(model)}), tmp_path / "text")


def test_an_update_that_is_not_finite_stops_the_run_and_is_replayed(
    made, teacher, tmp_path, capsys
):
    config = teacher_config(made, **{"optimizer.learning_rate": 1e30})
    told = (
        r"step 2: update_norm is inf \(.*loss 2\..*\); samples train_.*stopped. The last checkpoint"
    )
    with pytest.raises(UserError, match=told):
        run(config, tmp_path)
    # At step 1 the rate is 0: what the run left is what it began with.
    assert main.main(["replay", f"--workdir={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "update_norm" in out and "not finite" in out
    with _harmed_dump(tmp_path, tmp_path / "harmed", sample=(5, 0)) as name:
        assert main.main(["replay", f"--workdir={tmp_path / 'harmed'}", "--dump=2"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"grad_norm +nan +not finite", out) and "gradients: not finite in" in out
    assert out.count("not finite by itself") == 1
    assert f"not finite by itself: sample {name}\n" in out


@contextlib.contextmanager
def _harmed_dump(workdir: Path, copy: Path, sample: tuple[int, int]):
    """A dump in which the extent of one sample's picture is a NaN; gives the sample's id."""
    shutil.copytree(workdir, copy)
    config = config_check.read(workdir)
    shapes = dump.batch_shapes(workdir, 2)
    mesh, program = replay._fitting(config, shapes["sample_valid"].shape[0])
    where = sharding.batch_sharding(mesh)
    shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=where) for k, v in shapes.items()}
    with jax.set_mesh(mesh):
        loaded = dump.read(workdir, 2, program.abstract, shapes)
        extent = np.array(loaded.batch["extent"])
        extent[sample] = np.nan
        batch = loaded.batch | {"extent": jax.device_put(extent, where)}
        state = dataclasses.replace(
            program.abstract, params=loaded.params, opt_state=loaded.opt_state
        )
        shutil.rmtree(copy / "dumps")
        dump.write(copy, state, batch, step=2, meta=dump.read_meta(workdir, 2))
    images = kind_of_step(config, 1) == Kind.IMAGE
    source = open_source(*(config.data.images if images else config.data.videos).split(":"),
                         Kind.IMAGE if images else Kind.VIDEO)  # fmt: skip
    yield source.record_id(int(batch["record"][sample]))


def test_missing_data_is_one_line_and_the_mended_command_runs(made, teacher, tmp_path):
    with pytest.raises(UserError, match="nothing") as error:
        run(student_config(made, teacher, **{"data.videos": f"{made}/nothing:train"}), tmp_path)
    assert "\n" not in str(error.value)
    # The failed start left a config.json of another configuration, but no checkpoint to protect.
    run(student_config(made, teacher, stop_at=1), tmp_path)


def test_damaged_checkpoint_costs_the_steps_since_the_one_before(made, teacher, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(teacher, workdir)
    for path in (workdir / "checkpoints" / "6" / "optimizer").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    run(teacher_config(made), workdir)
    assert "checkpoints/6 is damaged and passed over for 4: optimizer/" in capsys.readouterr().err
    assert timeless(workdir) == timeless(teacher)


def test_evaluate_and_report(made, teacher, tmp_path, capsys):
    student = tmp_path / "student"
    run(student_config(made, teacher), student)
    for workdir in (teacher, student):
        instap(
            "evaluate", f"--workdir={workdir}", "--task=retrieval,probe", "--frames=4",
            "--batch_size=8", f"--videos={made}/packed:video_1k",
            f"--probe_videos={made}/packed:val_video", f"--images={made}/packed:img_1k",
            f"--probe_images={made}/packed:val_img",
        )  # fmt: skip
        assert "12 texts, 12 videos" in capsys.readouterr().out
        result = json.loads((workdir / "eval" / "retrieval.json").read_text())
        assert result["measurements"][0]["protocol"]["step"] == 6
    page = tmp_path / "report.html"
    instap(
        "report", f"--workdirs={teacher},{student}", f"--out={page}",
        f"--annotations={made}/set/annotations.jsonl", f"--media={made}/set/media",
    )  # fmt: skip
    assert "video_1k" in page.read_text()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--task=retrival", "tasks are retrieval, probe"),
        ("--videos=", "no suite"),
        ("--videos={made}/packed:video_2k", "video_1k"),
        ("--batch_size=3", "multiple of 8 devices"),
        ("--workdir={made}/nothing", "config.json"),
        ("--task=probe", "--probe_videos"),
    ],
)
def test_evaluate_bad_input_is_one_line(made, teacher, capsys, flag, message):
    args = {
        "--workdir": f"{teacher}",
        "--videos": f"{made}/packed:video_1k",
        "--task": "retrieval",
        "--batch_size": "8",
    }
    name, value = flag.format(made=made).split("=", 1)
    args[name] = value
    code = main.main(["evaluate", *(f"{k}={v}" for k, v in args.items())])
    text = capsys.readouterr().err
    assert code == 2
    assert message in text
    assert text.splitlines()[-1].startswith("instap evaluate: ")
    assert "Traceback" not in text


def test_ctrl_c_leaves_a_run_that_goes_on(made, teacher, tmp_path):
    """A real process, a real signal."""
    command = [
        sys.executable, "-m", "instap_jax", "train", "--config=configs/tiny.py:stage1",
        f"--workdir={tmp_path}/run", f"--config.data.videos={made}/packed:train",
        f"--config.teacher.checkpoint={teacher}", "--config.checkpoint.every=100000",
        "--config.log.every=1", "--config.log.profile=1:100000",
    ]  # fmt: skip
    command += [
        f"--config.{key}={value}"
        for key, value in config_check.flatten(student_config(made, teacher)).items()
        if key.split(".")[0] in ("vision", "teacher", "text") and value is not None
        if "checkpoint" not in key
    ]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.stat().st_size:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert "interrupted" in error
    # No regular checkpoint was due: this one is of the step it stopped after.
    last = read_metrics(tmp_path / "run")[-1]["step"]
    assert checkpoint.read_meta(str(tmp_path / "run"))[0] == last
    assert f"goes on from step {last}" in error
    assert len(list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))) == 1
