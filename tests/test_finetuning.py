"""Fine-tuning as a user does it: init, train, resume, evaluate, select; and what goes wrong."""

import contextlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from embedded import make_embedded
from flax import nnx
from tiny import tiny_config

from instap_jax import config_check, distributed, main
from instap_jax.errors import UserError
from instap_jax.evaluation import selection, tasks
from instap_jax.train import loop
from instap_jax.train.metrics import TIMES, read_metrics
from instap_jax.train.objectives import OBJECTIVES
from instap_jax.train.stop import StopRequest

CLASSES = ("plain", "gradient", "noise", "stripes", "tiles", "grass", "sky")


def instap(*args: str) -> None:
    assert main.main(args) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A directory with the embedded set, packed, and a tokenizer."""
    return make_embedded(
        tmp_path_factory.mktemp("made"), "--train_videos=16", "--train_images=8", "--suite_size=8",
        "--val_size=8", "--width=64", "--height=48", "--frames=8", "--processes=1",
    )  # fmt: skip


def config_of(made: Path, part: str, **changes):
    data = {
        "data.videos": f"{made}/packed:train",
        "data.frames": 2,
        "tokenizer.path": f"{made}/tokenizer.model",
        "steps": 4,
    }
    return tiny_config(part, **(data | changes))


def run(config, workdir: Path):
    """What `instap train` does."""
    config_check.check(config)
    config_check.record(
        config_check.LoadedConfig(config=config, file="test", overrides={}), workdir
    )
    return jax.device_get(loop.train(config, workdir, StopRequest()))


@pytest.fixture(scope="module")
def aligned(made) -> Path:
    run(config_of(made, "stage2", stop_at=2), made / "aligned")
    return made / "aligned"


@pytest.fixture(scope="module")
def students(made) -> list[Path]:
    """Two stage-1 runs of one teacher; the second one is the first, trained further."""
    run(config_of(made, "teacher", stop_at=2, **{"data.frames": 1}), made / "teacher")
    runs = [made / "short", made / "long"]
    for workdir, steps in zip(runs, (2, 30)):
        changes = {"teacher.checkpoint": str(made / "teacher"), "steps": steps}
        changes |= {"optimizer.warmup_steps": 1, "optimizer.learning_rate": 3e-3}
        run(config_of(made, "stage1", **changes), workdir)
    return runs


def assert_same(first, second) -> None:
    pairs = zip(jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(second), strict=True)
    for (path, a), b in pairs:
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def timeless(workdir: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(workdir)]


def result(workdir: Path, task: str) -> list[dict]:
    return json.loads((workdir / "eval" / f"{task}.json").read_text())["measurements"]


def test_grounding_from_an_aligned_run(made, aligned, tmp_path, capsys):
    def config(**changes):
        start = {"checkpoint.init_from": str(aligned)}
        return config_of(made, "ground", **(start | changes))

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    first = run(config(), whole)
    printed = capsys.readouterr().out
    assert "init encoder: " in printed and f"from {aligned} (align, newest, step 2)" in printed
    assert "init head: 6 arrays" in printed and printed.count("fresh") == 1
    assert "init leaves cross_attention, " in printed
    run(config(stop_at=2), parts)
    assert_same(first, run(config(), parts))  # parameters and optimizer state, bit for bit
    assert timeless(whole) == timeless(parts)
    capsys.readouterr()
    suites = [f"--videos={made}/packed:video_1k", f"--images={made}/packed:img_1k"]
    instap("evaluate", f"--workdir={whole}", "--task=grounding", "--batch_size=8", *suites)
    printed = capsys.readouterr().out
    assert "IoU@50" in printed and "centre box" in printed
    video, image = result(whole, "grounding")
    assert (video["protocol"]["frames"], image["protocol"]["frames"]) == (2, 1)
    assert "mean over its frames" in video["protocol"]["notes"]
    assert video["protocol"]["step"] == 4
    for one in (video, image):
        assert one["counts"]["instances"] > 8
        # The right one is among those drawn, so no scene of K instances gives less than 1 / K.
        assert one["metrics"]["floors"]["any instance"]["IoU@90"] >= 20
    assert main.main(["evaluate", f"--workdir={aligned}", "--task=grounding", suites[0]]) == 2
    assert "measures runs of stage 'ground'" in capsys.readouterr().err
    assert main.main(["evaluate", f"--workdir={whole}", "--task=retrieval", suites[0]]) == 2
    assert "embeds nothing" in capsys.readouterr().err


def test_init_from_a_stage_that_has_no_text(made, students, tmp_path):
    config = config_of(made, "ground", **{"checkpoint.init_from": str(students[0])})
    with pytest.raises(UserError, match="stage 'ground' starts from ground, align"):
        run(config, tmp_path)


def test_selection_fine_tunes_the_lower_loss_and_measures_it(made, students, tmp_path, capsys):
    config = config_check.flatten(config_of(made, "classify"))
    given = ("data", "vision", "teacher", "optimizer", "steps", "checkpoint", "log", "tokenizer")
    overrides = [
        f"--config.{key}={value}"
        for key, value in config.items()
        if value is not None and key.split(".")[0] in given
    ]
    command = [
        "select", f"--runs={students[0]},{students[1]}", f"--videos={made}/packed:val_video",
        f"--test_videos={made}/packed:video_1k", "--config=configs/tiny.py:classify",
        f"--workdir={tmp_path}/best", "--batch_size=8", *overrides,
    ]  # fmt: skip
    instap(*command)
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if "distillation loss (1)" in line)
    losses = [float(line.split()[0]) for line in lines[at + 1 : at + 3]]
    assert losses[0] < losses[1] < 2.2
    assert f"{students[1]} at step 30" in lines[at + 1]
    assert f"fine-tuning {students[1]}" in lines
    (measured,) = result(tmp_path / "best", "classification")
    assert measured["counts"] == {"samples": 8, "classes": 7}
    assert "full fine-tuning, 1 x 1 views" in measured["protocol"]["scoring"]
    args = [f"--workdir={tmp_path}/best", f"--videos={made}/packed:video_1k", "--batch_size=8"]
    instap("evaluate", "--task=classification", *args, "--clips=2", "--crops=3")
    (views,) = result(tmp_path / "best", "classification")
    assert "2 x 3 views" in views["protocol"]["scoring"]
    bad = ["evaluate", "--task=classification", *args[:1], f"--images={made}/packed:img_zero_1k"]
    assert main.main([*bad, "--batch_size=8"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "img_zero_1k-" in error and "config.classify.classes knows 7 classes" in error


def test_selection_joins_once_and_before_it_needs_a_device(made, students, tmp_path, monkeypatch):
    events = []

    @contextlib.contextmanager
    def joined(config):
        events.append("joined")
        yield

    best = SimpleNamespace(loss=1.0, workdir=students[1], step=30)
    monkeypatch.setattr(distributed, "joined", joined)
    monkeypatch.setattr(
        selection, "rank_candidates", lambda *_, **__: events.append("ranked") or [best]
    )
    monkeypatch.setattr(loop, "train", lambda *_: events.append("trained"))
    monkeypatch.setattr(tasks, "evaluate", lambda *_: events.append("measured"))
    instap(
        "select", f"--runs={students[1]}", f"--videos={made}/packed:val_video",
        f"--test_videos={made}/packed:video_1k", "--config=configs/tiny.py:classify",
        f"--config.data.videos={made}/packed:train", f"--workdir={tmp_path}/best",
    )  # fmt: skip
    assert events == ["joined", "ranked", "trained", "measured"]


def test_candidates_that_cannot_be_compared(made, students, aligned, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(students[0], other)
    content = json.loads((other / "config.json").read_text())
    content["config"]["distill"]["mask_ratio"] = 0.5
    (other / "config.json").write_text(json.dumps(content))
    command = ["select", "--config=configs/tiny.py:classify", f"--workdir={tmp_path}/x"]
    suites = [f"--videos={made}/packed:val_video", f"--test_videos={made}/packed:video_1k"]
    for runs, message in (
        (f"{students[0]},{other}", "cannot be compared: distill.mask_ratio is 0.8 and 0.5"),
        (f"{aligned}", "is a run of stage 'align', not of stage 1"),
        (f"{made}/nothing", "config.json"),
    ):
        assert main.main([*command, f"--runs={runs}", *suites]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "x").exists()


def test_a_workdir_of_something_else_is_refused_before_any_measuring(
    made, students, tmp_path, monkeypatch, capsys
):
    (tmp_path / "notes.txt").touch()
    monkeypatch.setattr(selection, "rank_candidates", lambda *_, **__: pytest.fail("measured"))
    command = ["select", "--config=configs/tiny.py:classify", f"--workdir={tmp_path}"]
    suites = [f"--videos={made}/packed:val_video", f"--test_videos={made}/packed:video_1k"]
    assert main.main([*command, f"--runs={students[0]}", *suites]) == 2
    assert "not empty and not a run" in capsys.readouterr().err


def test_a_label_that_is_no_class_stops_training(made, tmp_path):
    config = config_of(made, "classify", **{"classify.classes": CLASSES[:2]})
    with pytest.raises(UserError, match=r"has label '\w+'; .* 2 classes, 'plain' to 'gradient'"):
        run(config, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "classify"}, "needs two or more"),
        ({"stage": "classify", "classify.classes": ("a", "b", "a")}, "names 'a' twice"),
        ({"stage": "ground", "ground.l1": 0.0, "ground.giou": 0.0}, "are both 0"),
        ({"stage": "ground", "text.fusion_layers": 24}, "text.fusion_layers=24"),
        ({"stage": "classify", "classify.classes": ("a", "b"), "classify.smoothing": 1.0}, "in [0"),
    ],
)
def test_wrong_fine_tuning_configs_are_one_line(changes, message):
    config = config_check.default()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as error:
        config_check.check(config)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("stage", ["ground", "classify"])
def test_a_stage_that_is_tuned_has_a_place_for_all_of_stage_2(stage):
    config = tiny_config("stage2,box_codes", **{"contrastive.loss": "sigmoid"})
    model = nnx.eval_shape(lambda: OBJECTIVES["align"].create(config, nnx.Rngs(0)))
    known = {*OBJECTIVES[stage].starts_from["align"], *OBJECTIVES[stage].leaves}
    assert set(nnx.state(model, nnx.Param)) == known
