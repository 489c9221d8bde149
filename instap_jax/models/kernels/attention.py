"""softmax(q k^T / sqrt(c)) v as one TPU kernel on tokens as projections leave them, [b, n, h * c].

Heads narrower than the 128 lanes of a register lie side by side in them, two of 64 channels in
one. The usual layout [b, h, n, c] would leave half of every register empty, slow the projections
that write it and transpose what comes out. Here a program takes the lanes of all heads of a
register and zeroes, head by head, the lanes of the others: their products then add nothing, and
cost nothing, as a matrix unit multiplies 128 lanes whatever they hold.

All keys of these heads are in VMEM at once, so a row's softmax is computed whole. The gradient
computes it again from q and k, and needs nothing else of the forward pass but its result.

Axis letters: b samples, n query tokens, m key tokens, e = heads * channels.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from instap_jax.models.kernels.tiles import LANES

Array = jax.Array

SAVED = "attention"  # name, for rematerialisation, of what the kernel put out
_VMEM = 64 << 20  # bytes a program may take


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Static facts of a call. channels: of a head. block: query tokens of a program."""

    channels: int
    block: int
    interpret: bool


def attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    *,
    channels: int,
    block: int,
    interpret: bool = False,
) -> Array:
    """[b, n, e] in the dtype of v.

    Args:
      q: [b, n, e]. k, v: [b, m, e].
      mask: bool [b, m], True where a key may be attended to; None: all. Not all False in a row.
      channels: c.
      block: query tokens that a program takes at once; divides n.
      interpret: run the kernel's operations one by one, on any platform.
    """
    bias = None if mask is None else jnp.where(mask, 0, -jnp.inf)[:, None].astype(jnp.float32)
    return _attention(q, k, v, bias, _Shape(channels, block, interpret))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q, k, v, bias, shape):
    return _call(_forward_kernel, shape, (q, k, v, bias), (q,))[0]


def _attention_forward(q, k, v, bias, shape):
    out = checkpoint_name(_attention(q, k, v, bias, shape), SAVED)
    return out, (q, k, v, bias, out)


def _attention_backward(shape, saved, gradient):
    q, k, v = saved[:3]
    return *_call(_backward_kernel, shape, (*saved, gradient), (q, k, v)), None


_attention.defvjp(_attention_forward, _attention_backward)


def _call(kernel, shape: _Shape, inputs, outputs):
    q, k = inputs[:2]
    samples, n, width = q.shape
    m = k.shape[1]
    block = shape.block
    queries = pl.BlockSpec((1, block, LANES), lambda b, e, i: (b, i, e))
    keys = pl.BlockSpec((1, m, LANES), lambda b, e, i: (b, 0, e))
    row = pl.BlockSpec((1, 1, m), lambda b, e, i: (b, 0, 0))
    specs = (queries, keys, keys, None if inputs[3] is None else row, queries, queries)
    backward = len(outputs) > 1
    return pl.pallas_call(
        functools.partial(kernel, channels=shape.channels),
        grid=(samples, width // LANES, n // block),
        in_specs=list(specs[: len(inputs)]),
        out_specs=[queries, keys, keys][: len(outputs)],
        out_shape=[jax.ShapeDtypeStruct(o.shape, o.dtype) for o in outputs],
        scratch_shapes=[pltpu.VMEM((m, LANES), jnp.float32)] * 2 if backward else [],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM,
        ),
        interpret=shape.interpret,
        name="attention_backward" if backward else "attention",
    )(*inputs)


def _heads(channels: int, rows: int):
    """bool [rows, LANES] of every head in the lanes."""
    lane = lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
    for head in range(LANES // channels):
        yield (lane >= head * channels) & (lane < (head + 1) * channels)


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _exponentials(q: Array, k: Array, bias_ref, channels: int) -> tuple[Array, Array]:
    """exp(logits - row maximum) and the row sums."""
    logits = _dot(q, k, (1, 1))
    if bias_ref is not None:
        logits = logits + bias_ref[0]
    e = jnp.exp(logits - logits.max(axis=1, keepdims=True))
    return e, e.sum(axis=1, keepdims=True)


def _forward_kernel(q_ref, k_ref, v_ref, bias_ref, out_ref, *, channels):
    q, k, v = q_ref[0], k_ref[0], v_ref[0]
    q = q * jnp.asarray(channels**-0.5, q.dtype)
    out = jnp.zeros(q.shape, jnp.float32)
    for lanes in _heads(channels, q.shape[0]):
        e, total = _exponentials(jnp.where(lanes, q, 0), k, bias_ref, channels)
        out = jnp.where(lanes, _dot(e.astype(v.dtype), v, (1, 0)) / total, out)
    out_ref[0] = out.astype(out_ref.dtype)


def _backward_kernel(
    q_ref,
    k_ref,
    v_ref,
    bias_ref,
    out_ref,
    g_ref,
    dq_ref,
    dk_ref,
    dv_ref,
    dk_sum,
    dv_sum,
    *,
    channels,
):
    block = pl.program_id(2)

    @pl.when(block == 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    k, v, g = k_ref[0], v_ref[0], g_ref[0]
    q = q_ref[0] * jnp.asarray(channels**-0.5, k.dtype)
    dq = jnp.zeros(q.shape, jnp.float32)
    for lanes in _heads(channels, q.shape[0]):
        own_q, own_g = jnp.where(lanes, q, 0), jnp.where(lanes, g, 0)
        e, total = _exponentials(own_q, k, bias_ref, channels)
        # Probabilities are e / total: dividing the narrow factors instead spares the wide one.
        own_g = own_g.astype(jnp.float32) / total
        delta = (own_g * out_ref[0].astype(jnp.float32)).sum(axis=1, keepdims=True)
        own_g = own_g.astype(g.dtype)
        ds = (e * (_dot(own_g, v, (1, 1)) - delta)).astype(k.dtype)
        dq = jnp.where(lanes, _dot(ds, k, (1, 0)), dq)
        dk_sum[...] += _dot(ds, own_q, (0, 0))
        dv_sum[...] += _dot(e.astype(g.dtype), own_g, (0, 0))
    dq_ref[0] = (dq * channels**-0.5).astype(dq_ref.dtype)

    @pl.when(block == pl.num_programs(2) - 1)
    def _():
        dk_ref[0] = dk_sum[...].astype(dk_ref.dtype)
        dv_ref[0] = dv_sum[...].astype(dv_ref.dtype)
