"""Contact sheets: what is drawn where, and that nothing is half-written."""

import json
from pathlib import Path

import numpy as np
import pytest
from media_files import make_image, make_video, truncate
from PIL import Image, ImageColor

from instap_jax.data import media, preview
from instap_jax.main import main
from instap_jax.types import Kind

COLOUR = [np.array(ImageColor.getrgb(colour)) for colour in preview._COLOURS]


def grey(count=3, size=(90, 160)):
    return [np.full((*size, 3), 128, np.uint8) for _ in range(count)]


def sheet_of(boxes, present, labels, captions, **more):
    boxes, present = np.array(boxes, np.float32), np.array(present)
    return np.array(
        preview.draw_sheet(grey(boxes.shape[1]), boxes, present, labels, captions, **more)
    ).astype(int)


def tiles(sheet):
    """The tiles of a sheet of `grey` frames without titles, heading or faults."""
    width, height = 320, 180
    starts = [preview._PADDING + k * (width + preview._GAP) for k in range(3)]
    return [sheet[preview._PADDING :][:height, x : x + width] for x in starts]


def is_colour(pixels, row):
    return np.abs(pixels - COLOUR[row]).max(-1) <= 12


def test_boxes_lie_where_the_fractions_say_and_absent_ones_are_not_drawn():
    boxes = [[[0.25, 0.25, 0.5, 0.75]] * 3, [[0.5, 0.5, 1, 1]] * 3]
    present = [[True, False, True], [True, True, False]]
    found = tiles(sheet_of(boxes, present, ["0", "1"], ["c", "a", "b"]))
    for column in range(3):
        for row in range(2):
            assert is_colour(found[column], row).any() == present[row][column]
    lines = is_colour(found[2], 0)  # box 0 alone: x 80-160, y 45-135
    rows, columns = np.flatnonzero(lines.any(1)), np.flatnonzero(lines.any(0))
    assert (columns.min(), columns.max()) == (80, 159)
    assert rows.max() == 134
    assert lines[60:130, 80].all()  # its left edge, from end to end
    assert lines[134, 80:160].all()
    assert not lines[60:130, 90:150].any()  # and nothing inside
    assert not lines[:28].any()  # the label hangs no higher than its own height


def test_a_box_that_fills_the_frame_keeps_its_label_inside():
    found = tiles(sheet_of([[[0, 0, 1, 1]] * 3], [[True] * 3], ["9"], ["c", "a"]))[1]
    lines = is_colour(found, 0)
    assert lines[:, 0].all()
    assert lines[-1].all()
    assert lines[:10, :10].mean() > 0.5  # the chip, under the top edge


def test_text_grows_the_sheet_and_is_wrapped_to_its_width():
    boxes, present = np.zeros((1, 1, 4)), np.zeros((1, 1), bool)
    short = preview.draw_sheet(grey(1), boxes, present, ["0"], ["a", "b"])
    more = {"titles": ["frame 0"], "heading": "clip", "faults": ["box outside"]}
    words = preview.draw_sheet(grey(1), boxes, present, ["0"], ["a " * 400, "b " * 400], **more)
    assert words.width == short.width
    assert words.height > short.height + 200
    endless = preview.draw_sheet(grey(1), boxes, present, ["x" * 99], ["字" * 5000, "ü" * 5000])
    assert endless.width == short.width
    edge = np.array(endless)[:, -preview._PADDING + 2 :]
    assert (edge == 255).all()  # no text runs out of the sheet
    assert endless.height < 1000  # captions of 5,000 characters are cut


@pytest.mark.parametrize(
    "text",
    ["", "\0\n\t\x1b[31m", "العربية", "🙂" * 50, "a\u202eb", "字 ü", "x" * 2_000_000],
    ids=range(7),
)
def test_any_text_can_be_drawn(text):
    boxes, present = np.zeros((1, 1, 4)), np.ones((1, 1), bool)
    preview.draw_sheet(grey(1), boxes, present, [text], [text, text], heading=text, faults=[text])


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (33, 47)])
def test_any_frame_size_can_be_drawn(size):
    boxes, present = np.array([[[0.1, 0.1, 0.9, 0.9]]]), np.ones((1, 1), bool)
    preview.draw_sheet(grey(1, size), boxes, present, ["0"], ["c", "d"])


