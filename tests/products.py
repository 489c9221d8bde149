"""How precisely a function multiplies where nothing but itself asks for it, as on a TPU."""

import jax
from jax.extend import core
from jax.lax import Precision


def precisions(function, *args) -> set[Precision | None]:
    """Those of all matrix products of a function; None: the platform's own."""
    with jax.default_matmul_precision("default"):
        return set(_precisions(jax.make_jaxpr(function)(*args).jaxpr))


def _precisions(jaxpr: core.Jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield from equation.params["precision"] or (None,)
        for part in core.jaxprs_in_params(equation.params):
            yield from _precisions(part)
