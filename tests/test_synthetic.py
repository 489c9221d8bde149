"""The embedded set: captions against boxes, boxes against pixels, bytes against the seed."""

import collections
import hashlib
import json
import re
from pathlib import Path

import av
import embedded_reader as reader
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from instap_jax import main
from instap_jax.data import captions as subsampling
from instap_jax.data import validation
from instap_jax.data.schema import read_annotations, sample_to_json
from instap_jax.data.synthetic import backgrounds, generate, language, media, samples, scene
from instap_jax.data.synthetic.captions import Description
from instap_jax.data.synthetic.render import render
from instap_jax.data.synthetic.samples import Drawn, Format
from instap_jax.errors import UserError
from instap_jax.types import Kind, Sample

FORM = Format()
SMALL = Format(width=64, height=48, frames=8)
SIZE = (FORM.width, FORM.height)


def parts(videos=0, images=0, suite=0, val=0):
    return generate.suites(train_videos=videos, train_images=images, suite_size=suite, val_size=val)


@pytest.fixture(scope="module")
def lines() -> list[dict]:
    """Annotations of every suite, without media."""
    patch = pytest.MonkeyPatch()
    patch.setattr(media, "write_clip", lambda *args: None)
    patch.setattr(media, "write_still", lambda *args: None)
    drawn = generate._draw_all(Path("nowhere"), parts(120, 60, 30), FORM, 7, 1)
    found = [json.loads(json.dumps(sample_to_json(each.sample))) for each in drawn]
    patch.undo()
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("set") / "out"
    generate.generate(out, parts(6, 4, 2), FORM, seed=3, processes=1)
    return out


def measured(line: dict) -> reader.Measured:
    return reader.Measured(line, FORM.frames if line["kind"] == "video" else 1, SIZE)


# --- captions ------------------------------------------------------------------------------------


def test_instance_captions_are_true_and_identify(lines):
    kinds = collections.Counter()
    for line in lines:
        seen = measured(line)
        for i, instance in enumerate(line["instances"]):
            sentences = subsampling.split_sentences(instance["caption"])
            assert 2 <= len(sentences) <= 4, instance["caption"]
            claims = [reader.read(sentence) for sentence in sentences]
            kinds.update(claim.kind for claim in claims)
            assert len({claim.kind for claim in claims} & {"look"}) == 1
            for claim in claims:
                where = (line["id"], i, instance["caption"], claim)
                assert i in seen.matching(claim.subject, i), where
                if claim.other:
                    assert len(seen.matching(claim.other, i)) == 1, where
                assert seen.holds(claim, i, i) is not False, where
                if claim.kind in ("behind", "in_front"):
                    other = seen.matching(claim.other, i)[0]
                    assert seen.meet(i, other) and (other > i) == (claim.kind == "behind"), where
            for j in range(len(line["instances"])):
                told_apart = [seen.holds(claim, j, i) is not True for claim in claims]
                # Nothing stands in a relation to itself.
                told_apart += [
                    claim.other and j in seen.matching(claim.other, i) for claim in claims
                ]
                assert j == i or any(told_apart), (line["id"], i, j, instance["caption"])
    relations = {kind for _, *kind in reader.RELATIONS for kind in kind if kind}
    assert set(kinds) >= relations - {"away"} | {"look", "motion", "position", "inplace"}


def test_attributes_show_in_the_boxes(lines):
    for line in lines:
        seen = measured(line)
        for i, own in enumerate(seen.attributes):
            if line["kind"] == "image":
                motion = ("path", "direction", "speed", "inplace", "event")
                assert all(own[key] is None for key in motion)
                continue
            seen.motion_shown(i)
            absent = np.isnan(seen.boxes[i, :, 0])
            # One that enters or leaves is absent there; any other may be hidden at either end.
            assert absent[0] or own["event"] != "enters"
            assert absent[-1] or own["event"] != "leaves"
            if own["inplace"] == "pulse" and own["event"] == "none":
                sides = (seen.boxes[i, :, 2:] - seen.boxes[i, :, :2]).max(-1)
                assert np.nanmax(sides) > 1.2 * np.nanmin(sides)


def test_sizes_are_ordered_in_the_boxes(lines):
    extents = collections.defaultdict(list)
    for line in lines:
        seen = measured(line)
        for i, own in enumerate(seen.attributes):
            if own["inplace"] not in ("spin", "pulse"):
                sides = (seen.boxes[i, :, 2:] - seen.boxes[i, :, :2]).max(-1)
                extents[own["size"]].append(np.nanmax(sides) / seen.short)
    assert max(extents["small"]) < 0.225 and max(extents["medium"]) < 0.32
    assert np.percentile(extents["medium"], 5) > 0.22 and np.percentile(extents["large"], 10) > 0.32


