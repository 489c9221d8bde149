"""The grain pipeline: one stream on any hosts and workers, resume, faults, captions, evaluation."""

import collections
import dataclasses
import json
import math
from collections.abc import Sequence

import numpy as np
import psutil
import pytest
from clips import CLIPS, SIZE, caption, color
from ml_collections import ConfigDict
from pipeline_data import command_line, config, corpus  # noqa: F401 - fixtures

from instap_jax.data import media, pipeline
from instap_jax.data.captions import hash32, sentence_for_epoch, split_sentences, text_hash
from instap_jax.data.groups import GroupRef, SampleRef, fitting_size
from instap_jax.data.pipeline import Corpus, FaultMonitor, parse_corpora
from instap_jax.data.records import CorruptRecordError, RecordSource, open_source
from instap_jax.data.suite import read_suite
from instap_jax.errors import UserError
from instap_jax.types import Batch, Fault, Kind, Record


def open_loader(config: ConfigDict, groups=2, group_size=2, rows=None):
    return pipeline.make_loader(
        config, kind=Kind.VIDEO, groups=groups, group_size=group_size,
        rows=range(groups) if rows is None else rows,
    )  # fmt: skip


def take(loader, count: int) -> list[Batch]:
    try:
        return [{name: np.array(a) for name, a in next(loader).items()} for _ in range(count)]
    finally:
        loader.close()


def assert_equal(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other):
        assert a.keys() == b.keys() == Batch.__annotations__.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name, strict=True)


def hash_of(config: ConfigDict, text: str) -> int:
    """Of what the model reads of a text."""
    tokens = pipeline.open_tokenizer(config).encode(text, config.tokenizer.length)
    return hash32(tokens.tobytes())


# --- corpora ------------------------------------------------------------------------------------


def test_corpora_are_parsed():
    assert parse_corpora("") == ()
    assert parse_corpora(" a/b:train=2.5 , gs://bucket/d:img-1k") == (
        Corpus("a/b", "train", 2.5),
        Corpus("gs://bucket/d", "img_1k", 1.0),
    )


@pytest.mark.parametrize(
    "text", ["a", "a:", ":train", "a:b=0", "a:b=x", "a:b=-1", "a:b=nan", "a:b="]
)
def test_bad_corpora_are_named(text):
    with pytest.raises(UserError, match="corpus"):
        parse_corpora(f"ok:train,{text}")


def test_loader_faults(config, tmp_path):
    def message() -> str:
        with pytest.raises(UserError) as error:
            open_loader(config)
        return str(error.value)

    config.tokenizer.path = str(tmp_path / "none.model")
    assert "tokenizer.path" in message()
    config.tokenizer.path = None
    assert "instap tokenizer" in message()
    config.data.videos = ""
    assert "data.videos" in message()
    config.data.videos = f"{tmp_path}:train"
    assert "instap pack" in message()


# --- one stream, whatever the hosts and workers ---------------------------------------------------


def test_hosts_see_parts_of_the_same_batches(config, corpus):
    config.data.videos = f"{corpus}/jpeg:train=2,{corpus}/jpeg:more"
    whole = take(open_loader(config, groups=4), 6)
    # Also as hosts of a TPU share them: not in a row, and some groups on two hosts.
    for hosts in ([[0, 1], [2, 3]], [[0, 3], [1, 2]], [[0], [1], [2, 3]], [[0, 1, 2], [1, 2, 3]]):
        for rows in hosts:
            part = take(open_loader(config, groups=4, rows=rows), 6)
            assert_equal(part, [{k: v[rows] for k, v in batch.items()} for batch in whole])


def test_resume_in_mid_epoch_on_other_hosts_and_batches(config):
    whole = take(open_loader(config), 6)
    loader = open_loader(config)
    for _ in range(3):
        next(loader)
    state = json.loads(json.dumps(loader.get_state()))
    loader.close()
    parts = []
    for host in range(2):
        resumed = open_loader(config, rows=[host])
        next(resumed)  # a position it had is forgotten
        resumed.set_state(state)
        assert resumed.get_state() == state
        parts.append(take(resumed, 3))
    joined = [{n: np.concatenate([p[n] for p in step]) for n in step[0]} for step in zip(*parts)]
    assert_equal(joined, whole[3:])
    larger = open_loader(config, groups=3, group_size=4)  # the next batch, of another size
    larger.set_state(state)
    records = np.concatenate([batch["record"].ravel() for batch in whole[3:]])
    np.testing.assert_array_equal(take(larger, 1)[0]["record"].ravel(), records)


