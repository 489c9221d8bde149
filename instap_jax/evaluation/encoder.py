"""A trained model made ready to embed batches of a suite, and its texts.

What a clip's embedding is depends on the stage of the run:
  teacher   mean over the frames of CLIP's class token; text by the same CLIP.
  distill   mean over all tokens of the last distillation head's output, that is, in the teacher's
            space; text by the teacher. Stage 1 sees no text: this measures what distillation kept.
            A teacher that was converted from CLIP has no text tower: then no texts are embedded.
  align     W_v of the mean over all tokens, unmasked; W_t of the text. Instances, too, have an
            embedding: z~ of (7), cut and contextualised as in training. Where training had no
            equation (8) (the baselines), W_v of the mean of the crop's own tokens.

An entity's feature is the mean of the last layer's tokens whose patches its boxes cover, weighted
by the covered area, over the frames in which it is present.

Batches are grouped as in training: g groups, one for each data shard, of b samples and n instances
each; every array is split over its groups, so that crops are cut and encoded on all devices.
"""

import copy
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instap_jax import config_check, sharding
from instap_jax.data.pipeline import open_tokenizer
from instap_jax.errors import UserError
from instap_jax.evaluation import aligned
from instap_jax.evaluation.fingerprint import fingerprint
from instap_jax.models import boxes as box
from instap_jax.models import preprocess
from instap_jax.models.distillation import Student
from instap_jax.models.instap import InstAP
from instap_jax.models.placement import flat
from instap_jax.models.teacher import ClipModel
from instap_jax.train import checkpoint, inputs
from instap_jax.train.objectives import OBJECTIVES, embed_frames, term_weights, whole_view
from instap_jax.train.state import shardings, with_sharding
from instap_jax.types import Batch

# What embedding a batch reads of it; the last line is passed on, to be known on every host.
SAMPLE_KEYS = ("frames", "extent")
INSTANCE_KEYS = ("boxes", "present", "parent")
PASSED_KEYS = ("sample_valid", "instance_valid", "fault", "record", "parent")

