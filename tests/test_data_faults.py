"""Damaged, lost and mixed-up shards; samples that hang; what a loader makes of them."""

import dataclasses
import json
import shutil
import time

import numpy as np
import pytest
from pipeline_data import config, corpus  # noqa: F401 - fixtures

from instap_jax.data import builder, pipeline, records
from instap_jax.data.pipeline import FaultMonitor
from instap_jax.data.records import (
    CorruptRecordError,
    ForeignRecordError,
    MissingRecordError,
    RecordSource,
    open_source,
)
from instap_jax.data.shard import Options
from instap_jax.errors import UserError
from instap_jax.types import Fault, Kind

SHARD = 2  # records; 7 clips make shards of 2, 2, 2 and 1


@pytest.fixture(scope="module")
def pristine(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("faults") / "packed"
    pack(corpus, out, options=Options(rate=None))
    return out


def pack(corpus, out, **changes):
    builder.pack(
        str(corpus / "a.jsonl"), str(corpus), str(out), processes=1, shard_size=SHARD, **changes
    )


@pytest.fixture
def packed(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "packed")


def shards(packed):
    return sorted((packed / "video").glob("*train.array_record*"))


def outcomes(packed, **options) -> list[str]:
    """Id or kind of exception of every record."""
    found = []
    source = open_source(packed, "train", Kind.VIDEO, **options)
    for index in range(len(source)):
        try:
            found.append(source[index].id)
        except CorruptRecordError as error:
            assert type(error).fault.name.startswith(("CORRUPT", "MISSING", "FOREIGN"))
            assert f"train record {index}" in str(error)
            found.append(type(error).__name__)
    return found


CORRUPT, MISSING, FOREIGN = (
    error.__name__ for error in (CorruptRecordError, MissingRecordError, ForeignRecordError)
)


def test_a_flipped_byte_costs_one_record(packed):
    good = outcomes(packed)
    assert sorted(good) == [f"train-{clip}" for clip in range(7)]
    media = open_source(packed, "train", Kind.VIDEO)[3].media_bytes[5]
    data = bytearray(shards(packed)[1].read_bytes())
    data[data.index(media) + len(media) // 2] ^= 1
    shards(packed)[1].write_bytes(data)
    assert outcomes(packed) == [*good[:3], CORRUPT, *good[4:]]


@pytest.mark.parametrize("size", [0, 70_000, -1])
def test_a_shard_that_was_cut_short_costs_its_records(packed, size):
    good = outcomes(packed)
    data = shards(packed)[1].read_bytes()
    shards(packed)[1].write_bytes(data[:size])
    assert outcomes(packed) == [*good[:2], CORRUPT, CORRUPT, *good[4:]]


def test_a_missing_shard_stops_at_once_or_costs_its_records(packed):
    good = outcomes(packed)
    shards(packed)[1].unlink()
    with pytest.raises(UserError, match="1 of 4 shards"):
        open_source(packed, "train", Kind.VIDEO)
    with pytest.raises(UserError, match="1 of 4 shards"):
        open_source(packed, "train", Kind.VIDEO, max_missing=0.28)
    assert outcomes(packed, max_missing=2 / 7) == [*good[:2], MISSING, MISSING, *good[4:]]


def test_a_shard_in_the_place_of_another_is_told(packed, corpus, tmp_path):
    good = outcomes(packed)
    first, second, third, _ = shards(packed)
    shutil.copyfile(first, second)  # of the same set
    pack(corpus, tmp_path / "other", options=Options(rate=2))
    shutil.copyfile(shards(tmp_path / "other")[2], third)  # the same shard of another set
    assert outcomes(packed) == [*good[:2], *[FOREIGN] * 4, good[6]]


def test_a_description_that_counts_too_many_or_too_few(packed):
    good = outcomes(packed)
    path = packed / "video" / "dataset_info.json"
    info = json.loads(path.read_text())
    split = next(split for split in info["splits"] if split["name"] == "train")
    split["shardLengths"] = ["2", "4", "1", "1"]
    path.write_text(json.dumps(info))
    assert outcomes(packed) == [*good[:4], MISSING, MISSING, good[4], good[6]]


def test_sets_without_places_are_read_as_before(packed):
    good = outcomes(packed)
    path = packed / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in manifest.items() if k != "pack"}))
    shutil.copyfile(shards(packed)[0], shards(packed)[1])
    assert outcomes(packed) == [*good[:2], *good[:2], *good[4:]]
    path.unlink()
    assert outcomes(packed) == [*good[:2], *good[:2], *good[4:]]
    path.write_text("[]")
    with pytest.raises(UserError, match=r"manifest\.json"):
        open_source(packed, "train", Kind.VIDEO)


