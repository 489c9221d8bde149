"""Visual Genome: `--input` region_descriptions.json; `--captions` may hold {image id: caption}.

A region is an instance and its phrase the instance's caption. Visual Genome has no caption of the
whole image: without `--captions` the global caption is the list of the region phrases. Media:
`ID.jpg`; with `--media` it is looked for there, also in VG_100K/ and VG_100K_2/, and regions are
clipped to the picture.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from instap_jax.data import media
from instap_jax.data.converters.reading import (
    Request,
    caption_table,
    clipped,
    field,
    load_json,
)
from instap_jax.types import Kind

_DIRECTORIES = ("", "VG_100K/", "VG_100K_2/")


def convert(request: Request) -> Iterator[dict[str, Any]]:
    """Yields one image sample for each entry of the file that has regions."""
    captions = caption_table(request.captions)
    for index, image in enumerate(load_json(request.input, list)):
        where = f"{request.input}: [{index}]"
        key = field(image, "id", (int, str), where)
        name, size = f"{key}.jpg", (None, None)
        if request.media is not None:
            found = _find(request.media, name)
            if found is None:
                request.left_out["images that are missing or unreadable"] += 1
                continue
            name, size = found
        regions = field(image, "regions", list, where)
        instances = _instances(regions, size, request, f"{where}.regions")
        phrases = list(dict.fromkeys(item["caption"] for item in instances))
        texts = captions.get(str(key)) or phrases
        if not texts:
            request.left_out["images without caption and regions"] += 1
            continue
        yield {
            "id": key,
            "media": name,
            "kind": "image",
            "source": "visual_genome",
            "caption": texts,
            "instances": instances,
        }


def _find(root: Path, name: str) -> tuple[str, tuple[int, int]] | None:
    """Relative path and (width, height) of an image, or None."""
    for directory in _DIRECTORIES:
        try:
            info = media.probe(root / directory / name, Kind.IMAGE)
        except media.MediaError:
            continue
        return directory + name, (info.width, info.height)
    return None


def _instances(regions: list, size: tuple, request: Request, where: str) -> list[dict[str, Any]]:
    instances = []
    for index, region in enumerate(regions):
        place = f"{where}[{index}]"
        phrase = " ".join(field(region, "phrase", str, place).split())
        xywh = [field(region, key, (int, float), place) for key in ("x", "y", "width", "height")]
        box = clipped(xywh, *size)
        if not phrase or box is None:
            what = "boxes without area in the image" if phrase else "regions without phrase"
            request.left_out[what] += 1
            continue
        instances.append(
            {
                "id": field(region, "region_id", (int, str), place),
                "category": "",
                "caption": phrase,
                "boxes": [[0, *box]],
            }
        )
    return instances
