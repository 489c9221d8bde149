"""BERT's key table: Hugging Face's BertModel, BertForMaskedLM and BertForPreTraining.

UMT's text encoder (`multi_modality/models/backbones/bert/xbert.py`) has the same names, and
cross-attention in its last layers besides.
"""

from collections.abc import Mapping

from instap_jax.interop.keys import HEADS, HEADS_BIAS, Rule, Shape, linear, norm


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
