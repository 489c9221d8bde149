"""Stage 'classify': the label of a clip, by full fine-tuning or by a linear probe."""

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from instap_jax import losses
from instap_jax.models import preprocess
from instap_jax.models.heads import Classifier
from instap_jax.models.placement import flat
from instap_jax.train.objectives.base import (
    ALIGNED_ONLY,
    LossResult,
    Objective,
    compute_options,
    nothing,
)
from instap_jax.train.objectives.views import draw_view
from instap_jax.types import Batch


def _create(config: ConfigDict, rngs: nnx.Rngs) -> Classifier:
    return Classifier(config, **compute_options(config), rngs=rngs)


def _loss(config, model: Classifier, frozen, batch: Batch, key) -> LossResult:
    del frozen
    view_key, drop_key = jax.random.split(key)
    view = draw_view(config, batch, view_key)
    video = view.render(batch, config.vision.image_size, preprocess.IMAGENET)
    logits = model(video, key=drop_key)
    labels, valid = flat(batch["label"]), flat(batch["sample_valid"])
    loss = losses.classification_loss(logits, labels, valid, smoothing=config.classify.smoothing)
    right = (jnp.argmax(logits, axis=-1) == labels) & valid
    count = jnp.maximum(jnp.sum(valid, dtype=jnp.float32), 1)
    return loss, {"accuracy": jnp.sum(right, dtype=jnp.float32) / count}


CLASSIFY = Objective(
    create=_create,
    create_frozen=nothing,
    starts_from={"distill": ("encoder",), "align": ("encoder",)},
    leaves=("text", *ALIGNED_ONLY),
    loss=_loss,
)
