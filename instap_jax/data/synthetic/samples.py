"""One sample of the embedded set: scene, captions, media file and annotation."""

import dataclasses
import enum
import itertools
from pathlib import Path

import numpy as np

from instap_jax.data.synthetic import backgrounds, captions, media
from instap_jax.data.synthetic.captions import Description
from instap_jax.data.synthetic.facts import RELATIONS, Observation
from instap_jax.data.synthetic.render import Rendering, render
from instap_jax.data.synthetic.scene import Scene, draw_pool, draw_scene
from instap_jax.types import Instance, Kind, Sample

SOURCE = "embedded"
_NEIGHBOURS = 4  # consecutive samples that draw on one pool of looks
_TRIES = 200  # scenes drawn before a sample counts as impossible


class Stream(enum.IntEnum):
    """What a random stream is for; the last of its seeds."""

    SCENE = 1
    POOL = 2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A set of samples of one kind and role.

    Attributes:
      code: names the suite's random streams.
      shifted: whether it uses the shifted palette, textures and backgrounds.
    """

    name: str
    split: str
    kind: Kind
    code: int
    count: int
    shifted: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """Pixels of every picture; frames and frames per second of every clip."""

    width: int = 128
    height: int = 96
    frames: int = 24
    fps: int = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Drawn:
    """A sample whose media file is written.

    Attributes:
      attempt: which scene of the sample's series it is.
      keys: what must not occur twice in a split: the texts, and what they say.
    """

    sample: Sample
    attempt: int
    keys: tuple


def draw_sample(
    root: Path, suite: Suite, form: Format, seed: int, index: int, first: int = 0
) -> Drawn | None:
    """Draws sample `index` of a suite and writes its media file below `root`.

    Everything comes from (seed, suite, index, attempt): neither the suite's size nor what was
    drawn before matters. Scenes whose captions cannot be told apart are skipped.

    Args:
      first: the first scene of the sample's series to try.

    Returns:
      None where no usable scene came in `_TRIES` attempts.
    """
    still = suite.kind is Kind.IMAGE
    frames = 1 if still else form.frames
    short = min(form.width, form.height)
    extent = (form.width / short, form.height / short)
    readable = backgrounds.readable(suite.shifted)
    pool_seed = [seed, suite.code, index // _NEIGHBOURS, 0, Stream.POOL]
    pool = draw_pool(np.random.default_rng(pool_seed), suite.shifted)
    for attempt in range(first, _TRIES):
        rng = np.random.default_rng([seed, suite.code, index, attempt, Stream.SCENE])
        scene = draw_scene(rng, pool, readable, frames=frames, extent=extent, shifted=suite.shifted)
        if scene is None:
            continue
        rendering = render(scene, form.height, form.width)
        if not _well_seen(scene, rendering):
            continue
        seen = Observation(scene, rendering)
        descriptions = captions.describe_instances(rng, seen)
        if descriptions is None:
            continue
        sentences = captions.describe_scene(rng, seen)
        sample = _annotate(suite, index, scene, rendering, descriptions, sentences)
        pixels = rendering.frames(scene, form.height, form.width)
        if still:
            media.write_still(root / sample.media, pixels[0])
        else:
            media.write_clip(root / sample.media, pixels, form.fps)
        return Drawn(sample, attempt, _keys(scene, descriptions, sample))
    return None


def media_path(suite: Suite, index: int) -> str:
    """Relative to the media root."""
    folder, ending = ("images", "jpg") if suite.kind is Kind.IMAGE else ("videos", "mp4")
    return f"{folder}/{suite.name}-{index:06d}.{ending}"


def _well_seen(scene: Scene, rendering: Rendering) -> bool:
    """Whether every entity is mostly visible for a good part of the time."""
    for entity, present, share in zip(scene.entities, rendering.present, rendering.share):
        enough = 0.4 if entity.motion.event != "none" else 0.7
        if np.mean(share > 0.5) < enough:
            return False
        # Coming in is seen as coming in: absent at first, present at last.
        if entity.motion.event == "enters" and (present[0] or not present[-1]):
            return False
        if entity.motion.event == "leaves" and (present[-1] or not present[0]):
            return False
    return True


def _keys(scene: Scene, descriptions: list[Description], sample: Sample) -> tuple:
    keys = [("scene", captions.summary_key(scene)), ("global", *sample.captions)]
    for description in descriptions:
        keys += [("text", description.text), ("facts", description.key)]
    return tuple(keys)


def _annotate(
    suite: Suite,
    index: int,
    scene: Scene,
    rendering: Rendering,
    descriptions: list[Description],
    sentences: tuple[str, ...],
) -> Sample:
    background = scene.background
    return Sample(
        id=f"{suite.name}-{index:06d}",
        media=media_path(suite, index),
        kind=suite.kind,
        split=suite.split,
        source=SOURCE,
        captions=(" ".join(sentences),),
        unit_boxes=False,
        instances=tuple(
            _instance(scene, rendering, description, i)
            for i, description in enumerate(descriptions)
        ),
        line=0,
        extra={
            "label": background.kind,
            "attributes": {
                "background": background.kind,
                "tone": background.tone,
                "shifted": scene.shifted,
                "entities": len(scene.entities),
            },
        },
    )


def _instance(scene: Scene, rendering: Rendering, description: Description, i: int) -> Instance:
    frames = np.flatnonzero(rendering.present[i])
    # Before the first and after the last box it is absent anyway: only gaps need naming.
    absent = [(int(a) + 1, int(b) - 1) for a, b in itertools.pairwise(frames) if b > a + 1]
    frames = _needed(frames, rendering.boxes[i])
    return Instance(
        id=str(i),
        category=scene.entities[i].look.shape,
        captions=(description.text,),
        frames=frames.astype(np.int32),
        boxes=rendering.boxes[i, frames].astype(np.float32),
        absent=tuple(absent),
        extra={"attributes": _attributes(scene, description, i)},
    )


def _needed(frames: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Of the frames with a box those that interpolation cannot give back: rest needs no rows."""
    keep = np.ones(len(frames), bool)
    rest = (boxes[frames[1:]] == boxes[frames[:-1]]).all(-1) & (np.diff(frames) == 1)
    keep[1:-1] = ~(rest[1:] & rest[:-1])
    return frames[keep]


def _attributes(scene: Scene, description: Description, i: int) -> dict:
    """Ground truth of an instance; of motion, None in a still picture."""
    entity = scene.entities[i]
    motion = dataclasses.asdict(entity.motion)
    if scene.frames == 1:
        motion = dict.fromkeys(motion)
    relation = next((fact for fact in description.facts if fact.kind in RELATIONS), None)
    position = next((fact for fact in description.facts if fact.kind == "position"), None)
    when, zone = position.value if position else (None, None)
    return {
        **dataclasses.asdict(entity.look),
        "size": entity.size,
        **motion,
        "relation": relation and relation.kind,
        "relation_to": None if relation is None else str(relation.other),
        "position": zone,
        "position_when": when,
        "twins": [
            str(j) for j, other in enumerate(scene.entities) if j != i and other.look == entity.look
        ],
        "facts": [
            [fact.kind, fact.value, None if fact.other is None else str(fact.other)]
            for fact in description.facts
        ],
    }
