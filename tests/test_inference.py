"""`instap_jax.load` and `instap features`: eight devices, any T and size, files written."""

import json
import subprocess
import sys

import numpy as np
import pack_data
import pytest
import torch
from media_files import make_image, make_video
from tiny import tiny_config
from torch_export import make_pair, write_run, write_words

import instap_jax
from instap_jax import main
from instap_jax.data import media
from instap_jax.types import Kind

TEXTS = ["A red ball.", "", "rolls to the left of a blue box", "ball"]


@pytest.fixture(scope="module")
def pair():
    config = tiny_config("stage2")
    config.data.frames = 2
    config.align.vtm = config.align.inst_vtm = 1.0
    return make_pair(config)


@pytest.fixture(scope="module")
def run(pair, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    write_words(root, pair.config)
    return write_run(root / "run", pair.config, pair.params)


@pytest.fixture(scope="module")
def model(run):
    return instap_jax.load(run)


@pytest.fixture(scope="module")
def clips():
    """Clips of two kinds, mixed; boxes of 2, 0, 1 and 3 instances, two of them absent at times."""
    rng = np.random.default_rng(0)
    sizes = [(1, 20, 30), (2, 33, 21), (1, 18, 40), (2, 10, 60)]
    frames = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    boxes, present = [], []
    for count, clip in zip((2, 0, 1, 3), frames):
        low = rng.uniform(0, 0.5, (count, len(clip), 2))
        boxes.append(np.concatenate([low, low + 0.4], -1).astype(np.float32))
        present.append(np.ones((count, len(clip)), bool))
    present[3][1, 0] = present[3][2, 1] = False
    return frames, boxes, present


def close(ours, theirs):
    assert ours.dtype == np.float32 and ours.shape == tuple(theirs.shape)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4, rtol=0)


def test_everything_as_the_export_computes_it(pair, model, clips):
    frames, boxes, present = clips
    ids = torch.from_numpy(model._ids(TEXTS)).long()
    sentences = [TEXTS[:2], [], TEXTS[2:3], TEXTS[1:]]
    sentence_ids = [model._ids(part) for part in sentences]
    with torch.inference_mode():
        close(model.encode_text(TEXTS), pair.theirs.encode_text(ids))
        close(model.encode_video(frames), pair.theirs.encode_video(frames))
        close(model.match(frames, TEXTS), pair.theirs.match(frames, ids))
        expected = pair.theirs.encode_instances(frames, boxes, present)
        for ours, theirs in zip(
            model.encode_instances(frames, boxes, present), expected, strict=True
        ):
            close(ours, theirs)
        expected = pair.theirs.match_instances(frames, boxes, sentence_ids, present)
        found = model.match_instances(frames, boxes, sentences, present)
        for ours, theirs in zip(found, expected, strict=True):
            close(ours, theirs)


def test_batches_do_not_change_a_clip(pair, run, clips):
    frames, boxes, present = clips
    many, few = instap_jax.load(run), instap_jax.load(run, batch_size=8)
    frames, boxes, present = ([part[0], part[2]] * 5 for part in (frames, boxes, present))
    a, b = (m.encode_instances(frames, boxes, present) for m in (many, few))
    for first, second, again in zip(a, b, a[2:]):
        np.testing.assert_allclose(first, second, atol=1e-6)
        assert first.shape == again.shape or first.shape[0] != again.shape[0]
    np.testing.assert_allclose(a[0], a[8], atol=1e-6)


def test_an_array_is_as_good_as_a_list(model, clips):
    frames, _, _ = clips
    stacked = np.stack([frames[0], frames[0][:, ::-1]])
    np.testing.assert_array_equal(model.encode_video(stacked), model.encode_video(list(stacked)))
    assert model.encode_video([]).shape == model.encode_text([]).shape == (0, 16)
    assert model.match([], []).shape == (0,)


def test_wrong_inputs_are_named(model, clips):
    frames, boxes, present = clips
    nowhere = [np.zeros_like(here) for here in present]
    cases = [
        ("uint8", lambda: model.encode_video([frames[0] / 255])),
        ("uint8", lambda: model.encode_video(frames[0])),  # one clip instead of many
        ("pixels", lambda: model.encode_instances(frames, [b * 30 + 5 for b in boxes])),
        ("finite", lambda: model.encode_instances(frames, [b * np.nan for b in boxes])),
        ("must be", lambda: model.encode_instances(frames, boxes[::-1])),
        ("must be", lambda: model.encode_instances(frames, boxes, present[::-1])),
        ("shorter", lambda: model.encode_instances(frames, boxes[:3])),
        ("not one", lambda: model.encode_text("A red ball.")),
        ("at least one frame", lambda: model.encode_instances(frames, boxes, nowhere)),
        ("shorter", lambda: model.match(frames, TEXTS[:2])),
        ("2 instances and 4 texts", lambda: model.match_instances(frames, boxes, [TEXTS] * 4)),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match=words):
            call()


def test_a_head_that_was_not_trained_is_not_used(pair, clips, tmp_path):
    config = pair.config.copy_and_resolve_references()
    config.align.vtm = config.align.inst_vtm = 0.0
    model = instap_jax.load(write_run(tmp_path / "run", config, pair.params))
    frames, boxes, present = clips
    with pytest.raises(ValueError, match=r"config\.align\.vtm counts nothing"):
        model.match(frames, TEXTS)
    with pytest.raises(ValueError, match=r"config\.align\.inst_vtm counts nothing"):
        model.match_instances(frames, boxes, [["a"] * len(b) for b in boxes], present)


