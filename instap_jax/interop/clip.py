"""CLIP's vision tower, OpenAI's layout and Hugging Face's, as the teacher.

OpenAI: `visual.transformer.resblocks.N.attn.in_proj_weight` ..., or without `visual.`, which is
how UMT's `extract_clip` saves it. Hugging Face: CLIPModel and CLIPVisionModelWithProjection. CLIP's
text tower (pre-norm, causal, its own vocabulary) has no place in our models and is ignored.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from instap_jax.config import default
from instap_jax.errors import UserError
from instap_jax.interop import bert, open_clip
from instap_jax.interop.keys import (
    CONVOLUTION_2D,
    HEADS,
    HEADS_BIAS,
    SAME,
    TRANSPOSED,
    Rule,
    Shape,
    Table,
    linear,
    norm,
    resolve,
)
from instap_jax.interop.plan import (
    Plan,
    Resize,
    assumed,
    count,
    dimensions,
    fit,
    shapes_of,
)
from instap_jax.interop.reading import Weights, hugging_face_heads, read_config
from instap_jax.models import resize
from instap_jax.train.objectives.distill import create_teacher

_TEXT = "CLIP's text tower: no model here has its structure"
_SCALE = "CLIP's temperature, which the teacher does not use"
OPENAI_IGNORED = {
    "transformer.": _TEXT,
    "token_embedding.": _TEXT,
    "positional_embedding": _TEXT,
    "ln_final.": _TEXT,
    "text_projection": _TEXT,
    "logit_scale": _SCALE,
    "input_resolution": "a number that the shapes say too",
    "context_length": _TEXT,
    "vocab_size": _TEXT,
}
HUGGING_FACE_IGNORED = {
    "text_model.": _TEXT,
    "text_projection.": _TEXT,
    "logit_scale": _SCALE,
}
# Of OpenAI's vision transformers, whose files do not say: channels of an attention head, in models
# of these widths. open_clip has others in the same layout.
CHANNELS = 64
WIDTHS = (768, 1024)
ACTIVATION = "activation quick_gelu"


def openai_table(shapes: Mapping[str, Shape], *, theirs: str = "visual.") -> Table:
    """OpenAI's layout over our `visual`."""
    block = f"{theirs}transformer.resblocks.{{}}"
    ours = "visual.blocks"
    rules = [
        Rule("visual.patch_embedding.kernel", (f"{theirs}conv1.weight",), CONVOLUTION_2D),
        Rule("visual.class_token", (f"{theirs}class_embedding",)),
        Rule("visual.positions", (f"{theirs}positional_embedding",)),
        *norm("visual.ln_pre", f"{theirs}ln_pre"),
        *norm(f"{ours}.norm1", f"{block}.ln_1"),
        Rule(f"{ours}.attention.qkv", (f"{block}.attn.in_proj_weight",), HEADS),
        Rule(f"{ours}.attention.qkv_bias", (f"{block}.attn.in_proj_bias",), HEADS_BIAS),
        *linear(f"{ours}.attention.out", f"{block}.attn.out_proj"),
        *norm(f"{ours}.norm2", f"{block}.ln_2"),
        *linear(f"{ours}.mlp.expand", f"{block}.mlp.c_fc"),
        *linear(f"{ours}.mlp.contract", f"{block}.mlp.c_proj"),
        *norm("visual.ln_post", f"{theirs}ln_post"),
        Rule("visual.projection.kernel", (f"{theirs}proj",), SAME),
    ]
    return resolve(rules, shapes, ignored=OPENAI_IGNORED if theirs else {})


