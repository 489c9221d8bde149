"""UMT's text tower assembled from Hugging Face BERT modules, and its weights in our layout.

UMT's xbert is BERT whose last layers are decoder-style layers (cross-attention, keys and values
from the vision width) without the causal mask; Hugging Face has all of those parts.
"""

import copy

import numpy as np
import torch
from torch import nn
from transformers import BertConfig
from transformers.models.bert import modeling_bert as hf

torch.set_num_threads(1)


def randomise(module: nn.Module, seed: int) -> None:
    """Random values everywhere, so that no bias, norm or table is at a value that hides it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(std=0.2, generator=generator)
            if name.endswith("LayerNorm.weight"):
                parameter.add_(1)


def additive(mask: torch.Tensor) -> torch.Tensor:
    """bool [b, m] -> what the attention modules add to their logits, [b, 1, 1, m]."""
    return torch.where(mask, 0.0, torch.finfo(torch.float32).min)[:, None, None, :]


class Tower(nn.Module):
    """Embeddings, text layers, fusion layers, MLM head with tied decoder."""

    def __init__(self, config: BertConfig, text_layers: int, fusion_layers: int, vision_width: int):
        super().__init__()
        self.embeddings = hf.BertEmbeddings(config)
        self.text = nn.ModuleList(hf.BertLayer(config) for _ in range(text_layers))
        decoder = copy.deepcopy(config)
        decoder.is_decoder = decoder.add_cross_attention = True
        self.fusion = nn.ModuleList(hf.BertLayer(decoder) for _ in range(fusion_layers))
        for layer in self.fusion:
            layer.attention.self.is_causal = False
            layer.crossattention.self.key = nn.Linear(vision_width, config.hidden_size)
            layer.crossattention.self.value = nn.Linear(vision_width, config.hidden_size)
        self.head = hf.BertLMPredictionHead(config)
        self.head.decoder.weight = self.embeddings.word_embeddings.weight
        self.head.decoder.bias = self.head.bias

    def encode(self, ids, mask):
        x = self.embeddings(ids)
        for layer in self.text:
            x = layer(x, additive(mask))
        return x

    def fuse(self, x, mask, visual, visual_mask):
        for layer in self.fusion:
            x = layer(x, additive(mask), visual, additive(visual_mask))
        return x


def make_config(*, vocab: int, width: int, heads: int, hidden: int, length: int) -> BertConfig:
    return BertConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=hidden,
        max_position_embeddings=length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy().copy()


def _linear(module: nn.Linear) -> dict:
    return {"kernel": _array(module.weight).T, "bias": _array(module.bias)}


def _norm(module: nn.LayerNorm) -> dict:
    return {"scale": _array(module.weight), "bias": _array(module.bias)}


def _heads(modules: list[nn.Linear], heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Projections [d, in] -> kernel [in, x, h, c] and bias [x, h, c]."""
    kernels = [_array(m.weight).T.reshape(m.in_features, heads, -1) for m in modules]
    biases = [_array(m.bias).reshape(heads, -1) for m in modules]
    return np.stack(kernels, axis=1), np.stack(biases)


def block(layer: hf.BertLayer, heads: int) -> dict:
    """One layer's weights, as the nested state of our `TextBlock`."""
    own = layer.attention
    qkv, qkv_bias = _heads([own.self.query, own.self.key, own.self.value], heads)
    state = {
        "attention": {"qkv": qkv, "qkv_bias": qkv_bias, "out": _linear(own.output.dense)},
        "attention_norm": _norm(own.output.LayerNorm),
        "mlp": {
            "expand": _linear(layer.intermediate.dense),
            "contract": _linear(layer.output.dense),
        },
        "mlp_norm": _norm(layer.output.LayerNorm),
    }
    if hasattr(layer, "crossattention"):
        cross = layer.crossattention
        query, query_bias = _heads([cross.self.query], heads)
        key_value, key_value_bias = _heads([cross.self.key, cross.self.value], heads)
        state["cross"] = {
            "query": query,
            "query_bias": query_bias,
            "key_value": key_value,
            "key_value_bias": key_value_bias,
            "out": _linear(cross.output.dense),
        }
        state["cross_norm"] = _norm(cross.output.LayerNorm)
    return state


def embeddings(module: hf.BertEmbeddings) -> dict:
    return {
        "words": _array(module.word_embeddings.weight),
        "positions": _array(module.position_embeddings.weight),
        "token_types": _array(module.token_type_embeddings.weight),
        "norm": _norm(module.LayerNorm),
    }


def head(module: hf.BertLMPredictionHead) -> dict:
    return {
        "dense": _linear(module.transform.dense),
        "norm": _norm(module.transform.LayerNorm),
        "bias": _array(module.bias),
    }