_TEXT_BATCH = 256
_CROP_BLOCK = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """A trained model on its mesh.

    Attributes:
      config: of the run, with the tokenizer and text encoder that captions are read with.
      graphdef: of the run's own model; `nnx.merge(graphdef, params["model"])` is the model.
      clip_graphdef: of what embeds texts in stage 1; None where nothing does.
      params: {'model': of the run, 'clip': of what embeds texts in stage 1}.
      weights: whose they are, for the protocol; `step` of training.
      instances: how instances are embedded, for the protocol; '' where they are not.
      temperature, instance_temperature: of (2) and of (8).
      text_length: tokens that texts are cut to.
    """

    config: ConfigDict
    graphdef: nnx.GraphDef
    clip_graphdef: nnx.GraphDef | None
    params: Any
    mesh: Mesh
    weights: str
    step: int
    instances: str
    text_length: int

    def embed(self, batch: Batch, *, tokens: bool = False) -> dict[str, jax.Array]:
        """Embeds a batch [g, b, ...] on the mesh (`put`).

        Returns:
          'video' [g * b, p] and 'entity' [g * n, d], float32, from stage 'align' 'instance'
          [g * n, p] and 'crop' [g * n, d], the visual input of (9), and `PASSED_KEYS`, flat: all
          known on every host. 'video' and 'instance' are l2-normalised. With `tokens` also
          'tokens' [g * b, v, d], in the compute dtype, split over the devices.
        """
        return self._embed(self.params, batch, tokens)

    def put(self, batch: Batch) -> Batch:
        """This host's groups of a batch, on the mesh."""
        keys = {*SAMPLE_KEYS, *INSTANCE_KEYS, *PASSED_KEYS}
        return {k: sharding.place_rows(batch[k], self.mesh) for k in keys}

    @property
    def embeds_texts(self) -> bool:
        """False for a run of stage 'distill' whose teacher has no text tower."""
        return self.clip_graphdef is not None

    def require_texts(self) -> None:
        """Raises UserError where no texts are embedded: nothing can be retrieved by them."""
        if self.embeds_texts:
            return
        teacher = self.config.teacher.checkpoint
        if not teacher:
            raise UserError(
                "stage 'distill' needs a teacher: set config.teacher.checkpoint to the workdir of "
                "a 'teacher' run, whose text tower embeds the texts (--task=probe needs none)"
            )
        raise UserError(
            f"{teacher}: this teacher has no text tower (converted from CLIP's visual part alone), "
            "and texts of stage 'distill' are its teacher's to embed: measure the run by "
            "--task=probe, train it with config.evaluation.every unset"
        )

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """int32 [n, s], cut to `text_length`."""
        return np.stack([self._tokenizer.encode(text, self.text_length) for text in texts])

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, p], l2-normalised; equal texts have equal embeddings, bit for bit.

        Raises:
          UserError: see `require_texts`.
        """
        self.require_texts()
        return self._of_texts(self.tokenize(texts), self._embed_text)

    def text_tokens(self, ids: np.ndarray) -> np.ndarray:
        """int32 [n, s] -> [n, s, d] of the last text-only layer, in the compute dtype."""
        return self._of_texts(ids, self._text_tokens)

    def crop_blocks(self, crops: np.ndarray) -> Iterator[jax.Array]:
        """float32 [M, d] -> blocks [B, 1, d], each crop the one visual token of (9)."""
        for start in range(0, len(crops), _CROP_BLOCK):
            block = crops[start : start + _CROP_BLOCK, None]
            missing = min(_CROP_BLOCK, len(crops)) - len(block)
            block = np.pad(block, [(0, missing), (0, 0), (0, 0)])
            yield sharding.place(block, sharding.replicated(self.mesh))

    def _of_texts(self, ids: np.ndarray, function) -> np.ndarray:
        distinct, inverse = np.unique(ids, axis=0, return_inverse=True)
        size = _TEXT_BATCH - _TEXT_BATCH % sharding.data_shards(self.mesh)
        size = max(size, sharding.data_shards(self.mesh))
        found = []
        for start in range(0, len(distinct), size):
            part = distinct[start : start + size]
            padded = np.zeros((size, ids.shape[1]), np.int32)
            padded[: len(part)] = part
            placed = sharding.place(padded, sharding.batch_sharding(self.mesh))
            found.append(jax.device_get(function(self.params, placed))[: len(part)])
        return np.concatenate(found)[inverse.reshape(-1)]

    def with_params(self, params: nnx.State, step: int) -> "Encoder":
        """The same encoder, compiled once for all, of other parameters of the run's model."""
        _ = self._embed, self._embed_text, self._tokenizer  # made once, then shared by the copies
        other = copy.copy(self)
        clip = params if self.config.stage == "teacher" else self.params["clip"]
        object.__setattr__(other, "params", {"model": params, "clip": clip})
        object.__setattr__(other, "step", step)
        other.__dict__.pop("fingerprint", None)
        return other

    @functools.cached_property
    def fingerprint(self) -> str:
        """Content hash of the run's own parameters."""
        return fingerprint(self.params["model"])

    @property
    def temperature(self) -> float:
        """tau of (2): of the text tower's contrast."""
        clip = self.config.stage != "align"
        return float(self._clip().tau() if clip else self._model().tau())

    @property
    def instance_temperature(self) -> float:
        """tau of (8); stage 'align' only."""
        return float(self._model().instance_tau())

    def _model(self) -> nnx.Module:
        return nnx.merge(self.graphdef, self.params["model"])

    def _clip(self) -> nnx.Module:
        return nnx.merge(self.clip_graphdef, self.params["clip"])

    @functools.cached_property
    def _tokenizer(self):
        return open_tokenizer(self.config)

    @functools.cached_property
    def _embed(self):
        whole, split = sharding.replicated(self.mesh), sharding.batch_sharding(self.mesh)

        def embed(params, batch: Batch, tokens: bool) -> dict[str, jax.Array]:
            if self.config.stage not in _EMBED:
                raise UserError(
                    f"a run of stage {self.config.stage!r} embeds nothing; evaluate the run that "
                    "it was fine-tuned from"
                )
            model = nnx.merge(self.graphdef, params["model"])
            out, seen = _EMBED[self.config.stage](self.config, model, batch)
            out |= {name: flat(batch[name]) for name in PASSED_KEYS}
            out = {k: jax.lax.with_sharding_constraint(v, whole) for k, v in out.items()}
            if tokens:
                seen = seen.reshape((seen.shape[0], -1, seen.shape[-1]))
                out["tokens"] = jax.lax.with_sharding_constraint(seen, split)
            return out

        return jax.jit(embed, static_argnums=2)

    @functools.cached_property
    def _embed_text(self):
        def embed(params, ids: jax.Array) -> jax.Array:
            if self.config.stage == "align":
                return aligned.embed_texts(nnx.merge(self.graphdef, params["model"]), ids)
            return aligned.unit(nnx.merge(self.clip_graphdef, params["clip"]).embed_texts(ids))

        return jax.jit(embed, out_shardings=sharding.replicated(self.mesh))

    @functools.cached_property
    def _text_tokens(self):
        def encode(params, ids: jax.Array) -> jax.Array:
            return nnx.merge(self.graphdef, params["model"]).text.encode(ids).tokens

        return jax.jit(encode, out_shardings=sharding.replicated(self.mesh))


