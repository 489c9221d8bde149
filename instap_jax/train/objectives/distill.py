"""Stage 'distill': the paper's stage 1, masked video distillation, loss (1)."""

import jax
from flax import nnx
from ml_collections import ConfigDict

from instap_jax import losses
from instap_jax.models import preprocess
from instap_jax.models.distillation import Student
from instap_jax.models.placement import flat
from instap_jax.models.teacher import ClipVision
from instap_jax.train.objectives.base import LossResult, Objective, compute_options
from instap_jax.train.objectives.views import draw_view, guide
from instap_jax.types import Batch


def _create(config: ConfigDict, rngs: nnx.Rngs) -> Student:
    return Student(config, **compute_options(config), rngs=rngs)


def create_teacher(config: ConfigDict, rngs: nnx.Rngs) -> ClipVision:
    """The frozen teacher g, without its text tower."""
    return ClipVision(config.teacher, **compute_options(config), rngs=rngs)


def _loss(config, model: Student, teacher: ClipVision, batch: Batch, key) -> LossResult:
    view_key, mask_key, drop_key = jax.random.split(key, 3)
    view = draw_view(config, batch, view_key)
    guidance = guide(
        config,
        teacher,
        view.render(batch, config.teacher.image_size, preprocess.CLIP),
        mask_key,
        ratio=config.distill.mask_ratio,
        taps=config.distill.layers,
    )
    video = view.render(batch, config.vision.image_size, preprocess.IMAGENET)
    student = model(video, visible=guidance.visible, key=drop_key)
    loss = losses.distillation_loss(student, guidance.target, flat(batch["sample_valid"]))
    return loss, {}


DISTILL = Objective(
    create=_create, create_frozen=create_teacher, frozen_path=("visual",), loss=_loss
)
