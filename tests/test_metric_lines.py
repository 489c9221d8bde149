"""metrics.jsonl after a crash: no step twice, none lost, whatever the crash or the disk tore."""

import errno
import json
from unittest.mock import Mock

import pytest
from tiny import tiny_config

from instap_jax.errors import StorageError, UserError
from instap_jax.train.metrics import MetricWriter, StepMeans, read_metrics
from instap_jax.types import Kind

CONFIG = tiny_config("stage1")


def write(workdir, steps, resume=0):
    writer = MetricWriter(workdir, CONFIG, resume_step=resume)
    for step in steps:
        writer.write(step, {"loss": step / 10})
    writer.sync()
    writer.close()


def steps(workdir):
    return [line["step"] for line in read_metrics(workdir)]


@pytest.mark.parametrize("torn", ['{"step": 5, "lo', '{"step": 5', "\x00" * 40, "5", "[1]", ""])
def test_a_torn_end_is_repaired_on_resume(tmp_path, torn):
    write(tmp_path, range(1, 5))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert steps(tmp_path) == [1, 2, 3, 4]
    write(tmp_path, [3, 4, 5, 6], resume=2)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [
        1, 2, 3, 4, 5, 6
    ]  # fmt: skip


def test_a_line_without_its_end_is_kept(tmp_path):
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-1])
    write(tmp_path, [4], resume=3)
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_a_damaged_line_costs_itself_alone(tmp_path):
    write(tmp_path, range(1, 5))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\xff" + lines[1][1:] + lines[2] + lines[3])
    assert steps(tmp_path) == [1, 3, 4]


def test_numbers_that_are_not_finite_are_left_out(tmp_path):
    writer = MetricWriter(tmp_path, CONFIG, resume_step=0)
    writer.write(1, {"loss": float("nan"), "grad_norm": float("inf"), "guard/skipped": 1.0})
    writer.close()
    (line,) = read_metrics(tmp_path)
    assert line.keys() == {"step", "time", "guard/skipped"}


def test_a_validation_that_is_owed_is_not_there_twice(tmp_path):
    write(tmp_path, [1, 2])
    writer = MetricWriter(tmp_path, CONFIG, resume_step=2)
    for step in (1, 2):
        writer.write(step, {"eval/recall": 1.0})
    writer.close()
    for owed in (False, True):
        MetricWriter(tmp_path, CONFIG, resume_step=2, unvalidated=owed).close()
        found = [(line["step"], "eval/recall" in line) for line in read_metrics(tmp_path)]
        assert found == [(1, False), (2, False), (1, True), (2, True)][: 4 - owed]


def test_storage_that_does_not_answer_is_no_fault_of_the_input(tmp_path):
    writer = MetricWriter(tmp_path, CONFIG, resume_step=0)
    writer._file.close()
    writer._file = Mock()
    writer._file.write.side_effect = OSError(errno.ESTALE, "Stale file handle")
    with pytest.raises(StorageError, match="Stale file handle"):
        writer.write(1, {"loss": 1.0})


def test_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written: No space left"):
        writer = MetricWriter.__new__(MetricWriter)
        writer._file, writer._board, writer._wandb = (tmp_path / "metrics.jsonl").open("a"), 0, 0
        try:
            writer.write(1, {"loss": 1.0})
        finally:
            writer.close()


def test_a_line_has_the_means_of_its_steps_and_of_each_kind():
    means = StepMeans(split=True, kept=None)
    means.add(Kind.VIDEO, {"loss": 6.0, "learning_rate": 0.1})
    means.add(Kind.VIDEO, {"loss": float("nan"), "learning_rate": 0.2})  # its update was skipped
    kept = json.loads(json.dumps(means.state()))  # as a checkpoint keeps it
    means = StepMeans(split=True, kept=kept)
    means.add(Kind.IMAGE, {"loss": 1.0, "learning_rate": 0.3})
    means.add(Kind.VIDEO, {"loss": 4.0, "learning_rate": 0.4})
    assert means.read() == {
        "loss": pytest.approx(11 / 3), "loss_video": 5.0, "loss_image": 1.0,
        "kind_video": 0.75, "kind_image": 0.25, "learning_rate": 0.4,
    }  # fmt: skip
    means.add(Kind.IMAGE, {"loss": 3.0, "learning_rate": 0.5})
    assert means.read() == {
        "loss": 3.0, "loss_image": 3.0, "kind_image": 1.0, "learning_rate": 0.5
    }  # fmt: skip


def test_a_checkpoint_that_is_still_being_written_keeps_its_sums():
    means = StepMeans(split=True, kept=None)
    means.add(Kind.VIDEO, {"loss": 6.0})
    kept = means.state()
    means.add(Kind.VIDEO, {"loss": 1.0})
    assert kept == {"steps": {"video": 1}, "sums": {"loss": {"video": [6.0, 1]}}}


def test_of_one_kind_nothing_is_told_apart():
    means = StepMeans(split=False, kept=None)
    means.add(Kind.VIDEO, {"loss": 2.0})
    assert means.read() == {"loss": 2.0, "kind_video": 1.0}