def load_encoder(
    workdir: Path, mesh: Mesh, *, random_weights: bool = False, which: str = checkpoint.NEWEST
) -> Encoder:
    """A checkpoint of a run as an encoder.

    Args:
      random_weights: take the run's model as it was before its first step (the baseline that a
        probe of stage 1 is compared with), the teacher's text encoder as trained.
      which: `checkpoint.NEWEST` or `checkpoint.BEST`.

    Raises:
      UserError: no run or checkpoint there, or one that does not fit its config.
    """
    config = config_check.read(workdir)
    step, meta = checkpoint.read_meta(str(workdir), which=which)
    inputs.check_same(config, meta, str(workdir))
    if config.stage == "align":  # another converted stage may do without texts
        inputs.run_tokenizer(config, meta, str(workdir))
    create = OBJECTIVES[config.stage].create
    if random_weights:
        graphdef, params = _random_model(config, create, mesh)
    else:
        graphdef, params = load_model(config, create, str(workdir), mesh, step=step, which=which)
    encoder = make_encoder(config, mesh, graphdef, params, step=0 if random_weights else step)
    if not random_weights:
        return encoder
    return dataclasses.replace(encoder, weights=f"{encoder.weights}, random")


def make_encoder(
    config: ConfigDict, mesh: Mesh, graphdef: nnx.GraphDef, params: nnx.State, *, step: int
) -> Encoder:
    """An encoder of these parameters; stage 'distill' reads its teacher's text encoder for it.

    Without parameters (None) it only serves `with_params`.

    Raises:
      UserError: the teacher cannot be read, or its tokenizer is another than it was trained with.
    """
    own_config, clip_graphdef, clip_params = config, graphdef, None
    if config.stage == "teacher":
        clip_params = params
    if config.stage == "distill":
        config, clip_graphdef, clip_params = _with_teacher(config, mesh)
    return Encoder(
        config=config,
        graphdef=graphdef,
        clip_graphdef=clip_graphdef,
        params={"model": params, "clip": clip_params},
        mesh=mesh,
        weights=_WEIGHTS[config.stage],
        step=step,
        instances=_instances_name(own_config),
        text_length=config.tokenizer.length,
    )


def _with_teacher(
    config: ConfigDict, mesh: Mesh
) -> tuple[ConfigDict, nnx.GraphDef | None, nnx.State | None]:
    """The configuration with what the teacher reads texts with, its structure and parameters.

    As it is, and nothing, where there is no teacher (UMT's weights, converted) or it has no text
    tower (CLIP's).
    """
    teacher = config.teacher.checkpoint
    if not teacher:
        return config, None, None
    step, meta = checkpoint.read_meta(teacher)
    if "text" not in checkpoint.module_names(teacher, step=step):
        return config, None, None
    other = config_check.read(epath.Path(teacher))
    inputs.check_tokenizer(other, meta, teacher)
    graphdef, params = load_model(other, OBJECTIVES["teacher"].create, teacher, mesh, step=step)
    config = config.copy_and_resolve_references()
    config.tokenizer, config.text = other.tokenizer, other.text
    return config, graphdef, params


