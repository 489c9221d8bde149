"""Building blocks shared by every network: linear maps, norms, attention, residual blocks.

Conventions held by all models:
  * Parameters are float32 `nnx.Param`s carrying `logical_axes`, one name (or None) per axis, which
    `sharding.py` turns into mesh axes. A stack (`depth.py`) has one more axis on the left.
  * `dtype` is the compute dtype: kernels and activations are cast to it layer by layer. LayerNorm
    and softmax are computed in float32.
  * Modules hold no random state. `key=None` means deterministic.

Axis letters of the einsums:
  b samples   n query tokens   m key tokens   d width   h heads   c channels of a head
  e = h * c, heads side by side   x which of query, key, value
"""

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from instap_jax.models import attention_backends
from instap_jax.models.kernels import layer_norm
from instap_jax.models.placement import cut, flat, gathered, join

Array = jax.Array
Initializer = Callable[..., Array]


# UMT initialises every linear map so (modeling_pretrain_umt.py, _init_weights).
xavier_uniform: Initializer = jax.nn.initializers.xavier_uniform()


class Linear(nnx.Module):
    """y = x W + b, with kernel [in, out] and bias [out]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str | None, str | None],
        dtype: Any,
        rngs: nnx.Rngs,
        use_bias: bool = True,
        init: Initializer = xavier_uniform,
    ):
        kernel = init(rngs.params(), (in_features, out_features), jnp.float32)
        self.kernel = nnx.Param(kernel, logical_axes=axes)
        self.bias = (
            nnx.Param(jnp.zeros(out_features, jnp.float32), logical_axes=axes[1:])
            if use_bias
            else None
        )
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        """[..., in] -> [..., out] in the compute dtype."""
        return self.add_bias(self.product(x))

    def product(self, x: Array) -> Array:
        """x W."""
        return x.astype(self.dtype) @ gathered(self.kernel, self.dtype)

    def add_bias(self, y: Array) -> Array:
        return y if self.bias is None else y + gathered(self.bias, self.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, computed in float32, returned in the compute dtype.

    eps differs by origin and must match converted weights: UMT 1e-6, CLIP 1e-5, BERT 1e-12.
    `backend`: as for attention; on a TPU 'auto' and 'pallas' take our kernel.
    """

    def __init__(
        self,
        width: int,
        *,
        eps: float,
        dtype: Any,
        axis: str | None = "embed",
        backend: str = "auto",
    ):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32), logical_axes=(axis,))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32), logical_axes=(axis,))
        self.eps = eps
        self.dtype = dtype
        self.backend = backend

    def __call__(self, x: Array) -> Array:
        scale, bias = gathered(self.scale, jnp.float32), gathered(self.bias, jnp.float32)
        if layer_norm.fits(self.backend, x.shape):
            return layer_norm.by_device(x, scale, bias, self.eps).astype(self.dtype)
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        y = centred * lax.rsqrt(variance + self.eps)
        return (y * scale + bias).astype(self.dtype)