def test_global_captions_name_everything_and_are_true(lines):
    for line in lines:
        seen = measured(line)
        summary, *details = subsampling.split_sentences(line["caption"])
        assert len(summary.split()) <= 24
        place = line["attributes"]["tone"] or {"bricks": "brick"}.get(
            line["attributes"]["background"], line["attributes"]["background"]
        )
        assert place in summary, line["caption"]
        names = re.sub(
            r"^On .* we see | on (a|an|green|pale|gray|dark|beige|slate|water)\b.*", "", summary
        )
        phrases = [p for p in re.split(r", | and ", names.rstrip(".")) if p]
        counts = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4, "five": 5}
        total, named = 0, set()
        for phrase in phrases:
            number = counts[phrase.split()[0].lower()]
            fits = seen.matching(phrase, None)
            assert len(fits) >= number, line["caption"]
            total, named = total + number, named | set(fits)
        assert total == len(named) == len(line["instances"]), line["caption"]
        if re.search(r"background|behind", details[-1].lower()) or details[-1].startswith(
            ("Everything", "The scene")
        ):
            assert place in details.pop()
        assert len(details) == len(line["instances"])
        for sentence in details:
            claim = reader.read(sentence)
            if claim.kind == "look":
                fits = seen.matching(sentence, None)
            else:
                fits = seen.matching(claim.subject, None)
                assert len(fits) == 1 or claim.subject.startswith("one "), sentence
            assert any(seen.holds(claim, i, i) is not False for i in fits), (line["id"], sentence)


def test_no_caption_occurs_twice_in_a_split(lines):
    texts = collections.defaultdict(list)
    for line in lines:
        texts[line["split"], "global"].append(line["caption"])
        texts[line["split"], "instance"] += [each["caption"] for each in line["instances"]]
    assert len(texts) == 8
    for found in texts.values():
        assert len(set(found)) == len(found) > 0


def test_language_is_grammatical_and_small(lines):
    words = set()
    for line in lines:
        for text in (line["caption"], *(each["caption"] for each in line["instances"])):
            words |= set(re.findall(r"[a-z]+", text.lower()))
            assert not re.search(
                r"\ba [aeiou]|\ba hour|\ban (?!hour)[^aeiou]|  | ,|\.\.|None", text, re.I
            )
            assert all(s[0].isupper() and s[-1] == "." for s in subsampling.split_sentences(text))
    assert len(words) < 230


def test_twins_and_contrasts(lines):
    """Looks repeat within scenes and across them, so that they do not name an instance."""
    videos = [line for line in lines if line["id"].startswith("train_video")]
    entities = [each["attributes"] for line in videos for each in line["instances"]]
    assert np.mean([bool(own["twins"]) for own in entities]) > 0.35
    motions = collections.defaultdict(set)
    for own in entities:
        look = tuple(own[key] for key in ("shape", "colour", "texture"))
        motions[look].add((own["path"], own["direction"], own["speed"], own["inplace"]))
    assert np.mean([len(found) > 1 for found in motions.values()]) > 0.4


def test_shifted_suite_shares_shapes_only(lines):
    def seen(zero: bool, key: str) -> set:
        chosen = [line for line in lines if (line["split"] == "img_zero_1k") == zero]
        if key == "background":
            return {line["attributes"][key] for line in chosen}
        return {each["attributes"][key] for line in chosen for each in line["instances"]}

    assert seen(True, "shape") == seen(False, "shape") == set(scene.SHAPES)
    assert not seen(True, "texture") & seen(False, "texture")
    assert not seen(True, "background") & seen(False, "background")


