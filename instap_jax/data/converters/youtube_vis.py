"""YouTube-VIS: `--input` an instances file (videos, annotations with per-frame bboxes, categories).

One sample has one media file, but YouTube-VIS has a directory of images per video: the media is
`DIRECTORY.mp4`, a clip made of exactly those images (docs/annotations.md has the command), so that
frame i is file_names[i]. A null box means that the object is not in the picture. `--captions` may
hold {directory: caption}; otherwise captions are made from the category names.
"""

import collections
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from instap_jax.data.converters.coco import category_name, category_names
from instap_jax.data.converters.reading import (
    Request,
    caption_table,
    categories_caption,
    category_caption,
    clipped,
    field,
    gaps,
    load_json,
    numbers,
)
from instap_jax.errors import UserError


def convert(request: Request) -> Iterator[dict[str, Any]]:
    """Yields one video sample for each entry of `videos`, in its order."""
    content = load_json(request.input, dict)
    captions = caption_table(request.captions)
    where = str(request.input)
    names = category_names(content, where)
    tracks = collections.defaultdict(list)
    for index, item in enumerate(field(content, "annotations", list, where)):
        tracks[field(item, "video_id", (int, str), f"{where}: annotations[{index}]")].append(item)
    for index, video in enumerate(field(content, "videos", list, where)):
        place = f"{where}: videos[{index}]"
        name = _directory(video, place)
        items = tracks[field(video, "id", (int, str), place)]
        instances = [_instance(item, video, names, request, where) for item in items]
        instances = [item for item in instances if item is not None]
        texts = captions.get(name)
        if not texts and instances:
            texts = categories_caption("video", (item["category"] for item in instances))
        if not texts:
            request.left_out["videos without caption and objects"] += 1
            continue
        yield {
            "id": name,
            "media": f"{name}.mp4",
            "kind": "video",
            "source": "youtube_vis",
            "caption": texts,
            "instances": instances,
        }


def _directory(video: dict, where: str) -> str:
    files = field(video, "file_names", list, where)
    parents = {str(PurePosixPath(name).parent) for name in files if isinstance(name, str)}
    if len(parents) != 1 or parents == {"."}:
        raise UserError(f"{where}: file_names must lie in one directory, named after the video")
    return parents.pop()


def _instance(
    item: dict, video: dict, names: dict, request: Request, where: str
) -> dict[str, Any] | None:
    place = f"{where}: annotation {field(item, 'id', (int, str), where)}"
    name = category_name(item, names, place)
    values = field(item, "bboxes", list, place)
    if len(values) != len(video["file_names"]):
        count = len(video["file_names"])
        raise UserError(f"{place}: {len(values)} bboxes, but the video has {count} frames")
    size = field(video, "width", int, place), field(video, "height", int, place)
    boxes = {}
    for frame, value in enumerate(values):
        if value:
            box = clipped(numbers(value, 4, f"{place}: bboxes[{frame}]"), *size)
            if box is None:
                request.left_out["boxes without area in the frame"] += 1
            else:
                boxes[frame] = box
    if not boxes:
        request.left_out["objects without any box"] += 1
        return None
    return {
        "id": item["id"],
        "category": name,
        "caption": category_caption(name),
        "boxes": [[frame, *box] for frame, box in boxes.items()],
        "absent": gaps(list(boxes)),
    }