@pytest.fixture
def annotated(tmp_path):
    """An annotation file of six samples of two splits, one of them unreadable, and its media."""
    root = tmp_path / "media"
    make_video(root / "v.mp4", 12, (68, 92))
    make_image(root / "i.jpg", (33, 47))
    truncate(make_video(root / "cut.mp4", 24), 0.9)
    boxes = [[0, 10, 10, 60, 50], [6, 30, 10, 80, 50]]
    one = {"id": 0, "category": "猫", "caption": "Die Katze läuft.", "boxes": boxes}
    video = {"media": "v.mp4", "kind": "video", "caption": "Ein Tag.", "instances": [one]}
    image = {"media": "i.jpg", "kind": "image", "caption": "Bild.", "split": "img-1k"}
    lines = [
        {"id": "a/ü 猫?", **video},
        {"id": "b", **image},
        {"id": "c", **video, "media": "cut.mp4"},
        {"id": "d", **image},
        {"id": "e", **video, "instances": [{**one, "boxes": [[0, 1, 1, 999, 9]]}]},
        {"id": "f", **video},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path, root


def run(annotated, out, *more):
    path, root = annotated
    return main(["preview", f"--annotations={path}", f"--media={root}", f"--out={out}", *more])


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_preview_writes_sheets_and_skips_what_cannot_be_read(annotated, tmp_path, capsys):
    out = tmp_path / "deep" / "sheets"
    assert run(annotated, out) == 0
    assert names(out) == [
        "000001-a_ü_猫_.png",
        "000002-b.png",
        "000004-d.png",
        "000005-e.png",
        "000006-f.png",
    ]
    assert names(out.parent) == ["sheets"]
    printed = capsys.readouterr()
    assert printed.out == f"5 previews in {out}\n"
    assert f"skipped {annotated[0]}:3 c cut.mp4: truncated: header says 24" in printed.err
    red = np.array(ImageColor.getrgb(preview._RED))
    for name, faulty in (("000005-e.png", True), ("000006-f.png", False)):
        with Image.open(out / name) as image:
            top = np.array(image.convert("RGB"))[:70]
        assert (np.abs(top - red).max(-1) <= 3).any() == faulty  # its fault is written on it


def test_preview_as_clips(annotated, tmp_path):
    out = tmp_path / "clips"
    out.mkdir()  # an empty directory may be given
    assert run(annotated, out, "--format=mp4") == 0
    assert names(out)[:2] == ["000001-a_ü_猫_.mp4", "000002-b.png"]
    assert "000003-c.mp4" not in names(out)  # half of a clip is none
    info = media.verify(out / "000006-f.mp4", Kind.VIDEO)
    assert (info.frames, info.fps) == (12, 8.0)
    assert info.height % 2 == info.width % 2 == 0


def test_a_clip_that_fails_half_way_leaves_no_file(annotated, tmp_path, monkeypatch, capsys):
    path, root = annotated
    make_video(root / "v.mp4", 70, (34, 46))  # more than the encoder holds back
    path.write_text("\n".join(path.read_text().splitlines()[-3:]), encoding="utf-8")
    whole = media.iterate_frames

    def damaged(path, short_side):
        for count, frame in enumerate(whole(path, short_side)):
            if count == 60:
                raise media.MediaError("damaged")
            yield frame

    monkeypatch.setattr(media, "iterate_frames", damaged)
    assert run(annotated, tmp_path / "clips", "--format=mp4") == 0
    assert names(tmp_path / "clips") == ["000001-d.png"]
    assert capsys.readouterr().err.count("damaged") == 2


def test_count_and_split(annotated, tmp_path, capsys):
    assert run(annotated, tmp_path / "one", "--count=1", "--split=img-1k") == 0
    assert len(names(tmp_path / "one")) == 1
    assert run(annotated, tmp_path / "two", "--split=img_1k") == 0
    assert names(tmp_path / "two") == ["000002-b.png", "000004-d.png"]
    assert run(annotated, tmp_path / "three", "--split=valid") == 2
    assert "no sample of split 'valid'; the file has img_1k, train" in capsys.readouterr().err
    assert not (tmp_path / "three").exists()


def test_existing_output_and_other_faults_leave_nothing(annotated, tmp_path, capsys):
    path, root = annotated
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    before = names(tmp_path)
    path.write_text(path.read_text().splitlines()[2] + "\n")  # only the truncated clip
    for arguments, message in (
        ((annotated, full), f"--out={full}: exists and is not an empty directory"),
        ((annotated, path), "exists and is not an empty directory"),
        ((annotated, path / "new"), "new: cannot be written: Not a directory"),
        ((annotated, Path("/proc/new")), "--out=/proc/new: cannot be written: No such file"),
        ((annotated, tmp_path / "new"), "none of the 1 samples chosen could be drawn"),
        (((path, tmp_path / "none"), tmp_path / "new"), "none is not a directory"),
        (((tmp_path / "none", root), tmp_path / "new"), "cannot be read: No such file"),
        ((annotated, tmp_path / "new", "--count=0"), "count"),
        ((annotated, tmp_path / "new", "--format=gif"), "format"),
    ):
        assert run(*arguments) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert names(tmp_path) == before
    assert names(full) == ["mine.txt"]
