"""Packed clips that carry their name and frame number in their colours, for tests."""

import json
from pathlib import Path

import av
import numpy as np

from instap_jax.data import builder
from instap_jax.data.shard import Options
from instap_jax.data.tokenizer import train_sentencepiece

SIZE = (34, 46)  # of the clips, pixels
FRAMES = 12
CLIPS = 7
SIDES = ("Seen on the left. A cat.", "A cat. Nothing else.")


def color(clip: int, frame: int) -> tuple[int, int, int]:
    """Red names the clip, green the frame."""
    return 30 + 30 * clip, 20 + 18 * frame, 60


def caption(clip: int) -> str:
    return f"Clip {clip} begins. Clip {clip} goes on. Clip {clip} ends."


def annotation(clip: int, split: str, instances: int) -> dict:
    line = {"id": f"{split}-{clip}", "media": f"{clip}.mp4", "kind": "video", "split": split}
    line |= {"caption": caption(clip), "instances": []}
    for k in range(instances):
        # Instance 0 is there throughout, instance 1 in the first two frames only.
        last = FRAMES - 1 if k != 1 else 1
        boxes = [[0, 0, 0, 23, 17], [last, 23, 17, 46, 34]]
        text = f"Thing {k} of {clip}. {SIDES[k % 2]}"
        line["instances"].append({"id": k, "category": "x", "caption": text, "boxes": boxes})
    return line


def write_corpus(root: Path) -> None:
    """Writes `root/jpeg` and `root/mp4`, packed, every frame of the clips, and `root/t.model`.

    Splits: 'train' (7 clips with 0 to 3 instances) and 'more' (3 clips with one).
    """
    for clip in range(CLIPS):
        with av.open(str(root / f"{clip}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=8, options={"crf": "8"})
            stream.height, stream.width = SIZE
            stream.pix_fmt = "yuv420p"
            for frame in range(FRAMES):
                array = np.full((*SIZE, 3), color(clip, frame), np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
            container.mux(stream.encode())
    lines = [annotation(clip, "train", clip % 4) for clip in range(CLIPS)]
    lines += [annotation(clip, "more", 1) for clip in range(3)]
    (root / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    texts = [text for clip in range(CLIPS) for text in (caption(clip), *SIDES)]
    (root / "t.model").write_bytes(train_sentencepiece(texts, 400))
    for name, options in (("jpeg", Options(rate=None)), ("mp4", Options(encoding="mp4"))):
        builder.pack(
            str(root / "a.jsonl"), str(root), str(root / name), options=options, processes=1
        )
