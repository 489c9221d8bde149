"""Packing: records, shards, restart, rejects, and reading back."""

import errno
import fcntl
import json
import os
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import brightness
from pack_data import FAULTY, LINES, annotations, image_line, make_media, tree, video_line

from instap_jax.data import builder, media, plan, records, shard, workers
from instap_jax.data.shard import Options, sampling_grid
from instap_jax.errors import UserError
from instap_jax.types import Kind, Record

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
EXTRA = st.dictionaries(st.text(), JSON, max_size=2)
TEXTS = st.lists(st.text(), max_size=3).map(tuple)


@st.composite
def any_record(draw) -> Record:
    frames, instances = draw(st.integers(0, 4)), draw(st.integers(0, 3))

    def per_instance(strategy):
        return draw(st.lists(strategy, min_size=instances, max_size=instances).map(tuple))

    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return Record(
        id=draw(st.text()),
        media=draw(st.text()),
        kind=draw(st.sampled_from(Kind)),
        source=draw(st.text()),
        captions=draw(TEXTS),
        encoding=draw(st.sampled_from(["jpeg", "mp4"])),
        media_bytes=draw(st.lists(st.binary(), max_size=3)),
        frame_index=np.cumsum(rng.integers(1, 2**28, frames)).astype(np.int32),
        fps=draw(st.floats(0, 240)),
        size=(draw(st.integers(1, 4000)), draw(st.integers(1, 4000))),
        instance_ids=per_instance(st.text()),
        categories=per_instance(st.text()),
        instance_captions=per_instance(TEXTS),
        boxes=rng.random((instances, frames, 4)).astype(np.float32),
        present=rng.random((instances, frames)) < 0.5,
        extra=draw(EXTRA),
        instance_extra=per_instance(EXTRA),
    )


