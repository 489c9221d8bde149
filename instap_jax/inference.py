"""A trained model of stage 'align' in a program of your own: `model = instap_jax.load(WORKDIR)`.

    video = model.encode_video(frames)              # uint8 [B, T, H, W, 3] -> [B, p]
    text = model.encode_text(["a red ball rolls"])  # -> [1, p]
    similarity = text @ video.T

Clips may differ in T and in size: those alike are computed together, in batches whose shapes are
rounded up, so that few programs are compiled however many clips come. Runs on whatever devices JAX
has, each with its share of a batch.

Letters: B clips, T frames, H W their pixels, n instances of a clip, s text length, p shared
embedding; inside a batch g groups (one a device), b clips and n instances of a group.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instap_jax import config_check, sharding
from instap_jax.data.tokenizer import Tokenizer
from instap_jax.errors import UserError
from instap_jax.evaluation import aligned
from instap_jax.evaluation.encoder import load_model
from instap_jax.models.instap import InstAP
from instap_jax.models.placement import flat
from instap_jax.train import checkpoint, inputs
from instap_jax.train.objectives import OBJECTIVES, term_weights

_CANVAS_STEP = 64  # pixels that heights and widths are rounded up to
DTYPES = ("float32", "bfloat16")

Clips = np.ndarray | Sequence[np.ndarray]


def load(path: str | Path, *, dtype: str | None = None, batch_size: int = 32) -> "Model":
    """The newest checkpoint of a run of stage 'align', ready to use.

    Args:
      path: its workdir.
      dtype: compute dtype, 'float32' or 'bfloat16'; None: as in training.
      batch_size: clips (or texts) computed together at most, over all devices.

    Raises:
      UserError: no such run, one of another stage, or a tokenizer other than in training.
    """
    workdir = Path(path)
    config = config_check.read(workdir)
    if config.stage != "align":
        raise UserError(f"{path} is a run of stage {config.stage!r}; load wants one of 'align'")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
    config.compute.dtype = dtype or config.compute.dtype
    step, meta = checkpoint.read_meta(str(workdir))
    tokenizer = inputs.run_tokenizer(config, meta, str(workdir))
    mesh = sharding.mesh_of_all()
    create = OBJECTIVES["align"].create
    graphdef, params = load_model(config, create, str(workdir), mesh, step=step)
    return Model(config, mesh, graphdef, params, tokenizer, step=step, batch_size=batch_size)


@dataclasses.dataclass(kw_only=True)
class _Item:
    """One clip of a call: uint8 [T, H, W, 3], its text [s], its instances [n, ...]."""

    frames: np.ndarray
    text: np.ndarray
    boxes: np.ndarray
    present: np.ndarray
    instance_text: np.ndarray


class Model:
    """Embeds clips, instances and texts, and matches them; made by `load`.

    Attributes:
      config: of the run. step: of the checkpoint.
      batch_size: clips or texts computed together at most.
    """

    def __init__(
        self,
        config: ConfigDict,
        mesh: Mesh,
        graphdef: nnx.GraphDef,
        params: nnx.State,
        tokenizer: Tokenizer,
        *,
        step: int,
        batch_size: int,
    ):
        self.config, self.step = config, step
        self._mesh, self._params = mesh, params
        self._shards = sharding.data_shards(mesh)
        self.batch_size = max(batch_size, self._shards)
        self._tokenizer = tokenizer
        self._nothing = np.zeros((0, config.align.projection), np.float32)
        self._no_text = np.zeros(config.tokenizer.length, np.int32)

        def compile(function: Callable[[InstAP, Any], jax.Array]):
            return jax.jit(
                lambda params, batch: function(nnx.merge(graphdef, params), batch),
                out_shardings=sharding.replicated(mesh),
            )

        self._embed_text = compile(aligned.embed_texts)
        self._embed_video = compile(self._video)
        self._embed_instances = compile(self._instances)
        self._match = compile(self._matched)
        self._match_instances = compile(self._matched_instances)

    def encode_video(self, frames: Clips) -> np.ndarray:
        """Embeds whole clips; an image is a clip of one frame.

        Args:
          frames: uint8 [B, T, H, W, 3] RGB, or B arrays [T, H, W, 3] of any T and size.

        Returns:
          float32 [B, p], l2-normalised.

        Raises:
          ValueError: frames of another shape or dtype.
        """
        items = self._items(frames)
        return self._per_clip(self._embed_video, items) if items else self._nothing

    def encode_instances(
        self, frames: Clips, boxes: Sequence[np.ndarray], present: Sequence | None = None
    ) -> list[np.ndarray]:
        """Embeds instances: their crops, after these have looked at their scenes, (5)-(7).

        Args:
          frames: as in `encode_video`.
          boxes: B arrays float [n, T, 4], x0 y0 x1 y1 as fractions of the picture; n may be 0.
          present: B arrays bool [n, T], the frames in which the instance is in the picture, at
            least one of them; the boxes of the others are not looked at. None: all.

        Returns:
          B arrays float32 [n, p], l2-normalised.

        Raises:
          ValueError: shapes that do not belong together, boxes in pixels, or an instance that is
            present nowhere.
        """
        items = self._items(frames, boxes, present)
        return self._per_instance(self._embed_instances, items, self._nothing)

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """B texts, cut to `config.tokenizer.length` tokens -> float32 [B, p], l2-normalised."""
        ids, found = self._ids(texts), []
        for start in range(0, len(ids), self.batch_size):
            part = ids[start : start + self.batch_size]
            padded = np.zeros((self._shards * _round_up(len(part), self._shards), ids.shape[1]))
            padded[: len(part)] = part
            out = self._run(self._embed_text, padded.astype(np.int32))
            found.append(out[: len(part)])
        return np.concatenate(found) if found else self._nothing

    def match(self, frames: Clips, texts: Sequence[str]) -> np.ndarray:
        """The probability that clip i and text i belong together, by the fusion layers, (3).

        Args:
          frames: as in `encode_video`. texts: B of them.

        Returns:
          float32 [B].

        Raises:
          ValueError: the run did not train (3), or other numbers of clips and texts.
        """
        self._require("vtm")
        items = self._items(frames)
        for item, ids in zip(items, self._ids(texts), strict=True):
            item.text = ids
        return self._per_clip(self._match, items) if items else np.zeros(0, np.float32)

    def match_instances(
        self,
        frames: Clips,
        boxes: Sequence[np.ndarray],
        texts: Sequence[Sequence[str]],
        present: Sequence | None = None,
    ) -> list[np.ndarray]:
        """As `match`, of instances and sentences, (9).

        Args:
          frames, boxes, present: as in `encode_instances`. texts: B sequences of n texts.

        Returns:
          B arrays float32 [n].

        Raises:
          ValueError: the run did not train (9), or as `encode_instances`.
        """
        self._require("inst_vtm")
        items = self._items(frames, boxes, present)
        for item, sentences in zip(items, texts, strict=True):
            if len(sentences) != len(item.boxes):
                raise ValueError(f"{len(item.boxes)} instances and {len(sentences)} texts")
            item.instance_text = self._ids(sentences)
        return self._per_instance(self._match_instances, items, np.zeros(0, np.float32))

    def _require(self, term: str) -> None:
        if term not in term_weights(self.config):
            raise ValueError(
                f"this run did not train the match head: its config.align.{term} counts nothing"
            )

    def _video(self, model: InstAP, batch) -> jax.Array:
        return aligned.embed_scenes(model, aligned.see_scenes(self.config, model, batch))

    def _instances(self, model: InstAP, batch) -> jax.Array:
        tokens = aligned.see_scenes(self.config, model, batch)
        return aligned.embed_instances(self.config, model, batch, tokens).embedding

    def _matched(self, model: InstAP, batch) -> jax.Array:
        tokens = aligned.see_scenes(self.config, model, batch)
        return aligned.match(model, flat(batch["text"]), tokens)

    def _matched_instances(self, model: InstAP, batch) -> jax.Array:
        tokens = aligned.see_scenes(self.config, model, batch)
        crop = aligned.embed_instances(self.config, model, batch, tokens).crop
        return aligned.match(model, flat(batch["instance_text"]), crop[:, None])

    def _ids(self, texts: Sequence[str]) -> np.ndarray:
        if isinstance(texts, str):
            raise ValueError("texts must be a sequence of texts, not one")
        length = self.config.tokenizer.length
        ids = [self._tokenizer.encode(text, length) for text in texts]
        return np.array(ids, np.int32).reshape(-1, length)

    def _items(self, frames: Clips, boxes=None, present=None) -> list[_Item]:
        clips = [_checked(clip) for clip in frames]
        items = []
        if boxes is None:
            boxes = [np.zeros((0, len(clip), 4), np.float32) for clip in clips]
        if present is None:
            present = [np.ones(np.shape(b)[:2], bool) for b in boxes]
        for clip, b, here in zip(clips, boxes, present, strict=True):
            b, here = np.asarray(b, np.float32), np.asarray(here, bool)
            if b.shape[1:] != (len(clip), 4) or b.shape[:2] != here.shape:
                raise ValueError(
                    f"boxes {b.shape}, present {here.shape}: must be [n, {len(clip)}, 4] and "
                    f"[n, {len(clip)}]"
                )
            if not ((b > -1) & (b < 2)).all():
                raise ValueError("boxes must be fractions of the picture, not pixels, and finite")
            if not here.any(axis=1).all():
                raise ValueError("an instance must be present in at least one frame")
            sentences = np.tile(self._no_text, (len(b), 1))
            item = _Item(
                frames=clip, text=self._no_text, boxes=b, present=here, instance_text=sentences
            )
            items.append(item)
        return items

    def _per_clip(self, function, items: list[_Item]) -> np.ndarray:
        rows: dict[int, np.ndarray] = {}
        for members, batch, _ in self._batches(items):
            rows |= zip(members, self._run(function, batch))  # places beyond the last are empty
        return np.stack([rows[i] for i in range(len(items))])

    def _per_instance(self, function, items: list[_Item], nothing) -> list[np.ndarray]:
        found = [nothing for _ in items]
        wanted = [i for i, item in enumerate(items) if len(item.boxes)]
        for members, batch, slots in self._batches([items[i] for i in wanted]):
            out = self._run(function, batch)
            for member, mine in zip(members, slots):
                found[wanted[member]] = out[mine]
        return found

    def _run(self, function, batch) -> np.ndarray:
        with jax.set_mesh(self._mesh):
            placed = jax.device_put(batch, sharding.batch_sharding(self._mesh))
            return jax.device_get(function(self._params, placed))

    def _batches(self, items: list[_Item]) -> Iterator[tuple]:
        """Clips alike, a batch at a time: (indices, batch, slots of each one's instances)."""
        alike: dict[tuple, list[int]] = collections.defaultdict(list)
        for index, item in enumerate(items):
            frames, *size, _ = item.frames.shape
            alike[frames, *(-(-side // _CANVAS_STEP) * _CANVAS_STEP for side in size)].append(index)
        for (_, *canvas), members in alike.items():
            for start in range(0, len(members), self.batch_size):
                chosen = members[start : start + self.batch_size]
                yield chosen, *_pack([items[i] for i in chosen], tuple(canvas), self._shards)


def _pack(
    items: list[_Item], canvas: tuple[int, int], groups: int
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """A batch of `types.Batch` as far as it is read.

    Returns:
      The batch [g, ...], item i at place i of g * b, and of every item its slots in g * n.
    """
    size, frames = _round_up(len(items), groups), len(items[0].frames)
    counts = [sum(len(i.boxes) for i in items[g * size : (g + 1) * size]) for g in range(groups)]
    budget = _round_up(max(counts), 1)
    length = len(items[0].text)
    batch = {
        "frames": np.zeros((groups, size, frames, *canvas, 3), np.uint8),
        "extent": np.zeros((groups, size, 2), np.float32),
        "text": np.zeros((groups, size, length), np.int32),
        "boxes": np.zeros((groups, budget, frames, 4), np.float32),
        "present": np.zeros((groups, budget, frames), bool),
        "parent": np.zeros((groups, budget), np.int32),
        "instance_text": np.zeros((groups, budget, length), np.int32),
    }
    slots, used = [], [0] * groups
    for place, item in enumerate(items):
        g, b = divmod(place, size)
        height, width = item.frames.shape[1:3]
        batch["frames"][g, b, :, :height, :width] = item.frames
        batch["extent"][g, b] = height / canvas[0], width / canvas[1]
        batch["text"][g, b] = item.text
        mine = np.arange(used[g], used[g] + len(item.boxes))
        used[g] += len(mine)
        for name in ("boxes", "present", "instance_text"):
            batch[name][g, mine] = getattr(item, name)
        batch["parent"][g, mine] = b
        slots.append(g * budget + mine)
    return batch, slots


def _checked(clip: np.ndarray) -> np.ndarray:
    clip = np.asarray(clip)
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or 0 in clip.shape:
        raise ValueError(f"a clip is uint8 [T, H, W, 3], not {clip.dtype} {list(clip.shape)}")
    return clip


def _round_up(count: int, parts: int) -> int:
    """A part's share of the count, rounded up to a power of two: few shapes, few compilations."""
    share = max(1, -(-count // parts))
    return 1 << (share - 1).bit_length()
