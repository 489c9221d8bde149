"""COCO: `--input` an instances file, `--captions` the captions file of the same images.

An image without captions gets a sentence that counts its categories. An instance's caption is its
category as a sentence, as COCO describes no single object. Crowd boxes stand for no one entity
and are left out. Media: `file_name`.
"""

import collections
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from instap_jax.data.captions import blank
from instap_jax.data.converters.reading import (
    Request,
    categories_caption,
    category_caption,
    clipped,
    field,
    load_json,
    numbers,
)
from instap_jax.errors import UserError


def convert(request: Request) -> Iterator[dict[str, Any]]:
    """Yields one image sample for each entry of `images`, in its order."""
    content = load_json(request.input, dict)
    where = str(request.input)
    names = category_names(content, where)
    boxes = collections.defaultdict(list)
    for index, item in enumerate(field(content, "annotations", list, where)):
        boxes[field(item, "image_id", (int, str), f"{where}: annotations[{index}]")].append(item)
    captions = _captions(request.captions)
    for index, image in enumerate(field(content, "images", list, where)):
        place = f"{where}: images[{index}]"
        key = field(image, "id", (int, str), place)
        size = field(image, "width", int, place), field(image, "height", int, place)
        instances = _instances(boxes[key], size, names, request, f"{where}: image {key}")
        texts = captions.get(key)
        if not texts and instances:
            texts = [categories_caption("image", (item["category"] for item in instances))]
        if not texts:
            request.left_out["images without caption and objects"] += 1
            continue
        yield {
            "id": key,
            "media": field(image, "file_name", str, place),
            "kind": "image",
            "source": "coco",
            "caption": texts,
            "instances": instances,
        }


def category_names(content: dict, where: str) -> dict[Any, str]:
    """Category id -> name. YouTube-VIS shares it."""
    names = {}
    for index, item in enumerate(field(content, "categories", list, where)):
        place = f"{where}: categories[{index}]"
        names[field(item, "id", (int, str), place)] = field(item, "name", str, place)
    return names


def category_name(item: dict, names: dict[Any, str], where: str) -> str:
    """The name of an annotation's category. Raises UserError where it is not declared."""
    key = field(item, "category_id", (int, str), where)
    if key not in names:
        raise UserError(f"{where}: category_id {key} is not among the categories")
    return names[key]


def _captions(path: Path | None) -> dict[Any, list[str]]:
    captions: dict[Any, list[str]] = collections.defaultdict(list)
    if path is not None:
        for index, item in enumerate(field(load_json(path, dict), "annotations", list, str(path))):
            place = f"{path}: annotations[{index}]"
            text = " ".join(field(item, "caption", str, place).split())
            image = field(item, "image_id", (int, str), place)
            captions[image] += [] if blank(text) else [text]
    return captions


def _instances(
    items: list[dict], size: tuple[int, int], names: dict, request: Request, where: str
) -> list[dict[str, Any]]:
    instances = []
    for item in items:
        if item.get("iscrowd"):
            request.left_out["crowd boxes"] += 1
            continue
        name = category_name(item, names, where)
        box = clipped(numbers(item.get("bbox"), 4, f"{where}: bbox"), *size)
        if box is None:
            request.left_out["boxes without area in the image"] += 1
            continue
        instances.append(
            {
                "id": field(item, "id", (int, str), where),
                "category": name,
                "caption": category_caption(name),
                "boxes": [[0, *box]],
            }
        )
    return instances
