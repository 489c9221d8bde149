"""Model FLOPs of a step, counted exactly from its jaxpr, and the peak rates of known chips.

XLA's own cost analysis counts the body of a scan once; a model of scanned layers needs the jaxpr
walked with trip counts.
"""

import math
from collections.abc import Callable

import jax
from jax.extend import core

# Peak dense bfloat16 FLOP/s of one device, by a prefix of `device_kind`; longest prefix wins.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # per core: a chip shows as two devices
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Peak bfloat16 FLOP/s of a device, or None for one that is not listed (a CPU, say)."""
    known = [kind for kind in PEAK_FLOPS if device.device_kind.startswith(kind)]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def count_flops(function: Callable, *args) -> int:
    """Floating-point operations of the matrix products of `function(*args)`.

    Args:
      function: traceable; it is traced, not run.
      *args: arrays or abstract arrays.

    Returns:
      2 * multiply-adds of every dot_general and convolution, loop bodies times their trip count.
      A `while` of unknown length counts once; the branches of a `cond` count as the largest.
    """
    # Not within another trace: a step compiled with options of its own must be the outermost.
    jitted = function if isinstance(function, jax.stages.Wrapped) else jax.jit(function)
    return _count(jitted.trace(*args).jaxpr.jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contract, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contract)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out_features = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2 * equation.outvars[0].aval.size * math.prod(kernel) // out_features
    if name == "cond":
        return max(_count(branch.jaxpr) for branch in params["branches"])
    inner = sum(_count(sub) for sub in core.jaxprs_in_params(params))
    if name == "scan":
        return inner * params["length"]
    if name == "shard_map":
        return inner * params["mesh"].size
    return inner
