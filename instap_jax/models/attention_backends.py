"""How softmax(q k^T / sqrt(c)) v is computed: by XLA, or by a kernel that never holds its logits.

`config.compute.attention` names the backend:
  'xla'     two einsums and a float32 softmax between them: any platform, any request.
  'pallas'  our TPU kernel (`attention_kernel`).
  'cudnn'   cuDNN's flash attention, on NVIDIA GPUs, bfloat16 alone.
  'auto'    the kernel of the platform where one attention holds at least `LONG` logits, else 'xla':
            below it XLA was as fast by the compiler's estimate (docs/attention.md).

The platform is that of the current mesh (`jax.set_mesh`), which is not always that of the process:
a program for TPUs is compiled ahead of time on a machine without one. Without a mesh it is XLA.

Some attentions need XLA whatever is named: where probabilities are dropped out, scaled or returned
(no kernel holds them), where heads or batch do not divide over the mesh or `shard_map` has split
them already, and on a TPU where the heads of a device do not fill whole registers. A kernel named
for a platform or dtype that cannot run it is an error.

Axis letters: b samples, n query tokens, m key tokens, h heads, c channels of a head, e = h * c.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from instap_jax.errors import UserError
from instap_jax.models.kernels import attention as attention_kernel
from instap_jax.models.kernels import tiles
from instap_jax.models.placement import data_ways, device_kind, is_split_already, platform
from instap_jax.sharding import DATA_AXES

Array = jax.Array

LONG = 128 * 256  # logits of a head, n * m, from which on 'auto' takes a kernel
_PLATFORM = {"pallas": "tpu", "cudnn": "gpu"}
_LOGITS = 1 << 20  # of a head, that a program holds at once
# A v4 has 16 MB of VMEM, and a gradient's blocks of more logits or keys do not fit.
_LOGITS_ON_V4, _KEYS_ON_V4 = 1 << 19, 3584


def choose(
    backend: str, dtype: Any, *, samples: int, queries: int, keys: int, heads: int, width: int
) -> str:
    """'xla', 'pallas' or 'cudnn' for q [b, n, e] and k [b, m, e] of a dtype; width is e.

    Raises:
      UserError: when the named kernel cannot run on the mesh's platform, or in this dtype.
    """
    found = platform()
    if backend == "auto":
        kernels = [kernel for kernel, where in _PLATFORM.items() if where == found]
        fits = kernels and (kernels[0] != "cudnn" or dtype == jnp.bfloat16)
        backend = kernels[0] if fits and queries * keys >= LONG else "xla"
    elif backend != "xla" and found != _PLATFORM[backend]:
        raise UserError(
            f"config.compute.attention={backend!r} runs on a {_PLATFORM[backend].upper()}, and the "
            f"devices of this mesh are of platform {found!r}; use 'auto'"
        )
    elif backend == "cudnn" and dtype != jnp.bfloat16:
        raise UserError(
            f"config.compute.attention='cudnn' needs config.compute.dtype='bfloat16', not '{dtype}'"
        )
    ways = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    divides = samples % data_ways() == 0 and heads % ways == 0 and not is_split_already()
    if backend == "pallas":
        divides = divides and tiles.LANES % (width // heads) == 0
        divides = divides and width // ways % tiles.LANES == 0
        if _is_v4():
            divides = divides and dtype == jnp.bfloat16 and keys <= _KEYS_ON_V4
    if backend == "cudnn":  # its gradient takes no odd length
        divides = divides and queries % 2 == keys % 2 == 0
    return backend if divides else "xla"


def pad_tokens(x: Array, *, backend: str, heads: int) -> Array:
    """Tokens [b, n, d] of blocks of self-attention, padded with zeros for the TPU kernel.

    Once for all layers: in each of them it would copy q, k and v. Blocks are then told the
    `length`; what becomes of the padding means nothing.
    """
    samples, n, width = x.shape
    sizes = {"samples": samples, "queries": n, "keys": n, "heads": heads, "width": width}
    found = choose(backend, x.dtype, **sizes)
    return _pad(x, padded_length(n, tiles.whole_tiles(n))) if found == "pallas" else x


def attend(
    backend: str,
    q: Array,
    k: Array,
    v: Array,
    *,
    heads: int,
    mask: Array | None,
    length: int | None = None,
    interpret: bool = False,
) -> Array:
    """Attention by a kernel, on every device for its own samples and heads.

    Args:
      backend: 'pallas' or 'cudnn'.
      q: [b, n, e]. k, v: [b, m, e].
      mask: bool [b, length], True where a key may be attended to; None: all. A row without any is
        the mean of the values, as `layers.attention_probabilities` has it.
      length: keys from here on are padding (`pad_tokens`); None: none is.
      interpret: run the TPU kernel's operations one by one, on any platform: for tests.

    Returns:
      [b, n, e] in the dtype of v.
    """
    channels = q.shape[-1] // heads
    padding = 0 if length is None else k.shape[1] - length
    if mask is not None:
        # Kernels give such rows the padding too. Queries of zeros make every logit equal.
        some = mask.any(axis=-1)
        q = jnp.where(some[:, None, None], q, 0)
        mask = mask | ~some[:, None]
    elif padding:
        mask = jnp.ones((k.shape[0], length), bool)
    if padding:
        mask = jnp.pad(mask, ((0, 0), (0, padding)))
    kernel = functools.partial(_pallas, interpret=interpret) if backend == "pallas" else _cudnn
    kernel = functools.partial(kernel, channels=channels)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(q, k, v, mask)
    tokens, keys = P(DATA_AXES, None, "tensor"), P(DATA_AXES, None)
    split = jax.shard_map(
        kernel,
        in_specs=(tokens, tokens, tokens, None if mask is None else keys),
        out_specs=tokens,
        check_vma=False,
    )
    return split(q, k, v, mask)


def _pallas(
    q: Array, k: Array, v: Array, mask: Array | None, *, channels: int, interpret: bool
) -> Array:
    n, m = q.shape[1], k.shape[1]
    whole = tiles.whole_tiles(m)
    if whole != m:
        mask = jnp.ones((k.shape[0], m), bool) if mask is None else mask
        mask = jnp.pad(mask, ((0, 0), (0, whole - m)))
    q = _pad(q, padded_length(n, whole))
    y = attention_kernel.attention(
        q,
        _pad(k, whole),
        _pad(v, whole),
        mask,
        channels=channels,
        block=_block(n, whole),
        interpret=interpret,
    )
    return y[:, :n]


def _pad(x: Array, length: int) -> Array:
    return x if x.shape[1] == length else jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0)))


def padded_length(queries: int, keys: int) -> int:
    """The number of queries, filled up to whole blocks of the TPU kernel."""
    block = _block(queries, keys)
    return -(-queries // block) * block


def _block(queries: int, keys: int) -> int:
    """Queries that a program of the TPU kernel takes."""
    return tiles.block(queries, (_LOGITS_ON_V4 if _is_v4() else _LOGITS) // keys)


def _is_v4() -> bool:
    return device_kind().startswith("TPU v4")


def _cudnn(q: Array, k: Array, v: Array, mask: Array | None, *, channels: int) -> Array:
    if mask is not None:  # of every query: cuDNN takes no mask that is broadcast over them
        mask = jnp.broadcast_to(mask[:, None, None], (q.shape[0], 1, q.shape[1], k.shape[1]))
    q, k, v = (x.reshape(*x.shape[:-1], -1, channels) for x in (q, k, v))
    y = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
    return y.reshape(*y.shape[:-2], -1)