@given(st.sampled_from(scene.COLOURS + scene.SHAPES), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_articles_and_plurals(word, number):
    phrase = language.counted((None, None, "red", word), number)
    assert phrase.endswith(
        "es" if number > 1 and word.endswith("s") else word[-1] if number == 1 else "s"
    )
    article = language.with_article(f"a {word}").split()[0]
    assert article == ("an" if word in ("orange", "hourglass") else "a")


# --- pictures ------------------------------------------------------------------------------------


def one(shape, x, y, diameter, **changes) -> scene.Entity:
    steps = np.atleast_1d(np.asarray(x, float))
    centre = np.stack(np.broadcast_arrays(steps, y), -1).astype(float)
    state = {"angle": 0.0, "scale": 1.0, "opacity": 1.0} | changes
    state = {name: np.full(len(steps), value) for name, value in state.items()}
    look = scene.Look(shape, "red", "plain")
    return scene.Entity(look, "large", scene.Motion(), diameter, centre, **state)


def staged(*entities) -> scene.Scene:
    background = scene.Background("plain", "pale", 0)
    return scene.Scene(entities, background, (4 / 3, 1.0), len(entities[0].centre), False)


def test_boxes_are_tight_and_visible_only():
    """Against pixel centres inside the analytic shapes; a square passes before a disc."""
    x = np.linspace(-0.3, 1.1, 12)
    disc, square = one("circle", np.full(12, 0.5), 0.5, 0.3), one("square", x, 0.5, 0.4)
    result = render(staged(disc, square), 96, 128)
    v, u = (np.mgrid[0:96, 0:128] + 0.5) / 96
    inside_disc = np.hypot(u - 0.5, v - 0.5) < 0.15
    gaps = 0
    for t in range(12):
        inside_square = np.maximum(abs(u - x[t]), abs(v - 0.5)) < 0.18
        for k, mask in enumerate((inside_disc & ~inside_square, inside_square)):
            whole = np.pi * 14.4**2 if k == 0 else 34.56**2
            assert result.share[k, t] == pytest.approx(mask.sum() / whole, abs=0.04)
            if abs(mask.sum() / whole - 0.15) > 0.05:
                assert result.present[k, t] == (mask.sum() / whole > 0.15)
            if result.present[k, t]:
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                tight = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
                np.testing.assert_allclose(result.boxes[k, t], tight, atol=1)
        gaps += not result.present[0, t]
    assert gaps and result.present[0, 0] and result.present[0, -1]
    assert not result.present[1, 0]  # still outside
    assert result.covered[0, 1] > 0.9 and result.covered[1, 0] == 0


def test_annotated_boxes_give_back_every_frame():
    """Rows left out are those that interpolation gives back; what is hidden is named as absent."""
    x = np.concatenate([np.full(4, -0.4), np.linspace(-0.3, 1.1, 12), np.full(4, 1.1)])
    stage = staged(one("circle", np.full(20, 0.5), 0.5, 0.3), one("square", x, 0.5, 0.4))
    result = render(stage, 96, 128)
    description = Description(("A.",), ())
    for k in range(2):
        instance = samples._instance(stage, result, description, k)
        sample = Sample(
            id="a", media="a.mp4", kind=Kind.VIDEO, split="train", source="", captions=("A.",),
            unit_boxes=False, instances=(instance,), line=0,
        )  # fmt: skip
        again = reader.Measured(sample_to_json(sample), 20, (128, 96)).boxes[0]
        expected = np.where(result.present[k, :, None], result.boxes[k], np.nan)
        np.testing.assert_array_equal(again, expected)
        assert k or (len(instance.frames) < result.present[0].sum() and len(instance.absent) == 1)


def test_spin_shows_on_every_look_that_may_spin():
    rng = np.random.default_rng(0)
    for shape in scene.SHAPES:
        for texture in scene.TEXTURES + scene.SHIFTED_TEXTURES:
            look = scene.Look(shape, "red", texture)
            if not any(scene.draw_motion(rng, look).inplace == "spin" for _ in range(80)):
                assert shape in ("circle", "ring") and texture == "plain"
                continue
            entity = scene.Entity(
                look, "small", scene.Motion(), 0.18, np.full((2, 2), 0.5), np.array([0.0, 0.5]),
                np.ones(2), np.ones(2),
            )  # fmt: skip
            stage = staged(entity)
            a, b = render(stage, 64, 86).frames(stage, 64, 86).astype(int)
            assert (np.abs(a - b).max(-1) > 40).sum() >= 8, look


def test_every_colour_stands_out():
    for shifted in (False, True):
        for (kind, tone), colours in backgrounds.readable(shifted).items():
            assert len(colours) >= 8
            picture = backgrounds.paint(scene.Background(kind, tone, 1), 48, 64).reshape(-1, 3)
            for colour in colours:
                near = min(
                    backgrounds.contrast(backgrounds.rgb(colour, shifted), p) for p in picture[::9]
                )
                assert near > 100, (kind, tone, colour)


def test_entities_stay_within_the_sizes_promised(lines):
    for line in lines:
        for instance in line["instances"]:
            boxes = np.array(instance["boxes"])[:, 1:]
            assert boxes.min() >= 0 and np.all(boxes[:, 2:] <= SIZE)
            assert np.all(boxes[:, 2:] > boxes[:, :2])


# --- files ---------------------------------------------------------------------------------------


def test_media_are_h264_and_jpeg_that_move_inside_the_boxes(written):
    for line in map(json.loads, (written / "annotations.jsonl").open()):
        path = written / "media" / line["media"]
        if line["kind"] == "image":
            with Image.open(path) as still:
                assert (still.format, still.size) == ("JPEG", SIZE)
            continue
        data = path.read_bytes()
        assert 0 < data.find(b"moov") < data.find(b"mdat")
        with av.open(str(path)) as clip:
            stream = clip.streams.video[0]
            assert stream.codec_context.name == "h264" and stream.average_rate == FORM.fps
            assert stream.pix_fmt == "yuv420p"
            frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in clip.decode(stream)]
        assert np.shape(frames) == (FORM.frames, FORM.height, FORM.width, 3)
        boxes = measured(line).boxes
        for t in range(1, FORM.frames):
            moved = np.abs(frames[t] - frames[t - 1]).max(-1) > 60
            for x0, y0, x1, y1 in boxes[:, t - 1 : t + 1].reshape(-1, 4):
                if not np.isnan(x0):
                    moved[max(int(y0) - 3, 0) : int(y1) + 3, max(int(x0) - 3, 0) : int(x1) + 3] = (
                        False
                    )
            # At the edge an entity is coming in or leaving before it counts as present.
            inner = moved[12:-12, 12:-12]
            assert inner.mean() < 0.01, (line["id"], t, inner.sum())