def load_model(
    config: ConfigDict,
    create,
    workdir: str,
    mesh: Mesh,
    *,
    step: int | None = None,
    which: str = checkpoint.NEWEST,
) -> tuple[nnx.GraphDef, nnx.State]:
    """Structure and parameters of a run's model, placed on the mesh; see `load_encoder`."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: create(config, nnx.Rngs(0))))
    abstract = with_sharding(abstract, mesh)
    return graphdef, checkpoint.read_params(workdir, abstract, step=step, which=which)


def _random_model(config: ConfigDict, create, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State]:
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: create(config, nnx.Rngs(0))))

    def init():
        return nnx.state(create(config, nnx.Rngs(config.seed)))

    return graphdef, jax.jit(init, out_shardings=shardings(with_sharding(abstract, mesh)))()


def pool_boxes(
    tokens: jax.Array, boxes: jax.Array, present: jax.Array, parent: jax.Array
) -> jax.Array:
    """Mean of the tokens under each trajectory, of one group.

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
        seen = tokens[index].astype(jnp.float32)
        return jnp.einsum("tp,tpd->d", weight, seen, precision=jax.lax.Precision.HIGHEST)

    total = jnp.maximum(area.sum((1, 2)), 1e-12)
    return jax.lax.map(pool, (area, parent)) / total[:, None]


def _embed_clip(config: ConfigDict, model: ClipModel, batch: Batch):
    video = whole_view(batch).render(batch, config.teacher.image_size, preprocess.CLIP)
    clips, frames = video.shape[:2]
    tokens = model.visual(flat(video), taps=1).taps[-1]
    tokens = tokens.reshape((clips, frames, *tokens.shape[1:]))
    embedding = aligned.unit(embed_frames(model, video))
    return {"video": embedding, "entity": _entities(batch, tokens)}, tokens


def _embed_student(config: ConfigDict, model: Student, batch: Batch):
    video = whole_view(batch).render(batch, config.vision.image_size, preprocess.IMAGENET)
    clips, frames = video.shape[:2]
    tokens = model.encoder(video).tokens.reshape((clips, frames, -1, config.vision.width))
    embedding = aligned.unit(model(video)[-1].mean(1))
    return {"video": embedding, "entity": _entities(batch, tokens)}, tokens


def _embed_aligned(config: ConfigDict, model: InstAP, batch: Batch):
    tokens = aligned.see_scenes(config, model, batch)
    instances = aligned.embed_instances(config, model, batch, tokens)
    grid = tokens.reshape((len(tokens), batch["frames"].shape[2], -1, tokens.shape[-1]))
    out = {
        "video": aligned.embed_scenes(model, tokens),
        "entity": _entities(batch, grid),
        "instance": instances.embedding,
        "crop": instances.crop,
    }
    return out, tokens


_EMBED = {"teacher": _embed_clip, "distill": _embed_student, "align": _embed_aligned}
_WEIGHTS = {
    "teacher": "teacher",
    "distill": "student, distillation head",
    "align": "aligned",
    "ground": "fine-tuned for grounding",
    "classify": "fine-tuned for classification",
}


def _entities(batch: Batch, tokens: jax.Array) -> jax.Array:
    """float32 [g * n, d] of tokens [g * b, t, p, d]."""
    groups, size = batch["frames"].shape[:2]
    grouped = tokens.reshape((groups, size, *tokens.shape[1:]))
    boxes, present, parent = (batch[name] for name in ("boxes", "present", "parent"))
    return flat(jax.vmap(pool_boxes)(grouped, boxes, present, parent))


def _instances_name(config: ConfigDict) -> str:
    """How stage 'align' embeds an instance."""
    if config.stage != "align":
        return ""
    boxes = "one box held still" if config.align.still_boxes else "box trajectory"
    if "inst_vtc" not in term_weights(config) or not config.align.cross_attention:
        return f"crop of its {boxes}"
    anchored = ", anchored in the scene" if config.align.scene_anchor else ""
    return f"crop of its {boxes}{anchored}, cross-attended to the scene"
