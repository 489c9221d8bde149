"""The embedded set as a directory: suites drawn by several processes, written aside, renamed."""

import collections
import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from instap_jax.aside import written_aside
from instap_jax.data.processes import pool
from instap_jax.data.schema import sample_to_json
from instap_jax.data.synthetic.samples import Drawn, Format, Suite, draw_sample
from instap_jax.errors import UserError
from instap_jax.types import Kind

_CHUNK = 8  # samples handed to a process at once
_MIN_SIDE, _MAX_SIDE, _MAX_ASPECT = 48, 4096, 2.5
_MIN_FRAMES, _MAX_FRAMES = 8, 1024
_MAX_SAMPLES = 1_000_000  # of a suite; they are listed before the first is drawn


def suites(
    *, train_videos: int, train_images: int, suite_size: int, val_size: int
) -> tuple[Suite, ...]:
    """The suites of the set, with the paper's roles.

    Raises:
      UserError: a negative or absurd size, or nothing to draw at all.
    """
    for name, count in locals().copy().items():
        if count < 0:
            raise UserError(f"--{name}={count}: a number of samples is 0 or more")
        if count > _MAX_SAMPLES:
            raise UserError(f"--{name}={count}: at most {_MAX_SAMPLES:,} samples")
    if not any((train_videos, train_images, suite_size, val_size)):
        raise UserError("nothing to render: all of the suites' sizes are 0")
    video, image = Kind.VIDEO, Kind.IMAGE
    return (
        Suite(name="train_video", split="train", kind=video, code=1, count=train_videos),
        Suite(name="train_image", split="train", kind=image, code=2, count=train_images),
        Suite(name="img_1k", split="img_1k", kind=image, code=3, count=suite_size),
        Suite(
            name="img_zero_1k", split="img_zero_1k", kind=image, code=4, count=suite_size,
            shifted=True,
        ),
        Suite(name="video_1k", split="video_1k", kind=video, code=5, count=suite_size),
        Suite(name="val_video", split="val_video", kind=video, code=6, count=val_size),
        Suite(name="val_img", split="val_img", kind=image, code=7, count=val_size),
    )  # fmt: skip


def check_format(form: Format) -> None:
    """Raises UserError where H.264 cannot hold the pictures or nothing could be seen in them."""
    for name in ("width", "height"):
        side = getattr(form, name)
        if not _MIN_SIDE <= side <= _MAX_SIDE:
            raise UserError(f"--{name}={side}: expected {_MIN_SIDE} to {_MAX_SIDE} pixels")
        if side % 2:
            raise UserError(f"--{name}={side}: H.264 (yuv420p) needs an even number of pixels")
    if max(form.width, form.height) > _MAX_ASPECT * min(form.width, form.height):
        raise UserError(
            f"--width={form.width} --height={form.height}: one side is more than {_MAX_ASPECT} "
            "times the other"
        )
    if not _MIN_FRAMES <= form.frames <= _MAX_FRAMES:
        raise UserError(
            f"--frames={form.frames}: expected {_MIN_FRAMES} to {_MAX_FRAMES}; motion needs frames"
        )
    if not 1 <= form.fps <= 240:
        raise UserError(f"--fps={form.fps}: expected 1 to 240 frames a second")


def generate(
    out: Path,
    parts: Sequence[Suite],
    form: Format,
    *,
    seed: int,
    processes: int,
    on_sample: Callable[[], None] = lambda: None,
) -> None:
    """Writes `out/annotations.jsonl` and `out/media/`; the bytes depend on no process count.

    Args:
      out: must not exist or be an empty directory. It appears complete or not at all.
      processes: 1 draws in this process.
      on_sample: called after every sample.

    Raises:
      UserError: `out` is in use, a value is out of range, or a suite is larger than the number of
        different captions allows.
    """
    check_format(form)
    if seed < 0:
        raise UserError(f"--seed={seed}: a seed is 0 or more")
    if processes < 1:
        raise UserError(f"--processes={processes}: expected 1 or more")
    with written_aside(out, "--out") as root:
        for folder in ("videos", "images"):
            (root / "media" / folder).mkdir(parents=True)
        with (root / "annotations.jsonl").open("w", encoding="utf-8") as annotations:
            for drawn in _draw_all(root / "media", parts, form, seed, processes):
                annotations.write(json.dumps(sample_to_json(drawn.sample)) + "\n")
                on_sample()


def _draw_all(
    root: Path, parts: Sequence[Suite], form: Format, seed: int, processes: int
) -> Iterator[Drawn]:
    """All samples in order, no text twice in a split.

    A sample that repeats an earlier one is drawn again here, in order, so the outcome is the same
    however many processes drew the first attempts.
    """
    tasks = [(suite, index) for suite in parts for index in range(suite.count)]
    draw = functools.partial(_draw_task, root, form, seed)
    used: dict[str, set] = {suite.split: set() for suite in parts}
    with _mapping(processes, len(tasks)) as mapping:
        for (suite, index), drawn in zip(tasks, mapping(draw, tasks)):
            keys = used[suite.split]
            while drawn is not None and (
                not keys.isdisjoint(drawn.keys) or len(set(drawn.keys)) < len(drawn.keys)
            ):
                drawn = draw_sample(root, suite, form, seed, index, drawn.attempt + 1)
            if drawn is None:
                raise UserError(
                    f"{suite.name}: no new caption could be found for sample {index + 1} of "
                    f"{suite.count}: ask for a smaller suite"
                )
            keys.update(drawn.keys)
            yield drawn


def _draw_task(root: Path, form: Format, seed: int, task: tuple[Suite, int]) -> Drawn | None:
    return draw_sample(root, task[0], form, seed, task[1])


def _draw_chunk(
    draw: Callable[[tuple[Suite, int]], Drawn | None], tasks: Sequence[tuple[Suite, int]]
) -> list[Drawn | None]:
    return [draw(task) for task in tasks]


@contextlib.contextmanager
def _mapping(processes: int, tasks: int):
    """An ordered `map` over this many processes."""
    if processes == 1 or tasks <= _CHUNK:
        yield map
        return
    with pool(processes) as submit:
        yield functools.partial(_in_order, submit)


def _in_order(
    submit: Callable[..., Future], draw: Callable, tasks: Sequence[tuple[Suite, int]]
) -> Iterator[Drawn | None]:
    chunks = (tasks[i : i + _CHUNK] for i in range(0, len(tasks), _CHUNK))
    try:
        pending = collections.deque(submit(_draw_chunk, draw, chunk) for chunk in chunks)
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that renders died (out of memory, or killed); try fewer --processes"
        ) from error