def test_load_refuses(run, tmp_path):
    with pytest.raises(instap_jax.errors.UserError, match=r"config\.json"):
        instap_jax.load(tmp_path)
    with pytest.raises(ValueError, match="float32, bfloat16"):
        instap_jax.load(run, dtype="float16")
    assert instap_jax.load(run, dtype="bfloat16").encode_text(TEXTS[:1]).dtype == np.float32


def test_package_stays_light():
    code = "import sys, instap_jax; assert not {'jax', 'numpy', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = instap_jax.laod


def features(*args: str) -> int:
    return main.main(["features", *args, "--short_side=32", "--threads=2", "--batch_size=8"])


def read(out):
    arrays = np.load(out / "features.npz")
    lines = [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]
    faults = [json.loads(line) for line in (out / "faults.jsonl").read_text().splitlines()]
    return arrays, lines, faults


def test_a_link_that_leads_out_is_found_before_anything_is_embedded(run, tmp_path, monkeypatch):
    root = pack_data.make_media(tmp_path / "media")
    (root / "zz.jpg").symlink_to("/etc/passwd")
    monkeypatch.setattr(instap_jax.inference, "load", lambda *_, **__: pytest.fail("loaded"))
    assert features(f"--workdir={run}", f"--media={root}", f"--out={tmp_path}/out") == 2


def test_features_of_an_annotation_file(run, model, tmp_path, capsys):
    root = pack_data.make_media(tmp_path / "media")
    late = {"id": "late", "caption": "Late.", "boxes": [[10, 4, 4, 30, 30], [11, 4, 4, 30, 30]]}
    clip_line = pack_data.video_line("b")
    clip_line["instances"].append(late)
    lines = [
        pack_data.image_line("a"),
        pack_data.video_line("gone", media="gone.mp4"),
        clip_line,
        pack_data.image_line("c", instances=[]),
    ]
    file = pack_data.annotations(tmp_path / "a.jsonl", lines)
    out = tmp_path / "out"
    args = (f"--workdir={run}", f"--annotations={file}", f"--media={root}", f"--out={out}")
    assert features(*args) == 0
    printed = capsys.readouterr()
    assert "3 samples, 4 instances; 1 could not be read" in printed.out
    assert "gone.mp4: no such file" in printed.err
    arrays, index, faults = read(out)
    counts = {"video": 3, "text": 3, "instance": 4, "instance_text": 4}
    assert {k: a.shape for k, a in arrays.items()} == {k: (n, 16) for k, n in counts.items()}
    assert [(i["row"], i["id"], i["frames"]) for i in index] == [
        (0, "a", [0]), (1, "b", [3, 9]), (2, "c", [0]),
    ]  # fmt: skip
    assert [[(k["row"], k["id"]) for k in line["instances"]] for line in index] == [
        [(0, "0")], [(1, "0"), (2, "b"), (3, "late")], [],
    ]  # fmt: skip
    assert faults == [{"id": "gone", "media": "gone.mp4", "line": 2, "reason": "no such file"}]
    about = json.loads((out / "about.json").read_text())
    assert about["step"] == 0 and about["frames"] == 2 and about["faults"] == 1
    still = media.read_image(root / "still.jpg", 32)[None]
    clip = np.stack(media.read_frames(root / "clip.mp4", [3, 9], 32))
    np.testing.assert_allclose(arrays["video"], model.encode_video([still, clip, still]), atol=1e-5)
    sentences = model.encode_text(["Sky.", "A cat. It runs.", "One. Two.", "Late."])
    np.testing.assert_allclose(arrays["instance_text"], sentences, atol=1e-5)
    # Of the chosen frames only the first shows the cat (2 to 6), and none what comes at 10: that
    # counts as present in the nearer one.
    cat = [[4.6 + 9.2 / 4, 3.4 + 6.8 / 4, 23 + 9.2 / 4, 17 + 17 / 4]] * 2
    boxes = np.array([cat, [[4, 4, 30, 30]] * 2]) / [46, 34, 46, 34]
    (seen,) = model.encode_instances([clip], [boxes], [np.array([[True, False], [False, True]])])
    np.testing.assert_allclose(arrays["instance"][[1, 3]], seen, atol=1e-4)


def test_features_of_a_folder(run, model, tmp_path, capsys):
    make_image(tmp_path / "media" / "deep" / "b.JPG")
    make_video(tmp_path / "media" / "a.mp4")
    (tmp_path / "media" / "notes.txt").write_text("no picture")
    out = tmp_path / "out"
    args = [f"--workdir={run}", f"--media={tmp_path}/media"]
    assert features(*args, f"--out={out}", "--frames=3") == 0
    arrays, index, faults = read(out)
    assert set(arrays) == {"video"} and not faults
    assert [(i["media"], i["kind"], i["frames"]) for i in index] == [
        ("a.mp4", str(Kind.VIDEO), [2, 6, 10]),
        ("deep/b.JPG", str(Kind.IMAGE), [0]),
    ]
    capsys.readouterr()
    for more, words in {
        (f"--out={out}",): "exists and is not an empty directory",
        (f"--out={tmp_path}/x", "--split=train"): "give --annotations",
        (f"--out={tmp_path}/x", f"--media={tmp_path}/media/deep/x"): "no such directory",
    }.items():
        assert features(*args, *more) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.jpg").write_bytes(b"no picture")
    assert features(args[0], f"--media={tmp_path}/bad", f"--out={tmp_path}/x") == 2
    assert "none of 1 samples can be read; x.jpg: not an image" in capsys.readouterr().err
    assert not list(tmp_path.glob("*x*")) and not list(tmp_path.glob(".*"))
