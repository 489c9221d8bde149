"""Checkpoints of a tiny state: damage is noticed whatever it is, failing storage loses nothing."""

import dataclasses
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from instap_jax.errors import EXIT_STORAGE, StorageError, UserError, exit_code
from instap_jax.train import checkpoint, integrity, saving
from instap_jax.train.state import TrainState

META = {"stage": "distill"}


def state_of(step: int) -> TrainState:
    params = nnx.State({"kernel": nnx.Param(jnp.full((4, 3), float(step)))})
    return TrainState(
        step=jnp.int32(step),
        params=params,
        opt_state=(jnp.float32(step),),
        refused=jnp.int32(0),
    )


def abstract():
    return jax.eval_shape(lambda: state_of(0))


def checkpointer(workdir, **options) -> saving.Checkpointer:
    return saving.Checkpointer(str(workdir), **({"every": 2, "keep": 5} | options))


def write(workdir, *steps: int) -> None:
    saver = checkpointer(workdir)
    for step in steps:
        saver.save(state_of(step), step, data={"at": step}, meta=META)
    saver.close()


def restored_step(workdir) -> int:
    saver = checkpointer(workdir)
    try:
        state, data = saver.restore(abstract())
    finally:
        saver.close()
    assert data["at"] == int(state.step)
    np.testing.assert_array_equal(state.params["kernel"].get_value(), float(state.step))
    return int(state.step)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    write(workdir, 2, 4)
    return workdir


@pytest.fixture
def copy(written, tmp_path):
    shutil.copytree(written, tmp_path / "run")
    return tmp_path / "run"


def files_of(directory) -> list:
    """The files of the items; the two that orbax writes last are read by nobody here."""
    return sorted(p for p in directory.rglob("*") if p.is_file() and p.parent != directory)


def test_every_flipped_bit_is_noticed(copy):
    directory = copy / "checkpoints" / "4"
    integrity.check(directory, checkpoint.ITEMS)
    files = [*files_of(directory), directory / integrity.MANIFEST]
    assert len(files) > 20
    for path in files:
        before = path.read_bytes()
        place = len(before) // 2
        path.write_bytes(before[:place] + bytes([before[place] ^ 1]) + before[place + 1 :])
        with pytest.raises(integrity.Damaged):
            integrity.check(directory, checkpoint.ITEMS)
        path.write_bytes(before)
    integrity.check(directory, checkpoint.ITEMS)


def test_every_truncated_and_missing_file_is_noticed(copy):
    directory = copy / "checkpoints" / "4"
    for path in [*files_of(directory), directory / integrity.MANIFEST]:
        before = path.read_bytes()
        path.write_bytes(before[:-1])
        with pytest.raises(integrity.Damaged, match=r"bytes, not|cannot be parsed"):
            integrity.check(directory, checkpoint.ITEMS)
        path.unlink()
        with pytest.raises(integrity.Damaged, match="missing"):
            integrity.check(directory, checkpoint.ITEMS)
        path.write_bytes(before)


def _empty(directory):
    shutil.rmtree(directory)
    directory.mkdir()


def _cut(directory):
    largest = max(files_of(directory / "params"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:10])


@pytest.mark.parametrize("harm", [_empty, _cut, lambda d: shutil.rmtree(d / "optimizer")])
def test_damaged_newest_is_kept_and_the_run_goes_on_from_the_one_before(copy, capsys, harm):
    harm(copy / "checkpoints" / "4")
    assert restored_step(copy) == 2
    told = capsys.readouterr().err.splitlines()
    assert "checkpoints/4 is damaged and passed over for 2: " in told[0]
    assert told[1] == f"it is kept as {copy}/checkpoints-damaged/4"
    assert (copy / "checkpoints-damaged" / "4").exists()
    write(copy, 4)  # the step is run again
    assert restored_step(copy) == 4
    harm(copy / "checkpoints" / "4")
    assert restored_step(copy) == 2
    assert (copy / "checkpoints-damaged" / "4.1").exists()


def test_readers_take_the_newest_intact_one_and_move_nothing(copy, capsys):
    _cut(copy / "checkpoints" / "4")
    read = checkpoint.read_params(str(copy), abstract().params)
    np.testing.assert_array_equal(read["kernel"].get_value(), 2.0)
    assert checkpoint.read_meta(str(copy))[0] == 2
    assert "checkpoints/4 is damaged and passed over for 2" in capsys.readouterr().err
    assert (copy / "checkpoints" / "4").exists()
    with pytest.raises(UserError, match="checkpoints/4 is damaged"):
        checkpoint.read_params(str(copy), abstract().params, step=4)


def test_what_readers_do_not_need_does_not_stop_them(copy):
    shutil.rmtree(copy / "checkpoints" / "4" / "optimizer")
    assert checkpoint.read_meta(str(copy))[0] == 4