def test_one_failed_read_is_tried_again(packed, monkeypatch):
    source = open_source(packed, "train", Kind.VIDEO)
    good = source[0].id
    opened = []

    class Failing:
        def read(self, _):
            raise RuntimeError("the storage does not answer")

    source._readers[0] = Failing()
    real = RecordSource._reader
    monkeypatch.setattr(RecordSource, "_reader", lambda s, i: opened.append(i) or real(s, i))
    assert source[0].id == good and opened == [0, 0]


def test_places_do_not_depend_on_where_and_how_it_was_packed(pristine, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "moved", ignore=shutil.ignore_patterns("jpeg", "mp4"))
    pack(tmp_path / "moved", tmp_path / "again", options=Options(rate=None))
    for one, other in zip(shards(pristine), shards(tmp_path / "again"), strict=True):
        assert one.read_bytes() == other.read_bytes()


# --- through the loader ---------------------------------------------------------------------------


def open_loader(config, packed, **changes):
    config.data.update(videos=f"{packed}:train", shuffle=False, max_fault_rate=0.5, **changes)
    return pipeline.make_loader(config, kind=Kind.VIDEO, groups=1, group_size=7, rows=[0])


def test_the_loader_counts_by_reason_and_keeps_the_rest(config, packed, pristine):
    whole = open_loader(config, pristine)
    good = {name: np.array(array) for name, array in next(whole).items()}
    whole.close()
    cut, lost, foreign, _ = shards(packed)
    lost.unlink()
    shutil.copyfile(cut, foreign)
    cut.write_bytes(cut.read_bytes()[:-1])
    loader = open_loader(config, packed)
    monitor = FaultMonitor(loader)
    batch = next(loader)
    monitor.update(batch)
    loader.close()
    reasons = {"CORRUPT_RECORD": 2, "MISSING_RECORD": 2, "FOREIGN_RECORD": 2}
    assert monitor.counts() == reasons
    assert batch["sample_valid"][0].tolist() == [False] * 6 + [True]
    assert not batch["frames"][0, :6].any()
    for name in ("frames", "text", "text_hash", "media_hash"):
        np.testing.assert_array_equal(batch[name][0, 6], good[name][0, 6])


def test_a_hanging_sample_is_counted_and_a_resumed_run_is_the_same(config, pristine, monkeypatch):
    def read(self, index, real=RecordSource.__getitem__):
        if index == 4:
            time.sleep(1000)
        return real(self, index)

    monkeypatch.setattr(RecordSource, "__getitem__", read)
    loader = open_loader(config, pristine, decode_timeout=0.5)
    monitor = FaultMonitor(loader)
    batches = [{k: np.array(v) for k, v in next(loader).items()} for _ in range(2)]
    state = loader.get_state()
    for batch in batches:
        monitor.update(batch)
        assert batch["fault"][0].tolist() == [0, 0, 0, 0, Fault.TIMEOUT, 0, 0]
    assert monitor.counts() == {"TIMEOUT": 2} and loader.workers_replaced >= 2
    third = {k: np.array(v) for k, v in next(loader).items()}
    loader.close()
    resumed = open_loader(config, pristine, decode_timeout=0.5)
    resumed.set_state(state)
    again = next(resumed)
    resumed.close()
    for name in third:
        np.testing.assert_array_equal(third[name], again[name], err_msg=name)


def test_content_that_no_record_of_ours_has_is_a_fault(pristine):
    source = open_source(pristine, "train", Kind.VIDEO)
    record = next(record for record in source if record.instance_ids)
    odd = {
        "captions": (7,), "size": (0, 4), "size ": (4.5, 4), "id": None, "fps": "8",
        "encoding": "png", "frame_index": record.frame_index[::-1],
        "boxes": np.full_like(record.boxes, np.nan),
    }  # fmt: skip
    for name, value in odd.items():
        changed = dataclasses.replace(record, **{name.strip(): value})
        with pytest.raises((ValueError, TypeError)):
            records.from_example(records.parse_example(records.serialize(changed)))