def assert_same(one: Record, other: Record) -> None:
    for name in Record.__slots__:
        a, b = getattr(one, name), getattr(other, name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype and a.shape == b.shape, name
            np.testing.assert_array_equal(a, b, err_msg=name)
        else:
            assert (a, type(a)) == (b, type(b)), name


@settings(max_examples=60, deadline=None)
@given(any_record())
def test_record_round_trip_is_exact(record):
    example = records.FEATURES.deserialize_example_np(records.serialize(record))
    back = records.from_example(example)
    assert_same(record, back)
    assert_same(record, pickle.loads(pickle.dumps(back)))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_media(tmp_path_factory.mktemp("media"))


def pack(tmp_path: Path, root: Path, lines: list[dict], out: str = "out", **arguments) -> Path:
    file = annotations(tmp_path / "a.jsonl", lines)
    arguments = {"options": Options(), "shard_size": 3, "processes": 1} | arguments
    builder.pack(str(file), str(root), str(tmp_path / out), **arguments)
    return tmp_path / out


@pytest.fixture(scope="module")
def packed(tmp_path_factory, root) -> Path:
    return pack(tmp_path_factory.mktemp("packed"), root, LINES)


def by_id(out: Path, split: str, kind: Kind) -> dict[str, Record]:
    return {r.id: r for r in records.open_source(str(out), split, kind)}


# --- what is stored ------------------------------------------------------------------------------


def test_video_is_stored_as_jpegs_on_the_grid(packed):
    record = by_id(packed, "train", Kind.VIDEO)["v3"]
    assert record.frame_index.tolist() == [0, 2, 4, 6, 8, 10]  # 4 of 8 frames per second
    assert (record.fps, record.size, record.encoding) == (8.0, (34, 46), "jpeg")
    assert len(record.media_bytes) == 6
    for index, data in zip(record.frame_index, record.media_bytes, strict=True):
        frame = media.decode_jpeg(data)
        assert frame.shape == (34, 46, 3)
        assert abs(frame.mean() - brightness(int(index))) < 3
    assert (record.media, record.source, record.extra) == (
        "clip.mp4",
        "test",
        {"license": {"by": 1}},
    )
    assert record.captions == ("Global. Text.",)
    assert (record.instance_ids, record.categories) == (("0", "b"), ("cat", ""))
    assert record.instance_captions == (("A cat. It runs.",), ("One.", "Two."))
    assert record.instance_extra == ({"mood": "calm"}, {})


def test_boxes_on_the_grid_are_those_computed_by_hand(packed):
    record = by_id(packed, "train", Kind.VIDEO)["v0"]
    first, last = [0.1, 0.1, 0.5, 0.5], [0.3, 0.3, 0.7, 1.0]  # frames 2 and 6 of a 46x34 clip
    middle = [0.2, 0.2, 0.6, 0.75]
    np.testing.assert_allclose(record.boxes[0], [first, first, middle, last, last, last], atol=1e-6)
    assert record.present[0].tolist() == [False, True, True, True, False, False]
    np.testing.assert_allclose(record.boxes[1], [[0, 0, 1, 1]] * 6)
    assert record.present[1].tolist() == [True, True, False, True, True, True]


def test_one_frame_video_and_images(packed):
    short = by_id(packed, "train", Kind.VIDEO)["short"]
    assert short.frame_index.tolist() == [0] and short.boxes.shape == (0, 1, 4)
    images = by_id(packed, "train", Kind.IMAGE)
    assert set(images) == {"bild-ü0", "bild-ü1", "bild-ü2", "bild-ü3", "large"}
    still = images["bild-ü2"]
    assert (still.fps, still.size, still.frame_index.tolist()) == (0, (33, 47), [0])
    np.testing.assert_allclose(still.boxes, [[[0.1, 0.1, 1, 1]]], atol=1e-6)
    assert images["large"].size == (256, 513)  # 300x601 with the short side at 256
    assert media.decode_jpeg(images["large"].media_bytes[0]).shape == (256, 513, 3)


def test_mp4_passes_the_file_through(tmp_path, root):
    out = pack(tmp_path, root, LINES, options=Options(encoding="mp4", rate=2))
    record = by_id(out, "train", Kind.VIDEO)["v0"]
    assert record.encoding == "mp4" and record.size == (34, 46)
    assert record.media_bytes == [(root / "clip.mp4").read_bytes()]
    assert record.frame_index.tolist() == [0, 4, 8]
    assert by_id(out, "train", Kind.IMAGE)["large"].encoding == "jpeg"


def test_long_clip_is_not_held_in_memory(packed, root, tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "_HELD_FRAMES", 5)
    assert tree(pack(tmp_path, root, LINES)) == tree(packed)
    cut = shard._frames(root / "cut.mp4", Kind.VIDEO, np.arange(60), 256)
    with pytest.raises(media.MediaError, match="truncated"):
        list(cut)


@pytest.mark.parametrize(
    ("frames", "fps", "rate", "expected"),
    [
        (1, 30.0, 4.0, [0]),
        (7, 30.0, 4.0, [0]),
        (30, 30.0, 4.0, [0, 7, 15, 22]),  # multiples of 7.5, rounded down
        (9, 25.0, 10.0, [0, 2, 5, 7]),
        (4, 8.0, 60.0, [0, 1, 2, 3]),  # never above the native rate
        (3, 8.0, None, [0, 1, 2]),
        (901, 30.0, 0.1, [0, 300, 600, 900]),
        (1, 0.0, 4.0, [0]),
    ],
)
def test_sampling_grid(frames, fps, rate, expected):
    assert sampling_grid(frames, fps, rate).tolist() == expected


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5000), st.floats(0.01, 240), st.none() | st.floats(0.001, 300))
def test_sampling_grid_covers_the_clip(frames, fps, rate):
    index = sampling_grid(frames, fps, rate)
    assert index.dtype == np.int32 and index[0] == 0
    assert (np.diff(index) >= 1).all() and index[-1] < frames
    step = max(1, fps / rate) if rate else 1
    assert index[-1] + step > frames - 1 - 1e-3  # no room for one more


# --- reading -------------------------------------------------------------------------------------


def test_opens_with_tfds(packed):
    for kind, splits in ((Kind.VIDEO, {"train": 8, "video_1k": 1}), (Kind.IMAGE, {"train": 5})):
        dataset = tfds.builder_from_directory(str(packed / kind))
        assert dataset.info.config_name == kind
        assert {name: split.num_examples for name, split in dataset.info.splits.items()} == splits
        source = dataset.as_data_source("train")
        mine = records.open_source(str(packed), "train", kind)
        assert len(source) == len(mine) == splits["train"]
        for example, record in zip(source, mine, strict=True):
            assert_same(records.from_example(example), record)


