"""Contact sheets: frames of a sample with its boxes, ids and captions, for people to look at."""

import functools
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from instap_jax.aside import written_aside
from instap_jax.data import media, schema
from instap_jax.errors import UserError
from instap_jax.types import Kind, Sample

FORMATS = ("png", "mp4")

FRAMES_PER_SHEET = 5
# Pixels of a tile: as high as this, unless that makes it wider than _TILE_WIDTH.
_TILE_HEIGHT, _STILL_HEIGHT, _TILE_WIDTH = 180, 400, 720
_PADDING, _GAP, _MIN_WIDTH = 14, 6, 560
_TEXT, _SMALL_TEXT = 15, 12  # font sizes in pixels
_MAX_LINES, _MAX_CHARACTERS = 6, 4000  # of one caption
_INK, _FAINT, _RED, _PAPER = "#202124", "#70757a", "#c5221f", "white"
# Distinct in hue and in brightness; repeated where there are more instances.
_COLOURS = (
    "#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#00a5b5",
    "#ffe119", "#f032e6", "#9a6324", "#808000", "#000075", "#aaffc3",
)  # fmt: skip


def draw_sheet(
    frames: Sequence[np.ndarray],
    boxes: np.ndarray,
    present: np.ndarray,
    labels: Sequence[str],
    captions: Sequence[str],
    *,
    titles: Sequence[str] = (),
    heading: str = "",
    faults: Sequence[str] = (),
) -> Image.Image:
    """Draws the frames of one sample in a row, and its captions below.

    Args:
      frames: f uint8 [h, w, 3] RGB arrays of one size.
      boxes: [k, f, 4], x0 y0 x1 y1 as fractions of the frame.
      present: bool [k, f]; a box is drawn only where it is True.
      labels: k short names (ids), drawn at the boxes and before the instances' captions.
      captions: the global caption, then one per instance.
      titles: f short texts below the frames, such as 'frame 12'.
      heading: one line above the frames.
      faults: lines in red below the heading.
    """
    labels = [_printable(label) for label in labels]
    tile = _tile_size(frames)
    columns = len(frames)
    inner = max(_MIN_WIDTH, columns * tile[0] + (columns - 1) * _GAP)
    lines = _text_block(heading, faults, labels, captions, inner)
    top = sum(line.height for line in lines if line.above)
    bottom = sum(line.height for line in lines if not line.above)
    titles_height = _SMALL_TEXT + 12 if titles else _GAP
    height = top + tile[1] + titles_height + bottom + 2 * _PADDING
    sheet = Image.new("RGB", (inner + 2 * _PADDING, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    y = _PADDING
    for line in lines:
        if line.above:
            y = line.draw(draw, y)
    for column, frame in enumerate(frames):
        x = _PADDING + column * (tile[0] + _GAP)
        picture = Image.fromarray(frame).resize(tile, Image.Resampling.BICUBIC)
        _draw_boxes(picture, boxes[:, column], present[:, column], labels)
        sheet.paste(picture, (x, y))
        if titles:
            place = (x + tile[0] // 2, y + tile[1] + 3)
            draw.text(place, _printable(titles[column]), _FAINT, _font(_SMALL_TEXT), anchor="ma")
    y += tile[1] + titles_height
    for line in lines:
        if not line.above:
            y = line.draw(draw, y)
    return sheet


def sample_sheet(sample: Sample, root: Path) -> Image.Image:
    """Draws a contact sheet of one sample; its faults, if any, are written on it in red.

    Raises:
      MediaError: its media cannot be read.
      UserError: its media path leads out of the root.
    """
    path = media.confined(root, sample.media)
    info = media.probe(path, sample.kind)
    if sample.kind is Kind.IMAGE:
        index, titles = np.zeros(1, np.int32), ()
        frames = [media.read_image(path)]
    else:
        index = np.unique(np.linspace(0, info.frames - 1, FRAMES_PER_SHEET).round().astype(int))
        titles = [f"frame {i}  ({i / info.fps:.1f} s)" for i in index]
        frames = media.read_frames(path, index, short_side=2 * _TILE_HEIGHT)
    return draw_sheet(frames, titles=titles, **_annotation(sample, index, info))


def write_clip(sample: Sample, root: Path, target: Path) -> None:
    """Writes every frame of a video sample, drawn on, as an H.264 file.

    Raises:
      MediaError: its media cannot be read.
      UserError: its media path leads out of the root.
    """
    path = media.confined(root, sample.media)
    info = media.probe(path, sample.kind)
    drawn = _annotation(sample, np.arange(info.frames), info)
    boxes, present = drawn.pop("boxes"), drawn.pop("present")
    with av.open(str(target), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(info.fps).limit_denominator(1001))
        stream.pix_fmt = "yuv420p"
        for index, frame in enumerate(media.iterate_frames(path, short_side=_STILL_HEIGHT)):
            now = slice(index, index + 1)
            sheet = draw_sheet(
                [frame], boxes[:, now], present[:, now], titles=[f"frame {index}"], **drawn
            )
            size = tuple(side // 2 * 2 for side in sheet.size)  # H.264 with 4:2:0 needs even sides
            if index == 0:
                stream.width, stream.height = size
            sheet = sheet.crop((0, 0, *size))
            container.mux(stream.encode(av.VideoFrame.from_image(sheet)))
        container.mux(stream.encode())


def write_previews(
    annotations: Path,
    root: Path,
    out: Path,
    *,
    count: int,
    split: str,
    form: str,
    on_skip: Callable[[Sample, str], None],
) -> int:
    """Writes a sheet (or clip) for each of `count` samples, chosen evenly at random.

    Args:
      out: a directory that does not exist or is empty; it appears only when all is written.
      split: only samples of this split; '' takes all.
      form: 'png', or 'mp4' for clips (images still become PNG).
      on_skip: called for a sample whose media cannot be read, with the reason.

    Returns:
      How many were written.

    Raises:
      UserError: a fault of the file, `out` is not empty or cannot be written, or nothing could be
        drawn.
    """
    if not root.is_dir():
        raise UserError(f"media root {root} is not a directory")
    with written_aside(out, "--out") as aside:
        chosen = _choose(annotations, count, split)
        written = 0
        for sample in chosen:
            try:
                _write_one(sample, root, aside, form)
            except media.MediaError as error:
                on_skip(sample, f"{sample.media}: {error}")
            except UserError as error:
                raise UserError(f"{annotations}:{sample.line}: {error}") from error
            else:
                written += 1
        if not written:
            raise UserError(f"none of the {len(chosen)} samples chosen could be drawn")
    return written


def _write_one(sample: Sample, root: Path, directory: Path, form: str) -> None:
    # The line number keeps apart ids that differ only in what a file name cannot hold.
    safe = re.sub(r"[^\w.-]+", "_", sample.id)[:60]
    name = f"{sample.line:06d}-{safe}"
    if form == "mp4" and sample.kind is Kind.VIDEO:
        target = directory / f"{name}.mp4"
        try:
            write_clip(sample, root, target)
        except media.MediaError:  # perhaps after some frames
            target.unlink(missing_ok=True)
            raise
    else:
        sample_sheet(sample, root).save(directory / f"{name}.png")


def _choose(annotations: Path, count: int, split: str) -> list[Sample]:
    """A uniform choice of `count` samples in one pass (reservoir), in the order of the file."""
    rng = np.random.default_rng([0])
    split = split.replace("-", "_")
    splits = set()
    kept: list[Sample] = []
    seen = 0
    for sample in schema.read_annotations(annotations):
        splits.add(sample.split)
        if split and sample.split != split:
            continue
        seen += 1
        place = len(kept) if len(kept) < count else int(rng.integers(seen))
        if place < count:
            kept[place : place + 1] = [sample]
    if not kept:
        raise UserError(f"no sample of split {split!r}; the file has {', '.join(sorted(splits))}")
    return sorted(kept, key=lambda sample: sample.line)


def _annotation(sample: Sample, index: np.ndarray, info: media.MediaInfo) -> dict:
    """The arguments of `draw_sheet` that come from the annotation."""
    faults = schema.check_sample(sample, info)
    try:
        boxes, present = schema.boxes_on_grid(sample, index, info)
    except schema.SampleFault:  # is among the faults
        boxes = np.zeros((0, len(index), 4), np.float32)
        present = np.zeros((0, len(index)), bool)
    size = f"{info.width}x{info.height}"
    length = f"  {info.frames} frames, {info.fps:g}/s" if sample.kind is Kind.VIDEO else ""
    source = f"  source {sample.source}" if sample.source else ""
    return {
        "boxes": boxes,
        "present": present & np.isfinite(boxes).all(-1),
        "labels": [instance.id for instance in sample.instances],
        "captions": [" / ".join(sample.captions)]
        + [
            f"[{instance.category or 'no category'}] {' / '.join(instance.captions)}"
            for instance in sample.instances
        ],
        "heading": f"{sample.id}   {sample.split}  {sample.kind}  {size}{length}{source}",
        "faults": faults,
    }


def _tile_size(frames: Sequence[np.ndarray]) -> tuple[int, int]:
    height, width = frames[0].shape[:2]
    target = _STILL_HEIGHT if len(frames) == 1 else _TILE_HEIGHT
    scale = min(target / height, _TILE_WIDTH / width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _draw_boxes(
    picture: Image.Image, boxes: np.ndarray, present: np.ndarray, labels: Sequence[str]
) -> None:
    draw = ImageDraw.Draw(picture)
    width, height = picture.size
    for row in np.flatnonzero(present):
        colour = _colour(row)
        x0, y0, x1, y1 = np.round(boxes[row] * (width, height, width, height)).astype(int).tolist()
        x1, y1 = max(x0, min(x1, width) - 1), max(y0, min(y1, height) - 1)
        draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline="black")  # seen on any ground
        draw.rectangle((x0, y0, x1, y1), outline=colour, width=3)
        size = _chip_size(labels[row])
        x = min(x0, width - size[0])
        above = y0 - size[1]
        _draw_chip(draw, (max(0, x), above if above >= 0 else y0), labels[row], colour)


def _chip_size(label: str) -> tuple[int, int]:
    return round(_font(_SMALL_TEXT, bold=True).getlength(_chip_text(label))) + 6, _SMALL_TEXT + 4


def _chip_text(label: str) -> str:
    return label if len(label) <= 16 else label[:15] + "…"


def _draw_chip(draw: ImageDraw.ImageDraw, place: tuple[int, int], label: str, colour: str) -> None:
    width, height = _chip_size(label)
    x, y = place
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
    font = _font(_SMALL_TEXT, bold=True)
    draw.text((x + 3, y + height // 2), _chip_text(label), ink, font, anchor="lm")


def _colour(row: int) -> str:
    return _COLOURS[row % len(_COLOURS)]


class _Line:
    """One line of text of the sheet, perhaps with a coloured chip before it."""

    def __init__(self, text, ink=_INK, bold=False, above=False, indent=0, chip=None, space=0):
        self._text, self._ink, self._bold, self.above = text, ink, bold, above
        self._indent, self._chip = indent, chip
        self.height = _TEXT + 5 + space

    def draw(self, draw: ImageDraw.ImageDraw, y: int) -> int:
        """Draws the line with its bottom at the returned y."""
        middle = y + self.height - (_TEXT + 5) // 2
        if self._chip:
            _draw_chip(draw, (_PADDING, middle - _chip_size(self._chip[0])[1] // 2), *self._chip)
        place = (_PADDING + self._indent, middle)
        draw.text(place, self._text, self._ink, _font(_TEXT, self._bold), anchor="lm")
        return y + self.height


def _text_block(
    heading: str, faults: Sequence[str], labels: Sequence[str], captions: Sequence[str], width: int
) -> list[_Line]:
    lines = [_Line(text, bold=True, above=True) for text in _wrap(heading, width, bold=True)]
    for fault in faults:
        lines += [_Line(text, ink=_RED, above=True) for text in _wrap(f"fault: {fault}", width)]
    for text in _wrap(captions[0] if captions else "", width):
        lines.append(_Line(text))
    indent = max((_chip_size(label)[0] for label in labels), default=0) + 8
    for row, (label, caption) in enumerate(zip(labels, captions[1:])):
        for number, text in enumerate(_wrap(caption, width - indent) or ("",)):
            chip = (label, _colour(row)) if number == 0 else None
            lines.append(_Line(text, indent=indent, chip=chip, space=0 if number else 3))
    return lines


@functools.lru_cache(maxsize=1024)  # a clip shows the same text on every frame
def _wrap(text: str, width: int, bold: bool = False) -> Sequence[str]:
    """Breaks a text into lines of at most `width` pixels; a word that is longer is cut."""
    font = _font(_TEXT, bold)
    lines: list[str] = []
    line = ""
    for piece in _pieces(text):
        if font.getlength((line + piece).rstrip()) <= width:
            line += piece
            continue
        if line.strip():
            lines.append(line.rstrip())
        line = piece
        while font.getlength(line.rstrip()) > width:
            cut = max(1, int(len(line) * width / font.getlength(line)) - 1)
            lines.append(line[:cut])
            line = line[cut:]
        if len(lines) >= _MAX_LINES:
            return (*lines[: _MAX_LINES - 1], lines[_MAX_LINES - 1][:-1] + "…")
    return (*lines, line.rstrip()) if line.strip() else tuple(lines)


def _pieces(text: str) -> list[str]:
    """Words with the space after them."""
    return re.findall(r"\S+\s*", _printable(text))


def _printable(text: str) -> str:
    """Without control characters, on which the text engine fails, and without endless tails."""
    return "".join(c if c.isprintable() else " " for c in text[:_MAX_CHARACTERS])


@functools.cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: Latin, Greek, Cyrillic, Arabic and more."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)
