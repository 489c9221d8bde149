"""Initial parameters from another run: all of them, or the modules that two stages share."""

import jax
from flax import nnx
from ml_collections import ConfigDict

from instap_jax.errors import UserError
from instap_jax.train import checkpoint
from instap_jax.train.objectives import Objective


def initial_params(
    config: ConfigDict, objective: Objective, abstract: nnx.State, fresh: nnx.State
) -> nnx.State:
    """Parameters from the run at `config.checkpoint.init_from`, the rest from `fresh`.

    A run of the same stage gives everything, one of a stage in `Objective.starts_from` the modules
    named there. Strict both ways: a module that is taken fits parameter by parameter, and one
    that the other run has is taken, or named in `Objective.leaves`. Prints where every module
    comes from, and what is left.

    Args:
      abstract: of the parameters, with shardings.
      fresh: parameters of this stage as initialised.

    Raises:
      UserError: no run there, one of a stage that gives this one nothing, or one that does not fit.
    """
    source = config.checkpoint.init_from
    step, meta = checkpoint.read_meta(source)
    stage = meta["stage"]
    if stage == config.stage:
        modules = tuple(abstract)
    elif stage in objective.starts_from:
        modules = objective.starts_from[stage]
    else:
        possible = ", ".join((config.stage, *objective.starts_from))
        raise UserError(
            f"config.checkpoint.init_from={source} is a run of stage {stage!r}; "
            f"stage {config.stage!r} starts from {possible}"
        )
    unused = sorted(set(checkpoint.module_names(source)) - set(modules))
    lost = [name for name in unused if stage == config.stage or name not in objective.leaves]
    if lost:
        raise UserError(f"{source}: stage {config.stage!r} has no place for its {lost[0]!r}")
    params = dict(fresh.raw_mapping)  # plain dicts inside: one State inside another is another tree
    for name in modules:
        read = checkpoint.read_params(source, abstract[name], select=(name,))
        params[name] = read.raw_mapping if isinstance(read, nnx.State) else read
    for name in params:
        origin = f"from {source} ({stage}, step {step})" if name in modules else "fresh"
        print(f"init {name}: {_size(abstract[name])}, {origin}")
    if unused:
        print(f"init leaves {', '.join(unused)} of {source}")
    return nnx.State(params)


def _size(module) -> str:
    leaves = jax.tree.leaves(module)
    count = sum(leaf.size for leaf in leaves)
    return f"{len(leaves)} arrays of {count:,} parameters"
