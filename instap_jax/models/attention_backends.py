"""How softmax(q k^T / sqrt(c)) v is computed: by XLA, or by a kernel that never holds its logits.

`config.compute.attention` names the backend:
  'xla'     two einsums and a float32 softmax between them: any platform, any request.
  'splash'  JAX's TPU kernel. Pads both lengths to a multiple of its block.
  'cudnn'   cuDNN's flash attention, on NVIDIA GPUs, bfloat16 alone.
  'auto'    the kernel of the platform where one attention holds at least `LONG` logits, else 'xla':
            below it XLA was as fast by the compiler's estimate (docs/attention.md).

The platform is that of the current mesh (`jax.set_mesh`), which is not always that of the process:
a program for TPUs is compiled ahead of time on a machine without one. Without a mesh it is XLA.

Some attentions need XLA whatever is named: where probabilities are dropped out, scaled or returned
(no kernel holds them), and where heads or batch do not divide over the mesh. A kernel named for a
platform or dtype that cannot run it is an error.

Axis letters: b samples, n query tokens, m key tokens, h heads, c channels of a head.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    FullMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)
from jax.sharding import PartitionSpec as P

from instap_jax.errors import UserError
from instap_jax.models.placement import data_ways
from instap_jax.sharding import DATA_AXES

Array = jax.Array

BACKENDS = ("auto", "xla", "splash", "cudnn")
LONG = 128 * 256  # logits of a head, n * m, from which on 'auto' takes a kernel
SAVED = "attention"  # name, for rematerialisation, of what splash's gradient needs of its result
_PLATFORM = {"splash": "tpu", "cudnn": "gpu"}
_LANES = 128
_MEMORY = 4096  # keys of a head held in VMEM at once
_BLOCKS = tuple(range(1024, 256, -_LANES))


def choose(backend: str, dtype: Any, *, samples: int, queries: int, keys: int, heads: int) -> str:
    """'xla', 'splash' or 'cudnn' for q [b, n, h, c] and k [b, m, h, c] of a dtype.

    Raises:
      UserError: when the named kernel cannot run on the mesh's platform, or in this dtype.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    platform = device.platform if device else "cpu"
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    if backend == "auto":
        kernels = [kernel for kernel, where in _PLATFORM.items() if where == platform]
        fits = kernels and (kernels[0] != "cudnn" or dtype == jnp.bfloat16)
        backend = kernels[0] if fits and queries * keys >= LONG else "xla"
    elif backend != "xla" and platform != _PLATFORM[backend]:
        raise UserError(
            f"config.compute.attention={backend!r} runs on a {_PLATFORM[backend].upper()}, and the "
            f"devices of this mesh are of platform {platform!r}; use 'auto'"
        )
    elif backend == "cudnn" and dtype != jnp.bfloat16:
        raise UserError(
            f"config.compute.attention='cudnn' needs config.compute.dtype='bfloat16', not '{dtype}'"
        )
    divides = samples % data_ways() == 0 and heads % mesh.shape.get("tensor", 1) == 0
    return backend if divides else "xla"


def pad_tokens(x: Array) -> Array:
    """Tokens [b, n, d], padded with zeros to what splash would pad their projections to.

    Padding before the projections costs them a few rows; after them it copies q, k and v.
    """
    return jnp.pad(x, ((0, 0), (0, block_and_padding(x.shape[1])[1]), (0, 0)))


def attend(
    backend: str,
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None,
    length: int | None = None,
    interpret: bool = False,
) -> Array:
    """Attention by a kernel, on every device for its own samples and heads.

    Args:
      backend: 'splash' or 'cudnn'.
      q: [b, n, h, c]. k, v: [b, m, h, c].
      mask: bool [b, length], True where a key may be attended to; None: all. A row without any is
        the mean of the values, as `layers.attention_probabilities` has it.
      length: keys from here on are padding (`pad_tokens`); None: none is.
      interpret: run the TPU kernel's operations one by one, on any platform: for tests.

    Returns:
      [b, n, h, c] in the dtype of v.
    """
    padding = 0 if length is None else k.shape[1] - length
    if mask is not None:
        # Kernels give such rows the padding too. Queries of zeros make every logit equal.
        some = mask.any(axis=-1)
        q = jnp.where(some[:, None, None, None], q, 0)
        mask = mask | ~some[:, None]
    elif padding:
        mask = jnp.ones((k.shape[0], length), bool)
    if padding:
        mask = jnp.pad(mask, ((0, 0), (0, padding)))
    kernel = functools.partial(_splash, interpret=interpret) if backend == "splash" else _cudnn
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(q, k, v, mask)
    heads, keys = P(DATA_AXES, None, "tensor", None), P(DATA_AXES, None)
    split = jax.shard_map(
        kernel,
        in_specs=(heads, heads, heads, None if mask is None else keys),
        out_specs=heads,
        check_vma=False,
    )
    return split(q, k, v, mask)


def _splash(q: Array, k: Array, v: Array, mask: Array | None, *, interpret: bool) -> Array:
    n, m, heads, channels = q.shape[1], k.shape[1], *q.shape[2:]
    (block_n, pad_n), (block_m, pad_m) = block_and_padding(n), block_and_padding(m)
    # All keys of a head at once: a third fewer cycles than block by block.
    memory_m = m + pad_m if m + pad_m <= _MEMORY else block_m
    segments = None
    if mask is not None or pad_m:
        # Queries, the padded ones too (their outputs are cut off), see the keys of segment 1.
        kv = jnp.ones((q.shape[0], m), bool) if mask is None else mask
        kv = jnp.pad(kv, ((0, 0), (0, pad_m))).astype(jnp.int32)
        segments = SegmentIds(q=jnp.ones((q.shape[0], n + pad_n), jnp.int32), kv=kv)

    def prepare(x: Array, padding: int) -> Array:
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))

    attention = make_splash_mha(
        MultiHeadMask([FullMask((n + pad_n, m + pad_m))] * heads),
        block_sizes=BlockSizes(
            block_q=block_n,
            block_kv=memory_m,
            block_kv_compute=block_m,
            block_q_dkv=block_n,
            block_kv_dkv=memory_m,
            block_kv_dkv_compute=block_m,
            use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
    q = prepare(q * channels**-0.5, pad_n)
    y = jax.vmap(attention)(q, prepare(k, pad_m), prepare(v, pad_m), segments)
    return y[:, :, :n].swapaxes(1, 2)


def block_and_padding(tokens: int) -> tuple[int, int]:
    """(block, padding): the largest block among those that pad the fewest tokens.

    A length below the smallest block is one block of whole lanes.
    """
    if tokens <= _BLOCKS[-1]:
        block = -(-tokens // _LANES) * _LANES
        return block, block - tokens
    return min(((b, -tokens % b) for b in _BLOCKS), key=lambda pair: pair[1])


def _cudnn(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    mask = None if mask is None else mask[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
