"""Our TPU kernels beside JAX's splash attention and XLA's LayerNorm, by the compiler's estimate.

    python benchmarks/kernels.py [--topology=v5e:1x1] [--tokens=208,320,624,1568,3136]

Needs the extra `compile` and no TPU. Prints cycles of one head of 64 channels, forward and
backward, and of one token of a LayerNorm of width 1024. Kernels: instructions or traffic
(`aot/kernels.py`); XLA: its `estimated_cycles`. Splash gets the blocks of 384 to 1024 that pad the
fewest tokens, a shorter length as one block, and its fused backward pass.
"""

import argparse
import os
from collections.abc import Callable

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    FullMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)
from jax.sharding import SingleDeviceSharding

from instap_jax.aot import hlo, kernels, topology
from instap_jax.models import attention_backends, layers
from instap_jax.models.kernels import layer_norm

SAMPLES, HEADS, CHANNELS = 2, 16, 64
WIDTH = HEADS * CHANNELS


def ours(q, k, v):
    return attention_backends.attend("pallas", q, k, v, heads=HEADS, mask=None)


def splash(q, k, v):
    """With the padding to whole blocks masked by segments, all keys of a head held at once."""
    length = q.shape[1]
    blocks = range(1024, 256, -128) if length > 384 else (-(-length // 128) * 128,)
    block = min(blocks, key=lambda size: -length % size)
    padded = -(-length // block) * block
    q, k, v = (
        jnp.pad(layers.split_heads(x, HEADS), ((0, 0), (0, padded - length), (0, 0), (0, 0)))
        for x in (q, k, v)
    )
    attend = make_splash_mha(
        MultiHeadMask([FullMask((padded, padded))] * HEADS),
        block_sizes=BlockSizes(
            block_q=block,
            block_kv=padded,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=padded,
            block_kv_dkv_compute=block,
            use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=1,
    )
    ids = (jnp.arange(padded) < length).astype(jnp.int32)
    segments = SegmentIds(q=jnp.ones_like(ids), kv=ids)
    q, k, v = (x.swapaxes(1, 2) for x in (q * CHANNELS**-0.5, k, v))
    return jax.vmap(attend, in_axes=(0, 0, 0, None))(q, k, v, segments)


def kernel_cycles(function: Callable, where, *args) -> dict[str, int]:
    """Cycles of the kernels of `function` and of its gradient, by name."""

    def both(*args):
        y, pullback = jax.vjp(function, *args)
        return pullback(y)

    calls = kernels.measure(jax.jit(both).trace(*args).jaxpr.jaxpr, where)
    return {call.name: call.times * call.cycles for call in calls}


def xla_cycles(function: Callable, where, *args) -> int:
    """The compiler's estimate of a whole function, kernels left out."""
    place = SingleDeviceSharding(topology.devices(where)[0])
    lowered = jax.jit(function, in_shardings=place).trace(*args).lower(lowering_platforms=("tpu",))
    with topology.compiler_environment():
        return hlo.cycles(list(hlo.walk(hlo.parse(lowered.compile().as_text()))))


def attention_rows(tokens: int, where) -> None:
    x = jax.ShapeDtypeStruct((SAMPLES, tokens, WIDTH), jnp.bfloat16)
    for name, function in (("ours", ours), ("splash", splash)):
        found = kernel_cycles(function, where, x, x, x)
        backward = sum(v for k, v in found.items() if "backward" in k or "dkv" in k)
        forward = sum(found.values()) - backward
        each = [f"{cycles / SAMPLES / HEADS:,.0f}" for cycles in (forward, backward)]
        print(f"| attention, {tokens} tokens | {name} | {each[0]} | {each[1]} |", flush=True)


def norm_rows(tokens: int, where) -> None:
    x = jax.ShapeDtypeStruct((64, tokens, WIDTH), jnp.bfloat16)
    row = jax.ShapeDtypeStruct((WIDTH,), jnp.float32)

    def by_kernel(x, scale, bias):
        return layer_norm.layer_norm(x, scale, bias, 1e-6, False)

    def by_xla(x, scale, bias):
        norm = layers.LayerNorm(WIDTH, eps=1e-6, dtype=x.dtype, backend="xla")
        norm.scale[...], norm.bias[...] = scale, bias
        return norm(x)

    def gradient(x, scale, bias, g):
        return jax.vjp(by_xla, x, scale, bias)[1](g)

    found = kernel_cycles(by_kernel, where, x, row, row)
    mine = found["layer_norm"], found["layer_norm_backward"]
    theirs = xla_cycles(by_xla, where, x, row, row), xla_cycles(gradient, where, x, row, row, x)
    for name, pair in (("ours", mine), ("XLA", theirs)):
        each = [f"{cycles / 64 / tokens:,.1f}" for cycles in pair]
        print(f"| LayerNorm, {tokens} tokens | {name} | {each[0]} | {each[1]} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--topology", default="v5e:1x1")
    parser.add_argument("--tokens", default="208,320,624,1568,3136")
    args = parser.parse_args()
    where = topology.parse(args.topology)
    print(f"{where.label}, libtpu {topology.compiler_version()}, jax {jax.__version__}\n")
    print("| what | by | cycles forward | backward |\n|---|---|---:|---:|")
    for tokens in map(int, args.tokens.split(",")):
        attention_rows(tokens, where)
        norm_rows(tokens, where)


if __name__ == "__main__":
    main()