def test_workers_do_not_change_the_batches(config):
    whole = take(open_loader(config), 7)
    config.data.workers = 2
    loader = open_loader(config)
    first = [{name: np.array(a) for name, a in next(loader).items()} for _ in range(3)]
    workers = psutil.Process().children(recursive=True)
    loader.set_state(loader.get_state())  # stops them, starts new ones
    assert_equal(first + take(loader, 4), whole)
    _, alive = psutil.wait_procs(
        [p for p in workers if "spawn_main" in " ".join(command_line(p))], timeout=10
    )
    assert not alive


def test_seed_and_shuffle(config, corpus):
    def order(**changes) -> list[int]:
        config.data.update(videos=f"{corpus}/jpeg:train", shuffle=changes.get("shuffle", True))
        config.seed = changes.get("seed", 0)
        return [int(r) for b in take(open_loader(config, 1, CLIPS), 2) for r in b["record"].ravel()]

    plain = order(shuffle=False)
    assert plain == [*range(CLIPS), *range(CLIPS)]
    shuffled = order()
    assert sorted(shuffled) == sorted(plain) and order() == shuffled != order(seed=1)
    first, second = shuffled[:CLIPS], shuffled[CLIPS:]
    assert sorted(first) == sorted(second) == list(range(CLIPS)) and first != second


def test_every_turn_draws_other_frames(config, memory):
    pictures = [np.full((*SIZE, 3), 10 * i, np.uint8) for i in range(24)]
    files = [media.encode_jpeg(picture) for picture in pictures]
    record = make_record(media_bytes=files, **make_instances(("A.",), np.ones((1, 24), bool)))
    memory(record, record)
    batches = take(open_loader(config, groups=1, group_size=2), 20)
    drawn = {tuple(f[:, 0, 0, 0]) for batch in batches for f in batch["frames"][0]}
    assert len(drawn) >= 38  # 40 draws of 6 ** 4


# --- what is in a batch ---------------------------------------------------------------------------


def test_captions_cycle_by_the_epoch_of_their_own_corpus(config, corpus):
    # 3 of 4 samples from 'more' (3 clips) and 1 from 'train' (7): their epochs drift apart.
    config.data.videos = f"{corpus}/jpeg:train=1,{corpus}/jpeg:more=3"
    sources = [open_source(f"{corpus}/jpeg", split, Kind.VIDEO) for split in ("train", "more")]
    seen = collections.Counter()
    for batch in take(open_loader(config, groups=1, group_size=4), 30):
        for place in np.ndindex(batch["record"].shape):
            sample = int(batch["corpus"][place]), int(batch["record"][place])
            epoch = seen[sample]
            seen[sample] += 1
            record = sources[sample[0]][sample[1]]
            assert len(split_sentences(record.captions[0])) == 3
            expected = hash_of(config, sentence_for_epoch(record.captions, epoch))
            assert batch["text_hash"][place] == expected
            assert batch["media_hash"][place] == text_hash(f"{sample[0]}/{record.media}")
            for slot in np.flatnonzero(batch["instance_valid"][place[0]]):
                if batch["parent"][place[0], slot] == place[1]:
                    texts = [sentence_for_epoch(c, epoch) for c in record.instance_captions]
                    hashes = [hash_of(config, text) for text in texts]
                    assert batch["instance_text_hash"][place[0], slot] in hashes
    assert sum(n for (c, _), n in seen.items() if c == 1) == 90  # by weight
    for c, size in ((0, CLIPS), (1, 3)):  # and evenly within a corpus
        turns = [n for (corpus_, _), n in seen.items() if corpus_ == c]
        assert len(turns) == size and max(turns) - min(turns) <= 1


