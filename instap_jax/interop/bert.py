"""BERT's key table: Hugging Face's BertModel, BertForMaskedLM and BertForPreTraining.

UMT's text encoder (`multi_modality/models/backbones/bert/xbert.py`) has the same names, and
cross-attention in its last layers besides.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from instap_jax.errors import UserError
from instap_jax.interop.keys import (
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
from instap_jax.interop.reading import Weights, hugging_face_heads, read_config
from instap_jax.models.text import TextEncoder
from instap_jax.train.objectives import compute_options

CHANNELS = 64  # of an attention head in BERT base and large
# Fusion layers that UMT makes of the last ones (multi_modality/configs/model.py).
FUSION_LAYERS = {12: 3, 24: 5}
IGNORED = {
    "bert.pooler.": "BERT's pooler: text is pooled by its [CLS] token as it is, as in UMT",
    "cls.seq_relationship.": "BERT's next-sentence head",
}
# Of Hugging Face's BertConfig, and of its CLIPVisionConfig.
DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
}
_CROSS = ("text.fusion_blocks.cross.", "text.fusion_blocks.cross_norm.")


def table(shapes: Mapping[str, Shape], *, head: bool = True) -> Table:
    """BERT's layout over our `text`, its keys beginning with 'bert.' and 'cls.'.

    Args:
      head: whether the file has a masked-language head.
    """
    rules = encoder_rules(shapes, theirs="bert.", cross=False)
    length = shapes["text.embeddings.positions"][0]
    return resolve(
        rules + (head_rules(theirs="cls.") if head else []),
        shapes,
        own=_CROSS if head else (*_CROSS, "text.mlm_head."),
        tied=tied_head(body="bert.", head="cls.") if head else {},
        constants={"bert.embeddings.position_ids": np.arange(length)[None]},
        ignored=IGNORED,
    )


def plan(weights: Weights, config: ConfigDict | None) -> Plan:
    """BERT weights as what `config.text.checkpoint` names.

    Raises:
      UserError: not BERT weights, or they do not fit the configuration.
    """
    weights.rename(_canonical)
    if not weights.has("bert.embeddings."):
        raise UserError(f"{weights.path}: no BERT: it has no 'embeddings.word_embeddings.weight'")
    sizes = text_sizes(weights, "bert.")
    guesses = {"text.heads": max(sizes["text.width"] // CHANNELS, 1)}
    if (said := read_config(weights.path)) is not None:
        sizes["text.heads"] = _check_said(weights, said, sizes)
        guesses = {}
    depth = sizes["text.depth"]
    if config is None and depth not in FUSION_LAYERS:
        raise UserError(
            f"{weights.path}: {depth} layers; how many of them are fusion layers is known of 12 "
            "and 24 only: give --config=FILE and --config.text.fusion_layers"
        )
    guesses["text.fusion_layers"] = FUSION_LAYERS.get(depth)
    fitted = fit(config, "align", weights, sizes, guesses)

    def create(rngs: nnx.Rngs) -> nnx.Module:
        width = fitted.vision.width
        options = compute_options(fitted)
        return nnx.Dict(text=TextEncoder(fitted.text, vision_width=width, rngs=rngs, **options))

    return Plan(
        kind="bert (Hugging Face)",
        config=fitted,
        create=create,
        table=table(shapes_of(create), head=weights.has("cls.predictions.")),
        draw=False,
        sizes=sizes,
        assumed=assumed(fitted, guesses),
    )


def _canonical(name: str) -> str:
    """Names as BertForPreTraining has them today: BertModel's lack 'bert.', and weights of 2018,
    Google's own on the hub among them, call a LayerNorm's parameters gamma and beta."""
    if name.startswith(("embeddings.", "encoder.", "pooler.")):
        name = f"bert.{name}"
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )


def _check_said(weights: Weights, said: dict[str, Any], sizes: dict[str, Any]) -> int:
    """Heads, from Hugging Face's config.json; the rest of it must be what we compute, and of a
    model of these sizes."""
    file = weights.path.parent / "config.json"
    wanted = {
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "position_embedding_type": "absolute",
    }
    for field, value in wanted.items():
        if said.get(field, value) != value:
            raise UserError(
                f"{file}: {field} is {said[field]!r}; the text encoder computes with {value!r}"
            )
    tensors = {
        "hidden_size": sizes["text.width"],
        "num_hidden_layers": sizes["text.depth"],
        "intermediate_size": round(sizes["text.width"] * sizes["text.mlp_ratio"]),
    }
    return hugging_face_heads(file, DEFAULTS | said, tensors)


def text_sizes(weights: Weights, theirs: str) -> dict[str, Any]:
    """The fields of `config.text` that a BERT's tensors determine; keys begin with `theirs`."""
    vocabulary, width = dimensions(weights, f"{theirs}embeddings.word_embeddings.weight", 2)
    length = dimensions(weights, f"{theirs}embeddings.position_embeddings.weight", 2)[0]
    hidden = dimensions(weights, f"{theirs}encoder.layer.0.intermediate.dense.weight", 2)[0]
    return {
        "text.vocab_size": vocabulary,
        "text.width": width,
        "text.depth": count(weights, f"{theirs}encoder.layer.{{}}."),
        "text.mlp_ratio": hidden / width,
        "text.max_length": length,
    }