def test_source_is_random_access_and_picklable(packed):
    source = records.open_source(str(packed), "train", Kind.VIDEO)
    again = pickle.loads(pickle.dumps(source))
    assert repr(again) == repr(source) and str(packed) in repr(source)
    for index in (7, 0, 3):
        assert_same(source[index], again[index])
        assert source.record_id(index) == source[index].id
    for outside in (8, -1):
        with pytest.raises(IndexError):
            source[outside]


def test_open_source_names_what_there_is(packed, tmp_path):
    def message(*arguments):
        with pytest.raises(UserError) as error:
            records.open_source(*arguments)
        return str(error.value)

    assert "did you mean 'train'" in message(str(packed), "trian", Kind.VIDEO)
    assert "train, video_1k" in message(str(packed), "test", Kind.VIDEO)
    assert "no split 'all'" in message(str(packed), "all", Kind.VIDEO)
    assert "does not exist" in message(str(tmp_path / "nowhere"), "train", Kind.VIDEO)
    assert "no packed data" in message(str(tmp_path), "train", Kind.VIDEO)
    (tmp_path / "video").symlink_to(packed / "video")
    assert "only video" in message(str(tmp_path), "train", Kind.IMAGE)


def test_damage_is_confined_to_the_records_it_hit(root, tmp_path):
    out = pack(tmp_path, root, LINES)
    shards = sorted((out / "video").glob("*train*array_record*"))
    clean = list(records.open_source(str(out), "train", Kind.VIDEO))
    data = bytearray(shards[1].read_bytes())
    position = data.find(clean[4].media_bytes[2])
    hit = next(i for i in (3, 4, 5) if data.find(clean[i].id.encode() + b'"') in range(position))
    data[position + 40] ^= 0xFF  # records 3 to 5 are equal but for the id: the first one is hit
    shards[1].write_bytes(data)
    shards[2].write_bytes(b"")
    source = records.open_source(str(out), "train", Kind.VIDEO)
    damaged = []
    for index in [*range(8), *range(8)]:
        try:
            assert_same(source[index], clean[index])
        except records.CorruptRecordError as error:
            damaged.append(index)
            assert f"train record {index}" in str(error)
    assert damaged == [hit, 6, 7, hit, 6, 7]
    assert source.record_id(hit).endswith(f"train record {hit}")
    shards[2].unlink()
    with pytest.raises(UserError, match="1 of 3 shards"):
        records.open_source(str(out), "train", Kind.VIDEO)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory, root) -> Path:
    lines = [image_line(f"{i}") for i in range(12)]
    return pack(tmp_path_factory.mktemp("many"), root, lines, shard_size=1)


def test_few_shards_are_open_at_once_over_all_sources(many_shards, monkeypatch):
    monkeypatch.setattr(records, "_MAX_READERS", 3)
    sources = [records.open_source(str(many_shards), "train", Kind.IMAGE) for _ in range(2)]
    ids = [source[0].id for source in sources]  # whatever the library opens but once
    before = descriptors()
    in_use = sources[0]._reader(0)
    for source in sources * 2:
        assert len({source[i].id for i in range(12)}) == 12
        assert descriptors() <= before + 3
    assert len(in_use.read([0])) == 1  # another reader took its place; its user goes on
    for index in (0, 1, 2, 0, 3):
        assert sources[0].record_id(index)
    assert set(sources[0]._readers) == {0, 2, 3} and not sources[1]._readers
    assert ids[0] == ids[1]


def test_too_many_open_files_are_no_fault_of_the_data(many_shards):
    source = records.open_source(str(many_shards), "train", Kind.IMAGE)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    source[0]  # whatever the library opens but once
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors() + 2, limits[1]))
    try:
        with pytest.raises(UserError, match=r"too many open files; .* may open \d+: .*ulimit -n"):
            list(source)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(list(source)) == 12


# --- the same bytes, whatever happens ------------------------------------------------------------


def test_more_shards_than_wait_for_the_workers_at_once(many_shards, root, tmp_path):
    lines = [image_line(f"{i}") for i in range(12)]  # 8 wait
    assert tree(pack(tmp_path, root, lines, shard_size=1, processes=2)) == tree(many_shards)


