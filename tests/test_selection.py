"""Validation during training: it disturbs nothing, and the best checkpoint can be used."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from test_train import assert_same, run, teacher_config
from tiny import tiny_config

from instap_jax import config_check, main
from instap_jax.errors import Preempted, UserError
from instap_jax.evaluation import features
from instap_jax.evaluation.validation import make_validate
from instap_jax.train import checkpoint, loop, selection
from instap_jax.train.metrics import read_metrics
from instap_jax.train.stop import Ask, StopRequest

METRIC = "val_video/instance/mean_recall"


def aligned_config(small_set, **changes):
    data = {
        "data.videos": f"{small_set}/packed:train",
        "tokenizer.path": f"{small_set}/tokenizer.model",
        "steps": 4,
    }
    return tiny_config("stage2", **(data | changes))


def validated(small_set, **changes):
    wanted = {
        "evaluation.every": 1,
        "evaluation.videos": f"{small_set}/packed:val_video",
        "evaluation.metric": METRIC,
        "evaluation.batch_size": 3,  # rounded up to the eight devices
    }
    return aligned_config(small_set, **(wanted | changes))


def train(config, workdir, asked=Ask.NOTHING):
    config_check.check(config)
    loaded = config_check.LoadedConfig(config=config, file="test", overrides={})
    config_check.record(loaded, workdir)
    stop = StopRequest()
    stop.asked = asked
    return jax.device_get(loop.train(config, workdir, stop, make_validate))


@pytest.fixture(scope="module")
def finished(small_set, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("selection") / "validated"
    return workdir, train(validated(small_set), workdir)


def logged(workdir, name=f"eval/{METRIC}"):
    return {line["step"]: line[name] for line in read_metrics(workdir) if name in line}


def test_validation_changes_no_bit_of_the_training(small_set, finished, tmp_path):
    workdir, state = finished
    assert_same(run(aligned_config(small_set), tmp_path / "plain"), state)
    plain = {line["step"]: line["loss"] for line in read_metrics(tmp_path / "plain")}
    assert plain == logged(workdir, "loss") and len(plain) == 4
    assert not (tmp_path / "plain" / "checkpoints-best").exists()


def test_resumed_equals_uninterrupted_with_validation(small_set, finished, tmp_path):
    workdir, state = finished
    parts = tmp_path / "parts"
    train(validated(small_set, stop_at=3), parts)
    assert_same(state, train(validated(small_set), parts))
    assert logged(parts) == logged(workdir)
    first, second = (checkpoint.read_meta(str(w), which="best") for w in (workdir, parts))
    assert first[0] == second[0] and first[1]["selection"] == second[1]["selection"]


def test_a_preempted_run_saves_at_once_and_validates_when_it_goes_on(small_set, finished, tmp_path):
    workdir, state = finished
    parts = tmp_path / "parts"
    with pytest.raises(Preempted):
        train(validated(small_set), parts, Ask.PREEMPTED)
    assert checkpoint.read_meta(str(parts))[0] == 1 and not logged(parts)
    shutil.copytree(parts, tmp_path / "other")
    train(validated(small_set, stop_at=2, **{"evaluation.every": None}), tmp_path / "other")
    assert not logged(tmp_path / "other")
    assert_same(state, train(validated(small_set), parts))
    assert logged(parts) == logged(workdir)


def test_the_log_has_the_metrics_by_suite_unit_and_name(finished):
    names = {name for line in read_metrics(finished[0]) for name in line if name[:5] == "eval/"}
    for unit in ("global", "instance"):
        for metric in ("mean_recall", "t2v/R@1", "v2t/R@10", "t2v/median_rank"):
            assert f"eval/val_video/{unit}/{metric}" in names
    assert set(logged(finished[0])) == {1, 2, 3, 4}


def test_the_best_checkpoint_is_the_best_of_the_log(finished, small_set, capsys):
    workdir, _ = finished
    values = logged(workdir)
    best = max(values, key=lambda step: (values[step], -step))  # of equal ones the first
    step, meta = checkpoint.read_meta(str(workdir), which="best")
    assert step == best
    assert meta["selection"] == {"metric": METRIC, "value": values[best], "step": best}
    assert [p.name for p in (workdir / "checkpoints-best").iterdir()] == [str(best)]
    code = main.main(["evaluate", f"--workdir={workdir}", f"--videos={small_set}/packed:val_video",
                      "--checkpoint=best"])  # fmt: skip
    assert code == 0 and f"aligned at step {best}" in capsys.readouterr().out
    found = json.loads((workdir / "eval" / "retrieval.json").read_text())["measurements"]
    unit = next(one for one in found if one["protocol"]["unit"] == "instance captions")
    # What training measured is what `evaluate` measures of the same checkpoint.
    assert unit["metrics"]["mean_recall"] == values[best]


def test_another_run_can_start_from_the_best(finished, small_set, tmp_path, capsys):
    best, _ = checkpoint.read_meta(str(finished[0]), which="best")
    changes = {"checkpoint.init_from": str(finished[0]), "checkpoint.init_which": "best"}
    run(aligned_config(small_set, stop_at=1, **changes), tmp_path / "next")
    assert f"(align, best, step {best})" in capsys.readouterr().out


def test_what_a_crash_left_of_the_best_is_removed(finished, small_set, tmp_path):
    workdir, _ = finished
    best, _ = checkpoint.read_meta(str(workdir), which="best")
    directory = tmp_path / "checkpoints-best"
    for name in (best, best - 1, f"{best + 1}.orbax-checkpoint-tmp"):  # -1: killed before deleting
        shutil.copytree(workdir / "checkpoints-best" / str(best), directory / str(name))
    program = type("Program", (), {"graphdef": None})
    selection.Selection(validated(small_set), tmp_path, program, None, lambda *_: None)
    assert [path.name for path in directory.iterdir()] == [str(best)]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, ""),
        ({"evaluation.frames": 2}, "frames"),
        ({"evaluation.images": "d:val_img"}, "images"),
        ({"evaluation.metric": "val_video/global/mean_recall"}, "metric"),
    ],
)
def test_a_best_that_was_measured_otherwise_is_not_what_to_beat(
    finished, small_set, tmp_path, capsys, changes, named
):
    shutil.copytree(finished[0] / "checkpoints-best", tmp_path / "checkpoints-best")
    config = validated(small_set, **changes)
    program = type("Program", (), {"graphdef": None})
    worse = {METRIC: -1.0, "val_video/global/mean_recall": -1.0}
    chosen = selection.Selection(config, tmp_path, program, None, lambda *_: lambda *_: worse)
    err = capsys.readouterr().err
    assert (f"measured with another config.evaluation.{named}: the next" in err) == bool(named)
    _, meta = checkpoint.read_meta(str(tmp_path), which="best")
    chosen.measure(nnx.State({"x": np.zeros(3, np.float32)}), 9, meta)
    step, meta = checkpoint.read_meta(str(tmp_path), which="best")
    assert (step == 9) == bool(named)


def test_a_best_of_a_stretch_that_was_lost_is_replaced(finished, tmp_path):
    """The run went back to a checkpoint before it, and met the same step with a better value."""
    workdir, _ = finished
    shutil.copytree(workdir / "checkpoints-best", tmp_path / "checkpoints-best")
    step, meta = checkpoint.read_meta(str(tmp_path), which="best")
    params = nnx.State({"module": {"x": np.full(3, 7.0, np.float32)}})
    checkpoint.write_best(str(tmp_path), params, step=step, meta=meta | {"stage": "again"})
    assert checkpoint.read_meta(str(tmp_path), which="best") == (step, meta | {"stage": "again"})


def test_an_unreadable_sample_costs_the_measurement_and_not_the_run(
    small_set, tmp_path, monkeypatch, capsys
):
    refuse, batches = features.refuse_faults, []

    def refuse_one(out, source):
        batches.append(1)
        fault = out["fault"] | (len(batches) == 3)  # of two in every validation
        refuse(out | {"fault": fault}, source)

    monkeypatch.setattr(features, "refuse_faults", refuse_one)
    train(validated(small_set), tmp_path)
    assert sorted(logged(tmp_path)) == [1, 3, 4]
    assert "step 2: not validated, training goes on: " in capsys.readouterr().err


def test_suites_and_metrics_that_are_not_there(small_set, tmp_path):
    config = validated(small_set)
    program = type("Program", (), {"graphdef": None})
    make = lambda *_: lambda params, step: {"val_video/global/mean_recall": 1.0}
    config.evaluation.metric = "val_video/instance/mean_recall"  # of a suite without instances
    chosen = selection.Selection(config, tmp_path, program, None, make)
    with pytest.raises(UserError, match="none of what the suites gave: val_video/global"):
        chosen.measure({}, 1, {})
    config.evaluation.videos = f"{small_set}/packed:val_vide"
    with pytest.raises(UserError, match="val_vide"):
        make_validate(config, None, None)


def test_only_a_better_value_replaces_the_best(small_set, tmp_path, monkeypatch):
    kept, values = [], iter([3.0, 5.0, 5.0, 4.0])

    def write_best(workdir, params, *, step, meta):
        kept.append((step, meta["selection"]["value"]))

    monkeypatch.setattr(selection.checkpoint, "write_best", write_best)
    config = validated(small_set)
    program = type("Program", (), {"graphdef": None})
    chosen = selection.Selection(
        config, tmp_path, program, None, lambda *_: lambda params, step: {METRIC: next(values)}
    )
    for step in range(1, 5):
        assert chosen.measure({}, step, {}) == {f"eval/{METRIC}": [3.0, 5.0, 5.0, 4.0][step - 1]}
    assert kept == [(1, 3.0), (2, 5.0)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation.videos": "d:video_1k"}, "'video_1k' is a test suite"),
        ({"evaluation.videos": "d:msrvtt-1k-a"}, "is a test suite"),
        ({"evaluation.videos": "d:msvd"}, "is a test suite"),
        ({"evaluation.videos": "d:my_test"}, "is a test suite"),
        ({"evaluation.videos": ""}, "are empty"),
        ({"evaluation.videos": "d:val", "data.videos": "x:a,d:val=2"}, "is trained on"),
        ({"evaluation.metric": "val/instance/mean_recal"}, "must be SPLIT/global or"),
        ({"evaluation.metric": "other/global/mean_recall"}, "SPLIT one of val_video"),
        ({"evaluation.metric": "val_video/global/median_rank"}, "must be SPLIT"),
        ({"evaluation.every": 0}, "must be positive"),
    ],
)
def test_faults_of_the_configuration(changes, message):
    wanted = {
        "evaluation.every": 2,
        "evaluation.videos": "d:val_video",
        "evaluation.metric": METRIC,
    }
    if "evaluation.videos" in changes:
        wanted["evaluation.metric"] = None
    config = tiny_config("stage2")
    config.update_from_flattened_dict(
        {k: v for k, v in (wanted | changes).items() if v is not None}
    )
    with pytest.raises(UserError, match=message):
        config_check.check(config)


def test_stages_without_instances_or_retrieval(small_set):
    config = teacher_config(small_set, **{"evaluation.every": 2, "evaluation.images": "d:val",
                                     "evaluation.metric": "val/instance/mean_recall"})  # fmt: skip
    with pytest.raises(UserError, match="embeds no instances"):
        config_check.check(config)


def test_evaluating_a_best_that_is_not_there(small_set, tmp_path, capsys):
    run(aligned_config(small_set, stop_at=1), tmp_path / "run")
    flags = [f"--workdir={tmp_path / 'run'}", f"--videos={small_set}/packed:val_video"]
    assert main.main(["evaluate", *flags, "--checkpoint=best"]) == 2
    assert "no best checkpoint" in capsys.readouterr().err
