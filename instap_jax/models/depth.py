"""Many equal layers as one module and one compiled loop, and what its backward pass keeps.

A stack's parameters have a leading layer axis [depth, ...].
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from instap_jax.models.kernels import attention as attention_kernel
from instap_jax.models.placement import data_ways, split_over_data

Array = jax.Array

_BLOCK_INPUT = "block_input"  # name, for rematerialisation
# Bytes of a block's input on one device from which 'offload' offloads: smaller ones (masked scenes)
# take little memory, and their transfers would double the compiled loops for nothing.
OFFLOADED_FROM = 1 << 26


def stack(create: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """Creates `depth` modules as one, every parameter with a leading layer axis [depth, ...]."""

    @nnx.vmap(in_axes=0, out_axes=0)
    def build(key: Array) -> nnx.Module:
        return create(nnx.Rngs(params=key))

    return build(jax.random.split(rngs.params(), depth))


def layer(blocks: nnx.Module, index: int) -> nnx.Module:
    """One module out of a `stack`."""
    graphdef, state = nnx.split(blocks)
    return nnx.merge(graphdef, jax.tree.map(lambda a: a[index], state))


_POLICIES = jax.checkpoint_policies
_REMAT = {
    "offload": _POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_BLOCK_INPUT, attention_kernel.SAVED],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "none": _POLICIES.nothing_saveable,
    "attention": _POLICIES.save_only_these_names(attention_kernel.SAVED),
    "dots": _POLICIES.save_from_both_policies(
        _POLICIES.dots_with_no_batch_dims_saveable,
        _POLICIES.save_only_these_names(attention_kernel.SAVED),
    ),
}


def _call_block(block: nnx.Module, x: Any, key: Array | None, rate: Array | None) -> Any:
    return block(x, key=key) if rate is None else block(x, key=key, drop_path_rate=rate)


def scan_blocks(
    blocks: nnx.Module,
    x: Any,
    *,
    remat: str,
    key: Array | None = None,
    drop_path_rates: Array | None = None,
    start: int = 0,
    stop: int | None = None,
    taps: int = 0,
    call: Callable[[nnx.Module, Any, Array | None, Array | None], Any] = _call_block,
) -> tuple[Any, Any]:
    """Runs layers [start, stop) of a `stack` as one compiled loop.

    Args:
      blocks: what `stack` made.
      x: the carry, an array or a pytree of arrays.
      remat: what the backward pass keeps of a block: 'none' (only its input), 'attention' (also
        what its kernel put out), 'offload' (these two in the host's memory where the input takes
        64 MiB a device or more, else as 'none'), 'dots' (as 'attention', and matmul outputs
        without batch dimensions), 'all'.
      key: folded with the layer's index; None runs deterministically.
      drop_path_rates: float [depth] over the whole stack.
      taps: the outputs of the last `taps` of these layers are also returned. Two loops, so that
        no other output is stacked.
      call: (block, x, key, rate) -> x, for blocks that take more than `PreNormBlock` does; it may
        close over masks and contexts.

    Returns:
      (x, outputs [taps, ...] in layer order, or None without taps).
    """
    graphdef, state = nnx.split(blocks)
    depth = jax.tree.leaves(state)[0].shape[0]
    stop = depth if stop is None else stop
    if not 0 <= taps <= stop - start <= stop <= depth:
        raise ValueError(f"{taps} taps of layers [{start}, {stop}) of {depth}")

    if remat == "offload" and _bytes_on_a_device(x) < OFFLOADED_FROM:
        remat = "none"

    def apply(x, state, index, rate):
        x = checkpoint_name(x, _BLOCK_INPUT)
        layer_key = None if key is None else jax.random.fold_in(key, index)
        return call(nnx.merge(graphdef, state), x, layer_key, rate)

    if remat != "all":
        # Inside a scan nothing can be merged across iterations, so the barriers are not needed.
        apply = jax.checkpoint(apply, policy=_REMAT[remat], prevent_cse=False)

    def run(x, first, last, keep):
        layers = (state, jnp.arange(depth), drop_path_rates)
        layers = jax.tree.map(lambda a: a[first:last], layers)

        def step(x, layer):
            x = split_over_data(apply(x, *layer))
            return x, x if keep else None

        return lax.scan(step, x, layers)

    if stop - taps > start:
        x, _ = run(x, start, stop - taps, keep=False)
    return run(x, stop - taps, stop, keep=True) if taps else (x, None)


def _bytes_on_a_device(activations: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(activations)) // data_ways()
