"""Each converter against a tiny hand-made input and the exact lines it must become."""

import json

import pytest
from media_files import make_image

from instap_jax.data import converters, schema
from instap_jax.data.converters.reading import Request, categories_caption, category_caption
from instap_jax.errors import UserError
from instap_jax.main import main


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def run(name, tmp_path, source, **more):
    """Converts and returns the parsed lines and what was left out."""
    request = Request(input=source, **more)
    out = tmp_path / "out.jsonl"
    converters.convert_file(name, request, out, lambda: None)
    assert list(schema.read_annotations(out))  # it is a valid annotation file
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return lines, dict(request.left_out)


def sample(key, media, kind, source, caption, instances, split="train"):
    return {
        "id": key, "media": media, "kind": kind, "split": split, "source": source,
        "caption": caption, "box_format": "xyxy_pixels", "instances": instances,
    }  # fmt: skip


def instance(key, category, caption, boxes, absent=None):
    value = {"id": key, "category": category, "caption": caption, "boxes": boxes}
    return value | ({"absent": absent} if absent else {})


COCO = {
    "images": [
        {"id": 7, "file_name": "train2017/000007.jpg", "width": 100, "height": 80},
        {"id": 8, "file_name": "train2017/000008.jpg", "width": 50, "height": 50},
        {"id": 9, "file_name": "train2017/000009.jpg", "width": 50, "height": 50},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 3, "bbox": [10.5, 20, 30, 40], "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 4, "bbox": [90, 70, 30, 30], "iscrowd": 0},
        {"id": 3, "image_id": 7, "category_id": 4, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        {"id": 4, "image_id": 7, "category_id": 4, "bbox": [3, 3, 0, 5], "iscrowd": 0},
        {"id": 5, "image_id": 8, "category_id": 4, "bbox": [1, 2, 3, 4]},
    ],
    "categories": [{"id": 3, "name": "dog"}, {"id": 4, "name": "apple"}],
}


def test_coco(tmp_path):
    captions = {
        "annotations": [
            {"id": 1, "image_id": 7, "caption": "A dog\nby an apple. "},
            {"id": 2, "image_id": 7, "caption": "Ein Hund – groß."},
        ]
    }
    lines, left_out = run(
        "coco",
        tmp_path,
        write(tmp_path / "instances.json", COCO),
        captions=write(tmp_path / "captions.json", captions),
        split="img-1k",
    )
    assert lines == [
        sample(
            "7", "train2017/000007.jpg", "image", "coco",
            ["A dog by an apple.", "Ein Hund – groß."],
            [
                instance("1", "dog", "A dog.", [[0, 10.5, 20.0, 40.5, 60.0]]),
                instance("2", "apple", "An apple.", [[0, 90.0, 70.0, 100.0, 80.0]]),
            ],
            split="img_1k",
        ),
        sample(
            "8", "train2017/000008.jpg", "image", "coco", "This image shows apple (1).",
            [instance("5", "apple", "An apple.", [[0, 1.0, 2.0, 4.0, 6.0]])],
            split="img_1k",
        ),
    ]  # fmt: skip
    assert left_out == {
        "crowd boxes": 1,
        "boxes without area in the image": 1,
        "images without caption and objects": 1,
    }


def test_a_blank_caption_of_coco_is_none(tmp_path):
    blank = {"annotations": [{"id": 1, "image_id": 7, "caption": " \n"}]}
    lines, _ = run(
        "coco",
        tmp_path,
        write(tmp_path / "instances.json", COCO),
        captions=write(tmp_path / "captions.json", blank),
    )
    assert lines[0]["caption"] == "This image shows dog (1) and apple (1)."


def test_visual_genome(tmp_path):
    regions = [
        {"region_id": 11, "image_id": 1, "phrase": "the red end", "x": 30, "y": -2, "width": 40,
         "height": 20},
        {"region_id": 12, "image_id": 1, "phrase": "  ", "x": 3, "y": 2, "width": 4, "height": 2},
        {"region_id": 13, "image_id": 1, "phrase": "café", "x": 3, "y": 2, "width": 4, "height": 5},
        {"region_id": 14, "image_id": 1, "phrase": "café", "x": 60, "y": 2, "width": 4,
         "height": 5},
    ]  # fmt: skip
    source = write(
        tmp_path / "regions.json", [{"id": 1, "regions": regions}, {"id": 2, "regions": regions}]
    )
    make_image(tmp_path / "media" / "VG_100K_2" / "1.jpg", (33, 47))
    lines, left_out = run("visual_genome", tmp_path, source, media=tmp_path / "media")
    expected = [
        instance("11", "", "the red end", [[0, 30.0, 0.0, 47.0, 18.0]]),
        instance("13", "", "café", [[0, 3.0, 2.0, 7.0, 7.0]]),
    ]
    assert lines == [
        sample("1", "VG_100K_2/1.jpg", "image", "visual_genome", ["the red end", "café"], expected)
    ]
    assert left_out == {
        "images that are missing or unreadable": 1,
        "regions without phrase": 1,
        "boxes without area in the image": 1,
    }


def test_visual_genome_without_media_takes_captions(tmp_path):
    region = {"region_id": 5, "phrase": "a hat", "x": -1, "y": 2, "width": 3, "height": 4}
    source = write(tmp_path / "regions.json", [{"id": 9, "regions": [region]}])
    captions = write(tmp_path / "captions.json", {"9": "A man. He has a hat."})
    lines, _ = run("visual_genome", tmp_path, source, captions=captions)
    found = [instance("5", "", "a hat", [[0, -1.0, 2.0, 2.0, 6.0]])]
    assert lines == [sample("9", "9.jpg", "image", "visual_genome", "A man. He has a hat.", found)]


def test_mot(tmp_path):
    info = "[Sequence]\nname=MOT17-02\nimDir=img1\nframeRate=30\nimWidth=100\nimHeight=80\n"
    write(tmp_path / "mot" / "MOT17-02-DPM" / "seqinfo.ini", info)
    truth = (
        "3,2,11,21,30,40,1,3,1\n"  # frames need not be sorted
        "1,2,1,1,30,40,1,3,1\n"
        "1,1,-9,11,30,10,1,1,0.5\n"  # cut by the left edge
        "2,1,11,11,30,10,1,1,1\n"
        "3,1,500,11,30,10,1,1,1\n"  # outside
        "1,3,1,1,3,4,0,1,1\n"  # flag 0
        "1,4,1,1,3,4,1,12,1\n"  # a reflection
    )
    write(tmp_path / "mot" / "MOT17-02-DPM" / "gt" / "gt.txt", truth)
    lines, left_out = run("mot", tmp_path, tmp_path / "mot")
    expected = [
        instance(
            "1", "pedestrian", "A pedestrian.",
            [[0, 0.0, 10.0, 20.0, 20.0], [1, 10.0, 10.0, 40.0, 20.0]],
        ),
        instance(
            "2", "car", "A car.",
            [[0, 0.0, 0.0, 30.0, 40.0], [2, 10.0, 20.0, 40.0, 60.0]], [[1, 1]],
        ),
    ]  # fmt: skip
    caption = "This video shows pedestrian (1) and car (1)."
    assert lines == [sample("MOT17-02", "MOT17-02.mp4", "video", "mot", caption, expected)]
    assert left_out == {"rows that the benchmark ignores": 2, "boxes without area in the frame": 1}


def test_mot15_has_no_classes_and_one_sequence_may_be_given(tmp_path):
    write(tmp_path / "seq" / "seqinfo.ini", "[Sequence]\nname=TUD\nimWidth=64\nimHeight=48\n")
    write(tmp_path / "seq" / "gt" / "gt.txt", "1,1,2,3,4,5,1,10.25,-3.5,0\n")
    lines, _ = run("mot", tmp_path, tmp_path / "seq")
    found = [instance("1", "pedestrian", "A pedestrian.", [[0, 1.0, 2.0, 5.0, 7.0]])]
    caption = "This video shows pedestrian (1)."
    assert lines == [sample("TUD", "TUD.mp4", "video", "mot", caption, found)]


YOUTUBE_VIS = {
    "videos": [
        {"id": 1, "width": 64, "height": 48, "length": 4,
         "file_names": [f"0043f083b5/{i:05d}.jpg" for i in (0, 5, 10, 15)]},
    ],
    "annotations": [
        {"id": 4, "video_id": 1, "category_id": 6,
         "bboxes": [None, [1.5, 2, 10, 12], None, [60, 40, 10, 12]]},
        {"id": 5, "video_id": 1, "category_id": 6, "bboxes": [None, None, None, None]},
    ],
    "categories": [{"id": 6, "name": "skis"}],
}  # fmt: skip


def test_youtube_vis(tmp_path):
    lines, left_out = run("youtube_vis", tmp_path, write(tmp_path / "a.json", YOUTUBE_VIS))
    expected = [
        instance("4", "skis", "Skis.", [[1, 1.5, 2.0, 11.5, 14.0], [3, 60.0, 40.0, 64.0, 48.0]],
                 [[2, 2]])
    ]  # fmt: skip
    assert lines == [
        sample("0043f083b5", "0043f083b5.mp4", "video", "youtube_vis",
               "This video shows skis (1).", expected)
    ]  # fmt: skip
    assert left_out == {"objects without any box": 1}


def test_umt(tmp_path):
    source = write(
        tmp_path / "webvid.json",
        [
            {"video": "a/1.mp4", "caption": "A dog runs."},
            {"image": str(tmp_path / "media" / "b" / "ü.jpg"), "caption": ["One.", "Two."]},
            {"video": "a/1.mp4", "caption": "It runs again."},
            {"video": "a/2.mp4", "caption": ""},
            {"video": "a/3.mp4", "caption": [" ", "\u200b"]},
            {"video": "a/4.mp4", "caption": []},
        ],
    )
    lines, left_out = run("umt", tmp_path, source, media=tmp_path / "media")
    assert lines == [
        sample("a/1.mp4", "a/1.mp4", "video", "webvid", "A dog runs.", []),
        sample("b/ü.jpg", "b/ü.jpg", "image", "webvid", ["One.", "Two."], []),
        sample("a/1.mp4#2", "a/1.mp4", "video", "webvid", "It runs again.", []),
    ]
    assert left_out == {"entries without caption": 3}


def test_sentences_made_of_categories():
    names = ("dog", "apple", "skis", "bus", "glass")
    sentences = ["A dog.", "An apple.", "Skis.", "A bus.", "A glass."]
    assert [category_caption(name) for name in names] == sentences
    caption = categories_caption("video", ["car", "dog", "car", "cat"])
    assert caption == "This video shows car (2), dog (1) and cat (1)."


def broken_coco(**changes):
    return {**COCO, **changes}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("coco", "{not json", "in:1: not JSON: Expecting property name enclosed in double quotes"),
        ("coco", [], "in: expected a JSON object, got a list"),
        ("coco", {"images": []}, "in: key 'categories' is missing"),
        ("coco", broken_coco(categories=[]), "in: image 7: category_id 3 is not among the cat"),
        (
            "coco",
            broken_coco(annotations=[{"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2]}]),
            "in: image 7: bbox: expected a list of 4 numbers, got [1, 2]",
        ),
        (
            "coco",
            broken_coco(images=[{"id": 7, "file_name": "../x", "width": 99, "height": 80}]),
            "sample 7: key 'media': '../x' leads out of the media root",
        ),
        ("coco", broken_coco(images=COCO["images"][:1] * 2), "sample 7: this id occurs twice"),
        ("umt", [{"video": "../x.mp4", "caption": "c"}], "leads out of the media root"),
        ("umt", [{"video": "/x.mp4", "caption": "c"}], "is absolute; give its root with --media"),
        ("umt", [{"caption": "c"}], "in: [0]: key 'image' is missing"),
        ("umt", [{"image": "a", "caption": 3}], "'caption': expected a string or list, got a whol"),
        ("umt", [], "in: nothing to convert"),
        ("visual_genome", [{"id": 1}], "in: [0]: key 'regions' is missing"),
        (
            "youtube_vis",
            {**YOUTUBE_VIS, "annotations": [
                {"id": 4, "video_id": 1, "category_id": 6, "bboxes": [None]}
            ]},
            "annotation 4: 1 bboxes, but the video has 4 frames",
        ),
    ],
)  # fmt: skip
def test_faulty_input_is_one_line_and_leaves_nothing(tmp_path, capsys, name, content, message):
    source = write(tmp_path / "in", content)
    code = main(["import", f"--from={name}", f"--input={source}", f"--out={tmp_path / 'o.jsonl'}"])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ("1,1,2,3\n", "gt.txt:1: expected frame,id,left,top,width,height,flag,class"),
        ("1,1,2,3,4,5,1,1,1\n1,1,2,3,4,5,1,1,1\n", "gt.txt:2: a second box of track 1 in frame 1"),
        ("1,1,2,3,4,5,1,77,1\n", "gt.txt:1: unknown class 77"),
        ("1,a,2,3,4,5,1,1,1\n", "gt.txt:1: expected frame,id,left"),
    ],
)
def test_faulty_mot(tmp_path, truth, message):
    write(tmp_path / "s" / "seqinfo.ini", "[Sequence]\nname=s\nimWidth=64\nimHeight=48\n")
    write(tmp_path / "s" / "gt" / "gt.txt", truth)
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        run("mot", tmp_path, tmp_path / "s")