def test_equal_files_and_texts_that_read_the_same_are_told(config):
    """Lists with one caption a line repeat a file; capitals and what is cut off say nothing."""
    config.tokenizer.length = 8
    loader = open_loader(config, 1, 2)
    record = loader._builder.sources[0][0]
    shown = [
        dataclasses.replace(record, captions=(text,), id=f"entry-{i}", media=name)
        for i, (text, name) in enumerate(
            [
                ("A red dog runs to the right.", "a.mp4"),
                ("a RED dog runs to the right.", "a.mp4"),
                ("A red dog runs to the right. Then it sits.", "b.mp4"),
                ("A dog.", "c.mp4"),
            ]
        )
    ]
    loader.close()
    builder = dataclasses.replace(
        loader._builder, sources=[shown], group_size=4, caption_sampling="first"
    )
    refs = [SampleRef(corpus=0, record=i, epoch=0, turn=i) for i in range(4)]
    frames = np.zeros(builder.shapes(1)["frames"][0], np.uint8)
    batch = builder.build([GroupRef(first=0, samples=refs)], frames, lambda number: Fault.NONE)
    media, texts = batch["media_hash"][0].tolist(), batch["text_hash"][0].tolist()
    assert media[0] == media[1] and len(set(media)) == 3
    assert texts[0] == texts[1] == texts[2] != texts[3]


def test_every_corpus_keeps_its_order_however_many_there_are(config, corpus, monkeypatch):
    config.data.videos = ",".join([f"{corpus}/jpeg:train"] * 40)
    shuffled = collections.Counter()
    made = pipeline._Turns._shuffled

    def counted(turns, epoch):
        shuffled[turns._corpus, epoch] += 1
        return made(turns, epoch)

    monkeypatch.setattr(pipeline._Turns, "_shuffled", counted)
    take(open_loader(config, 1, 40), 3)
    assert len(shuffled) == 40 and set(shuffled.values()) == {1}


def test_without_sub_sampling_every_epoch_has_the_caption_from_its_start(config, corpus):
    config.data.caption_sampling = "first"
    source = open_source(f"{corpus}/jpeg", "train", Kind.VIDEO)
    whole = hash_of(config, source[0].captions[0])
    batches = take(open_loader(config, groups=1, group_size=CLIPS), 3)
    assert [(b["text_hash"][b["record"] == 0] == whole).all() for b in batches] == [True] * 3


def test_ids_of_the_tokenizer_are_compared(config):
    config.tokenizer.update(cls_id=101, mask_id=103)
    with pytest.raises(UserError, match=r"set tokenizer.cls_id=2"):
        open_loader(config)


@pytest.mark.parametrize("encoding", ["jpeg", "mp4"])
@pytest.mark.parametrize("sampling", ["random", "uniform"])
def test_pixels_boxes_and_texts_belong_together(config, corpus, encoding, sampling):
    config.data.videos = f"{corpus}/{encoding}:train"
    config.data.sampling = sampling
    source = open_source(f"{corpus}/{encoding}", "train", Kind.VIDEO)
    for batch in take(open_loader(config, groups=2, group_size=3), 4):
        assert batch["sample_valid"].all() and not batch["fault"].any()
        np.testing.assert_allclose(batch["extent"], np.broadcast_to([34 / 40, 46 / 48], (2, 3, 2)))
        assert not batch["frames"][..., 34:, :, :].any() and not batch["frames"][..., 46:, :].any()
        for g, b in np.ndindex(2, 3):
            record = source[batch["record"][g, b]]
            clip = int(record.id.split("-")[1])
            picture = batch["frames"][g, b, :, :34, :46].astype(float).mean((1, 2))
            frames = np.rint((picture[:, 1] - 20) / 18).astype(int)
            expected = [color(clip, frame) for frame in frames]
            np.testing.assert_allclose(picture, expected, atol=6)
            grid = [int(np.flatnonzero(record.frame_index == frame)[0]) for frame in frames]
            if sampling == "uniform":
                f = len(record.frame_index)
                assert grid == [math.floor((i + 0.5) * f / 4) for i in range(4)]
            _check_instances(config, batch, g, b, record, grid)


def _check_instances(config, batch: Batch, g: int, b: int, record: Record, grid: list[int]) -> None:
    slots = np.flatnonzero(batch["instance_valid"][g] & (batch["parent"][g] == b))
    shown = [k for k in range(len(record.instance_ids)) if record.present[k, grid].any()]
    assert len(slots) == len(shown)  # the budget is large enough here
    for slot, k in zip(slots, shown):
        np.testing.assert_array_equal(batch["boxes"][g, slot], record.boxes[k, grid])
        np.testing.assert_array_equal(batch["present"][g, slot], record.present[k, grid])
        text = split_sentences(record.instance_captions[k][0])
        assert batch["instance_text_hash"][g, slot] in [hash_of(config, t) for t in text]