def quick_gelu(x: Array) -> Array:
    """CLIP's approximation x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def exact_gelu(x: Array) -> Array:
    """x * Phi(x) with the error function, not its tanh approximation."""
    return jax.nn.gelu(x, approximate=False)


def dropout(x: Array, *, rate: float | Array, key: Array | None) -> Array:
    """Zeroes elements with probability `rate` and scales the rest by 1 / (1 - rate)."""
    # A rate known to be 0 draws nothing: random bits cost as much as a small layer.
    off = key is None or (isinstance(rate, float | int) and not rate)
    return x if off else _drop(x, rate, key, x.shape)


def drop_path(x: Array, *, rate: float | Array, key: Array | None) -> Array:
    """Stochastic depth: `dropout` of whole samples (axis 0). `rate` < 1 may be traced."""
    return x if key is None else _drop(x, rate, key, x.shape[:1] + (1,) * (x.ndim - 1))


def _drop(x: Array, rate: float | Array, key: Array, shape: tuple[int, ...]) -> Array:
    keep = 1.0 - jnp.asarray(rate, jnp.float32)
    # Drawn once in a pass and stored, a byte an element: a TPU would draw again, twenty rounds of
    # arithmetic, within every product that reads the result, its gradient or that of a bias.
    kept = lax.optimization_barrier(jax.random.bernoulli(key, keep, shape))
    return x * (kept / keep).astype(x.dtype)


def attention_probabilities(q: Array, k: Array, *, mask: Array | None = None) -> Array:
    """softmax(q k^T / sqrt(c)) in float32.

    Args:
      q: [b, n, h, c]. k: [b, m, h, c].
      mask: bool [b, m], True where a key may be attended to. A row without any is uniform, not NaN.

    Returns:
      float32 [b, h, n, m].
    """
    q = q * q.shape[-1] ** -0.5
    logits = jnp.einsum("bnhc,bmhc->bhnm", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(logits, axis=-1)


def dot_product_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    heads: int,
    mask: Array | None = None,
    length: int | None = None,
    dropout_rate: float = 0.0,
    key: Array | None = None,
    scale: Array | None = None,
    backend: str = "auto",
) -> Array:
    """The one place where attention is computed without keeping its probabilities.

    Args:
      q: [b, n, e]. k, v: [b, m, e]. All in the compute dtype.
      heads: h.
      mask: bool [b, m] of attendable keys, or None for all; [b, length] with a `length`.
      length: keys from here on are padding; None: none is.
      dropout_rate: of the probabilities; only used with a `key`.
      scale: float32 [b, h, n, m], what the probabilities are multiplied by. The gradient at a
        scale of ones is probability times gradient: what attention maps show.
      backend: see `attention_backends`. Dropout and scale are computed by XLA whatever it names.

    Returns:
      [b, n, e] in the dtype of v.
    """
    drops = key is not None and bool(dropout_rate)
    backend = _choose(backend, q, k.shape[1], heads, exact=drops or scale is not None)
    if backend != "xla":
        return attention_backends.attend(backend, q, k, v, heads=heads, mask=mask, length=length)
    k, v = k[:, :length], v[:, :length]
    q, k, v = (split_heads(x, heads) for x in (q, k, v))
    probabilities = attention_probabilities(q, k, mask=mask)
    if dropout_rate:
        probabilities = dropout(probabilities, rate=dropout_rate, key=key)
    if scale is not None:
        probabilities = probabilities * scale
    return _merge_heads(_weighted_sum(probabilities, v))


def _choose(backend: str, q: Array, keys: int, heads: int, *, exact: bool) -> str:
    """The backend of queries [b, n, e]; `exact`: their probabilities are needed."""
    samples, queries, width = q.shape
    found = attention_backends.choose(
        backend, q.dtype, samples=samples, queries=queries, keys=keys, heads=heads, width=width
    )
    return "xla" if exact else found


def _weighted_sum(probabilities: Array, v: Array) -> Array:
    return jnp.einsum("bhnm,bmhc->bnhc", probabilities.astype(v.dtype), v)


class Bias(enum.Enum):
    """Which of the query, key and value projections have a bias."""

    QUERY_VALUE = "query_value"  # UMT: a key bias cancels in the softmax
    FULL = "full"  # CLIP, BERT


class Attention(nnx.Module):
    """Multi-head self-attention with one query-key-value kernel [d, 3, h, c].

    A torch weight [3 d, d] converts as `weight.T.reshape(d, 3, h, c)`. The bias is [3, h, c], or
    [2, h, c] (query, value) for `Bias.QUERY_VALUE`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        bias: Bias,
        dtype: Any,
        rngs: nnx.Rngs,
        backend: str = "auto",
    ):
        channels = _head_channels(width, heads)
        self.qkv = _projection(rngs.params(), width, 3, heads, channels)
        count = 3 if bias is Bias.FULL else 2
        self.qkv_bias = _projection_bias(count, heads, channels)
        self.out = Linear(width, width, axes=("heads", "embed"), dtype=dtype, rngs=rngs)
        self.heads = heads
        self.bias_kind = bias
        self.dtype = dtype
        self.backend = backend

    def __call__(
        self,
        x: Array,
        *,
        mask: Array | None = None,
        length: int | None = None,
        dropout_rate: float = 0.0,
        key: Array | None = None,
    ) -> Array:
        """[b, n, d] -> [b, n, d]; the others as in `dot_product_attention`."""
        q, k, v = self._project(x)
        y = dot_product_attention(
            q,
            k,
            v,
            heads=self.heads,
            mask=mask,
            length=length,
            dropout_rate=dropout_rate,
            key=key,
            backend=self.backend,
        )
        return self.out(y)

    def with_probabilities(
        self, x: Array, *, mask: Array | None = None, length: int | None = None
    ) -> tuple[Array, Array]:
        """As `__call__`, and also the attention probabilities, float32 [b, h, n, m]."""
        if length is not None:
            mask = jnp.ones((x.shape[0], length), bool) if mask is None else mask
            mask = jnp.pad(mask, ((0, 0), (0, x.shape[1] - length)))
        q, k, v = (split_heads(x, self.heads) for x in self._project(x))
        probabilities = attention_probabilities(q, k, mask=mask)
        return self.out(_merge_heads(_weighted_sum(probabilities, v))), probabilities

    def _project(self, x: Array) -> tuple[Array, Array, Array]:
        """[b, n, d] -> three of [b, n, e]."""
        kernel = gathered(self.qkv, self.dtype)
        # Three products: of one for all, XLA would cut q, k and v out by copying them.
        x = x.astype(self.dtype)
        q, k, v = (x @ _merge_heads(kernel[:, i]) for i in range(3))
        bias = _merge_heads(gathered(self.qkv_bias, self.dtype))
        if self.bias_kind is Bias.FULL:
            k = k + bias[1]
        return q + bias[0], k, v + bias[-1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What m consecutive rows of every group attend to, g groups.

    Attributes:
      tokens: [g, m, v, width of the context].
      mask: bool [g, m, v] over them; None: all.
      scale: float32 [g, m, h, n, v], see `dot_product_attention`.
    """

    tokens: Array
    mask: Array | None = None
    scale: Array | None = None


class CrossAttention(nnx.Module):
    """Multi-head attention from x to contexts of another width; full bias.

    `out_scale`: of the output projection's initial kernel.
    """

    def __init__(
        self,
        width: int,
        context_width: int,
        heads: int,
        *,
        dtype: Any,
        rngs: nnx.Rngs,
        out_scale: float = 1.0,
        backend: str = "auto",
    ):
        channels = _head_channels(width, heads)
        self.query = _projection(rngs.params(), width, 1, heads, channels)
        self.query_bias = _projection_bias(1, heads, channels)
        self.key_value = _projection(rngs.params(), context_width, 2, heads, channels)
        self.key_value_bias = _projection_bias(2, heads, channels)
        self.out = Linear(
            width,
            width,
            axes=("heads", "embed"),
            init=lambda *of: out_scale * xavier_uniform(*of),
            dtype=dtype,
            rngs=rngs,
        )
        self.heads = heads
        self.dtype = dtype
        self.backend = backend

    def __call__(
        self,
        x: Array,
        contexts: Sequence[Context],
        *,
        dropout_rate: float = 0.0,
        key: Array | None = None,
    ) -> Array:
        """[g * M, n, d] -> the same; the M rows of a group are those of the contexts, in turn."""
        groups = contexts[0].tokens.shape[0]
        parts = cut(self.queries(x), groups, [context.tokens.shape[1] for context in contexts])
        y = []
        for index, (part, context) in enumerate(zip(parts, contexts, strict=True)):
            of_rows = jax.tree.map(flat, context)
            seen = self.attend(
                flat(part),
                *self.keys_values(of_rows.tokens),
                mask=of_rows.mask,
                dropout_rate=dropout_rate,
                key=None if key is None else jax.random.fold_in(key, index),
                scale=of_rows.scale,
            )
            y.append(seen.reshape(part.shape))
        return self.out(join(y))

    def keys_values(self, context: Array) -> tuple[Array, Array]:
        """A context [b, m, width of it] -> two of [b, m, e]: for contexts that several x share."""
        k, v = self._project(context, self.key_value, self.key_value_bias)
        return k, v

    def queries(self, x: Array) -> Array:
        """[b, n, d] -> [b, n, e]."""
        (q,) = self._project(x, self.query, self.query_bias)
        return q

    def attend(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        mask: Array | None = None,
        dropout_rate: float = 0.0,
        key: Array | None = None,
        scale: Array | None = None,
    ) -> Array:
        """What `queries` and `keys_values` returned -> [b, n, e], before the output projection."""
        return dot_product_attention(
            q,
            k,
            v,
            heads=self.heads,
            mask=mask,
            dropout_rate=dropout_rate,
            key=key,
            scale=scale,
            backend=self.backend,
        )

    def _project(self, x: Array, kernel: nnx.Param, bias: nnx.Param) -> list[Array]:
        x = x.astype(self.dtype)
        kernel = _merge_heads(gathered(kernel, self.dtype))
        bias = _merge_heads(gathered(bias, self.dtype))
        return [x @ kernel[:, i] + bias[i] for i in range(kernel.shape[1])]


def _head_channels(width: int, heads: int) -> int:
    if width % heads:
        raise ValueError(f"width {width} is not a multiple of {heads} heads")
    return width // heads


def _projection(key: Array, width: int, count: int, heads: int, channels: int) -> nnx.Param:
    # Heads have an axis of their own, so that sharding them never cuts across q, k and v.
    init = jax.nn.initializers.variance_scaling(
        1.0, "fan_avg", "uniform", in_axis=0, out_axis=(1, 2, 3)
    )
    kernel = init(key, (width, count, heads, channels), jnp.float32)
    return nnx.Param(kernel, logical_axes=("embed", None, "heads", None))


def _projection_bias(count: int, heads: int, channels: int) -> nnx.Param:
    zeros = jnp.zeros((count, heads, channels), jnp.float32)
    return nnx.Param(zeros, logical_axes=(None, "heads", None))


def split_heads(x: Array, heads: int) -> Array:
    """[..., e] -> [..., h, c]."""
    return x.reshape(*x.shape[:-1], heads, -1)


def _merge_heads(x: Array) -> Array:
    return x.reshape(*x.shape[:-2], -1)


@jax.custom_vjp
def hold(x: Array) -> Array:
    """x, computed once and stored: no later operation is fused with those that make it."""
    return lax.optimization_barrier(x)


hold.defvjp(lambda x: (hold(x), None), lambda _, gradient: (gradient,))


@jax.custom_vjp
def hold_gradient(x: Array) -> Array:
    """x, whose gradient is held as `hold` does."""
    return x


hold_gradient.defvjp(lambda x: (x, None), lambda _, g: (lax.optimization_barrier(g),))


class Mlp(nnx.Module):
    """Two linear maps with an activation between them."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: Callable[[Array], Array],
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.expand = Linear(width, hidden, axes=("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.contract = Linear(hidden, width, axes=("mlp", "embed"), dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Array) -> Array:
        # A TPU would fuse the activation into the product that reads it, or that its gradient
        # comes from, and compute it once for every tile of that product's result.
        x = self.expand.add_bias(hold_gradient(self.expand.product(x)))
        return self.contract(hold(self.activation(x)))


class PreNormBlock(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), each branch under stochastic depth."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp_ratio: float,
        bias: Bias,
        activation: Callable[[Array], Array],
        eps: float,
        dtype: Any,
        rngs: nnx.Rngs,
        backend: str = "auto",
    ):
        self.norm1 = LayerNorm(width, eps=eps, dtype=dtype, backend=backend)
        self.attention = Attention(width, heads, bias=bias, dtype=dtype, rngs=rngs, backend=backend)
        self.norm2 = LayerNorm(width, eps=eps, dtype=dtype, backend=backend)
        hidden = int(width * mlp_ratio + 1e-6)
        self.mlp = Mlp(width, hidden, activation=activation, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Array,
        *,
        mask: Array | None = None,
        length: int | None = None,
        drop_path_rate: float | Array = 0.0,
        key: Array | None = None,
    ) -> Array:
        """[b, n, d] -> [b, n, d]; mask and length of the tokens as in `dot_product_attention`."""
        key1, key2 = (None, None) if key is None else jax.random.split(key)
        y = self.attention(self.norm1(x), mask=mask, length=length)
        x = x + drop_path(y, rate=drop_path_rate, key=key1)
        y = self.mlp(self.norm2(x))
        return x + drop_path(y, rate=drop_path_rate, key=key2)

    def with_probabilities(
        self, x: Array, *, mask: Array | None = None, length: int | None = None
    ) -> tuple[Array, Array]:
        """Deterministic `__call__`, and also the attention probabilities, float32 [b, h, n, n]."""
        y, probabilities = self.attention.with_probabilities(
            self.norm1(x), mask=mask, length=length
        )
        x = x + y
        return x + self.mlp(self.norm2(x)), probabilities


@jax.custom_vjp
def clamp(x: Array, low: float, high: float) -> Array:
    """Clips x to [low, high] without trapping it outside.

    The gradient passes where a descent step leads back into the range and is zero where it would
    lead further out. UMT clamps the temperature parameter in place instead, to the same end.
    """
    return jnp.clip(x, low, high)


def _clamp_forward(x, low, high):
    return clamp(x, low, high), (x, low, high)


def _clamp_backward(saved, g):
    x, low, high = saved
    outward = ((x <= low) & (g > 0)) | ((x >= high) & (g < 0))
    return jnp.where(outward, 0.0, g), None, None


clamp.defvjp(_clamp_forward, _clamp_backward)
