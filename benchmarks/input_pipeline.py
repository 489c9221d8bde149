"""Clips per second and core of the input pipeline, beside its own decode-only limits.

  python benchmarks/input_pipeline.py [--clips 12] [--rounds 7] [--processes 3]

Makes its own clips (moving textures, H.264, 30 frames/s), packs them twice with `instap pack`'s
defaults (JPEG frames at 4 per second, and the mp4 passed through), and measures one process:

  packed JPEG, Loader        the whole pipeline: read, parse, choose, decode, tokenize, batch
  packed JPEG, decode only   a plain Pillow loop over as many frames of the same clips; pixels are
                             thrown away, so that they never leave the processor's cache
  packed JPEG, to arrays     the same, but a clip's frames end up in one array [T, h, w, 3]
  packed mp4, Loader         the same pipeline on clips that were passed through
  mp4, decode only           a plain PyAV loop over the same clips, up to the last chosen frame

The loops are interleaved round by round, because the machine's speed drifts, and all of it is
repeated in fresh processes, because the same loop is up to a fifth faster or slower from process to
process. Figures are medians over all rounds; shares are medians of the rounds' own ratios. "Per
core" is per second of CPU time, all threads of the process counted.
"""

import argparse
import io
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from absl import flags
from PIL import Image

from instap_jax.config import default
from instap_jax.data.builder import pack
from instap_jax.data.pipeline import Loader, make_loader
from instap_jax.data.records import Record, open_source
from instap_jax.data.sampling import choose_frames
from instap_jax.data.shard import Options
from instap_jax.data.tokenizer import train_sentencepiece
from instap_jax.types import Kind

# name: (height, width), seconds, T
SIZES = {
    "640x360 10 s, T=16": ((360, 640), 10, 16),
    "640x360 10 s, T=8": ((360, 640), 10, 8),
    "128x128 3 s, T=8 (embedded set)": ((128, 128), 3, 8),
}
# Loop, and the limits it is measured against.
LIMITS = (
    ("packed JPEG, Loader", "packed JPEG, decode only"),
    ("packed JPEG, Loader", "packed JPEG, to arrays"),
    ("packed mp4, Loader", "mp4, decode only"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=12, help="clips of a corpus")
    parser.add_argument("--rounds", type=int, default=7, help="rounds; medians are printed")
    parser.add_argument("--processes", type=int, default=3, help="fresh processes")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, (size, seconds, frames)) in enumerate(SIZES.items()):
            directory = Path(scratch, str(number))
            make_corpora(directory, clips=args.clips, size=size, seconds=seconds)
            rounds = []
            for _ in range(args.processes):
                fresh = multiprocessing.get_context("spawn").Pool(1)
                with fresh:
                    arguments = directory, args.clips, frames, args.rounds
                    rounds += fresh.apply(measure, arguments)
            results[name] = summarise(rounds)
            print_table(name, results[name])
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def measure(directory: Path, clips: int, frames: int, rounds: int) -> list[dict[str, np.ndarray]]:
    """Returns, for every round and loop, milliseconds of (CPU, wall) time for one clip."""
    flags.FLAGS.mark_as_parsed()  # grain reads absl's
    loaders = {kind: open_loader(directory, kind, clips, frames) for kind in ("jpeg", "mp4")}
    records = {
        kind: list(open_source(str(directory / kind), "train", Kind.VIDEO)) for kind in loaders
    }
    rng = np.random.default_rng(0)  # like the loader, other frames in every round
    loops: dict[str, Callable[[], None]] = {
        "packed JPEG, Loader": lambda: drain(loaders["jpeg"]),
        "packed JPEG, decode only": lambda: decode_jpegs(records["jpeg"], frames, rng, list),
        "packed JPEG, to arrays": lambda: decode_jpegs(records["jpeg"], frames, rng, np.stack),
        "packed mp4, Loader": lambda: drain(loaders["mp4"]),
        "mp4, decode only": lambda: decode_mp4s(records["mp4"], frames, rng),
    }
    measured = []
    for _ in range(rounds + 1):
        measured.append({name: _time(loop) * 1e3 / clips for name, loop in loops.items()})
    for loader in loaders.values():
        loader.close()
    return measured[1:]  # the first round opens files and fills caches


def summarise(rounds: list[dict[str, np.ndarray]]) -> dict[str, dict[str, float]]:
    """Returns medians over the rounds: times of every loop, and shares of the limits."""
    table = {}
    for name in rounds[0]:
        cpu, wall = np.median([round_[name] for round_ in rounds], axis=0)
        table[name] = {"cpu_ms": float(cpu), "wall_ms": float(wall)}
    for name, limit in LIMITS:
        cpu, wall = np.median([round_[limit] / round_[name] for round_ in rounds], axis=0)
        table[f"{name} / {limit}"] = {"cpu_share": float(cpu), "wall_share": float(wall)}
    return table