def test_processes_do_not_change_the_bytes(packed, root, tmp_path):
    assert tree(pack(tmp_path, root, LINES, processes=2)) == tree(packed)
    other = pack(tmp_path, root, LINES, out="other", seed=1)
    ids = [
        [r.id for r in records.open_source(str(d), "train", Kind.VIDEO)] for d in (packed, other)
    ]
    assert sorted(ids[0]) == sorted(ids[1]) and ids[0] != ids[1]


def test_stopped_run_continues_to_the_same_bytes(packed, root, tmp_path, monkeypatch):
    write, begun = workers.write_shard, []

    def stops_at_the_third(task, tick):
        begun.append(task)
        if len(begun) == 3:
            tick = interrupt
        return write(task, tick)

    def interrupt(line):
        raise KeyboardInterrupt

    monkeypatch.setattr(workers, "write_shard", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        pack(tmp_path, root, LINES)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    with pytest.raises(UserError, match="not the same: quality"):
        pack(tmp_path, root, LINES, options=Options(quality=50))
    assert tree(pack(tmp_path, root, LINES)) == tree(packed)
    assert len(begun) == 3 + 6 - 2  # six shards; two were there, the third was begun twice
    assert not (tmp_path / "out.partial").exists()


def test_lost_shard_is_made_again(packed, root, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(builder, "_describe", full)
        with pytest.raises(UserError, match=r"No space left.*same command again"):
            pack(tmp_path, root, LINES)
    shards = sorted((tmp_path / "out.partial/data/video").glob("*array_record*"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    assert tree(pack(tmp_path, root, LINES)) == tree(packed)


def test_two_runs_do_not_share_a_directory(root, tmp_path):
    (tmp_path / "out.partial").mkdir()
    with open(tmp_path / "out.partial/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another `instap pack`"):
            pack(tmp_path, root, LINES)


# --- faults --------------------------------------------------------------------------------------


def test_rejects_are_counted_listed_and_left_out(root, tmp_path):
    out = pack(tmp_path, root, LINES + FAULTY, max_reject_rate=5 / 19)
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert [(r["line"], r["id"]) for r in rejects] == [
        (15, "v0"),
        (16, "cut"),
        (17, "gone"),
        (18, "line"),
        (19, "not an image"),
    ]
    for reject, word in zip(
        rejects, ("duplicate id", "truncated", "no such file", "zero area", "image"), strict=True
    ):
        assert word in reject["reason"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["annotations"]["samples"] == 19
    assert manifest["rejects"]["total"] == sum(manifest["rejects"]["reasons"].values()) == 5
    assert manifest["rejects"]["reasons"]["truncated"] == 1
    counts = {
        (kind, split): (n["samples"], n["instances"], n["frames"])
        for kind, splits in manifest["counts"].items()
        for split, n in splits.items()
    }
    assert counts == {
        ("image", "train"): (5, 4, 5),
        ("video", "train"): (8, 14, 43),
        ("video", "video_1k"): (1, 2, 6),
    }
    assert set(by_id(out, "train", Kind.VIDEO)) == {*(f"v{i}" for i in range(7)), "short"}


def test_too_many_rejects_leave_nothing(root, tmp_path):
    with pytest.raises(builder.TooManyRejects, match="5 of 19 samples rejected") as error:
        pack(tmp_path, root, LINES + FAULTY, max_reject_rate=4.9 / 19, shard_size=100)
    assert len(error.value.rejects) == 5
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_work_ends_as_soon_as_there_are_too_many_rejects(root, tmp_path, monkeypatch):
    write, begun = workers.write_shard, []
    monkeypatch.setattr(
        workers, "write_shard", lambda task, tick: begun.append(task) or write(task, tick)
    )
    missing = [image_line(f"{i}", media="gone.jpg") for i in range(20)]
    with pytest.raises(builder.TooManyRejects):
        pack(tmp_path, root, missing, max_reject_rate=0.2, shard_size=2)
    assert len(begun) == 3  # 4 rejects are allowed


def test_what_a_removal_leaves_is_taken_up_by_no_other_pack(root, tmp_path, monkeypatch):
    def interrupted(path, **_):
        if os.path.isdir(path):
            os.remove(f"{path}/plan.json")
            raise KeyboardInterrupt

    good = [image_line(f"{i}") for i in range(6)]
    first = [line | {"caption": "Grue."} for line in good[:5]] + [good[5] | {"media": "gone.jpg"}]
    with monkeypatch.context() as patch:
        patch.setattr(builder.shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pack(tmp_path, root, first, shard_size=2, max_reject_rate=0)
    out = pack(tmp_path, root, good, shard_size=2)
    assert tree(out) == tree(pack(tmp_path, root, good, out="again", shard_size=2))
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "out", "again"}


@pytest.mark.parametrize("lines", [LINES[:2], [*LINES[:2], *FAULTY]])
def test_a_removal_that_fails_hides_nothing(root, tmp_path, monkeypatch, lines):
    def nfs(path, **_):
        opened = {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
        assert not any("/lock" in name for name in opened)  # else the file would stay there
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(os, "rmdir", nfs)
    if lines == LINES[:2]:
        assert (pack(tmp_path, root, lines) / "manifest.json").exists()
    else:
        with pytest.raises(builder.TooManyRejects):
            pack(tmp_path, root, lines)
    assert not (tmp_path / "out.partial").exists()


def test_split_emptied_by_rejects_is_an_error(root, tmp_path):
    lines = [*LINES, image_line("x", split="img-1k", media="gone.jpg")]
    with pytest.raises(UserError, match="every image sample of split 'img_1k'"):
        pack(tmp_path, root, lines, max_reject_rate=1)
    lines = [*LINES, image_line("v0", split="img-1k")]
    with pytest.raises(UserError, match="every image sample of split 'img_1k'"):
        pack(tmp_path, root, lines, max_reject_rate=1)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_shard_may_lose_all_its_samples(root, tmp_path):
    missing = [image_line(f"m{i}", media="gone.jpg") for i in range(5)]
    out = pack(tmp_path, root, [*LINES, *missing], max_reject_rate=1, shard_size=1)
    assert len(records.open_source(str(out), "train", Kind.IMAGE)) == 5
    assert len(by_id(out, "train", Kind.IMAGE)) == 5


def test_file_faults_end_at_once(root, tmp_path):
    for line, text in (
        (video_line("x", box_format="corners"), "a.jsonl:15: key 'box_format'"),
        (video_line("x", media="../x.mp4"), "a.jsonl:15: .*leads out"),
        (video_line("x", split="all"), "a.jsonl:15: key 'split'"),
        (video_line("x", media="link.mp4"), "a.jsonl:15: .*leads out"),
    ):
        with pytest.raises(UserError, match=text):
            (root / "link.mp4").unlink(missing_ok=True)
            (root / "link.mp4").symlink_to("/etc/passwd")
            pack(tmp_path, root, [*LINES, line])
        assert os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize(
    ("samples", "kind", "shards"),
    [
        (1, Kind.VIDEO, 1),
        (100, Kind.VIDEO, 4),
        (2000, Kind.IMAGE, 16),
        (5000, Kind.VIDEO, 20),
        (90_000, Kind.IMAGE, 22),
    ],
)
def test_small_sets_have_a_shard_for_every_core(samples, kind, shards):
    assert plan._shard_count(samples, kind, None) == shards


def test_annotations_that_were_written_again_are_noticed(tmp_path):
    file = annotations(tmp_path / "a.jsonl", LINES)
    index = plan.Index(str(file))
    index.check_unchanged()
    os.utime(file, ns=(0, os.stat(file).st_mtime_ns + 1_000_000))
    with pytest.raises(UserError, match=r"a\.jsonl was changed while it was being packed"):
        index.check_unchanged()


def test_paths_that_do_not_fit(packed, root, tmp_path):
    with pytest.raises(UserError, match="exists"):
        pack(tmp_path, root, LINES, out=str(packed))
    with pytest.raises(UserError, match="not a directory"):
        pack(tmp_path, root, LINES, out="no/out")
    with pytest.raises(UserError, match="not a directory"):
        pack(tmp_path, root, LINES, out="a.jsonl/out")
    with pytest.raises(UserError, match="cannot write to"):
        pack(tmp_path, root, LINES, out="/proc/out")
    with pytest.raises(UserError, match="media directory"):
        pack(tmp_path, root / "none", LINES)


@pytest.mark.parametrize(
    "options", [{"rate": -1.0}, {"short_side": 1}, {"quality": 100}, {"encoding": "webm"}]
)
def test_options_out_of_range(options):
    with pytest.raises(UserError, match=next(iter(options))):
        Options(**options)