def test_nothing_intact_is_an_error_and_never_a_fresh_start(copy):
    for step in (2, 4):
        _cut(copy / "checkpoints" / str(step))
    with pytest.raises(UserError, match=r"no intact checkpoint \(4: .* bytes.*; 2: ") as error:
        checkpointer(copy)
    assert "\n" not in str(error.value)
    assert (copy / "checkpoints" / "4").exists() and (copy / "checkpoints" / "2").exists()


def test_another_shape_is_an_error_not_damage(copy):
    wanted = abstract()
    wrong = nnx.State({"kernel": nnx.Param(jax.ShapeDtypeStruct((5, 3), jnp.float32))})
    saver = checkpointer(copy)
    with pytest.raises(UserError, match="checkpoints/4 cannot be restored"):
        saver.restore(dataclasses.replace(wanted, params=wrong))
    saver.close()
    assert not (copy / "checkpoints-damaged").exists()


def test_failing_storage_says_nothing_about_a_checkpoint(copy, monkeypatch):
    def failing(path):
        raise OSError(5, "Input/output error", str(path))

    integrity._verified.clear()
    monkeypatch.setattr(integrity, "_digest", failing)
    with pytest.raises(UserError, match="Input/output error"):
        checkpointer(copy)
    assert not (copy / "checkpoints-damaged").exists()


def test_checkpoints_of_a_version_without_checksums_are_read(copy, monkeypatch):
    monkeypatch.setattr(integrity, "MARK", {})
    monkeypatch.setattr(integrity, "write_manifest", lambda directory: None)
    write(copy, 6)
    monkeypatch.undo()
    assert not (copy / "checkpoints" / "6" / integrity.MANIFEST).exists()
    assert restored_step(copy) == 6


class _Failing:
    """Fails the write of the list of checksums, in the background, so many times."""

    def __init__(self, monkeypatch, times: int):
        self.left, self._write = times, integrity.write_manifest
        monkeypatch.setattr(integrity, "write_manifest", self)

    def __call__(self, directory):
        if self.left:
            self.left -= 1
            raise OSError(28, "No space left on device")
        self._write(directory)


def test_an_error_in_the_background_stops_the_run_at_a_later_step(copy, monkeypatch):
    _Failing(monkeypatch, 1)
    saver = checkpointer(copy, keep=1)
    saver.save(state_of(6), 6, data={"at": 6}, meta=META)
    told = r"No space left.*step 6; the last checkpoint is from step 4"
    with pytest.raises(UserError, match=told):
        for _ in range(1000):
            saver.check()
            time.sleep(0.01)
    saver.close()
    assert restored_step(copy) == 4


def test_a_failed_checkpoint_is_made_up_for(copy, monkeypatch, capsys):
    _Failing(monkeypatch, 2)
    saver = checkpointer(copy, retries=2, retry_seconds=0.01)
    assert saver.due(6) and not saver.due(7)
    saver.save(state_of(6), 6, data={"at": 6}, meta=META)
    saver.wait()
    assert "step 6; the last checkpoint is from step 4; trying again in 0.01 s" in (
        capsys.readouterr().err
    )
    assert not list((copy / "checkpoints").glob("6*"))  # it may be what fills the disk
    time.sleep(0.02)
    assert saver.due(7)
    saver.save(state_of(7), 7, data={"at": 7}, meta=META, wait=True)
    assert saver.latest_step() == 7 and not saver.due(9)
    saver.close()
    assert restored_step(copy) == 7


@pytest.mark.parametrize("empty_left", [True, False])
def test_vanished_storage_is_noticed(copy, empty_left):
    saver = checkpointer(copy)
    there = (copy / "checkpoints").rename(copy / "unmounted")
    if empty_left:  # as an unmounted file system leaves
        (copy / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"unmounted\?|No such file"):
        saver.save(state_of(6), 6, data={"at": 6}, meta=META)
    saver.close()
    if empty_left:
        (copy / "checkpoints").rmdir()
    there.rename(copy / "checkpoints")
    assert restored_step(copy) == 4


def test_what_storage_does_to_one_of_several_processes_is_not_final(copy, monkeypatch):
    """Another start may mend it, which none follows after exit code 2."""
    saver = checkpointer(copy)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(StorageError) as first, checkpoint.storage_faults("cannot save"):
        raise OSError("Input/output error")
    assert exit_code(first.value) == EXIT_STORAGE
    with pytest.raises(StorageError, match="the last checkpoint is from step 4"):
        saver._failed(6, first.value)


def test_what_a_killed_save_left_is_removed(copy):
    left = copy / "checkpoints" / "6.orbax-checkpoint-tmp"
    shutil.copytree(copy / "checkpoints" / "4", left)
    assert restored_step(copy) == 4
    deadline = time.monotonic() + 60  # orbax removes it from a thread of its own
    while left.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left.exists()


def test_retries_end(copy, monkeypatch):
    _Failing(monkeypatch, 9)
    saver = checkpointer(copy, retries=1, retry_seconds=0.01)
    with pytest.raises(UserError, match="the last checkpoint is from step 4"):
        saver.save(state_of(6), 6, data={"at": 6}, meta=META, wait=True)
    saver.close()
