"""Stage 'align': the paper's stage 2, the complete objective (11)-(13) and its ablations.

The term names are those of `config.align` and of the metrics. A term of weight 0 is not computed,
nor what only it needs: without `rec` and attention-guided masks no teacher runs, without an
instance term no crop is cut.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from instap_jax import losses, masking, sharding
from instap_jax.config import needs_teacher
from instap_jax.models import preprocess
from instap_jax.models.instap import InstanceFeatures, InstAP
from instap_jax.models.placement import cut, flat, join
from instap_jax.models.teacher import ClipVision
from instap_jax.models.text import PAD_ID
from instap_jax.train.objectives.base import (
    LossResult,
    Objective,
    compute_options,
    nothing,
)
from instap_jax.train.objectives.distill import create_teacher
from instap_jax.train.objectives.instances import (
    gather_in_group,
    instance_valid,
    see_instances,
)
from instap_jax.train.objectives.pairs import Pairs, Reading, masked_language, matching
from instap_jax.train.objectives.views import Guidance, View, draw_view, guide
from instap_jax.types import Batch

INSTANCE_TERMS = ("inst_vtc", "inst_vtm", "inst_mlm")
TERMS = ("rec", "vtc", "vtm", "mlm", *INSTANCE_TERMS)

# One random stream for each purpose, whatever terms a configuration switches off. Dropout is drawn
# for all texts of the text layers, and of the fusion layers, together.
_STREAMS = (
    "view", "mask", "scene", "crop_mask", "crop", "text", "corrupt", "inst_corrupt",
    "vtm", "inst_vtm", "fusion",
)  # fmt: skip


def term_weights(config: ConfigDict) -> dict[str, float]:
    """The weight of every term that has one: (11)-(13), lambda_inst multiplied in."""
    align = config.align
    weights = {term: align[term] for term in TERMS}
    weights |= {term: align.instance * align[term] for term in INSTANCE_TERMS}
    return {term: weight for term, weight in weights.items() if weight}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Scene:
    """The whole samples, encoded.

    Attributes:
      tokens: [g, b, v, d], the visible ones. embedding: [g, b, p].
      predicted: float32 [K, g * b, v, p], of the teacher's features; None without `rec`.
    """

    tokens: jax.Array
    embedding: jax.Array
    predicted: jax.Array | None
    view: View
    guidance: Guidance


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Text:
    """Texts of one kind after the text layers.

    Attributes:
      ids: int32 [g, m, s], as encoded. tokens: [g, m, s, d].
      targets: int32 [g, m, s], the ids to be predicted; None for texts that were not masked.
    """

    ids: jax.Array
    tokens: jax.Array
    targets: jax.Array | None


def _create(config: ConfigDict, rngs: nnx.Rngs) -> InstAP:
    return InstAP(config, **compute_options(config), rngs=rngs)


def _create_frozen(config: ConfigDict, rngs: nnx.Rngs) -> nnx.Module:
    return create_teacher(config, rngs) if needs_teacher(config) else nothing(config, rngs)


def _loss(config, model: InstAP, teacher: ClipVision, batch: Batch, key) -> LossResult:
    weights = term_weights(config)
    keys = dict(zip(_STREAMS, jax.random.split(key, len(_STREAMS))))
    scene = _see_scene(config, model, teacher, batch, keys, taps="rec" in weights)
    texts = _encode_texts(config, model, batch, keys, weights)
    results: dict[str, LossResult] = {}
    if "rec" in weights:
        valid = flat(batch["sample_valid"])
        loss = losses.distillation_loss(scene.predicted, scene.guidance.target, valid)
        results["rec"] = loss, {}
    found, readings = _sample_terms(config, model, batch, scene, texts, keys, weights)
    results |= found
    if any(term in weights for term in INSTANCE_TERMS):
        seen = see_instances(
            config,
            model,
            batch,
            scene.tokens,
            scene.view,
            mask_ratio=config.align.crop_mask_ratio,
            mask_key=keys["crop_mask"],
            key=keys["crop"],
        )
        found, more = _instance_terms(config, model, batch, seen, texts, keys, weights)
        results |= found
        readings |= more
    results |= _read(model, readings, keys["fusion"])
    metrics = {
        "temperature": model.tau(),
        "instance_temperature": model.instance_tau(),
        "instances": jnp.sum(instance_valid(batch), dtype=jnp.float32),
    }
    for term, (loss, details) in results.items():
        metrics |= {term: loss} | {f"{term}_{name}": value for name, value in details.items()}
    return sum(weight * results[term][0] for term, weight in weights.items()), metrics


def _see_scene(config, model, teacher, batch: Batch, keys, *, taps: bool) -> _Scene:
    """Masks and encodes the samples. A batch of one frame is one of images (T is static)."""
    groups, size, frames = batch["frames"].shape[:3]
    align = config.align
    view = draw_view(config, batch, keys["view"])
    guidance = guide(
        config,
        teacher,
        view.render(batch, config.teacher.image_size, preprocess.CLIP),
        keys["mask"],
        ratio=align.mask_ratio_image if frames == 1 else align.mask_ratio_video,
        taps=config.distill.layers if taps else 0,
    )
    out = model.encoder(
        view.render(batch, config.vision.image_size, preprocess.IMAGENET),
        visible=guidance.visible,
        key=keys["scene"],
        taps=config.distill.layers if taps else 0,
    )
    predicted = None
    if taps:
        patches = (config.vision.image_size // config.vision.patch) ** 2
        predicted = model.predict_teacher(
            out.taps, frames=frames, visible=guidance.visible, patches=patches
        )
    tokens = out.tokens.reshape((groups, size, *out.tokens.shape[1:]))
    pooled = jnp.mean(tokens, axis=-2, dtype=jnp.float32)
    return _Scene(
        tokens=tokens,
        embedding=model.embed_visual(pooled),
        predicted=predicted,
        view=view,
        guidance=guidance,
    )


def _encode_texts(config, model, batch: Batch, keys, weights) -> dict[str, _Text]:
    """What the terms read of 'captions', 'sentences', 'masked captions', 'masked sentences'.

    Sentences are those of the instances. All go through the text layers together.
    """

    def masked(name: str, stream: str):
        return masking.corrupt_tokens(
            keys[stream],
            batch[name],
            ratio=config.align.mlm_ratio,
            vocab_size=config.text.vocab_size,
            mask_id=config.tokenizer.mask_id,
            special_ids=(PAD_ID, config.tokenizer.cls_id),
        )

    read = {}
    if {"vtc", "vtm"} & weights.keys():
        read["captions"] = batch["text"], None
    if {"inst_vtc", "inst_vtm"} & weights.keys() or config.align.global_instances:
        read["sentences"] = batch["instance_text"], None
    if "mlm" in weights:
        read["masked captions"] = masked("text", "corrupt")
    if "inst_mlm" in weights:
        read["masked sentences"] = masked("instance_text", "inst_corrupt")
    if not read:
        return {}
    groups = batch["text"].shape[0]
    ids = join([ids for ids, _ in read.values()])
    tokens = model.text.encode(ids, key=keys["text"]).tokens
    parts = cut(tokens, groups, [ids.shape[1] for ids, _ in read.values()])
    return {
        name: _Text(ids=ids, tokens=part, targets=targets)
        for (name, (ids, targets)), part in zip(read.items(), parts)
    }


def _read(model, readings: dict[str, Reading], key) -> dict[str, LossResult]:
    """Every term of the fusion layers, through these at once."""
    if not readings:
        return {}
    fused = model.text.fuse_together([reading.texts for reading in readings.values()], key=key)
    return {term: reading.loss(tokens) for (term, reading), tokens in zip(readings.items(), fused)}


def _sample_terms(config, model, batch: Batch, scene: _Scene, texts, keys, weights):
    """Whole samples and their captions: (2), and what (3) and (4) read."""
    results: dict[str, LossResult] = {}
    readings: dict[str, Reading] = {}
    if "captions" in texts:
        pairs = Pairs(
            video=scene.embedding,
            text=model.embed_text(texts["captions"].tokens[:, :, 0]),
            tau=model.tau(),
            bias=model.bias(),
            valid=batch["sample_valid"],
            video_ids=batch["media_hash"],
            text_ids=batch["text_hash"],
        )
    if "vtc" in weights:
        contrasted = pairs
        if config.align.global_instances:
            contrasted = _with_sentences(model, batch, pairs, texts["sentences"])
        results["vtc"] = _contrast(
            losses.contrastive_loss, contrasted, video_ids=flat(contrasted.video_ids)
        )
    if "vtm" in weights:
        text = texts["captions"]
        readings["vtm"] = matching(model, pairs, text.ids, text.tokens, scene.tokens, keys["vtm"])
    if "mlm" in weights:
        text, valid = texts["masked captions"], batch["sample_valid"]
        readings["mlm"] = masked_language(
            model, text.ids, text.targets, text.tokens, scene.tokens, None, valid
        )
    return results, readings


def _with_sentences(model, batch: Batch, pairs: Pairs, sentences: _Text) -> Pairs:
    """`align.global_instances`: every instance's sentence is one more caption of its whole video.

    Pairs are added, none replaced; captions of one video are no negatives of each other.
    """
    video, video_ids = gather_in_group((pairs.video, pairs.video_ids), batch["parent"])
    added = Pairs(
        video=video,
        text=model.embed_text(sentences.tokens[:, :, 0]),
        tau=pairs.tau,
        bias=pairs.bias,
        valid=instance_valid(batch),
        video_ids=video_ids,
        text_ids=batch["instance_text_hash"],
    )
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1) if a.ndim else a, pairs, added)


def _instance_terms(config, model, batch: Batch, seen: InstanceFeatures, texts, keys, weights):
    """Instances and their sentences: (8), and what (9) and (10) read."""
    results: dict[str, LossResult] = {}
    readings: dict[str, Reading] = {}
    valid = instance_valid(batch)
    if "sentences" in texts:
        text = texts["sentences"]
        pairs = Pairs(
            video=model.embed_visual(seen.pooled),
            text=model.embed_text(text.tokens[:, :, 0]),
            tau=model.instance_tau(),
            bias=model.instance_bias(),
            valid=valid,
            # The parent's media, not its place: unique over the batch, equal for a video that
            # the batch holds twice.
            video_ids=gather_in_group(batch["media_hash"], batch["parent"]),
            text_ids=batch["instance_text_hash"],
        )
    if "inst_vtc" in weights:
        results["inst_vtc"] = _contrast(
            losses.instance_contrastive_loss,
            pairs,
            parent_ids=flat(pairs.video_ids),
            alpha=config.align.alpha,
        )
    if "inst_vtm" in weights:
        crop = seen.crop[:, :, None]  # one visual token
        readings["inst_vtm"] = matching(model, pairs, text.ids, text.tokens, crop, keys["inst_vtm"])
    if "inst_mlm" in weights:
        text = texts["masked sentences"]
        readings["inst_mlm"] = masked_language(
            model, text.ids, text.targets, text.tokens, seen.tokens, seen.mask, valid
        )
    return results, readings


def _contrast(loss, pairs: Pairs, **options) -> LossResult:
    """(2) or (8) over the global batch."""
    # Rows stay on their device: the loss then holds b / devices rows of the logits on each.
    video, text = (sharding.constrain_batch(flat(x)) for x in (pairs.video, pairs.text))
    out = loss(
        video,
        text,
        pairs.tau,
        valid=flat(pairs.valid),
        text_ids=flat(pairs.text_ids),
        bias=pairs.bias,
        **options,
    )
    return out.loss, {"accuracy_v2t": out.accuracy_v2t, "accuracy_t2v": out.accuracy_t2v}


ALIGN = Objective(
    create=_create,
    create_frozen=_create_frozen,
    frozen_path=("visual",),
    starts_from={"distill": ("encoder", "heads")},
    loss=_loss,
)
