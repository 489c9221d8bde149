"""What each stage trains: its model, its frozen model, and its loss. All else is shared."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from instap_jax import losses, masking
from instap_jax.models import preprocess
from instap_jax.models.distillation import Student
from instap_jax.models.teacher import ClipModel, ClipVision, ClipVisionOutput
from instap_jax.types import Batch

LossResult = tuple[jax.Array, dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """A stage of training.

    Attributes:
      create: (config, rngs) -> the model whose parameters are trained.
      create_frozen: (config, rngs) -> the model that is only read; an empty module where none is.
      frozen_path: path, inside the checkpoint named by `config.teacher.checkpoint`, of the frozen
        model's parameters.
      loss: (config, model, frozen, batch, key) -> (scalar to minimise, float32 scalars to log).
    """

    create: Callable[[ConfigDict, nnx.Rngs], nnx.Module]
    create_frozen: Callable[[ConfigDict, nnx.Rngs], nnx.Module]
    frozen_path: tuple[str, ...] = ()
    loss: Callable[[ConfigDict, nnx.Module, nnx.Module, Batch, jax.Array], LossResult]


def objective(config: ConfigDict) -> Objective:
    """The objective of `config.stage`."""
    return OBJECTIVES[config.stage]


def compute_options(config: ConfigDict) -> dict:
    """Keyword arguments that every model takes from `config.compute`."""
    return {"dtype": jnp.dtype(config.compute.dtype), "remat": config.compute.remat}


def _view(config: ConfigDict, batch: Batch, key: jax.Array) -> Callable[..., jax.Array]:
    """Draws one random view for each clip; returns a function that renders it.

    The function takes (size in pixels, normalisation constants) and gives float32 [B, T, S, S, 3],
    so that student and teacher see the same part of the picture, each cut from the full frames.
    """
    frames, extent = _flat(batch["frames"]), _flat(batch["extent"])
    boxes, flip = preprocess.random_views(key, extent, _flat(batch["keep_side"]), config.data)
    boxes = jnp.broadcast_to(boxes[:, None], (*frames.shape[:2], 4))

    def render(size: int, constants) -> jax.Array:
        pixels = preprocess.crop_and_resize(frames, boxes, extent, size, flip=flip)
        return preprocess.normalise(pixels, constants)

    return render


def _flat(array: jax.Array) -> jax.Array:
    """[g, b, ...] -> [g * b, ...]; rows stay on their device."""
    return array.reshape((-1, *array.shape[2:]))


# Stage 'teacher': a small CLIP, equation (2) between single frames and one sentence.


def _create_clip(config: ConfigDict, rngs: nnx.Rngs) -> ClipModel:
    return ClipModel(config, **compute_options(config), rngs=rngs)


def _clip_loss(config, model: ClipModel, frozen, batch: Batch, key) -> LossResult:
    del frozen
    view_key, text_key = jax.random.split(key)
    video = _view(config, batch, view_key)(config.teacher.image_size, preprocess.CLIP)
    out = losses.contrastive_loss(
        embed_frames(model, video),
        model.embed_texts(_flat(batch["text"]), key=text_key),
        model.tau(),
        valid=_flat(batch["sample_valid"]),
        video_ids=_flat(batch["media_hash"]),
        text_ids=_flat(batch["text_hash"]),
    )
    return out.loss, {
        "accuracy_v2t": out.accuracy_v2t,
        "accuracy_t2v": out.accuracy_t2v,
        "temperature": model.tau(),
    }


def embed_frames(model: ClipModel, video: jax.Array) -> jax.Array:
    """[B, T, S, S, 3] -> [B, p]: CLIP sees frames one by one; a clip is the mean of its frames."""
    clips, frames = video.shape[:2]
    images = model.embed_images(video.reshape((-1, *video.shape[2:])))
    return images.reshape((clips, frames, -1)).mean(1)


# Stage 'distill': PAPER stage 1, masked video distillation, loss (1).


def _create_student(config: ConfigDict, rngs: nnx.Rngs) -> Student:
    return Student(config, **compute_options(config), rngs=rngs)


def _create_teacher(config: ConfigDict, rngs: nnx.Rngs) -> ClipVision:
    return ClipVision(config.teacher, **compute_options(config), rngs=rngs)


def _distill_loss(config, model: Student, teacher: ClipVision, batch: Batch, key) -> LossResult:
    view_key, mask_key, drop_key = jax.random.split(key, 3)
    view = _view(config, batch, view_key)
    video = view(config.vision.image_size, preprocess.IMAGENET)
    clips, frames = video.shape[:2]
    images = view(config.teacher.image_size, preprocess.CLIP)
    seen = teacher(
        images.reshape((-1, *images.shape[2:])), taps=config.distill.layers, attention=True
    )
    seen = jax.lax.stop_gradient(seen)
    visible = choose_visible(config, mask_key, seen, clips, frames)
    target = seen.taps.reshape((seen.taps.shape[0], clips, -1, seen.taps.shape[-1]))
    target = jnp.take_along_axis(target, visible[None, :, :, None], axis=2)
    student = model(video, visible=visible, key=drop_key)
    loss = losses.distillation_loss(student, target, _flat(batch["sample_valid"]))
    return loss, {}


def choose_visible(
    config: ConfigDict, key: jax.Array, seen: ClipVisionOutput, clips: int, frames: int
) -> jax.Array:
    """The visible set Omega, int32 [B, V], of T * N tokens from the teacher's attention (PAPER 3).

    Frame by frame, as UMT does: every frame keeps the same number of tokens.
    """
    score = {"cls": seen.cls_attention, "received": seen.received}[config.distill.mask_score]
    score = score.reshape((clips, -1))
    return masking.choose_visible(
        key,
        score,
        masking.visible_count(score.shape[1], config.distill.mask_ratio, frames=frames),
        config.distill.mask_choice,
        frames=frames,
    )


def _nothing(config: ConfigDict, rngs: nnx.Rngs) -> nnx.Module:
    del config, rngs
    return nnx.Dict()


OBJECTIVES = {
    "teacher": Objective(create=_create_clip, create_frozen=_nothing, loss=_clip_loss),
    "distill": Objective(
        create=_create_student,
        create_frozen=_create_teacher,
        frozen_path=("visual",),
        loss=_distill_loss,
    ),
}
