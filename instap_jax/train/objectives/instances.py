"""Instances of a batch through the model: boxes to crops, tokens, and their look at the scene."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from instap_jax import masking
from instap_jax.models import boxes as box
from instap_jax.models import preprocess
from instap_jax.models.instances import instance_crops, token_mask
from instap_jax.models.instap import InstanceFeatures, InstAP
from instap_jax.train.objectives.views import View
from instap_jax.types import Batch


def see_instances(
    config: ConfigDict,
    model: InstAP,
    batch: Batch,
    scenes: jax.Array,
    view: View,
    *,
    mask_ratio: float = 0.0,
    mask_key: jax.Array | None = None,
    key: jax.Array | None = None,
) -> InstanceFeatures:
    """Cuts, encodes and contextualises the instances of a batch as `config.align` says.

    Args:
      scenes: [g, b, m, d], tokens of the samples as `view` shows them.
      mask_ratio: of crop tokens, drawn at random with `mask_key`.
      key: for stochastic depth; None runs deterministically.
    """
    align, patch = config.align, config.vision.patch
    size = align.crop_size or config.vision.image_size
    boxes, present = batch["boxes"], batch["present"]
    if align.still_boxes:
        boxes, present = box.hold_still(boxes, present)
    # Within the picture, as the crop is: anchors lie where its patches do.
    shown = jnp.clip(box.enlarge(boxes, align.crop_context), 0, 1)
    crops = instance_crops(
        batch["frames"], batch["extent"], shown, batch["parent"], size, flip=view.flip
    )
    mask = token_mask(present, (size // patch) ** 2)
    codes = _codes(config, model, boxes, shown, batch, present, view, size // patch)
    visible = None
    if mask_ratio:
        visible = _random_visible(mask_key, mask.shape, crops.shape[2], mask_ratio)
        mask = jnp.take_along_axis(mask, visible, axis=-1)
        if codes is not None:
            codes = jnp.take_along_axis(codes, visible[..., None], axis=-2)
    return model.encode_instances(
        preprocess.normalise(crops, preprocess.IMAGENET),
        mask,
        scenes,
        batch["parent"],
        visible=visible,
        codes=codes,
        key=key,
    )


def _random_visible(key: jax.Array, shape: tuple[int, ...], frames: int, ratio: float) -> jax.Array:
    """int32 [g, n, v] of l crop tokens; every frame keeps the same number."""
    groups, count, tokens = shape
    visible = masking.choose_visible(
        key,
        jnp.ones((groups * count, tokens)),
        masking.visible_count(tokens, ratio, frames=frames),
        "sample",
        frames=frames,
    )
    return visible.reshape((groups, count, -1))


def _codes(
    config: ConfigDict,
    model: InstAP,
    boxes: jax.Array,
    shown: jax.Array,
    batch: Batch,
    present: jax.Array,
    view: View,
    crop_side: int,
) -> jax.Array | None:
    """What crop tokens carry of their place, size and motion in the scene, [g, n, l, d], or None.

    Places by what the crops show, size and motion by the boxes themselves, both as the scene
    branch's view has them, which is what (5) attends to.
    """
    align, codes = config.align, []
    frame, flip = gather_in_group((view.boxes, view.flip), batch["parent"])
    boxes, shown = (box.to_view(corners, frame, flip) for corners in (boxes, shown))
    if align.scene_anchor:
        codes.append(
            box.scene_codes(
                shown,
                crop_side=crop_side,
                scene_side=config.vision.image_size // config.vision.patch,
                width=config.vision.width,
                grid=model.encoder.positions,
            )
        )
    if align.size_code or align.motion_code:
        codes.append(jnp.repeat(model.box_codes(boxes, present), crop_side**2, axis=-2))
    return sum(codes) if codes else None


def gather_in_group(tree, index: jax.Array):
    """Arrays [g, b, ...] and int32 [g, n] -> arrays [g, n, ...]; nothing leaves its group."""
    return jax.tree.map(lambda array: jax.vmap(lambda a, i: a[i])(array, index), tree)


def instance_valid(batch: Batch) -> jax.Array:
    """bool [g, n]: slots that hold an instance of a sample that could be read."""
    return batch["instance_valid"] & gather_in_group(batch["sample_valid"], batch["parent"])


def whole_view(batch: Batch) -> View:
    """The view of evaluation: the whole picture, not mirrored."""
    extent = batch["extent"]
    return View(boxes=preprocess.center_view(extent), flip=jnp.zeros(extent.shape[:2], bool))
