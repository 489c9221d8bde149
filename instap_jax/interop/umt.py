"""UMT's key tables: its stage-1 student and its stage-2 model.

From the public source: `single_modality/models/modeling_pretrain_umt.py` (stage 1),
`multi_modality/models/umt.py`, `backbones/vit/vit.py`, `backbones/bert/xbert.py` (stage 2). Its
position tables are fixed sine-cosine codes that no checkpoint holds.
"""

from collections.abc import Mapping

import numpy as np

from instap_jax.interop import bert
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

# InstAP's own: the look at the scene of (5), and the temperature of (8).
OWN = ("cross_attention.", "instance_temperature")
_BODY, _HEAD = "text_encoder.bert.", "text_encoder.cls."
IGNORED = {"clip_teacher.": "the frozen teacher, which stands in its own checkpoint"}


def table(stage: str, shapes: Mapping[str, Shape]) -> Table:
    """UMT's layout over the model of our stage.

    Args:
      stage: 'distill' (a UMT stage-1 state dict) or 'align' (a UMT stage-2 one).
      shapes: of the model's parameters, by dotted path (`keys.leaves`).

    Raises:
      ValueError: for another stage.
    """
    if stage == "distill":
        return resolve(vision_rules(""), shapes, ignored=IGNORED)
    if stage != "align":
        raise ValueError(f"UMT has nothing like stage {stage!r}")
    length = shapes["text.embeddings.positions"][0]
    return resolve(
        align_rules(shapes),
        shapes,
        own=OWN,
        tied=bert.tied_head(body=_BODY, head=_HEAD),
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