def _time(loop: Callable[[], None]) -> np.ndarray:
    cpu, wall = time.process_time(), time.perf_counter()
    loop()
    return np.array([time.process_time() - cpu, time.perf_counter() - wall])


def drain(loader: Loader) -> None:
    """One epoch: the loader's batch is the whole corpus."""
    assert next(loader)["sample_valid"].all()


def decode_jpegs(
    records: list[Record], frames: int, rng: np.random.Generator, collect: Callable
) -> None:
    """Independent of our own decoder: Pillow as its documentation shows, to an array.

    `collect` is `np.stack`, or `list` with one frame at a time.
    """
    for record in records:
        chosen = choose_frames(len(record.frame_index), frames, "random", rng)
        parts = [chosen] if collect is np.stack else chosen[:, None]
        for part in parts:
            files = (io.BytesIO(record.media_bytes[index]) for index in part)
            collect([np.asarray(Image.open(file)) for file in files])


def decode_mp4s(records: list[Record], frames: int, rng: np.random.Generator) -> None:
    """Independent of our own decoder: PyAV as its documentation shows, RGB of the wanted frames."""
    for record in records:
        chosen = choose_frames(len(record.frame_index), frames, "random", rng)
        wanted = set(record.frame_index[chosen].tolist())
        with av.open(io.BytesIO(record.media_bytes[0])) as container:
            container.streams.video[0].codec_context.thread_count = 1
            for index, frame in enumerate(container.decode(video=0)):
                if index in wanted:
                    frame.to_ndarray(format="rgb24")
                if index == max(wanted):
                    break


def open_loader(directory: Path, kind: str, clips: int, frames: int) -> Loader:
    config = default()
    config.data.videos = f"{directory / kind}:train"
    config.data.frames = frames
    config.data.workers = 0
    config.data.prefetch = 0
    config.tokenizer.path = str(directory / "t.model")
    return make_loader(config, kind=Kind.VIDEO, groups=1, group_size=clips, rows=[0])


def make_corpora(directory: Path, *, clips: int, size: tuple[int, int], seconds: int) -> None:
    """Writes clips and annotations under `directory`, packed as `jpeg/` and `mp4/`."""
    (directory / "media").mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines, captions = [], []
    for clip in range(clips):
        make_clip(directory / "media" / f"{clip}.mp4", size, seconds, rng)
        text = f"Texture {clip} drifts over a still one. It is seen for {seconds} seconds."
        captions.append(text)
        box = [size[1] / 4, size[0] / 4, size[1] / 2, size[0] / 2]
        instances = [
            {"id": i, "caption": text, "boxes": [[0, *box], [30 * seconds - 1, *box]]}
            for i in range(4)
        ]
        line = {"id": str(clip), "media": f"{clip}.mp4", "kind": "video", "caption": text}
        lines.append(json.dumps(line | {"instances": instances}))
    annotations = directory / "annotations.jsonl"
    annotations.write_text("\n".join(lines))
    (directory / "t.model").write_bytes(train_sentencepiece(captions, 400))
    for encoding in ("jpeg", "mp4"):
        out, options = str(directory / encoding), Options(encoding=encoding)
        pack(str(annotations), str(directory / "media"), out, options=options, processes=2)


def make_clip(path: Path, size: tuple[int, int], seconds: int, rng: np.random.Generator) -> None:
    """A textured patch that drifts over a textured ground: motion and detail of a real scene."""
    ground, patch = texture(size, rng), texture((size[0] // 2, size[1] // 2), rng)
    frames = 30 * seconds
    options = {"crf": "23", "preset": "veryfast"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = size[1], size[0], "yuv420p"
        for index in range(frames):
            frame = np.roll(ground, index, axis=1)
            y, x = (index * (s // 2) // frames for s in size)
            frame[y : y + patch.shape[0], x : x + patch.shape[1]] = patch
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def texture(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """uint8 [h, w, 3]: noise at all scales, falling off with frequency as natural pictures do."""
    total = np.zeros((*size, 3))
    for cells in (4, 8, 16, 32, 64, 128, 256):
        noise = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        big = Image.fromarray(noise).resize((size[1], size[0]), Image.Resampling.BICUBIC)
        total += (np.asarray(big) / 255 - 0.5) * 300 / cells**0.6
    return (total + 128).clip(0, 255).astype(np.uint8)


def print_table(name: str, result: dict[str, dict[str, float]]) -> None:
    print(f"\n{name}")
    print(f"{'':28}{'clips/s/core':>14}{'CPU ms/clip':>14}{'wall ms/clip':>14}")
    for loop, times in result.items():
        if "cpu_share" in times:
            print(
                f"{loop}: {times['cpu_share']:.1%} by CPU, {times['wall_share']:.1%} by wall time"
            )
            continue
        cpu, wall = times["cpu_ms"], times["wall_ms"]
        print(f"{loop:28}{1e3 / cpu:14.1f}{cpu:14.2f}{wall:14.2f}")


if __name__ == "__main__":
    main()