def test_keep_side_is_set_by_the_sentences_in_use(config):
    hashes = {hash_of(config, "Seen on the left."): True, hash_of(config, "Thing 0 of 3."): False}
    met = collections.Counter()
    for batch in take(open_loader(config), 12):
        for g, b in np.ndindex(batch["record"].shape):
            used = batch["instance_valid"][g] & (batch["parent"][g] == b)
            side = any(hashes.get(int(h), False) for h in batch["instance_text_hash"][g][used])
            assert batch["keep_side"][g, b] == side
            met[side] += 1
    assert min(met[True], met[False]) > 3


def test_texts_are_those_of_the_tokenizer(config):
    tokenizer = pipeline.load_tokenizer(config.tokenizer)
    batch = take(open_loader(config), 1)[0]
    texts = {hash_of(config, s): s for c in range(CLIPS) for s in split_sentences(caption(c))}
    for place in np.ndindex(batch["record"].shape):
        text = texts[int(batch["text_hash"][place])]
        np.testing.assert_array_equal(batch["text"][place], tokenizer.encode(text, 48))
    assert not batch["instance_text"][~batch["instance_valid"]].any()
    config.stage, config.tokenizer.path = "distill", None  # no text needed: none made
    assert not take(open_loader(config), 1)[0]["text"].any()


def test_too_many_instances_are_dropped_and_counted(config):
    config.data.instances_per_sample = 1
    totals = collections.Counter()
    for batch in take(open_loader(config, groups=1, group_size=CLIPS), 8):
        valid = batch["instance_valid"][0]
        assert len(valid) == CLIPS  # n = ceil(b * instances_per_sample)
        if batch["dropped"][0]:
            assert valid.all()
        totals["kept"] += valid.sum()
        totals["dropped"] += batch["dropped"][0]
        per_sample = np.bincount(batch["parent"][0][valid], minlength=CLIPS)
        assert per_sample.max() <= 2  # 0 to 3 instances each: nobody keeps three of seven
    # 7 clips with 0 to 3 instances: 9 of them, less those of one instance that comes in too short.
    assert totals["dropped"] and totals["kept"] + totals["dropped"] <= 8 * 9


def test_what_is_dropped_is_drawn_for_every_group(config, memory):
    config.data.instances_per_sample = 1
    memory(make_record(**make_instances(("A.", "B.", "C."), np.ones((3, 4), bool))))
    kept = {int(b["instance_text_hash"][0, 0]) for b in take(open_loader(config, 1, 1), 20)}
    assert kept == {hash_of(config, "A."), hash_of(config, "B."), hash_of(config, "C.")}


@pytest.mark.parametrize(("encoding", "canvas"), [("jpeg", (20, 20)), ("mp4", (17, 64))])
def test_large_pictures_are_scaled_down(config, corpus, encoding, canvas):
    config.data.videos, config.data.canvas = f"{corpus}/{encoding}:train", canvas
    batch = take(open_loader(config, groups=1, group_size=CLIPS), 1)[0]
    height, width = fitting_size(*SIZE, canvas)
    assert (height, width) in ((14, 19), (17, 23))
    np.testing.assert_allclose(batch["extent"][0, 0], [height / canvas[0], width / canvas[1]])
    picture = batch["frames"][..., :height, :width, :]
    assert (picture[..., 0] > 20).all() and batch["sample_valid"].all()
    assert not batch["frames"][..., height:, :, :].any()
    assert not batch["frames"][..., width:, :].any()


def test_batches_that_are_kept_are_not_overwritten(config):
    loader = open_loader(config)
    kept = [next(loader) for _ in range(4)]
    copies = [{name: np.array(a) for name, a in batch.items()} for batch in kept]
    views = [batch["frames"][0, 0] for batch in kept]
    for _ in range(4):
        next(loader)
    assert_equal(kept, copies)
    del kept
    for _ in range(4):
        next(loader)
    for view, copy in zip(views, copies):
        np.testing.assert_array_equal(view, copy["frames"][0, 0])
    loader.close()


# --- bad samples ---------------------------------------------------------------------------------


class Memory:
    """A record source over records in memory; an exception in a record's place is raised."""

    kind = Kind.VIDEO

    def __init__(self, records: list):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        if isinstance(self.records[index], Exception):
            raise self.records[index]
        return self.records[index]

    def record_id(self, index: int) -> str:
        return f"sample-{index}"


