"""What the student sees of a batch: a random view of every clip, and its visible tokens."""

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from instap_jax import masking
from instap_jax.models import preprocess
from instap_jax.models.placement import flat
from instap_jax.models.teacher import ClipVision, ClipVisionOutput
from instap_jax.types import Batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """One view for each clip.

    Attributes:
      boxes: float32 [g, b, 4], part of the picture, as fractions of it.
      flip: bool [g, b], mirrored left to right.
    """

    boxes: jax.Array
    flip: jax.Array

    def render(self, batch: Batch, size: int, constants) -> jax.Array:
        """Cuts the view out of the batch's frames.

        Student and teacher each call this, so that they see the same part of the picture, each
        cut from the full frames.

        Args:
          size: S in pixels.
          constants: of the normalisation, see `preprocess.normalise`.

        Returns:
          float32 [g * b, T, S, S, 3].
        """
        frames = flat(batch["frames"])
        boxes = jnp.broadcast_to(flat(self.boxes)[:, None], (*frames.shape[:2], 4))
        pixels = preprocess.crop_and_resize(
            frames, boxes, flat(batch["extent"]), size, flip=flat(self.flip)
        )
        return preprocess.normalise(pixels, constants)


def draw_view(config: ConfigDict, batch: Batch, key: jax.Array) -> View:
    """Draws one random view for each clip, as `config.data` says."""
    boxes, flip = preprocess.random_views(key, batch["extent"], batch["keep_side"], config.data)
    return View(boxes=boxes, flip=flip)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
    """What the frozen teacher says about a view, without gradient.

    Attributes:
      visible: int32 [B, V], the tokens the student may see; None: all T * N.
      target: [K, B, V, p], the teacher's features of these; None without `taps`.
    """

    visible: jax.Array | None
    target: jax.Array | None


def guide(
    config: ConfigDict,
    teacher: ClipVision,
    images: jax.Array,
    key: jax.Array,
    *,
    ratio: float,
    taps: int,
) -> Guidance:
    """Masks a batch of clips by the teacher's attention, and reads the teacher's features.

    The teacher runs only where something is read from it: no taps and no attention-guided mask
    (`distill.mask_score` 'random', or nothing masked) leave it alone.

    Args:
      images: float [B, T, S, S, 3], normalised with CLIP's constants.
      ratio: of the mask, rho; 0 leaves all tokens visible.
      taps: the teacher's last layers to read.
    """
    clips, frames = images.shape[:2]
    attention = bool(ratio) and config.distill.mask_score != "random"
    seen = None
    if taps or attention:
        seen = teacher(flat(images), taps=taps, attention=attention)
        seen = jax.lax.stop_gradient(seen)
    visible = None
    if ratio:
        patches = (config.vision.image_size // config.vision.patch) ** 2
        scores = _scores(config, key, seen, clips, frames * patches)
        visible = choose_visible(config, key, scores, frames=frames, ratio=ratio)
    target = None
    if taps:
        target = seen.taps.reshape((taps, clips, -1, seen.taps.shape[-1]))
        if visible is not None:
            target = jnp.take_along_axis(target, visible[None, :, :, None], axis=2)
    return Guidance(visible=visible, target=target)


def _scores(
    config: ConfigDict, key: jax.Array, seen: ClipVisionOutput | None, clips: int, tokens: int
) -> jax.Array:
    """float32 [B, T * N], the teacher's score of every token; noise for 'random'."""
    if config.distill.mask_score == "random":
        return jax.random.uniform(jax.random.fold_in(key, 1), (clips, tokens))
    score = {"cls": seen.cls_attention, "received": seen.received}[config.distill.mask_score]
    return score.reshape((clips, tokens))


def choose_visible(
    config: ConfigDict, key: jax.Array, scores: jax.Array, *, frames: int, ratio: float
) -> jax.Array:
    """The visible set Omega, int32 [B, V], by scores [B, T * N].

    Frame by frame, as UMT does: every frame keeps the same number of tokens.
    """
    return masking.choose_visible(
        key,
        scores,
        masking.visible_count(scores.shape[1], ratio, frames=frames),
        config.distill.mask_choice,
        frames=frames,
    )
