"""The annotation schema: what parses, what a file may not be, what a sample may not be."""

import copy
import json
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import make_image, make_video, truncate

from instap_jax.data import schema
from instap_jax.data.captions import blank
from instap_jax.data.media import MediaInfo
from instap_jax.errors import UserError
from instap_jax.main import main
from instap_jax.types import Instance, Kind, Sample

INFO = MediaInfo(10, 8.0, 100, 200)  # frames, fps, height, width

LINE = {
    "id": "clip-0001", "media": "videos/clip-0001.mp4", "kind": "video", "split": "img-1k",
    "source": "hdvila", "caption": "Global caption. Several sentences.",
    "box_format": "xyxy_pixels", "licence": {"by": "us"},
    "instances": [
        {"id": 0, "category": "person", "caption": ["First sentence.", "Zweite – 猫."],
         "boxes": [[0, 12.0, 30.5, 80.0, 90.0], [5, 14.0, 30.0, 82.0, 91.0]],
         "absent": [[2, 3]], "score": 0.5}
    ],
}  # fmt: skip


def parse(value, **changes):
    raw = value if isinstance(value, bytes) else json.dumps({**value, **changes}).encode()
    return schema.parse_line(raw, "a.jsonl:3", 3)


def with_instance(**changes):
    return {**LINE, "instances": [{**LINE["instances"][0], **changes}]}


def equal(one, other):
    """Samples hold arrays, which dataclass equality cannot compare."""
    return repr(one) == repr(other) and all(
        np.array_equal(a.frames, b.frames) and np.array_equal(a.boxes, b.boxes, equal_nan=True)
        for a, b in zip(one.instances, other.instances, strict=True)
    )


def test_a_line_as_documented():
    sample = parse(LINE)
    assert (sample.id, sample.media, sample.kind) == (LINE["id"], LINE["media"], Kind.VIDEO)
    assert (sample.split, sample.source, sample.line) == ("img_1k", "hdvila", 3)
    assert sample.captions == ("Global caption. Several sentences.",)
    assert sample.extra == {"licence": {"by": "us"}}
    assert not sample.unit_boxes
    (instance,) = sample.instances
    assert (instance.id, instance.category) == ("0", "person")
    assert instance.captions == ("First sentence.", "Zweite – 猫.")
    assert instance.frames.dtype == np.int32
    assert instance.frames.tolist() == [0, 5]
    assert instance.boxes.dtype == np.float32
    assert instance.boxes.tolist() == [[12, 30.5, 80, 90], [14, 30, 82, 91]]
    assert instance.absent == ((2, 3),)
    assert instance.extra == {"score": 0.5}
    assert schema.check_sample(sample, INFO) == []


def test_defaults_and_formats():
    sample = parse({"id": 7, "media": "a.jpg", "kind": "image", "caption": ["a", " ", "b"]})
    assert (sample.id, sample.split, sample.source, sample.instances) == ("7", "train", "", ())
    assert sample.captions == ("a", "b")  # the blank one says nothing
    for missing in ({"caption": None}, {"instances": None}):
        parse(LINE, **missing)
    boxes = {"boxes": [[0, 10, 20, 30, 40]]}
    wide = parse(with_instance(**boxes), box_format="xywh_pixels").instances[0].boxes
    assert wide.tolist() == [[10, 20, 40, 60]]
    assert parse(LINE, box_format="xyxy_unit").unit_boxes


captions = st.lists(st.text().filter(lambda text: not blank(text)), max_size=3).map(tuple)
extras = st.dictionaries(st.sampled_from(["x", "ü"]), st.none() | st.integers() | st.text())
numbers = st.floats(-1e6, 1e6, width=32)


