"""A small data set to pack, for tests."""

import json
from pathlib import Path

from media_files import make_image, make_video, truncate


def video_line(id: str, **changes) -> dict:
    cat = {"id": 0, "category": "cat", "caption": "A cat. It runs.", "mood": "calm"}
    cat["boxes"] = [[2, 4.6, 3.4, 23.0, 17.0], [6, 13.8, 10.2, 32.2, 34.0]]
    dog = {"id": "b", "caption": ["One.", "Two."], "absent": [[3, 4]]}
    dog["boxes"] = [[0, 0, 0, 46, 34], [11, 0, 0, 46, 34]]
    line = {"id": id, "media": "clip.mp4", "kind": "video", "source": "test", "license": {"by": 1}}
    return line | {"caption": "Global. Text.", "instances": [cat, dog]} | changes


def image_line(id: str, **changes) -> dict:
    sky = {"id": 0, "caption": "Sky.", "boxes": [[0, 4.7, 3.3, 47, 33]]}
    line = {"id": id, "media": "still.jpg", "kind": "image", "caption": "Blue."}
    return line | {"instances": [sky]} | changes


LINES = [
    *(video_line(f"v{i}") for i in range(7)),
    video_line("held-out", split="video-1k"),
    video_line("short", media="one.mp4", instances=[]),
    *(image_line(f"bild-ü{i}") for i in range(4)),
    image_line("large", media="large.jpg", instances=[]),
]
FAULTY = [
    video_line("v0"),
    video_line("cut", media="cut.mp4", instances=[]),
    video_line("gone", media="gone.mp4"),
    image_line("line", instances=[{"id": 0, "caption": "a", "boxes": [[0, 5, 5, 5, 9]]}]),
    image_line("not an image", media="clip.mp4"),
]


def make_media(directory: Path) -> Path:
    """Writes the media that the lines name."""
    make_video(directory / "clip.mp4", frames=12, size=(34, 46), fps=8)
    make_video(directory / "one.mp4", frames=1)
    make_image(directory / "still.jpg", size=(33, 47))
    make_image(directory / "large.jpg", size=(300, 601))
    truncate(make_video(directory / "cut.mp4", frames=60))
    make_video(directory / "long.mp4", frames=48, size=(240, 320))
    return directory


def annotations(path: Path, lines: list[dict]) -> Path:
    """Writes an annotation file."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text("\ufeff" + text, encoding="utf-8")  # with a byte-order mark, as some editors
    return path


def tree(directory: Path) -> dict[str, bytes]:
    """Every file under a directory, by its path there."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}
