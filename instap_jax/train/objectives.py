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
from instap_jax.models.teacher import ClipModel, ClipVision
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


def _views(config: ConfigDict, batch: Batch, key: jax.Array, *sizes: int) -> list[jax.Array]:
    """One random view of every clip, at each of `sizes` pixels, normalised: [B, T, S, S, 3]."""
    frames, extent = _flat(batch["frames"]), _flat(batch["extent"])
    boxes, flip = preprocess.random_views(key, extent, _flat(batch["keep_side"]), config.data)
    return [
        preprocess.normalise(preprocess.cut_view(frames, extent, boxes, flip, size))
        for size in sizes
    ]


def _flat(array: jax.Array) -> jax.Array:
    """[g, b, ...] -> [g * b, ...]; rows stay on their device."""
    return array.reshape((-1, *array.shape[2:]))


# Stage 'teacher': a small CLIP, equation (2) between single frames and one sentence.


def _create_clip(config: ConfigDict, rngs: nnx.Rngs) -> ClipModel:
    return ClipModel(config, **compute_options(config), rngs=rngs)


def _clip_loss(config, model: ClipModel, frozen, batch: Batch, key) -> LossResult:
    del frozen
    view_key, text_key = jax.random.split(key)
    (video,) = _views(config, batch, view_key, config.teacher.image_size)
    images = video.reshape((-1, *video.shape[2:]))  # [B * T, S, S, 3]
    frames = video.shape[1]
    image = model.visual(images).embedding
    image = image.reshape((-1, frames, image.shape[-1])).mean(1)
    text = model.encode_text(_flat(batch["text"]), key=text_key)
    out = losses.contrastive_loss(
        image,
        text,
        model.temperature(),
        valid=_flat(batch["sample_valid"]),
        video_ids=_flat(batch["media_hash"]),
        text_ids=_flat(batch["text_hash"]),
    )
    return out.loss, {
        "accuracy_v2t": out.accuracy_v2t,
        "accuracy_t2v": out.accuracy_t2v,
        "temperature": model.temperature(),
    }


# Stage 'distill': PAPER stage 1, masked video distillation, loss (1).


def _create_student(config: ConfigDict, rngs: nnx.Rngs) -> Student:
    return Student(config, **compute_options(config), rngs=rngs)


def _create_teacher(config: ConfigDict, rngs: nnx.Rngs) -> ClipVision:
    return ClipVision(config.teacher, **compute_options(config), rngs=rngs)


def _distill_loss(config, model: Student, teacher: ClipVision, batch: Batch, key) -> LossResult:
    view_key, mask_key, drop_key = jax.random.split(key, 3)
    sizes = config.vision.image_size, config.teacher.image_size
    student_video, teacher_video = _views(config, batch, view_key, *sizes)
    clips, frames = teacher_video.shape[:2]
    target = teacher(
        teacher_video.reshape((-1, *teacher_video.shape[2:])), taps=config.distill.layers
    )
    target = jax.lax.stop_gradient(target)
    visible = choose_visible(config, mask_key, target, clips, frames)
    student = model(student_video, visible=visible, key=drop_key)  # [K, B, V, p]
    taps = target.taps.reshape((target.taps.shape[0], clips, -1, target.taps.shape[-1]))
    taps = jnp.take_along_axis(taps, visible[None, :, :, None], axis=2)
    loss = losses.distillation_loss(student, taps, _flat(batch["sample_valid"]))
    return loss, {"cosine": 1 - loss / 2}


def choose_visible(config: ConfigDict, key: jax.Array, target, clips: int, frames: int):
    """Indices int32 [B, V] into the T * N tokens of a clip that the student sees (PAPER 3)."""
    score = {"cls": target.cls_attention, "received": target.received}[config.distill.mask_score]
    return masking.attention_guided_visible(
        key,
        score.reshape((clips, frames, -1)),
        ratio=config.distill.mask_ratio,
        choice=config.distill.mask_choice,
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
