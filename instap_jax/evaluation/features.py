"""Embeddings of a whole suite by a trained model: clips, captions, and the entities of each clip.

What a clip's embedding is depends on the stage of the run:
  teacher   mean over the frames of CLIP's class token; text by the same CLIP.
  distill   mean over all tokens of the last distillation head's output, that is, in the teacher's
            space; text by the teacher. Stage 1 sees no text: this measures what distillation kept.
  align     W_v of the mean over all tokens, unmasked; W_t of the text. Instances, too, have an
            embedding: z~ of (7), cut and contextualised as in training. Where training had no
            equation (8) (the baselines), W_v of the mean of the crop's own tokens.

An entity's feature is the mean of the last layer's tokens whose patches its boxes cover, weighted
by the covered area, over the frames in which it is present.
"""

import collections
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from instap_jax import config_check, sharding
from instap_jax.data.pipeline import evaluation_groups
from instap_jax.data.records import RecordSource, open_source
from instap_jax.errors import UserError
from instap_jax.models import boxes as box
from instap_jax.models import preprocess
from instap_jax.models.distillation import Student
from instap_jax.models.instap import InstAP
from instap_jax.models.teacher import ClipModel
from instap_jax.progress import Progress
from instap_jax.train import checkpoint, inputs
from instap_jax.train.objectives import (
    OBJECTIVES,
    embed_frames,
    see_instances,
    term_weights,
    whole_view,
)
from instap_jax.train.state import shardings, with_sharding
from instap_jax.types import Batch, Kind

# What embedding a batch reads of it.
SAMPLE_KEYS = ("frames", "extent", "text")
INSTANCE_KEYS = ("boxes", "present", "parent", "instance_text")