def encoder_rules(shapes: Mapping[str, Shape], *, theirs: str, cross: bool) -> list[Rule]:
    """Embeddings and layers of `TextEncoder` at `text`.

    Args:
      shapes: of our parameters. They say how many layers are text layers.
      theirs: prefix of the foreign keys, '' or ending in '.'.
      cross: whether the fusion layers' cross-attention is in the layout.
    """
    tables = {"words": "word", "positions": "position", "token_types": "token_type"}
    rules = [
        Rule(f"text.embeddings.{a}", (f"{theirs}embeddings.{b}_embeddings.weight",))
        for a, b in tables.items()
    ]
    rules += norm("text.embeddings.norm", f"{theirs}embeddings.LayerNorm")
    first = shapes["text.blocks.mlp_norm.bias"][0]
    rules += _layers("text.blocks", f"{theirs}encoder.layer.{{}}", 0)
    if "text.fusion_blocks.mlp_norm.bias" not in shapes:
        return rules
    rules += _layers("text.fusion_blocks", f"{theirs}encoder.layer.{{}}", first)
    return rules + (_cross(f"{theirs}encoder.layer.{{}}.crossattention", first) if cross else [])


def head_rules(*, theirs: str) -> list[Rule]:
    """The masked-language head; its decoder is tied (`tied_head`)."""
    return [
        *linear("text.mlm_head.dense", f"{theirs}predictions.transform.dense"),
        *norm("text.mlm_head.norm", f"{theirs}predictions.transform.LayerNorm"),
        Rule("text.mlm_head.bias", (f"{theirs}predictions.bias",)),
    ]


def tied_head(*, body: str, head: str) -> dict[str, str]:
    """The decoder's keys, which are other names of the word embeddings and of the bias."""
    return {
        f"{head}predictions.decoder.weight": f"{body}embeddings.word_embeddings.weight",
        f"{head}predictions.decoder.bias": f"{head}predictions.bias",
    }


def _layers(ours: str, theirs: str, first: int) -> list[Rule]:
    own = f"{theirs}.attention.self"
    weights = tuple(f"{own}.{part}.weight" for part in ("query", "key", "value"))
    biases = tuple(f"{own}.{part}.bias" for part in ("query", "key", "value"))
    return [
        Rule(f"{ours}.attention.qkv", weights, HEADS, first),
        Rule(f"{ours}.attention.qkv_bias", biases, HEADS_BIAS, first),
        *linear(f"{ours}.attention.out", f"{theirs}.attention.output.dense", first=first),
        *norm(f"{ours}.attention_norm", f"{theirs}.attention.output.LayerNorm", first=first),
        *linear(f"{ours}.mlp.expand", f"{theirs}.intermediate.dense", first=first),
        *linear(f"{ours}.mlp.contract", f"{theirs}.output.dense", first=first),
        *norm(f"{ours}.mlp_norm", f"{theirs}.output.LayerNorm", first=first),
    ]


def _cross(theirs: str, first: int) -> list[Rule]:
    ours, own = "text.fusion_blocks.cross", f"{theirs}.self"
    pair = ("key", "value")
    return [
        Rule(f"{ours}.query", (f"{own}.query.weight",), HEADS, first),
        Rule(f"{ours}.query_bias", (f"{own}.query.bias",), HEADS_BIAS, first),
        Rule(f"{ours}.key_value", tuple(f"{own}.{p}.weight" for p in pair), HEADS, first),
        Rule(f"{ours}.key_value_bias", tuple(f"{own}.{p}.bias" for p in pair), HEADS_BIAS, first),
        *linear(f"{ours}.out", f"{theirs}.output.dense", first=first),
        *norm(f"{ours}_norm", f"{theirs}.output.LayerNorm", first=first),
    ]