def test_mot_without_sequences(tmp_path):
    with pytest.raises(UserError, match=r"found no seqinfo\.ini"):
        run("mot", tmp_path, tmp_path)


def test_command_prints_counts_and_refuses_what_it_must(tmp_path, capsys):
    source, out = write(tmp_path / "in.json", COCO), tmp_path / "deep" / "out.jsonl"
    arguments = ["import", f"--input={source}", f"--out={out}"]
    assert main([*arguments, "--from=coco"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"{out}: 2 samples, 3 instances, 3 boxes"
    assert "left out: 1 crowd boxes" in printed
    assert main([*arguments, "--from=coco"]) == 2
    assert "exists; name a new file" in capsys.readouterr().err
    assert main([*arguments, "--from=Visual-Genom"]) == 2
    assert "did you mean 'visual_genome'?" in capsys.readouterr().err
    for place in (out / "x", "/proc/none/x", tmp_path / ("x" * 300)):  # none can be made
        assert main([*arguments[:2], f"--out={place}", "--from=coco"]) == 2
        assert f"--out {place}: cannot be written: " in capsys.readouterr().err.splitlines()[-1]
    assert main([*arguments[:2], f"--out={tmp_path / 'x'}", "--from=coco", "--split=A b"]) == 2
    assert "key 'split'" in capsys.readouterr().err