def make_record(clip: int = 0, **changes) -> Record:
    """Four equal frames of a clip with one instance; `changes` are fields of the record."""
    array = np.full((*SIZE, 3), color(clip, 0), np.uint8)
    values = {"id": f"m{clip}", "media": "", "kind": Kind.VIDEO, "source": "", "fps": 8.0}
    values |= {"captions": (caption(clip),), "encoding": "jpeg", "size": SIZE, "extra": {}}
    values["media_bytes"] = [media.encode_jpeg(array)] * 4
    values |= make_instances(("Thing.",), np.ones((1, 4), bool))
    return Record(**values | changes)


def make_instances(captions: Sequence[str], present: np.ndarray) -> dict:
    """The fields of a record with so many instances, in the frames that `present` [k, f] says."""
    count, frames = present.shape
    return {
        "frame_index": np.arange(frames, dtype=np.int32),
        "instance_ids": tuple(map(str, range(count))),
        "categories": ("",) * count,
        "instance_captions": tuple((text,) for text in captions),
        "boxes": np.full((count, frames, 4), 0.5, np.float32),
        "present": present,
        "instance_extra": ({},) * count,
    }


BAD = {
    "corrupt record": (CorruptRecordError("x"), Fault.CORRUPT_RECORD),
    "truncated jpeg": (
        make_record(media_bytes=[make_record().media_bytes[0][:-200]] * 4),
        Fault.UNDECODABLE_MEDIA,
    ),
    "last frame damaged": (
        make_record(media_bytes=[*make_record().media_bytes[:3], b"garbage"]),
        Fault.UNDECODABLE_MEDIA,
    ),
    "truncated mp4": (
        make_record(encoding="mp4", media_bytes=[b"\0\0\0\x18ftypmp42"]),
        Fault.UNDECODABLE_MEDIA,
    ),
    "no frames": (
        make_record(media_bytes=[], **make_instances(("Thing.",), np.zeros((1, 0), bool))),
        Fault.NO_FRAMES,
    ),
    "empty caption": (make_record(captions=(" ", "")), Fault.EMPTY_CAPTION),
    "another size": (make_record(size=(30, 40)), Fault.WRONG_SHAPE),
    "boxes of another clip": (make_record(boxes=np.zeros((1, 3, 4))), Fault.WRONG_SHAPE),
    "a line of pixels": (make_record(size=(1, 16000)), Fault.WRONG_SHAPE),
}


@pytest.fixture
def memory(monkeypatch):
    def use(*records) -> None:
        monkeypatch.setattr(pipeline, "open_source", lambda *_, **__: Memory(list(records)))

    return use


@pytest.mark.parametrize("name", BAD)
def test_bad_samples_are_masked_and_named(config, memory, name):
    bad, fault = BAD[name]
    config.data.shuffle = False
    memory(make_record(1), bad, make_record(2))
    loader = open_loader(config, groups=1, group_size=3)
    batch = take(loader, 2)[1]
    assert batch["sample_valid"].tolist() == [[True, False, True]]
    assert batch["fault"].tolist() == [[0, fault, 0]]
    assert batch["record"].tolist() == [[0, 1, 2]]
    for key in ("frames", "extent", "text", "media_hash", "text_hash", "keep_side"):
        assert not batch[key][0, 1].any(), key
        assert batch[key][0, 2].any() or key == "keep_side"
    assert batch["parent"][0][batch["instance_valid"][0]].tolist() == [0, 2]
    assert loader.sample_id(0, 1) == "sample-1"


def test_instances_without_a_sentence_or_out_of_sight_are_not_used(config, memory):
    present = np.ones((3, 4), bool)
    present[1] = False
    memory(make_record(**make_instances(("A.", "B.", ""), present)))
    batch = take(open_loader(config, groups=1, group_size=1), 1)[0]
    assert batch["instance_text_hash"][batch["instance_valid"]].tolist() == [hash_of(config, "A.")]
    assert not batch["fault"].any() and not batch["dropped"].any()


