"""The text encoder: BERT whose last layers are fusion layers, exactly as UMT builds it.

Layers 0 .. depth - fusion_layers - 1 see text alone; the last `fusion_layers` also cross-attend to
visual tokens (UMT `backbones/bert/xbert.py`: large 19 + 5, base 9 + 3). Post-norm, learned
positions, exact gelu, LayerNorm epsilon 1e-12. Every BERT weight has one place here, so weights
convert one to one; that is why the token-type table of two rows is kept though only row 0 is read.

Initial values: embeddings normal(0.02) as in BERT, linear maps as in all our networks (Xavier);
BERT's 0.02 for those suits widths near 1024 only, where BERT weights are loaded anyway.

Axis letters: B samples, g groups, m texts of a group, s text length, d width, V visual tokens,
e their width.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from instap_jax.models.depth import scan_blocks, stack
from instap_jax.models.layers import (
    Attention,
    Bias,
    Context,
    CrossAttention,
    LayerNorm,
    Linear,
    Mlp,
    dropout,
    exact_gelu,
)
from instap_jax.models.placement import cut, gathered, join

Array = jax.Array

NORM_EPSILON = 1e-12
PAD_ID = 0
TOKEN_TYPES = 2

_embedding_init = jax.nn.initializers.normal(0.02)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOutput:
    """Attributes:
    tokens: [B, s, d], outputs of the last text-only layer, in the compute dtype.
    pooled: [B, d], the [CLS] one among them (no BERT pooler: UMT has none).
    """

    tokens: Array
    pooled: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FusionTexts:
    """Texts of one kind and what the fusion layers show them: m of each of g groups.

    Attributes:
      tokens: [g, m, s, d] from `TextEncoder.encode`. mask: bool [g, m, s] from `text_mask`.
      visual: [g, m, V, e]. visual_mask: bool [g, m, V], True where there is a token; None: all.
    """

    tokens: Array
    mask: Array
    visual: Array
    visual_mask: Array | None = None


def text_mask(ids: Array) -> Array:
    """bool, same shape as the ids: True where there is a token, False where there is [PAD]."""
    return ids != PAD_ID


class TextEncoder(nnx.Module):
    """BERT with fusion layers and the masked-language head.

    Args:
      config: the `text` section of the configuration; `depth` counts the fusion layers too.
      vision_width: e, the width of the visual tokens. None: a text-only tower, whose `depth`
        layers are all text layers, without fusion layers and masked-language head.
      dtype: compute dtype.
      remat: see `depth.scan_blocks`. backend: see `attention_backends`.

    Raises:
      ValueError: when the fusion layers leave no text layer, or there are none to build.
    """

    def __init__(
        self,
        config: ConfigDict,
        *,
        vision_width: int | None = None,
        dtype: Any,
        remat: str,
        rngs: nnx.Rngs,
        backend: str = "auto",
    ):
        fusion = 0 if vision_width is None else config.fusion_layers
        if vision_width is not None and not 0 < fusion < config.depth:
            raise ValueError(
                f"text.fusion_layers is {fusion}: must be 1 to text.depth - 1 = {config.depth - 1}"
            )
        options = {"dtype": dtype, "backend": backend}
        self.embeddings = TextEmbeddings(config, dtype=dtype, rngs=rngs)
        self.blocks = stack(
            lambda rngs: TextBlock(config, context_width=None, rngs=rngs, **options),
            config.depth - fusion,
            rngs,
        )
        if vision_width is None:
            self.fusion_blocks = self.mlm_head = None
        else:
            self.fusion_blocks = stack(
                lambda rngs: TextBlock(config, context_width=vision_width, rngs=rngs, **options),
                fusion,
                rngs,
            )
            self.mlm_head = MaskedLanguageHead(config, dtype=dtype, rngs=rngs)
        # Texts take little memory: offloading them would double the compiled loops for nothing.
        self.remat = "none" if remat == "offload" else remat

    def encode(self, ids: Array, *, key: Array | None = None) -> TextOutput:
        """Runs the text-only layers.

        Args:
          ids: int32 [B, s], [CLS] first, padded with 0; s <= text.max_length.
          key: for dropout; None runs deterministically.
        """
        embed_key, key = (None, None) if key is None else jax.random.split(key)
        mask = text_mask(ids)
        tokens, _ = scan_blocks(
            self.blocks,
            self.embeddings(ids, key=embed_key),
            remat=self.remat,
            key=key,
            call=lambda block, x, key, _: block(x, mask=mask, key=key),
        )
        return TextOutput(tokens=tokens, pooled=tokens[:, 0])

    def fuse(
        self,
        text_tokens: Array,
        text_mask: Array,
        visual: Array,
        *,
        visual_mask: Array | None = None,
        key: Array | None = None,
    ) -> Array:
        """Runs the fusion layers.

        Args:
          text_tokens: [B, s, d] from `encode`. text_mask: bool [B, s] from `text_mask`.
          visual: [B, V, e]. visual_mask: bool [B, V], True where there is a token; None: all.
          key: for dropout, another one than for `encode`; None runs deterministically.

        Returns:
          [B, s, d] in the compute dtype.
        """
        texts = FusionTexts(
            tokens=text_tokens[:, None],
            mask=text_mask[:, None],
            visual=visual[:, None],
            visual_mask=None if visual_mask is None else visual_mask[:, None],
        )
        return self.fuse_together([texts], key=key)[0][:, 0]

    def fuse_together(
        self, texts: Sequence[FusionTexts], *, key: Array | None = None
    ) -> list[Array]:
        """Runs the fusion layers once for texts of several kinds, all of the same groups and s.

        Only the attention to visual tokens is each kind's own: everything else is one product of
        all texts, whose weights are gathered once, and the program holds the layer once.

        Returns:
          [g, m, s, d] of each kind, in the compute dtype.
        """
        groups = texts[0].tokens.shape[0]
        mask = join([kind.mask for kind in texts])
        contexts = [Context(tokens=kind.visual, mask=kind.visual_mask) for kind in texts]
        tokens, _ = scan_blocks(
            self.fusion_blocks,
            join([kind.tokens for kind in texts]),
            remat=self.remat,
            key=key,
            call=lambda block, x, key, _: block(x, mask=mask, contexts=contexts, key=key),
        )
        return cut(tokens, groups, [kind.tokens.shape[1] for kind in texts])

    def mlm_logits(self, tokens: Array) -> Array:
        """Fused tokens [B, s, d] -> float32 logits over the vocabulary [B, s, vocab_size]."""
        return self.mlm_head(tokens, self.embeddings.words)


class TextEmbeddings(nnx.Module):
    """LayerNorm(word + position + token type 0), then dropout."""

    def __init__(self, config: ConfigDict, *, dtype: Any, rngs: nnx.Rngs):
        def table(rows: int, axis: str | None) -> nnx.Param:
            values = _embedding_init(rngs.params(), (rows, config.width), jnp.float32)
            return nnx.Param(values, logical_axes=(axis, "embed"))

        self.words = table(config.vocab_size, "vocab")
        self.positions = table(config.max_length, None)
        self.token_types = table(TOKEN_TYPES, None)
        self.norm = LayerNorm(config.width, eps=NORM_EPSILON, dtype=dtype)
        self.dropout = config.dropout

    def __call__(self, ids: Array, *, key: Array | None = None) -> Array:
        """int32 [B, s] -> [B, s, d]."""
        length, longest = ids.shape[1], self.positions[...].shape[0]
        if length > longest:
            raise ValueError(f"text of {length} tokens; text.max_length is {longest}")
        words = gathered(self.words, jnp.float32)
        positions = gathered(self.positions, jnp.float32)[:length]
        x = words[ids] + positions + gathered(self.token_types, jnp.float32)[0]
        return dropout(self.norm(x), rate=self.dropout, key=key)


class TextBlock(nnx.Module):
    """A BERT layer: self-attention, cross-attention if it has a context, MLP; each
    x <- LayerNorm(x + dropout(branch(x))).

    Args:
      context_width: e of the visual tokens; None for a text-only layer.
    """

    def __init__(
        self,
        config: ConfigDict,
        *,
        context_width: int | None,
        dtype: Any,
        rngs: nnx.Rngs,
        backend: str = "auto",
    ):
        width, heads = config.width, config.heads

        def norm() -> LayerNorm:
            return LayerNorm(width, eps=NORM_EPSILON, dtype=dtype)

        options = {"dtype": dtype, "rngs": rngs, "backend": backend}
        self.attention = Attention(width, heads, bias=Bias.FULL, **options)
        self.attention_norm = norm()
        if context_width is None:
            self.cross = self.cross_norm = None
        else:
            self.cross = CrossAttention(width, context_width, heads, **options)
            self.cross_norm = norm()
        hidden = int(width * config.mlp_ratio + 1e-6)
        self.mlp = Mlp(width, hidden, activation=exact_gelu, dtype=dtype, rngs=rngs)
        self.mlp_norm = norm()
        self.dropout = config.dropout

    def __call__(
        self,
        x: Array,
        *,
        mask: Array,
        contexts: Sequence[Context] = (),
        key: Array | None = None,
    ) -> Array:
        """[B, s, d] -> [B, s, d]; mask bool [B, s], contexts of `layers.CrossAttention`."""
        keys = (None,) * 5 if key is None else jax.random.split(key, 5)
        rate = self.dropout
        y = self.attention(x, mask=mask, dropout_rate=rate, key=keys[0])
        x = self.attention_norm(x + dropout(y, rate=rate, key=keys[1]))
        if self.cross is not None:
            y = self.cross(x, contexts, dropout_rate=rate, key=keys[2])
            x = self.cross_norm(x + dropout(y, rate=rate, key=keys[3]))
        return self.mlp_norm(x + dropout(self.mlp(x), rate=rate, key=keys[4]))


class MaskedLanguageHead(nnx.Module):
    """BERT's prediction head: dense, gelu, LayerNorm, decoder tied to the word embeddings, bias."""

    def __init__(self, config: ConfigDict, *, dtype: Any, rngs: nnx.Rngs):
        width = config.width
        self.dense = Linear(width, width, axes=("embed", None), dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(width, eps=NORM_EPSILON, dtype=dtype)
        zeros = jnp.zeros(config.vocab_size, jnp.float32)
        self.bias = nnx.Param(zeros, logical_axes=("vocab",))

    def __call__(self, tokens: Array, words: nnx.Param) -> Array:
        """Tokens [B, s, d] and the word embeddings [vocab, d] -> float32 [B, s, vocab]."""
        x = self.norm(exact_gelu(self.dense(tokens)))
        table = gathered(words, x.dtype)
        logits = jnp.einsum("bsd,vd->bsv", x, table, preferred_element_type=jnp.float32)
        return logits + gathered(self.bias, jnp.float32)


class MatchHead(nnx.Module):
    """UMT's itm_head: two logits, [not a pair, a pair], from the fused [CLS] token."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        # Re-ranking orders by these: in bfloat16 one of 128 candidates in four ties with another.
        self.linear = Linear(width, 2, axes=("embed", None), dtype=jnp.float32, rngs=rngs)

    def __call__(self, tokens: Array) -> Array:
        """Fused tokens [B, s, d] -> float32 [B, 2]."""
        return self.linear(tokens[:, 0])