def hugging_face_table(shapes: Mapping[str, Shape]) -> Table:
    """Hugging Face's layout over our `visual`."""
    theirs, ours = "vision_model", "visual.blocks"
    block = f"{theirs}.encoder.layers.{{}}"
    parts = [f"{block}.self_attn.{part}_proj" for part in "qkv"]
    table = f"{theirs}.embeddings.position_embedding.weight"
    rules = [
        Rule(
            "visual.patch_embedding.kernel",
            (f"{theirs}.embeddings.patch_embedding.weight",),
            CONVOLUTION_2D,
        ),
        Rule("visual.class_token", (f"{theirs}.embeddings.class_embedding",)),
        Rule("visual.positions", (table,)),
        *norm("visual.ln_pre", f"{theirs}.pre_layrnorm"),  # so spelt there
        *norm(f"{ours}.norm1", f"{block}.layer_norm1"),
        Rule(f"{ours}.attention.qkv", tuple(f"{part}.weight" for part in parts), HEADS),
        Rule(f"{ours}.attention.qkv_bias", tuple(f"{part}.bias" for part in parts), HEADS_BIAS),
        *linear(f"{ours}.attention.out", f"{block}.self_attn.out_proj"),
        *norm(f"{ours}.norm2", f"{block}.layer_norm2"),
        *linear(f"{ours}.mlp.expand", f"{block}.mlp.fc1"),
        *linear(f"{ours}.mlp.contract", f"{block}.mlp.fc2"),
        *norm("visual.ln_post", f"{theirs}.post_layernorm"),
        Rule("visual.projection.kernel", ("visual_projection.weight",), TRANSPOSED),
    ]
    # Older files keep the row numbers 0, 1, ... as a buffer; of the file's own size, so that
    # nothing can be said about its values here.
    buffer = {f"{theirs}.embeddings.position_ids": "row numbers, not parameters"}
    old_text = {"text_model.embeddings.position_ids": _TEXT}
    return resolve(rules, shapes, ignored=HUGGING_FACE_IGNORED | buffer | old_text)


def plan(weights: Weights, config: ConfigDict | None) -> Plan:
    """CLIP weights as what `config.teacher.checkpoint` names.

    Raises:
      UserError: not CLIP weights, or they do not fit the configuration.
    """
    if weights.has("vision_model.") or weights.has("embeddings.class_embedding"):
        return _hugging_face(weights, config)
    theirs = next((p for p in ("visual.", "") if weights.has(f"{p}class_embedding")), None)
    if theirs is None:
        raise UserError(
            f"{weights.path}: no CLIP vision transformer: it has neither 'visual.class_embedding' "
            "(OpenAI) nor 'vision_model.embeddings.class_embedding' (Hugging Face)"
        )
    sizes = _sizes(
        weights,
        kernel=f"{theirs}conv1.weight",
        blocks=f"{theirs}transformer.resblocks.{{}}.",
        hidden=f"{theirs}transformer.resblocks.0.mlp.c_fc.weight",
    )
    sizes["teacher.projection"] = dimensions(weights, f"{theirs}proj", 2)[1]
    heads = open_clip.heads(weights, sizes)
    said = read_config(weights.path) or {}
    if heads is None and "vision_config" in said:  # of the same model in Hugging Face's layout
        heads = _check_said(weights, said, sizes)
    return _plan(
        weights, config, "clip (OpenAI)", sizes, heads, f"{theirs}positional_embedding",
        lambda shapes: openai_table(shapes, theirs=theirs),
    )  # fmt: skip


def _hugging_face(weights: Weights, config: ConfigDict | None) -> Plan:
    if weights.has("embeddings.class_embedding"):  # CLIPVisionModel of transformers 5
        weights.rename(lambda name: f"vision_model.{name}")
    if not weights.has("visual_projection."):
        raise UserError(
            f"{weights.path}: has no 'visual_projection.weight', without which features are not in "
            "CLIP's shared space; save a CLIPModel or CLIPVisionModelWithProjection"
        )
    sizes = _sizes(
        weights,
        kernel="vision_model.embeddings.patch_embedding.weight",
        blocks="vision_model.encoder.layers.{}.",
        hidden="vision_model.encoder.layers.0.mlp.fc1.weight",
    )
    sizes["teacher.projection"] = dimensions(weights, "visual_projection.weight", 2)[0]
    said = read_config(weights.path)
    heads = None if said is None else _check_said(weights, said, sizes)
    positions = "vision_model.embeddings.position_embedding.weight"
    kind = "clip (Hugging Face)"
    return _plan(weights, config, kind, sizes, heads, positions, hugging_face_table)