@st.composite
def instances(draw):
    frames = sorted(draw(st.sets(st.integers(0, 500), max_size=4)))
    rows = st.lists(numbers, min_size=4, max_size=4)
    boxes = draw(st.lists(rows, min_size=len(frames), max_size=len(frames)))
    return Instance(
        id=draw(st.text(min_size=1).filter(str.strip)),
        category=draw(st.text()),
        captions=draw(captions),
        frames=np.array(frames, np.int32),
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        absent=tuple(draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=2))),
        extra=draw(extras),
    )


@st.composite
def samples(draw):
    return Sample(
        id=draw(st.text(min_size=1).filter(str.strip)),
        media=draw(st.from_regex(r"[a-z猫]{1,5}/[a-z ü]{1,5}\.mp4", fullmatch=True)),
        kind=draw(st.sampled_from(Kind)),
        split=draw(st.from_regex(r"[a-z0-9_]{1,6}", fullmatch=True)),
        source=draw(st.text()),
        captions=draw(captions),
        unit_boxes=draw(st.booleans()),
        instances=tuple(draw(st.lists(instances(), max_size=3))),
        line=1,
        extra=draw(extras),
    )


@settings(max_examples=60, deadline=None)
@given(samples(), st.booleans())
def test_round_trip(sample, ascii_only):
    text = json.dumps(schema.sample_to_json(sample), ensure_ascii=ascii_only)
    assert equal(schema.parse_line(text.encode(), "f:1", 1), sample)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": ', "a.jsonl:3: not JSON: Expecting value at column 8"),
        (b"[1]", "a.jsonl:3: expected a JSON object, got [1]"),
        (b'{"id": "\xff"}', "a.jsonl:3: not UTF-8 text: invalid start byte"),
        (b"[" * 100_000, "a.jsonl:3: not JSON that can be read: maximum recursion depth"),
        (b'{"id": ' + b"9" * 5000 + b"}", "a.jsonl:3: not JSON that can be read: Exceeds"),
        ({**LINE, "id": None}, "a.jsonl:3: key 'id': missing or empty"),
        ({**LINE, "id": 1.5}, "key 'id': expected a string, got 1.5"),
        ({**LINE, "id": True}, "key 'id': expected a string, got true"),
        ({**LINE, "media": " "}, "key 'media': missing or empty"),
        ({**LINE, "media": "/etc/x.mp4"}, "key 'media': '/etc/x.mp4' is absolute"),
        ({**LINE, "media": "C:/x.mp4"}, "key 'media': 'C:/x.mp4' is absolute"),
        ({**LINE, "media": "a/../../x"}, "key 'media': 'a/../../x' leads out of the media root"),
        ({**LINE, "media": "a\0b"}, "key 'media': holds a NUL character"),
        ({**LINE, "kind": "gif"}, "key 'kind': \"gif\" is none of image, video"),
        ({**LINE, "kind": None}, "key 'kind': \"\" is none of image, video"),
        ({**LINE, "split": "Train!"}, "key 'split': 'Train!': use up to 64 lower-case letters"),
        ({**LINE, "split": "a" * 65}, "use up to 64 lower-case letters"),
        ({**LINE, "source": 3}, "key 'source': expected a string, got 3"),
        ({**LINE, "caption": 3}, "key 'caption': expected a string or a list of strings, got 3"),
        ({**LINE, "caption": ["a", 3]}, "key 'caption': expected a string or a list"),
        (
            {**LINE, "box_format": "xyxy"},
            "key 'box_format': \"xyxy\" is none of xyxy_pixels, xywh_pixels, xyxy_unit",
        ),
        ({**LINE, "instances": {}}, "key 'instances': expected a list, got {}"),
        ({**LINE, "instances": [3]}, "key 'instances[0]': expected an object, got 3"),
        (with_instance(id=""), "key 'instances[0].id': missing or empty"),
        (with_instance(category=[]), "key 'instances[0].category': expected a string, got []"),
        (with_instance(boxes=3), "key 'instances[0].boxes': expected a list, got 3"),
        (
            with_instance(boxes=[[0, 1, 2, 3, 4], [1, 2, 3, 4]]),
            "key 'instances[0].boxes[1]': expected [frame, four numbers], got [1, 2, 3, 4]",
        ),
        (with_instance(boxes=[[0, 1, 2, 3, "4"]]), "expected four numbers after the frame index"),
        (with_instance(boxes=[[0, 1, 2, 3, True]]), "expected four numbers after the frame"),
        (with_instance(boxes=[[0.5, 1, 2, 3, 4]]), "expected a frame index, got 0.5"),
        (with_instance(boxes=[[2**31, 1, 2, 3, 4]]), "frame index 2147483648 does not fit 32"),
        (with_instance(boxes=[[10**40, 1, 2, 3, 4]]), "frame index a very large integer does"),
        (with_instance(boxes=[[0, 1, 2, 3, 10**400]]), "a number is too large"),
        (with_instance(absent=[[1]]), "'instances[0].absent[0]': expected [first frame, last"),
        (with_instance(absent=[[1, "2"]]), "expected a frame index, got \"2\""),
    ],
)  # fmt: skip
def test_faults_of_the_file(line, message):
    with pytest.raises(UserError) as caught:
        parse(line)
    assert str(caught.value).startswith("a.jsonl:3: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def write(path, *lines):
    path.write_bytes(
        b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines)
    )
    return path


