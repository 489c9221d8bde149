"""What a hostile file may ask for: limits on pixels, frames, boxes, text and time."""

import json
import multiprocessing
import os
import signal
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import make_video

from instap_jax.data import media, records, schema, shard
from instap_jax.data.processes import exit_after
from instap_jax.data.shard import Options, Reject, make_record
from instap_jax.errors import UserError
from instap_jax.types import Kind

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import bombs
import fuzz
import fuzz_targets

real_inflate = zlib.decompressobj
SLOW = ("whole", "times_frames", "8192", "inflates")
FAST = [name for name in bombs.BOMBS if not any(word in name for word in SLOW)]


@pytest.mark.parametrize("name", FAST)
def test_bombs_are_refused(name, tmp_path):
    path = bombs.make(tmp_path, name)
    reason, seconds, _ = bombs.read(tmp_path, path.name, name)
    expected, _ = bombs.BOMBS[name]
    assert (reason is None) if expected is None else (expected in reason)
    assert seconds < 20


def read_all(path: Path) -> str:
    """The one reason that every way to read a clip gives."""
    reasons = set()
    for read in (
        lambda: media.probe(path, Kind.VIDEO),
        lambda: media.read_frames(path.read_bytes(), [0]),
        lambda: list(media.iterate_frames(path)),
    ):
        with pytest.raises(media.MediaError) as error:
            read()
        reasons.add(str(error.value))
    assert len(reasons) == 1
    return reasons.pop()


def test_frames_are_as_large_as_the_decoder_says_not_the_container(tmp_path, monkeypatch):
    path = make_video(tmp_path / "a.mp4", 3, (64, 80))
    data = bytearray(path.read_bytes())
    at = data.index(b"avc1", data.index(b"stsd")) + 28
    assert struct.unpack(">HH", data[at : at + 4]) == (80, 64)
    data[at : at + 4] = struct.pack(">HH", 16, 16)
    path.write_bytes(data)
    assert media.probe(path, Kind.VIDEO).width == 80
    monkeypatch.setattr(media, "MAX_CLIP_PIXELS", 64 * 80 - 1)
    assert "80x64" in read_all(path)


def test_frames_times_pixels_are_limited(tmp_path, monkeypatch):
    path = make_video(tmp_path / "a.mp4", 12, (34, 46))
    monkeypatch.setattr(media, "MAX_DECODED_PIXELS", 12 * 34 * 46)
    assert media.verify(path, Kind.VIDEO).frames == 12
    monkeypatch.setattr(media, "MAX_DECODED_PIXELS", 12 * 34 * 46 - 1)
    assert read_all(path).startswith("12 frames of 0.0 Mpix, more than")


def test_boxes_on_the_grid_are_limited(tmp_path, monkeypatch):
    make_video(tmp_path / "a.mp4", 12, (34, 46))
    line = {"id": 1, "media": "a.mp4", "kind": "video", "caption": "A."}
    line["instances"] = [
        {"id": i, "caption": "B.", "boxes": [[0, 1, 1, 9, 9]]} for i in range(3)
    ]  # fmt: skip
    sample = schema.parse_line(json.dumps(line).encode(), "a:1", 1)
    monkeypatch.setattr(shard, "_MAX_BOXES", 36)
    assert make_record(sample, str(tmp_path), Options(rate=None)).boxes.shape == (3, 12, 4)
    monkeypatch.setattr(shard, "_MAX_BOXES", 35)
    with pytest.raises(Reject, match="3 instances on 12 frames"):
        make_record(sample, str(tmp_path), Options(rate=None))


def test_texts_are_limited(tmp_path, monkeypatch):
    line = {"id": 1, "media": "a", "kind": "image", "caption": "x" * 20_000}
    info = media.MediaInfo(1, 0.0, 9, 9)
    assert not schema.check_sample(schema.parse_line(json.dumps(line).encode(), "", 1), info)
    line["caption"] += "x"
    faults = schema.check_sample(schema.parse_line(json.dumps(line).encode(), "", 1), info)
    assert faults == ["caption of 20001 characters, more than 20000"]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps(line)] * 2))
    monkeypatch.setattr(schema, "MAX_LINE_BYTES", len(json.dumps(line)) + 1)
    assert len(list(schema.read_annotations(path))) == 2
    monkeypatch.setattr(schema, "MAX_LINE_BYTES", len(json.dumps(line)) - 1)
    with pytest.raises(UserError, match=r"a\.jsonl:1: the line is longer"):
        list(schema.read_annotations(path))


