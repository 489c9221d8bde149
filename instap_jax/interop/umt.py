"""UMT's key tables: its stage-1 student and its stage-2 model.

From the public source: `single_modality/models/modeling_pretrain_umt.py` (stage 1),
`multi_modality/models/umt.py`, `backbones/vit/vit.py`, `backbones/bert/xbert.py` (stage 2). Its
position tables are fixed sine-cosine codes that no checkpoint holds.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from instap_jax.config import default
from instap_jax.errors import UserError
from instap_jax.interop import bert, terms
from instap_jax.interop.keys import (
    CONVOLUTION_3D,
    HEADS,
    HEADS_BIAS,
    Rule,
    Shape,
    Table,
    linear,
    norm,
    resolve,
)
from instap_jax.interop.plan import Plan, assumed, count, dimensions, fit, shapes_of
from instap_jax.interop.reading import Weights
from instap_jax.models.vision import position_codes
from instap_jax.train.objectives import OBJECTIVES, term_weights

# InstAP's own: the look at the scene of (5), the temperature of (8), and what options beyond the
# paper add.
OWN = (
    "cross_attention.",
    "instance_temperature",
    "box_codes.",
    "contrastive_bias",
    "instance_contrastive_bias",
)
_BODY, _HEAD = "text_encoder.bert.", "text_encoder.cls."
# What checkpoints fine-tuned for retrieval lack, ours -> theirs: UMT builds their text encoder
# without a language head, and so without the `bert.` in its names, and no distillation heads.
_LEFT_OUT = {"text.mlm_head.": _HEAD, "heads.": "vision_encoder.clip_decoder."}
_RETRIEVAL = ("vtc", "vtm")  # terms of that fine-tuning
POSITION_TABLES = (
    "encoder.pos_embed",
    "encoder.img_pos_embed",
    "clip_pos_embed",
    "clip_img_pos_embed",
)
IGNORED = {"clip_teacher.": "the frozen teacher, which stands in its own checkpoint"}
DESCRIPTION = "instap_config.json"  # beside an export of ours; UMT's own files have none


def table(stage: str, shapes: Mapping[str, Shape], *, absent: tuple[str, ...] = ()) -> Table:
    """UMT's layout over the model of our stage.

    Args:
      stage: 'distill' (a UMT stage-1 state dict) or 'align' (a UMT stage-2 one).
      shapes: of the model's parameters, by dotted path (`keys.leaves`).
      absent: prefixes of our parameters that a stage-2 file lacks.

    Raises:
      ValueError: for another stage.
    """
    if stage == "distill":
        return resolve(vision_rules(""), shapes, ignored=IGNORED)
    if stage != "align":
        raise ValueError(f"UMT has nothing like stage {stage!r}")
    length = shapes["text.embeddings.positions"][0]
    return resolve(
        [rule for rule in align_rules(shapes) if not rule.ours.startswith(absent)],
        shapes,
        own=OWN + absent,
        tied={} if "text.mlm_head." in absent else bert.tied_head(body=_BODY, head=_HEAD),
        constants={f"{_BODY}embeddings.position_ids": np.arange(length, dtype=np.int64)[None]},
        ignored=IGNORED,
    )


def align_rules(shapes: Mapping[str, Shape]) -> list[Rule]:
    """Everything of stage 'align' that UMT has too."""
    return [
        *vision_rules("vision_encoder."),
        *norm("pool_norm", "vision_encoder.pool_norm"),
        *linear("vision_projection", "vision_proj"),
        *bert.encoder_rules(shapes, theirs=_BODY, cross=True),
        *bert.head_rules(theirs=_HEAD),
        *linear("text_projection", "text_proj"),
        *linear("match_head.linear", "itm_head"),
        Rule("temperature", ("temp",)),
    ]


def vision_rules(theirs: str) -> list[Rule]:
    """The student: `encoder` and `heads`. The foreign keys begin with `theirs`."""
    encoder, decoder = f"{theirs}encoder", f"{theirs}clip_decoder.{{}}"
    embedding = f"{encoder}.patch_embed.proj"
    return [
        Rule("encoder.patch_embedding.kernel", (f"{embedding}.weight",), CONVOLUTION_3D),
        Rule("encoder.patch_embedding.bias", (f"{embedding}.bias",)),
        *_blocks("encoder.blocks", f"{encoder}.blocks.{{}}"),
        *norm("encoder.norm", f"{encoder}.norm"),
        *linear("heads.heads.linear", f"{decoder}.head"),
        *norm("heads.heads.norm", f"{decoder}.norm"),
    ]


def plan(weights: Weights, config: ConfigDict | None) -> Plan:
    """A UMT checkpoint as a run of stage 'distill' (its stage 1) or 'align' (its stage 2).

    Raises:
      UserError: neither of them, or it does not fit the configuration.
    """
    stage, prefix = _stage(weights)
    absent: tuple[str, ...] = ()
    if stage == "align":
        weights.rename(_canonical)
        absent = tuple(ours for ours, theirs in _LEFT_OUT.items() if not weights.has(theirs))
    described = terms.recorded(weights, DESCRIPTION)  # by an export of ours
    trained = described or (_RETRIEVAL if absent else None)
    sizes = _vision_sizes(weights, prefix, heads="heads." not in absent)
    if stage == "align":
        sizes |= _align_sizes(weights)
    if config is None:
        # An older export does not say what was done to texts: nothing.
        sizes |= {"tokenizer.text": "plain"} if described else {}
        sizes |= terms.options(weights, DESCRIPTION)
        sizes |= terms.zeros(trained) if stage == "align" else {}
    guesses = _guesses(sizes)
    fitted = fit(config, stage, weights, sizes, guesses)
    tables = _fixed_tables(weights, prefix)
    # UMT has no instance terms: instances are then evaluated as those of its baselines are.
    fitted.align.instance = 0.0
    if stage == "align" and not term_weights(fitted):
        raise UserError(
            f"{weights.path}: only terms of instances have weight, and UMT embeds none; export the "
            "run with --to=torch, or give align.vtc a weight"
        )
    terms.check(fitted, trained, weights.path)

    def create(rngs: nnx.Rngs) -> nnx.Module:
        return OBJECTIVES[stage].create(fitted, rngs)

    table_of_keys = table(stage, shapes_of(create), absent=absent)
    return Plan(
        kind=f"umt (stage {'2' if stage == 'align' else '1'}{', fine-tuned' if absent else ''})",
        config=fitted,
        create=create,
        table=dataclasses.replace(table_of_keys, ignored=table_of_keys.ignored | tables),
        draw=True,
        sizes=sizes,
        assumed=assumed(fitted, guesses) + terms.assumed(fitted, trained),
    )


def _stage(weights: Weights) -> tuple[str, str]:
    """Our name of the stage, and what the names of the student's tensors begin with.

    Raises:
      UserError: the weights are not UMT's.
    """
    if weights.has("vision_encoder.encoder."):
        return "align", "vision_encoder."
    if weights.has("encoder.patch_embed."):
        return "distill", ""
    raise UserError(
        f"{weights.path}: no UMT pre-training checkpoint: it has neither "
        "'encoder.patch_embed.proj.weight' (stage 1) nor 'vision_encoder.encoder...' (stage 2)"
    )


def _guesses(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """What a file does not say that says `sizes`."""
    usual = default()
    guesses = {
        "vision.heads": max(sizes["vision.width"] // bert.CHANNELS, 1),
        "vision.image_size": 14 * sizes["vision.patch"],  # 224 px, as all that UMT published
        "data.frames": usual.data.frames,
        "distill.layers": min(usual.distill.layers, sizes["vision.depth"]),
        "teacher.projection": usual.teacher.projection,
    }
    if "text.width" in sizes:
        guesses["tokenizer.text"] = "umt"
        guesses["text.heads"] = max(sizes["text.width"] // bert.CHANNELS, 1)
    return {key: value for key, value in guesses.items() if key not in sizes}


def _canonical(name: str) -> str:
    """Names as pre-training has them; see `_LEFT_OUT`."""
    for part in ("embeddings.", "encoder."):
        if name.startswith(f"text_encoder.{part}"):
            return name.replace("text_encoder.", _BODY, 1)
    return name


def _fixed_tables(weights: Weights, prefix: str) -> dict[str, str]:
    """Position tables in the file, which must be the fixed code: it is computed, not loaded.

    UMT keeps the fixed tables out of its checkpoints; a file with `use_learnable_pos_emb`, or with
    tables saved by hand, has them.

    Raises:
      UserError: one of them holds other numbers.
    """
    found = {}
    for name in POSITION_TABLES:
        name = f"{prefix}{name}"
        if name not in weights.shapes:
            continue
        _, tokens, width = dimensions(weights, name, 3)
        code = np.asarray(position_codes(1, tokens, width))
        if not np.allclose(weights.read(name).astype(np.float32), code[None], rtol=0, atol=1e-5):
            raise UserError(
                f"{weights.path}: {name!r} is not the fixed sine-cosine table; the student has no "
                "learned positions"
            )
        found[name] = "the fixed sine-cosine table, recomputed for the clip at hand"
    return found


def _vision_sizes(weights: Weights, prefix: str, *, heads: bool) -> dict[str, Any]:
    kernel = dimensions(weights, f"{prefix}encoder.patch_embed.proj.weight", 5)
    if kernel[2] != 1:
        raise UserError(
            f"{weights.path}: its tubelets are {kernel[2]} frames long; the student's are 1"
        )
    hidden = dimensions(weights, f"{prefix}encoder.blocks.0.mlp.fc1.weight", 2)[0]
    sizes = {
        "vision.width": kernel[0],
        "vision.depth": count(weights, f"{prefix}encoder.blocks.{{}}."),
        "vision.mlp_ratio": hidden / kernel[0],
        "vision.patch": kernel[-1],
    }
    if not heads:
        return sizes
    return sizes | {
        "distill.layers": count(weights, f"{prefix}clip_decoder.{{}}."),
        "teacher.projection": dimensions(weights, f"{prefix}clip_decoder.0.head.weight", 2)[0],
    }


def _align_sizes(weights: Weights) -> dict[str, Any]:
    sizes = bert.text_sizes(weights, _BODY)
    layers = range(sizes["text.depth"])
    fusion = sum(weights.has(f"{_BODY}encoder.layer.{i}.crossattention.") for i in layers)
    sizes["text.fusion_layers"] = fusion
    sizes["align.projection"] = dimensions(weights, "vision_proj.weight", 2)[0]
    return sizes


def _blocks(ours: str, theirs: str) -> list[Rule]:
    biases = (f"{theirs}.attn.q_bias", f"{theirs}.attn.v_bias")  # it has no key bias
    return [
        *norm(f"{ours}.norm1", f"{theirs}.norm1"),
        Rule(f"{ours}.attention.qkv", (f"{theirs}.attn.qkv.weight",), HEADS),
        Rule(f"{ours}.attention.qkv_bias", biases, HEADS_BIAS),
        *linear(f"{ours}.attention.out", f"{theirs}.attn.proj"),
        *norm(f"{ours}.norm2", f"{theirs}.norm2"),
        *linear(f"{ours}.mlp.expand", f"{theirs}.mlp.fc1"),
        *linear(f"{ours}.mlp.contract", f"{theirs}.mlp.fc2"),
    ]
