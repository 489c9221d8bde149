"""Stage 'ground': an instance's sentence to its box in every frame (the paper's Table 3)."""

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from instap_jax import box_losses
from instap_jax.models import preprocess
from instap_jax.models.heads import Grounder
from instap_jax.models.placement import flat
from instap_jax.train.objectives.base import (
    ALIGNED_ONLY,
    LossResult,
    Objective,
    compute_options,
    nothing,
)
from instap_jax.train.objectives.instances import (
    gather_in_group,
    instance_valid,
    whole_view,
)
from instap_jax.types import Batch


def _create(config: ConfigDict, rngs: nnx.Rngs) -> Grounder:
    return Grounder(config, **compute_options(config), rngs=rngs)


def predict_boxes(
    config: ConfigDict, model: Grounder, batch: Batch, *, key: jax.Array | None = None
) -> jax.Array:
    """Where the model sees every instance's sentence, frame by frame.

    The scene is whole: no mask, and no random view, which would cut the boxes.

    Args:
      key: for stochastic depth and dropout; None runs deterministically.

    Returns:
      float32 [g, n, t, 4], cx cy w h as fractions of the picture; meaningless in unused slots.
    """
    encode_key, locate_key = (None, None) if key is None else jax.random.split(key)
    video = whole_view(batch).render(batch, config.vision.image_size, preprocess.IMAGENET)
    tokens = model.encoder(video, key=encode_key).tokens
    groups, size, frames = batch["frames"].shape[:3]
    tokens = tokens.reshape((groups, size, frames, -1, tokens.shape[-1]))
    scenes = gather_in_group(tokens, batch["parent"])
    boxes = model.locate(flat(scenes), flat(batch["instance_text"]), key=locate_key)
    return boxes.reshape((groups, -1, *boxes.shape[1:]))


def _loss(config, model: Grounder, frozen, batch: Batch, key) -> LossResult:
    del frozen
    valid = instance_valid(batch)
    out = box_losses.box_loss(
        flat(predict_boxes(config, model, batch, key=key)),
        flat(batch["boxes"]),
        present=flat(batch["present"]),
        valid=flat(valid),
    )
    loss = config.ground.l1 * out.l1 + config.ground.giou * out.giou
    instances = jnp.sum(valid, dtype=jnp.float32)
    return loss, {"l1": out.l1, "giou": out.giou, "iou": out.iou, "instances": instances}


GROUND = Objective(
    create=_create,
    create_frozen=nothing,
    starts_from={"align": ("encoder", "text")},
    leaves=ALIGNED_ONLY,
    loss=_loss,
)