def test_annotations_pass_the_project_s_own_checks(written):
    faults = []
    validation.validate(
        written / "annotations.jsonl", written / "media", faults.append, lambda *a: None
    )
    assert not faults
    splits = collections.Counter(s.split for s in read_annotations(written / "annotations.jsonl"))
    assert splits == {"train": 10, "img_1k": 2, "img_zero_1k": 2, "video_1k": 2}


def digests(root: Path) -> dict[str, str]:
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_bytes_depend_on_the_seed_alone(tmp_path):
    def made(name, seed, processes, *sizes):
        generate.generate(tmp_path / name, parts(*sizes), SMALL, seed=seed, processes=processes)
        return digests(tmp_path / name)

    alone, together = made("a", 5, 1, 10, 8), made("b", 5, 2, 10, 8)
    assert alone == together and len(alone) == 19
    other, larger = made("c", 6, 1, 3, 3), made("d", 5, 1, 3, 3)
    for path in set(larger) - {"annotations.jsonl"}:
        assert larger[path] == alone[path] != other[path]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "d"]


def test_a_repeated_caption_is_drawn_again_or_refused(tmp_path, monkeypatch):
    suite = parts(4)[0]
    plan = {0: "p", 1: "p", 2: "q", 3: "p"}

    def draw(root, suite, form, seed, index, first=0):
        key = plan[index] if first < 2 else f"new {index}"
        return Drawn(sample=index, attempt=first, keys=(key,))

    monkeypatch.setattr(generate, "draw_sample", draw)
    drawn = list(generate._draw_all(tmp_path, [suite], FORM, 0, 1))
    assert [each.keys[0] for each in drawn] == ["p", "new 1", "q", "new 3"]
    monkeypatch.undo()
    monkeypatch.setattr(samples, "_TRIES", 0)
    with pytest.raises(
        UserError, match=r"train_video: no new caption .* sample 1 of 4: ask for a small"
    ):
        generate.generate(tmp_path / "out", [suite], FORM, seed=0, processes=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--width=127"], "--width=127: H.264 (yuv420p) needs an even number of pixels"),
        (["--height=0"], "--height=0: expected 48 to 4096 pixels"),
        (["--width=480", "--height=64"], "one side is more than 2.5 times the other"),
        (["--frames=1"], "--frames=1: expected 8 to 1024"),
        (["--fps=0"], "--fps=0"),
        (["--train_videos=-3"], "--train_videos=-3: a number of samples is 0 or more"),
        (["--train_videos=0"], "nothing to render"),
        (["--seed=-1"], "--seed=-1"),
        (["--processes=0"], "--processes=0"),
        (["--out=taken"], "--out=taken: exists and is not an empty directory"),
        (["--out=taken/file"], "--out=taken/file: exists"),
        (["--out=taken/file/below"], "--out=taken/file/below: cannot be written"),
    ],
)
def test_a_wrong_flag_is_one_line_and_no_file(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    Path("taken/file").write_text("mine")
    sizes = ["--train_videos=1", "--train_images=0", "--suite_size=0", "--val_size=0"]
    assert main.main(["synth", "--out=new", *sizes, *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("instap synth: ") and message in error
    assert sorted(str(path) for path in Path(".").rglob("*")) == ["taken", "taken/file"]


def test_command_fills_an_empty_directory(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    flags = ["--train_videos=1", "--train_images=1", "--suite_size=0", "--val_size=0"]
    flags += ["--width=64", "--height=48", "--frames=8", "--processes=1"]
    assert main.main(["synth", f"--out={tmp_path / 'out'}", *flags]) == 0
    assert "train        video  1" in capsys.readouterr().out
    assert sorted(digests(tmp_path / "out")) == [
        "annotations.jsonl",
        "media/images/train_image-000000.jpg",
        "media/videos/train_video-000000.mp4",
    ]