def test_read_is_lazy_and_counts_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", {**LINE, "id": "ü"}, b"  ", LINE, b"{")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte-order mark
    stream = schema.read_annotations(path)
    first, second = next(stream), next(stream)
    assert (first.id, first.line, second.line) == ("ü", 1, 3)
    with pytest.raises(UserError, match=r"a\.jsonl:4: not JSON"):
        next(stream)


def test_missing_and_empty_files(tmp_path):
    for path, message in (
        (tmp_path / "none.jsonl", "none.jsonl: cannot be read: No such file"),
        (tmp_path, "cannot be read: Is a directory"),
        (write(tmp_path / "empty.jsonl"), "empty annotation file"),
        (write(tmp_path / "blank.jsonl", b"\n \n"), "empty annotation file"),
    ):
        with pytest.raises(UserError, match=message):
            list(schema.read_annotations(path))


HOSTILE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
    | st.sampled_from(["xyxy_unit", "image", "../x", "\ud800", "\0", 10**30, -1, 1e300]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)  # fmt: skip


def paths(value, prefix=()):
    yield prefix
    children = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in children if isinstance(value, (dict, list)) else ():
        yield from (
            paths(child, (*prefix, key)) if isinstance(child, (dict, list)) else [(*prefix, key)]
        )


PATHS = [path for path in paths(LINE) if path]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PATHS), HOSTILE), min_size=1, max_size=3), st.data())
def test_mutated_lines_raise_nothing_but_user_errors(mutations, data):
    value = copy.deepcopy(LINE)
    for path, new in mutations:
        parent = value
        try:
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = new
        except (TypeError, LookupError):  # an earlier mutation replaced the parent
            continue
    raw = json.dumps(value).encode()
    cut = data.draw(st.sampled_from([len(raw)] * 4 + [len(raw) // 2]))
    try:
        sample = schema.parse_line(raw[:cut], "f:1", 1)
    except UserError as error:
        assert str(error).startswith("f:1: ")
        return
    faults = schema.check_sample(sample, INFO)
    assert all(isinstance(fault, str) for fault in faults)
    if not faults:
        boxes, _ = schema.boxes_on_grid(sample, np.arange(10, dtype=np.int32), INFO)
        assert ((boxes >= 0) & (boxes <= 1)).all()


def box(*rows, **changes):
    return with_instance(boxes=[list(row) for row in rows], absent=[], **changes)


@pytest.mark.parametrize(
    ("line", "faults"),
    [
        ({**LINE, "caption": " \n"}, ["empty caption"]),
        ({**LINE, "caption": []}, ["empty caption"]),
        ({**LINE, "caption": "wort " * 5000}, ["caption of 5000 words, more than 1000"]),
        ({**LINE, "caption": "wort " * 1000}, []),
        (with_instance(caption=None), ["instance '0': empty caption"]),
        ({**LINE, "kind": "image"}, ["kind is 'image' but the media file is a video"]),
        (
            {**LINE, "instances": LINE["instances"] + [{**LINE["instances"][0], "id": "0"}]},
            ["duplicate instance id '0'"],
        ),
        (box(), ["instance '0': no boxes"]),
        (box((3, 1, 1, 9, 9), (3, 1, 1, 9, 9)),
         ["instance '0': frame indices of the boxes do not increase"]),
        (box((3, 1, 1, 9, 9), (10, 1, 1, 9, 9)),
         ["instance '0': frame index 10 outside the clip of 10 frames"]),
        (box((-1, 1, 1, 9, 9)), ["instance '0': frame index -1 outside the clip of 10 frames"]),
        (box((0, 5, 5, 5, 9)),
         ["instance '0': box of zero area or with its corners swapped: "
          "x0 y0 x1 y1 = [5, 5, 5, 9] at frame 0 of a 200x100 frame"]),
        (box((0, 9, 9, 5, 5), (4, 9, 9, 5, 5)),
         ["instance '0': box of zero area or with its corners swapped: "
          "x0 y0 x1 y1 = [9, 9, 5, 5] at frame 0 of a 200x100 frame and 1 more"]),
        (box((0, 1, 1, 9, 9), (4, 1, float("nan"), 9, 9)),
         ["instance '0': box with a number that is not finite: "
          "x0 y0 x1 y1 = [1, nan, 9, 9] at frame 4 of a 200x100 frame"]),
        (box((0, 1, 1, 1e300, 9)),
         ["instance '0': box with a number that is not finite: "
          "x0 y0 x1 y1 = [1, 1, inf, 9] at frame 0 of a 200x100 frame"]),
        (box((0, -2, -1, 202, 101)), []),  # 1 % of 200 and of 100: rounding
        (box((0, -2.1, 1, 9, 9)),
         ["instance '0': box outside the frame: "
          "x0 y0 x1 y1 = [-2.1, 1, 9, 9] at frame 0 of a 200x100 frame"]),
        (box((0, 1, 1, 9, 101.1)),
         ["instance '0': box outside the frame: "
          "x0 y0 x1 y1 = [1, 1, 9, 101.1] at frame 0 of a 200x100 frame"]),
        (box((0, -2, 1, -1, 9)),  # nothing is left of it when clipped
         ["instance '0': box outside the frame: "
          "x0 y0 x1 y1 = [-2, 1, -1, 9] at frame 0 of a 200x100 frame"]),
        ({**box((0, 0.1, 0.1, 1.02, 0.5)), "box_format": "xyxy_unit"},
         ["instance '0': box outside the frame: "
          "x0 y0 x1 y1 = [0.1, 0.1, 1.02, 0.5] at frame 0 of a unit frame"]),
        (with_instance(absent=[[3, 2]]),
         ["instance '0': absent interval [3, 2] is reversed or outside the clip of 10 frames"]),
        (with_instance(absent=[[3, 10]]),
         ["instance '0': absent interval [3, 10] is reversed or outside the clip of 10 frames"]),
        (with_instance(absent=[[0, 2], [3, 6]]), ["instance '0': absent in all of its frames"]),
    ],
)  # fmt: skip
def test_faults_of_one_sample(line, faults):
    assert schema.check_sample(parse(line), INFO) == faults


def test_video_where_an_image_is_and_boxes_beyond_its_one_frame():
    assert schema.check_sample(parse(LINE), MediaInfo(1, 0.0, 100, 200)) == [
        "kind is 'video' but the media file is an image",
        "instance '0': frame index 5 outside the clip of 1 frames",
        "instance '0': absent interval [2, 3] is reversed or outside the clip of 1 frames",
    ]


def test_duplicate_sample_ids():
    unique = schema.UniqueIds()
    first, second = parse(LINE), schema.parse_line(json.dumps(LINE).encode(), "f:9", 9)
    assert unique.check(first) is None
    assert unique.check(second) == "duplicate id, first used on line 3"


def reference_grid(instance, index, side):
    """One frame at a time, in plain Python: the words of the docstring."""
    frames = instance.frames.tolist()
    first, last = frames[0], frames[-1]
    gone = {f for a, b in instance.absent for f in range(a, b + 1)}
    here = [f for f in range(first, last + 1) if f not in gone]
    boxes, present = [], []
    for wanted in index.tolist():
        nearest = min(here, key=lambda f: (abs(f - wanted), f))  # of two as near, the earlier
        left = max(f for f in frames if f <= nearest)
        right = min(f for f in frames if f >= nearest)
        weight = (nearest - left) / (right - left) if right > left else 0.0
        a, b = (instance.boxes[frames.index(f)].astype(float) for f in (left, right))
        boxes.append(np.clip((a + weight * (b - a)) / side, 0, 1))
        present.append(wanted in here)
    if here and not any(present):  # seen between two frames of the grid: at the nearest of them
        away = [min(abs(f - wanted) for f in here) for wanted in index.tolist()]
        present = [row == int(np.argmin(away)) for row in range(len(away))] if away else []
    return np.array(boxes), np.array(present, bool)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_boxes_on_grid_against_plain_python(data):
    frames = sorted(data.draw(st.sets(st.integers(0, 19), min_size=1, max_size=4)))
    corners = st.lists(st.floats(-5, 205, width=32), min_size=4, max_size=4)
    boxes = data.draw(st.lists(corners, min_size=len(frames), max_size=len(frames)))
    ends = st.tuples(st.integers(0, 19), st.integers(0, 19)).map(sorted)
    absent = data.draw(st.lists(ends, max_size=3))
    if set(range(frames[0], frames[-1] + 1)) <= {f for a, b in absent for f in range(a, b + 1)}:
        return  # check_sample rejects it
    line = with_instance(boxes=[[f, *b] for f, b in zip(frames, boxes)], absent=absent)
    unit = data.draw(st.booleans())
    sample = parse(line, box_format="xyxy_unit" if unit else "xyxy_pixels")
    index = np.array(sorted(data.draw(st.lists(st.integers(0, 19), max_size=6))), np.int32)
    found, present = schema.boxes_on_grid(sample, index, MediaInfo(20, 8.0, 100, 200))
    assert (found.dtype, present.dtype) == (np.float32, np.bool_)
    assert (found.shape, present.shape) == ((1, len(index), 4), (1, len(index)))
    side = np.array([1, 1, 1, 1] if unit else [200, 100, 200, 100])
    expected, expected_present = reference_grid(sample.instances[0], index, side)
    np.testing.assert_array_equal(present[0], expected_present)
    np.testing.assert_allclose(found[0], expected.reshape(-1, 4), atol=1e-5)


@pytest.mark.parametrize(
    ("absent", "wanted", "nearest"),
    [
        ([[4, 6]], 5, 3),  # 3 and 7 are as near: the earlier
        ([[4, 5]], 5, 6),
        ([[5, 9]], 8, 4),  # nothing after the gap
        ([[0, 6]], 1, 7),  # nothing before it
        ([[4, 4], [5, 5], [6, 8]], 5, 3),  # gaps that touch are one
    ],
)
def test_the_held_box_is_the_nearest_one(absent, wanted, nearest):
    rows = [[frame, frame, 0, frame + 10, 50] for frame in (0, 9)]
    sample = parse(with_instance(boxes=rows, absent=absent))
    grid = np.array([wanted, nearest], np.int32)
    boxes, present = schema.boxes_on_grid(sample, grid, INFO)
    assert present.tolist() == [[False, True]]
    np.testing.assert_allclose(boxes[0, 0, 0], nearest / 200, rtol=1e-6)


def test_grid_of_no_instances_and_of_faulty_ones():
    sample = parse(LINE, instances=[])
    boxes, present = schema.boxes_on_grid(sample, np.arange(3, dtype=np.int32), INFO)
    assert (boxes.shape, present.shape) == ((0, 3, 4), (0, 3))
    with pytest.raises(schema.SampleFault) as caught:
        schema.boxes_on_grid(parse(box()), np.arange(3, dtype=np.int32), INFO)
    assert caught.value.reason == "instance '0': frames are missing or do not increase"


@pytest.mark.parametrize(
    ("seen", "absent", "place"),
    [
        ([6], [], 1),  # of 0, 7, 14: the nearest
        ([1, 2], [], 0),
        ([16], [], 2),  # after the last one
        ([5, 9], [[7, 7]], 1),  # 6 and 8 are one frame away, the key frames two
    ],
)
def test_an_instance_seen_between_two_frames_of_the_grid_is_not_lost(seen, absent, place):
    rows = [[frame, 10 * frame, 0, 200, 100] for frame in seen]
    sample = parse(with_instance(boxes=rows, absent=absent))
    boxes, present = schema.boxes_on_grid(sample, np.array([0, 7, 14], np.int32), INFO)
    assert present.tolist() == [[row == place for row in range(3)]]
    nearest = 6 if absent else min(seen, key=lambda f: abs(f - 7 * place))
    np.testing.assert_allclose(boxes[0, place, 0], 10 * nearest / 200, rtol=1e-6)


def test_half_a_surrogate_pair_is_no_reason_to_stop():
    sample = parse(b'{"id": "a", "media": "a.jpg", "kind": "image", "caption": "A dog \\ud83d"}')
    assert sample.captions == ("A dog \ufffd",)
    whole = parse(b'{"id": "a", "media": "a.jpg", "kind": "image", "caption": "\\ud83d\\udc36"}')
    assert whole.captions == ("\U0001f436",)


@pytest.mark.parametrize("text", ["\u200b", " \u200b\n", "\ufeff", "\x08"])
def test_a_text_without_a_visible_character_is_none(text):
    assert parse(LINE, caption=["a", text]).captions == ("a",)
    assert schema.check_sample(parse(LINE, caption=text), INFO) == ["empty caption"]


def test_a_video_box_on_one_frame_is_present_there_only():
    sample = parse(box((4, 20, 10, 100, 50)))
    boxes, present = schema.boxes_on_grid(sample, np.array([3, 4, 5], np.int32), INFO)
    assert present.tolist() == [[False, True, False]]
    np.testing.assert_allclose(boxes[0], [[0.1, 0.1, 0.5, 0.5]] * 3)


# --- the command ---------------------------------------------------------------------------------


def media_root(tmp_path):
    make_video(tmp_path / "m" / "v.mp4", 10, (100, 200))
    make_image(tmp_path / "m" / "i.jpg", (33, 47))
    truncate(make_video(tmp_path / "m" / "cut.mp4", 24), 0.9)
    truncate(make_image(tmp_path / "m" / "cut.jpg"))
    make_video(tmp_path / "m" / "one.mp4", 1)
    return tmp_path / "m"


def image(key, media="i.jpg", **more):
    return {"id": key, "media": media, "kind": "image", "caption": "Ein Bild.", **more}


def validate(capsys, annotations, root, *more):
    code = main(["validate", f"--annotations={annotations}", f"--media={root}", *more])
    printed = capsys.readouterr()
    return code, printed.out.splitlines(), printed.err.strip().splitlines()[-1]


def test_validate_a_good_file(tmp_path, capsys):
    root = media_root(tmp_path)
    lines = [
        image("a"),
        image("b"),
        {**LINE, "media": "v.mp4"},
        {"id": "one", "media": "one.mp4", "kind": "video", "caption": "x", "split": "img-1k"},
    ]
    code, out, _ = validate(capsys, write(tmp_path / "a.jsonl", *lines), root)  # fmt: skip
    assert code == 0
    assert [" ".join(line.split()) for line in out] == [
        "split kind samples faulty instances per sample sentences boxes frames",
        "img_1k video 2 0 1 0.50 5 2 1-10",
        "train image 2 0 0 0.00 2 0 1",
        "faults: 0",
    ]


def test_validate_prints_one_line_per_fault(tmp_path, capsys):
    root = media_root(tmp_path)
    path = write(
        tmp_path / "a.jsonl",
        image("a"),
        image("missing", "none.jpg"),
        image("a"),
        image("cut", "cut.jpg"),
        {"id": "clip", "media": "cut.mp4", "kind": "video", "caption": "x"},
        image("words", caption="w " * 5000),
        image("wrong", "v.mp4"),
    )
    code, out, _ = validate(capsys, path, root)
    assert code == 2
    assert out[:3] == [
        f"{path}:2 missing none.jpg: no such file",
        f"{path}:3 a duplicate id, first used on line 1",
        f"{path}:4 cut cut.jpg: truncated: image file is truncated (18 bytes not processed)",
    ]
    assert out[3].startswith(f"{path}:5 clip cut.mp4: truncated: header says 24 frames, ")
    assert out[4] == f"{path}:6 words caption of 5000 words, more than 1000"
    assert out[5] == f"{path}:7 wrong v.mp4: not an image (or its header is damaged)"
    assert out[-1] == "faults: 6"
    _, out, _ = validate(capsys, path, root, "--max_faults=2")
    assert out[2] == "... and 4 more faults (--max_faults shows more)"


def test_validate_over_processes_gives_the_same(tmp_path, capsys):
    root = media_root(tmp_path)
    lines = [image(f"i{k}", "i.jpg" if k % 9 else "cut.jpg") for k in range(80)]
    code, out, _ = validate(capsys, write(tmp_path / "a.jsonl", *lines), root)
    assert code == 2
    assert [line.split()[1] for line in out[:9]] == [f"i{k}" for k in range(0, 80, 9)]
    assert " ".join(out[-2].split()) == "train image 80 9 0 0.00 80 0 1"
    lines[70] = image("away", "link/x.jpg")
    (root / "link").symlink_to(tmp_path.parent)
    code, _, error = validate(capsys, write(tmp_path / "a.jsonl", *lines), root)
    assert code == 2
    assert error.endswith(f"a.jsonl:71: media path 'link/x.jpg' leads out of the media root {root}")


def test_a_line_is_never_read_whole_if_it_is_too_long(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(schema, "MAX_LINE_BYTES", 1 << 20)
    path = write(tmp_path / "a.jsonl", image("a"), b"")
    with path.open("ab") as file:
        file.truncate(400 << 20)  # one endless line, without the disk space
    limit = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (200 << 20), limit[1]))
    try:
        code, _, error = validate(capsys, path, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    assert code == 2 and "a.jsonl:2: the line is longer than 1 MiB" in error


def test_validate_refuses_a_faulty_file_or_root(tmp_path, capsys):
    root = media_root(tmp_path)
    for path, media, message in (
        (write(tmp_path / "a.jsonl", image("a"), b"{]"), root, "a.jsonl:2: not JSON: Expecting"),
        (write(tmp_path / "e.jsonl"), root, "e.jsonl: empty annotation file"),
        (tmp_path / "none.jsonl", root, "none.jsonl: cannot be read: No such file"),
        (write(tmp_path / "b.jsonl", image("a")), tmp_path / "none", "none is not a directory"),
        (write(tmp_path / "c.jsonl", image("a", "../i.jpg")), root, "leads out of the media root"),
    ):
        code, _, error = validate(capsys, path, media)
        assert code == 2
        assert error.startswith("instap validate: ")
        assert message in error