def _check_said(weights: Weights, said: dict[str, Any], sizes: dict[str, Any]) -> int:
    """Heads, from Hugging Face's config.json; the rest of it must be what our teacher computes, and
    of a model of these sizes."""
    file = weights.path.parent / "config.json"
    vision = said.get("vision_config", said)
    if not isinstance(vision, dict):
        raise UserError(f"{file}: vision_config is no object")
    wanted = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}  # Hugging Face's defaults, too
    for field, value in wanted.items():
        if vision.get(field, value) != value:
            raise UserError(
                f"{file}: {field} is {vision[field]!r}; the teacher computes with {value!r}"
            )
    tensors = {
        "hidden_size": sizes["teacher.width"],
        "num_hidden_layers": sizes["teacher.depth"],
        "intermediate_size": round(sizes["teacher.width"] * sizes["teacher.mlp_ratio"]),
        "patch_size": sizes["teacher.patch"],
    }
    return hugging_face_heads(file, bert.DEFAULTS | {"patch_size": 32} | vision, tensors)


def _sizes(weights: Weights, *, kernel: str, blocks: str, hidden: str) -> dict[str, Any]:
    shape = dimensions(weights, kernel, 4)
    return {
        "teacher.width": shape[0],
        "teacher.depth": count(weights, blocks),
        "teacher.mlp_ratio": dimensions(weights, hidden, 2)[0] / shape[0],
        "teacher.patch": shape[-1],
    }


def _guess_heads(weights: Weights, config: ConfigDict | None, width: int) -> int:
    """Heads, of a file without a description; a given configuration overrides the guess.

    Raises:
      UserError: there is none, and the width is none of OpenAI's.
    """
    if config is None and width not in WIDTHS:
        raise UserError(
            f"{weights.path}: width {width} is none of OpenAI's ({', '.join(map(str, WIDTHS))}), "
            "whose heads and activation are known; put its open_clip_config.json (Hugging Face: "
            "config.json) beside it, or give --config=FILE with teacher.heads"
        )
    return max(width // CHANNELS, 1)


def _plan(weights, config, kind: str, sizes, heads, positions: str, make_table) -> Plan:
    """Args:
    heads: as a file beside the weights says, which then says the activation too; or None.
    """
    guesses, taken = {}, ()
    if heads is None:
        guesses["teacher.heads"] = _guess_heads(weights, config, sizes["teacher.width"])
        taken = (ACTIVATION,)
    else:
        sizes["teacher.heads"] = heads
    if config is None:
        # As many patches a side as the student has: UMT feeds ViT-L/14 196 px and ViT-B/16 224.
        vision = default().vision
        side = vision.image_size // vision.patch
        guesses = guesses | {"teacher.image_size": side * sizes["teacher.patch"]}
    fitted = fit(config, "teacher", weights, sizes, guesses)

    def create(rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Dict(visual=create_teacher(fitted, rngs))

    return Plan(
        kind=kind,
        config=fitted,
        create=create,
        table=make_table(shapes_of(create)),
        draw=False,
        resized=_resized(weights, positions, fitted),
        sizes=sizes,
        assumed=assumed(fitted, guesses) + taken,
    )


def _resized(weights: Weights, name: str, config: ConfigDict) -> dict[str, Resize]:
    """The position table [1 + side^2, d] for the teacher's picture size.

    As UMT's clip.py: the class token's row as it is, the grid bicubically (224 -> 196 px).
    """
    shape = dimensions(weights, name, 2)
    side = math.isqrt(max(shape[0] - 1, 0))
    target = config.teacher.image_size // config.teacher.patch
    if side * side + 1 != shape[0] or not side:
        raise UserError(f"{weights.path}: {name!r} has {shape[0]} rows, not 1 and a square")
    if side == target:
        return {}
    matrix = resize.bicubic(side, target)

    def apply(table: np.ndarray) -> np.ndarray:
        grid = table[1:].astype(np.float64).reshape(side, side, -1)
        grid = np.einsum("yr,xc,rcd->yxd", matrix, matrix, grid, optimize=True)
        return np.concatenate([table[:1], grid.reshape(target * target, -1).astype(np.float32)])

    return {name: Resize(shape, apply, f"bicubic, {side} x {side} to {target} x {target}")}
