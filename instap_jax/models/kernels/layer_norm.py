"""Layer normalisation as one TPU kernel: tokens are read once, and once more for the gradient.

XLA makes three passes of it, each bound by how it sums over the lanes of a register: a quarter of
a ViT-L layer's time by the compiler's estimate (docs/attention.md).

Axis letters: b samples, n tokens, d width.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from instap_jax.models.kernels import tiles
from instap_jax.models.placement import data_ways, is_split_already, platform
from instap_jax.sharding import DATA_AXES

Array = jax.Array

_ROWS = 256  # tokens a program takes at once, at most


def fits(backend: str, shape: tuple[int, ...]) -> bool:
    """Whether the kernel normalises an array of this shape [..., b, n, d] on the current mesh."""
    if platform() != "tpu" or backend not in ("auto", "pallas") or len(shape) < 3:
        return False
    if is_split_already():
        return False
    samples, tokens, width = shape[-3:]
    if jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1:
        return False  # gradients, alike on all of `tensor`, would be summed over it to no purpose
    # Shorter sequences, texts, are not worth a program of the grid each.
    return samples % data_ways() == 0 and tokens >= tiles.LANES and width % tiles.LANES == 0


def by_device(x: Array, scale: Array, bias: Array, eps: float, *, interpret: bool = False) -> Array:
    """`layer_norm` of [..., b, n, d], on every device of the mesh for its own samples."""

    def normalise(x, scale, bias):
        flat = x.reshape((-1, *x.shape[-2:]))
        return layer_norm(flat, scale, bias, eps, interpret).reshape(x.shape)

    if jax.sharding.get_abstract_mesh().empty:
        return normalise(x, scale, bias)
    tokens = P(*(None,) * (x.ndim - 3), DATA_AXES)
    split = jax.shard_map(normalise, in_specs=(tokens, P(), P()), out_specs=tokens, check_vma=False)
    return split(x, scale, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(x: Array, scale: Array, bias: Array, eps: float, interpret: bool) -> Array:
    """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis, computed in float32.

    Args:
      x: [b, n, d]; d a multiple of `tiles.LANES`.
      scale, bias: float32 [d].
      interpret: run the kernel's operations one by one, on any platform.

    Returns:
      [b, n, d] in the dtype of x.
    """
    rows, tokens, row = _specs(x)
    return pl.pallas_call(
        functools.partial(_forward_kernel, eps=eps),
        grid=rows,
        in_specs=[tokens, row, row],
        out_specs=tokens,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="layer_norm",
    )(x, scale[None], bias[None])


def _forward(x, scale, bias, eps, interpret):
    return layer_norm(x, scale, bias, eps, interpret), (x, scale)


def _backward(eps, interpret, saved, gradient):
    x, scale = saved
    rows, tokens, row = _specs(x)
    total = jax.ShapeDtypeStruct((1, x.shape[-1]), jnp.float32)
    dx, dscale, dbias = pl.pallas_call(
        functools.partial(_backward_kernel, eps=eps, count=x.shape[1]),
        grid=rows,
        in_specs=[tokens, row, tokens],
        out_specs=[tokens, row, row],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), total, total],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        interpret=interpret,
        name="layer_norm_backward",
    )(x, scale[None], gradient)
    return dx, dscale[0], dbias[0]


layer_norm.defvjp(_forward, _backward)


def _specs(x: Array):
    """Grid, and blocks of tokens and of one row of parameters."""
    samples, tokens, width = x.shape
    rows = tiles.block(tokens, _ROWS) if tokens > _ROWS else tokens
    return (
        (samples, pl.cdiv(tokens, rows)),
        pl.BlockSpec((1, rows, width), lambda b, i: (b, i, 0)),
        pl.BlockSpec((1, width), lambda b, i: (0, 0)),
    )


def _normalised(x: Array, eps: float) -> tuple[Array, Array]:
    """Of rows [n, d]: the normalised rows, and what they were multiplied by [n, 1]."""
    centred = x - x.mean(axis=-1, keepdims=True)
    factor = lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + eps)
    return centred * factor, factor


def _forward_kernel(x_ref, scale_ref, bias_ref, out_ref, *, eps):
    x, _ = _normalised(x_ref[0].astype(jnp.float32), eps)
    out_ref[0] = (x * scale_ref[...] + bias_ref[...]).astype(out_ref.dtype)


def _backward_kernel(x_ref, scale_ref, g_ref, dx_ref, dscale_ref, dbias_ref, *, eps, count):
    sample, block = pl.program_id(0), pl.program_id(1)

    @pl.when((sample == 0) & (block == 0))
    def _():
        dscale_ref[...] = jnp.zeros_like(dscale_ref)
        dbias_ref[...] = jnp.zeros_like(dbias_ref)

    x, factor = _normalised(x_ref[0].astype(jnp.float32), eps)
    g = g_ref[0].astype(jnp.float32)
    rows = x.shape[0]
    if count % rows:
        # The last block reaches beyond the tokens, where anything may lie.
        inside = block * rows + lax.broadcasted_iota(jnp.int32, (rows, 1), 0) < count
        x, g = jnp.where(inside, x, 0), jnp.where(inside, g, 0)
    dscale_ref[...] += (g * x).sum(axis=0, keepdims=True)
    dbias_ref[...] += g.sum(axis=0, keepdims=True)
    g = g * scale_ref[...]
    mean = g.mean(axis=-1, keepdims=True)
    dx = factor * (g - mean - x * (g * x).mean(axis=-1, keepdims=True))
    dx_ref[0] = dx.astype(dx_ref.dtype)
