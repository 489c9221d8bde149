"""Stage 'teacher': a small CLIP, equation (2) between single frames and one sentence."""

import jax
from flax import nnx
from ml_collections import ConfigDict

from instap_jax import losses, sharding
from instap_jax.models import preprocess
from instap_jax.models.placement import flat
from instap_jax.models.teacher import ClipModel
from instap_jax.train.objectives.base import (
    LossResult,
    Objective,
    compute_options,
    nothing,
)
from instap_jax.train.objectives.views import draw_view
from instap_jax.types import Batch


def _create(config: ConfigDict, rngs: nnx.Rngs) -> ClipModel:
    return ClipModel(config, **compute_options(config), rngs=rngs)


def _loss(config, model: ClipModel, frozen, batch: Batch, key) -> LossResult:
    del frozen
    view_key, text_key = jax.random.split(key)
    view = draw_view(config, batch, view_key)
    video = view.render(batch, config.teacher.image_size, preprocess.CLIP)
    out = losses.contrastive_loss(
        # Rows stay on their device, which then holds its own rows of the logits only.
        sharding.constrain_batch(embed_frames(model, video)),
        sharding.constrain_batch(model.embed_texts(flat(batch["text"]), key=text_key)),
        model.tau(),
        valid=flat(batch["sample_valid"]),
        video_ids=flat(batch["media_hash"]),
        text_ids=flat(batch["text_hash"]),
    )
    return out.loss, {
        "accuracy_v2t": out.accuracy_v2t,
        "accuracy_t2v": out.accuracy_t2v,
        "temperature": model.tau(),
    }


def embed_frames(model: ClipModel, video: jax.Array) -> jax.Array:
    """[B, T, S, S, 3] -> [B, p]: CLIP sees frames one by one; a clip is the mean of its frames."""
    clips, frames = video.shape[:2]
    images = model.embed_images(flat(video))
    return images.reshape((clips, frames, -1)).mean(1)


TEACHER = Objective(create=_create, create_frozen=nothing, loss=_loss)