def test_boxes_inflate_no_further_than_their_shape_says(monkeypatch):
    values, taken = zlib.compress(bytes(1 << 20)), []

    class Inflate:
        eof = False

        def __init__(self):
            self.real = real_inflate()

        def decompress(self, data, most):
            taken.append(self.real.decompress(data, most))
            return taken[-1]

    monkeypatch.setattr(records.zlib, "decompressobj", Inflate, raising=False)
    example = records.tf_example_pb2.Example()
    feature = example.features.feature
    feature["annotation"].bytes_list.value.append(b"{}")
    feature["boxes/value"].bytes_list.value.append(values)
    feature["boxes/shape"].int64_list.value.extend([1, 2, 4])
    with pytest.raises(ValueError):
        records.parse_example(example.SerializeToString())
    assert [len(piece) for piece in taken] == [33]
    feature["boxes/shape"].int64_list.value[0] = 1 << 24
    with pytest.raises(ValueError, match="boxes of shape"):
        records.parse_example(example.SerializeToString())


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=300), st.lists(st.integers(-(2**40), 2**40), max_size=4))
def test_boxes_inflate_to_what_their_shape_says_or_fail(values, shape):
    feature = records.tf_example_pb2.Example()
    boxes = feature.features.feature
    boxes["annotation"].bytes_list.value.append(b"{}")
    for name in ("boxes", "present"):
        boxes[f"{name}/value"].bytes_list.value.append(values)
        boxes[f"{name}/shape"].int64_list.value.extend(shape)
    with pytest.raises(Exception) as error:
        records.parse_example(feature.SerializeToString())
    assert not isinstance(error.value, MemoryError)


def _spin(seconds: int) -> None:
    exit_after(seconds)
    while True:
        np.zeros(9)


def test_a_worker_that_is_kept_too_long_is_ended():
    worker = multiprocessing.get_context("spawn").Process(target=_spin, args=(1,))
    worker.start()
    worker.join(timeout=60)
    assert worker.exitcode == -signal.SIGALRM


# --- the fuzzer itself ----------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def fuzzing(tmp_path_factory):
    before = signal.getsignal(signal.SIGALRM)
    argv = list(sys.argv)
    fuzz._enter(str(tmp_path_factory.mktemp("fuzz")))
    yield
    signal.signal(signal.SIGALRM, before)
    sys.argv[:] = argv


@pytest.mark.parametrize("name", fuzz_targets.SHARES)
def test_a_few_inputs_of_every_target(name):
    count = max(2, min(200, int(fuzz_targets.RATES[name] / 10)))
    assert fuzz._work((name, 0, count), 1, 20.0)[3] == []


def test_the_fuzzer_finds_and_shrinks(monkeypatch):
    def broken(raw, where, number):
        if b"fram\xff" in raw or raw.count(b"[") > 400:
            raise KeyError("planted")
        return real(raw, where, number)

    real = schema.parse_line
    monkeypatch.setattr(schema, "parse_line", broken)
    target = fuzz_targets.make("annotation")
    assert fuzz.outcome(target.run, target.seeds[0], 20.0) == ""
    where = fuzz.outcome(target.run, b"xx fram\xff yyyy", 20.0)
    assert where.startswith("KeyError")
    fails = lambda data: fuzz.outcome(target.run, data, 20.0) == where
    assert fuzz.shrink(b"x" * 500 + b"fram\xff" + b"y" * 300, fails) == b"fram\xff"
    monkeypatch.setattr(schema, "parse_line", lambda *_: signal.pause())
    assert fuzz.outcome(target.run, b"", 0.1).startswith("TooSlow")


def test_inputs_are_the_same_on_any_number_of_processes():
    target = fuzz_targets.make("boxes")
    drawn = [target.draw(fuzz.random.Random(f"0/boxes/{i}")) for i in (5, 6, 5)]
    assert drawn[0] == drawn[2] != drawn[1]


def test_nothing_of_the_package_unpickles_or_executes_what_it_reads():
    package = Path(media.__file__).parent.parent
    for path in (package / "data").rglob("*.py"):
        text = path.read_text()
        for word in ("import pickle", "pickle.load", "allow_pickle", "marshal", "eval(", "exec("):
            assert word not in text, f"{path.name}: {word}"
    assert os.path.isdir(package / "data")