Embed = Callable[[Any, Batch], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """A trained model, ready to embed batches.

    Attributes:
      config: of the run, with the tokenizer and text encoder that captions are read with.
      graphdef: of the run's own model; `nnx.merge(graphdef, params["model"])` is the model.
      params: of everything that `embed` needs.
      embed: (params, batch [1, b, ...]) -> {'video' [b, p], 'text' [b, p], 'entity' [n, d]},
        float32, and from stage 'align' 'instance' and 'instance_text' [n, p]; all but the entities
        l2-normalised.
      weights: whose they are, for the protocol; `step` of training.
      instances: how instances are embedded, for the protocol; '' where they are not.
    """

    config: ConfigDict
    graphdef: nnx.GraphDef
    params: Any
    embed: Embed
    weights: str
    step: int
    instances: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuiteFeatures:
    """One suite, record by record.

    Attributes:
      video, text: float32 [N, p], l2-normalised; row i of both is record i.
      entity: float32 [M, d].
      instance, instance_text: float32 [M, p], l2-normalised; row i of both is entity i; None where
        the encoder embeds no instances.
      labels: M dicts, the `attributes` that the annotation gave the entity ({} without).
      frames: T, frames of a clip.
    """

    name: str
    video: np.ndarray
    text: np.ndarray
    entity: np.ndarray
    labels: list[dict[str, Any]]
    frames: int
    instance: np.ndarray | None = None
    instance_text: np.ndarray | None = None


def load_encoder(workdir: Path, mesh: Mesh, *, random_weights: bool = False) -> Encoder:
    """The newest checkpoint of a run as an encoder.

    Args:
      random_weights: take the run's model as it was before its first step (the baseline that a
        probe of stage 1 is compared with), the teacher's text encoder as trained.

    Raises:
      UserError: no run or checkpoint there, or one that does not fit its config.
    """
    config = config_check.read(workdir)
    step, meta = checkpoint.read_meta(str(workdir))
    inputs.check_same(config, meta, str(workdir))
    stage = OBJECTIVES[config.stage]
    model, params = _load(
        config, stage.create, str(workdir), mesh, step=step, random_weights=random_weights
    )
    clip, clip_params = model, params
    if config.stage == "distill":
        teacher = Path(config.teacher.checkpoint)
        clip_config = config_check.read(teacher)
        clip, clip_params = _load(clip_config, OBJECTIVES["teacher"].create, str(teacher), mesh)
        config = _with_text_of(config, clip_config)

    def embed(params, batch: Batch) -> dict[str, jax.Array]:
        own, text = nnx.merge(model, params["model"]), nnx.merge(clip, params["clip"])
        if config.stage == "align":
            return _align_features(config, own, batch)
        batch = {name: array[0] for name, array in batch.items()}
        video = {"teacher": _clip_features, "distill": _student_features}[config.stage]
        embedding, tokens = video(config, own, batch)
        return {
            "video": _unit(embedding),
            "text": _unit(text.embed_texts(batch["text"])),
            "entity": pool_boxes(tokens, batch["boxes"], batch["present"], batch["parent"]),
        }

    over_samples = NamedSharding(mesh, P(None, sharding.DATA_AXES))
    whole = sharding.replicated(mesh)  # instances: their number need not divide
    places = dict.fromkeys(SAMPLE_KEYS, over_samples) | dict.fromkeys(INSTANCE_KEYS, whole)
    return Encoder(
        config=config,
        graphdef=model,
        params={"model": params, "clip": clip_params},
        embed=jax.jit(embed, in_shardings=(None, places), out_shardings=whole),
        weights=_weights_name(config.stage) + (", random" if random_weights else ""),
        step=0 if random_weights else step,
        instances=_instances_name(config),
    )


def embed_suite(
    encoder: Encoder,
    directory: str,
    split: str,
    kind: Kind,
    *,
    batch_size: int,
    frames: int | None = None,
) -> SuiteFeatures:
    """Embeds every record of a split, once.

    Args:
      batch_size: records a step; divided over the devices.
      frames: T of a clip; None: as many as the run was trained on.

    Raises:
      UserError: the split cannot be opened, or one of its records cannot be read: a suite with
        holes is another suite.
    """
    source = open_source(directory, split, kind)
    frames = (frames or encoder.config.data.frames) if kind is Kind.VIDEO else 1
    found: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    batches = evaluation_groups(encoder.config, directory, split, kind, frames, batch_size)
    with Progress(f"embed {split}", len(source)) as progress:
        for batch in batches:
            _refuse_faults(batch, source)
            read = {name: batch[name] for name in SAMPLE_KEYS + INSTANCE_KEYS}
            out = jax.device_get(encoder.embed(encoder.params, read))
            valid, instance_valid = batch["sample_valid"][0], batch["instance_valid"][0]
            for name, array in out.items():
                rows = valid if name in ("video", "text") else instance_valid
                found[name].append(array[rows])
            progress.update(int(valid.sum()))
    arrays = {name: np.concatenate(parts) for name, parts in found.items()}
    labels = [_attributes(extra) for extra in _instance_extras(source)]
    return SuiteFeatures(name=split, labels=labels, frames=frames, **arrays)


def pool_boxes(
    tokens: jax.Array, boxes: jax.Array, present: jax.Array, parent: jax.Array
) -> jax.Array:
    """Mean of the tokens under each trajectory.

    Args:
      tokens: [b, t, p, d], p = side * side patches of the whole picture, row by row.
      boxes: float32 [n, t, 4], x0 y0 x1 y1 as fractions of the picture.
      present: bool [n, t]; other frames do not count.
      parent: int32 [n], index into b.

    Returns:
      float32 [n, d]; zeros for an instance without any area.
    """
    side = round(tokens.shape[2] ** 0.5)
    area = box.patch_cover(boxes, side) * present[..., None, None]
    area = area.reshape((*area.shape[:2], -1))

    def pool(one):
        weight, index = one
        return jnp.einsum("tp,tpd->d", weight, tokens[index].astype(jnp.float32))

    total = jnp.maximum(area.sum((1, 2)), 1e-12)
    return jax.lax.map(pool, (area, parent)) / total[:, None]


def _load(
    config,
    create,
    workdir: str,
    mesh: Mesh,
    *,
    step: int | None = None,
    random_weights: bool = False,
):
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: create(config, nnx.Rngs(0))))
    abstract = with_sharding(abstract, mesh)
    if random_weights:

        def init():
            return nnx.state(create(config, nnx.Rngs(config.seed)))

        return graphdef, jax.jit(init, out_shardings=shardings(abstract))()
    return graphdef, checkpoint.read_params(workdir, abstract, step=step)


