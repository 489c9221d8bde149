"""Features of media files, as `instap features` writes them (docs/inference.md has the format)."""

import collections
import dataclasses
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from instap_jax import __version__
from instap_jax.aside import written_aside
from instap_jax.data import media, schema
from instap_jax.data.sampling import choose_frames
from instap_jax.errors import UserError
from instap_jax.inference import Model
from instap_jax.progress import Progress
from instap_jax.types import Kind, Sample

SUFFIXES = {
    Kind.IMAGE: (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    Kind.VIDEO: (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How media are read.

    Attributes:
      frames: T of a video, uniform over the clip: the middles of T equal parts.
      short_side: pixels; a longer short side is scaled down to it while decoding.
      threads: that decode.
    """

    frames: int
    short_side: int
    threads: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """Counts of what was written, and (sample, reason) of what could not be read."""

    samples: int
    instances: int
    faults: list[tuple[Sample, str]]


@dataclasses.dataclass(frozen=True)
class _Clip:
    """uint8 [T, h, w, 3], its frame indices, boxes [n, T, 4] (fractions), present bool [n, T]."""

    frames: np.ndarray
    index: np.ndarray
    boxes: np.ndarray
    present: np.ndarray


def find_media(root: Path) -> list[Sample]:
    """Every image and video below a directory, by suffix, in the order of their paths.

    Raises:
      UserError: no such directory, or none in it.
    """
    if not root.is_dir():
        raise UserError(f"--media={root}: no such directory")
    kinds = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes}
    paths = [p for p in sorted(root.rglob("*")) if p.suffix.lower() in kinds and p.is_file()]
    if not paths:
        raise UserError(f"--media={root}: no image and no video in it ({', '.join(kinds)})")
    return [_bare(p.relative_to(root).as_posix(), kinds[p.suffix.lower()]) for p in paths]


def _bare(name: str, kind: Kind) -> Sample:
    return Sample(
        id=name,
        media=name,
        kind=kind,
        split="",
        source="",
        captions=(),
        unit_boxes=False,
        instances=(),
        line=0,
    )


def extract(
    model: Model,
    samples: Sequence[Sample],
    root: Path,
    out: Path,
    reading: Reading,
    about: dict[str, str],
) -> Summary:
    """Embeds samples, their instances and their texts, and writes `out`.

    A sample that cannot be read is left out and listed; the others keep their order.

    Args:
      root: that media paths are relative to.
      out: directory to be made.
      about: where all of it comes from, for `about.json`.

    Raises:
      UserError: `out` exists or cannot be written, a path leads out of the root, or not one sample
        can be read.
    """
    rows: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    index: list[dict] = []
    faults: list[tuple[Sample, str]] = []
    with written_aside(out, "--out") as aside:
        with Progress("features", len(samples)) as progress:
            for part in _read(samples, root, reading, model.batch_size):
                good = [(s, c) for s, c in part if isinstance(c, _Clip)]
                faults += [(s, c) for s, c in part if isinstance(c, str)]
                if good:
                    _embed(model, good, rows, index)
                progress.update(len(part), f"{len(faults)} unreadable" if faults else "")
        if not index:
            sample, reason = faults[0]
            raise UserError(f"none of {len(samples)} samples can be read; {sample.media}: {reason}")
        arrays = {name: np.concatenate(parts) for name, parts in rows.items()}
        np.savez(aside / "features.npz", **arrays)
        _write_lines(aside / "index.jsonl", index)
        listed = [{"id": s.id, "media": s.media, "line": s.line, "reason": r} for s, r in faults]
        _write_lines(aside / "faults.jsonl", listed)
        about = about | {
            "version": __version__,
            "step": model.step,
            "frames": reading.frames,
            "short_side": reading.short_side,
            "samples": len(index),
            "faults": len(faults),
            "arrays": {name: list(array.shape) for name, array in arrays.items()},
        }
        (aside / "about.json").write_text(json.dumps(about, indent=1) + "\n")
    return Summary(len(index), sum(len(entry["instances"]) for entry in index), faults)


def _embed(model: Model, part: list[tuple[Sample, _Clip]], rows: dict, index: list[dict]) -> None:
    """Appends the features of some samples to `rows`, and their lines to `index`."""
    clips = [clip.frames for _, clip in part]
    rows["video"].append(model.encode_video(clips))
    if part[0][0].line:  # of an annotation file: all have a caption
        rows["text"].append(model.encode_text([" ".join(s.captions) for s, _ in part]))
        instances = model.encode_instances(
            clips, [clip.boxes for _, clip in part], [clip.present for _, clip in part]
        )
        rows["instance"] += instances
        sentences = [" ".join(i.captions) for sample, _ in part for i in sample.instances]
        rows["instance_text"].append(model.encode_text(sentences))
    row = sum(len(line["instances"]) for line in index)
    for sample, clip in part:
        ids = [instance.id for instance in sample.instances]
        index.append(
            {
                "row": len(index),
                "id": sample.id,
                "media": sample.media,
                "kind": str(sample.kind),
                "frames": clip.index.tolist(),
                "instances": [{"row": row + k, "id": id} for k, id in enumerate(ids)],
            }
        )
        row += len(ids)


def _read(
    samples: Sequence[Sample], root: Path, reading: Reading, size: int
) -> Iterator[list[tuple[Sample, _Clip | str]]]:
    """Samples `size` at a time with their clip, or the reason why there is none.

    While one part is embedded the next one is decoded.
    """
    with ThreadPoolExecutor(reading.threads) as pool:

        def start(part: Sequence[Sample]) -> list[tuple[Sample, Future]]:
            return [(sample, pool.submit(_read_one, sample, root, reading)) for sample in part]

        ahead = start(samples[:size])
        for first in range(size, len(samples) + size, size):
            now, ahead = ahead, start(samples[first : first + size])
            yield [(sample, future.result()) for sample, future in now]


def _read_one(sample: Sample, root: Path, reading: Reading) -> _Clip | str:
    path = media.confined(root, sample.media)
    try:
        info = media.probe(path, sample.kind)
        faults = schema.check_sample(sample, info) if sample.line else []
        if faults:
            return "; ".join(faults)
        count = reading.frames if sample.kind is Kind.VIDEO else 1
        index = choose_frames(info.frames, count, "uniform", np.random.default_rng(0))
        if sample.kind is Kind.IMAGE:
            frames = [media.read_image(path, reading.short_side)]
        else:
            frames = media.read_frames(path, index, reading.short_side)
    except media.MediaError as error:
        return str(error)
    boxes, present = schema.boxes_on_grid(sample, index, info)
    if not present.any(axis=1).all():
        _, everywhere = schema.boxes_on_grid(sample, np.arange(info.frames), info)
        present = present | _nearest(present, everywhere, index)
    return _Clip(np.stack(frames), index, boxes, present)


def _nearest(present: np.ndarray, everywhere: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Marks, of an instance in no chosen frame, the one nearest to its appearance, as evaluation.

    Args:
      present: bool [n, T], in the chosen frames. everywhere: bool [n, frames of the clip].
    """
    marked = np.zeros_like(present)
    for k in np.flatnonzero(~present.any(axis=1)):
        seen = np.flatnonzero(everywhere[k])
        seen = seen if len(seen) else np.arange(everywhere.shape[1])
        marked[k, np.abs(index[:, None] - seen).min(axis=1).argmin()] = True
    return marked


def _write_lines(path: Path, lines: list[dict]) -> None:
    with path.open("w") as file:
        for line in lines:
            file.write(json.dumps(line) + "\n")