def test_fault_monitor_stops_above_the_rate(config, memory):
    config.data.shuffle = False
    memory(*[make_record()] * 8, CorruptRecordError("x"), BAD["truncated jpeg"][0])
    loader = open_loader(config, groups=1, group_size=10)
    monitor = FaultMonitor(loader)
    for batches in range(1, FaultMonitor.MIN_SAMPLES // 10):
        monitor.update(next(loader))
        assert monitor.news() == (2, 10)  # since the last time
        monitor.check(0.01, 2 * batches, 10 * batches)  # too few samples to tell
    monitor.update(next(loader))
    loader.close()
    assert monitor.counts() == {"CORRUPT_RECORD": 20, "UNDECODABLE_MEDIA": 20}
    monitor.check(0.2, 40, 200)
    monitor.check(0.19, 40, 400)  # of all hosts
    with pytest.raises(UserError) as error:
        monitor.check(0.19, 40, 200)
    text = str(error.value)
    assert "40 of 200" in text and "\n" not in text and "0.19: CORRUPT_RECORD 20" in text
    assert "sample-8 (CORRUPT_RECORD)" in text and "sample-9 (UNDECODABLE_MEDIA)" in text
    with pytest.raises(UserError, match=r"100 of 400 .* 40 on this host: CORRUPT_RECORD 20"):
        monitor.check(0.19, 100, 400)


def test_any_mixture_of_bad_samples_keeps_captions_with_their_media(config, memory):
    bad = [record for record, _ in BAD.values()]
    good = [make_record(clip) for clip in range(CLIPS)]
    memory(*[r for pair in zip(good, bad) for r in pair])
    for batch in take(open_loader(config, groups=1, group_size=5), 12):
        for b in np.flatnonzero(batch["sample_valid"][0]):
            clip = int(batch["record"][0, b]) // 2
            red = batch["frames"][0, b, :, :34, :46, 0].mean()
            assert abs(red - color(clip, 0)[0]) < 6
            hashes = [hash_of(config, s) for s in split_sentences(caption(clip))]
            assert batch["text_hash"][0, b] in hashes
        assert (batch["sample_valid"] == (batch["fault"] == 0)).all()


# --- evaluation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("host_count", "workers"), [(1, 0), (2, 0), (1, 2)])
def test_evaluation_covers_a_split_once_in_order(config, corpus, host_count, workers, monkeypatch):
    source = open_source(f"{corpus}/jpeg", "train", Kind.VIDEO)
    reads, read = [], RecordSource.__getitem__
    monkeypatch.setattr(RecordSource, "__getitem__", lambda s, i: (reads.append(i), read(s, i))[1])
    hosts = [
        list(read_suite(config, source, frames=4, groups=2, group_size=2, workers=workers,
                        rows=None if host_count == 1 else [host]))
        for host in range(host_count)
    ]  # fmt: skip
    if not workers:  # else they are read in other processes
        assert sorted(reads) == list(range(CLIPS))  # each record once
    monkeypatch.undo()
    records, texts, facts, instances = [], [], [], 0
    for step in (part for parts in zip(*hosts, strict=True) for part in parts):
        batch = step.batch
        assert batch["frames"].shape == (2 // host_count, 2, 4, 40, 48, 3)
        counts = batch["instance_valid"].sum(axis=1)
        assert batch["boxes"].shape[1] == max(1, counts.max())
        assert not batch["fault"].any() and not batch["dropped"].any()
        records += batch["record"][batch["sample_valid"]].tolist()
        texts += batch["text_hash"][batch["sample_valid"]].tolist()
        facts += step.facts
        assert not batch["frames"][~batch["sample_valid"]].any()
        assert batch["present"].any(axis=2)[batch["instance_valid"]].all()
        instances += int(counts.sum())
    assert records == list(range(CLIPS))
    assert instances == sum(len(r.instance_ids) for r in source)  # also those seen in no frame
    assert texts == [hash_of(config, r.captions[0]) for r in source]  # whole captions
    assert [one.id for one in facts] == [r.id for r in source]
    for one, record in zip(facts, source):
        assert [i.captions for i in one.instances] == list(record.instance_captions)


def test_an_instance_between_the_frames_is_shown_in_the_nearest(config):
    present = np.zeros((2, 12), bool)
    present[0, 3] = True  # the chosen frames are 1, 4, 7 and 10
    twelve = make_record().media_bytes * 3
    source = Memory([make_record(media_bytes=twelve, **make_instances(("A. B.",) * 2, present))])
    batch = next(read_suite(config, source, frames=4, groups=1, group_size=1, workers=0)).batch
    assert batch["present"][0, 0].tolist() == [False, True, False, False]
    assert batch["present"][0, 1].sum() == 1 and batch["instance_valid"].all()
    assert batch["instance_text_hash"][0, 0] == hash_of(config, "A. B.")