def _clip_features(config: ConfigDict, model: ClipModel, batch: Batch):
    video = _whole_picture(batch, config.teacher.image_size, preprocess.CLIP)
    clips, frames = video.shape[:2]
    tokens = model.visual(video.reshape((-1, *video.shape[2:])), taps=1).taps[-1]
    return embed_frames(model, video), tokens.reshape((clips, frames, *tokens.shape[1:]))


def _student_features(config: ConfigDict, model: Student, batch: Batch):
    video = _whole_picture(batch, config.vision.image_size, preprocess.IMAGENET)
    clips, frames = video.shape[:2]
    tokens = model.encoder(video).tokens
    return model(video)[-1].mean(1), tokens.reshape((clips, frames, -1, tokens.shape[-1]))


def _align_features(config: ConfigDict, model: InstAP, batch: Batch) -> dict[str, jax.Array]:
    view = whole_view(batch)
    video = view.render(batch, config.vision.image_size, preprocess.IMAGENET)
    tokens = model.encoder(video).tokens
    pooled = jnp.mean(tokens, axis=1, dtype=jnp.float32)
    seen = see_instances(config, model, batch, tokens[None], view)
    instance = seen.pooled if "inst_vtc" in term_weights(config) else seen.crop
    grid = tokens.reshape((*video.shape[:2], -1, tokens.shape[-1]))
    boxes, present, parent = (batch[name][0] for name in ("boxes", "present", "parent"))

    def text(ids: jax.Array) -> jax.Array:
        return _unit(model.embed_text(model.text.encode(ids).pooled))

    return {
        "video": _unit(model.embed_visual(pooled)),
        "text": text(batch["text"][0]),
        "entity": pool_boxes(grid, boxes, present, parent),
        "instance": _unit(model.embed_visual(instance[0])),
        "instance_text": text(batch["instance_text"][0]),
    }


def _whole_picture(batch: Batch, size: int, constants) -> jax.Array:
    frames = batch["frames"]
    boxes = preprocess.center_view(batch["extent"])
    boxes = jnp.broadcast_to(boxes[:, None], (*frames.shape[:2], 4))
    pixels = preprocess.crop_and_resize(frames, boxes, batch["extent"], size)
    return preprocess.normalise(pixels, constants)


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _weights_name(stage: str) -> str:
    names = {"teacher": "teacher", "distill": "student, distillation head", "align": "aligned"}
    return names[stage]


def _instances_name(config: ConfigDict) -> str:
    """How stage 'align' embeds an instance."""
    if config.stage != "align":
        return ""
    boxes = "one box held still" if config.align.still_boxes else "box trajectory"
    if "inst_vtc" not in term_weights(config) or not config.align.cross_attention:
        return f"crop of its {boxes}"
    anchored = ", anchored in the scene" if config.align.scene_anchor else ""
    return f"crop of its {boxes}{anchored}, cross-attended to the scene"


def _with_text_of(config: ConfigDict, other: ConfigDict) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.tokenizer, config.text = other.tokenizer, other.text
    return config


def _refuse_faults(batch: Batch, source: RecordSource) -> None:
    for place in np.argwhere(batch["fault"]):
        record = int(batch["record"][*place])
        raise UserError(
            f"{source.record_id(record)} cannot be read; a suite is measured whole or not at all"
        )


def _attributes(extra) -> dict[str, Any]:
    """The key is the annotator's own: only a JSON object has named attributes to probe."""
    attributes = extra.get("attributes")
    return dict(attributes) if isinstance(attributes, dict) else {}


def _instance_extras(source: RecordSource):
    for index in range(len(source)):
        yield from source[index].instance_extra
