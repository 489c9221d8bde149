"""Initial parameters from elsewhere: another run, whole or the modules that two stages share, and
BERT weights as `instap convert --from=bert` writes them."""

from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from instap_jax.errors import UserError
from instap_jax.train import checkpoint, inputs
from instap_jax.train.objectives import Objective
from instap_jax.train.program import Program


def initial_params(
    config: ConfigDict, objective: Objective, abstract: nnx.State, fresh: nnx.State
) -> nnx.State:
    """Parameters from `config.checkpoint.init_from` and `config.text.checkpoint`, the rest from
    `fresh`.

    A run of the same stage gives everything, one of a stage in `Objective.starts_from` the modules
    named there; `config.text.checkpoint` gives `text`. Strict both ways: a module that is taken
    fits parameter by parameter, and one that the other run has is taken, or named in
    `Objective.leaves`. Prints where every module comes from.

    Args:
      abstract: of the parameters, with shardings.
      fresh: parameters of this stage as initialised.

    Raises:
      UserError: no run there, one of a stage that gives this one nothing, one that does not fit,
        one whose `text` was trained with another tokenizer, or two that both give `text`.
    """
    params = dict(fresh.raw_mapping)  # plain dicts inside: one State inside another is another tree
    origins: dict[str, str] = {}
    if source := config.checkpoint.init_from:
        which = config.checkpoint.init_which
        # One step for all modules: the run at `source` may be training.
        step, meta = checkpoint.read_meta(source, which=which)
        modules = _modules(config, objective, abstract, source, meta["stage"], step)
        if "text" in modules:
            _check_vocabulary(config, meta, source)
        for name in modules:
            read = checkpoint.read_params(
                source, abstract[name], select=(name,), step=step, which=which
            )
            params[name] = _plain(read)
            origins[name] = f"from {source} ({meta['stage']}, {which}, step {step})"
    if source := config.text.checkpoint:
        if "text" in origins:
            raise UserError(
                f"config.text.checkpoint={source} and config.checkpoint.init_from both give 'text'"
            )
        params["text"], origins["text"] = _text(config, abstract["text"], fresh["text"])
    if jax.process_index() == 0:
        for name in params:
            print(f"init {name}: {_size(abstract[name])}, {origins.get(name, 'fresh')}")
    return nnx.State(params)


def load_frozen(config: ConfigDict, program: Program, *, step: int | None = None) -> nnx.State:
    """Parameters of the frozen model, from `config.teacher.checkpoint`; nothing where none is.

    Args:
      step: of the checkpoint; None: the newest.

    Raises:
      UserError: it is not set, not there, damaged, or does not fit.
    """
    if not jax.tree.leaves(program.frozen_abstract):
        return program.frozen_abstract
    if not config.teacher.checkpoint:
        raise UserError(
            f"stage {config.stage!r} needs a teacher: set config.teacher.checkpoint to the "
            "workdir of a 'teacher' run, or to what `instap convert --from=clip` wrote"
        )
    return checkpoint.read_params(
        config.teacher.checkpoint,
        program.frozen_abstract,
        select=program.objective.frozen_path,
        step=step,
    )


def _modules(
    config: ConfigDict,
    objective: Objective,
    abstract: nnx.State,
    source: str,
    stage: str,
    step: int,
) -> tuple[str, ...]:
    """The modules that a run of `stage` at `source` gives; others are named in `leaves`."""
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
    which = config.checkpoint.init_which
    unused = sorted(set(checkpoint.module_names(source, step=step, which=which)) - set(modules))
    lost = [name for name in unused if stage == config.stage or name not in objective.leaves]
    if lost:
        raise UserError(f"{source}: stage {config.stage!r} has no place for its {lost[0]!r}")
    if unused and jax.process_index() == 0:
        print(f"init leaves {', '.join(unused)} of {source}")
    return modules


def _text(config: ConfigDict, abstract: nnx.State, fresh: nnx.State) -> tuple[Any, str]:
    """The text encoder of `config.text.checkpoint`, and the words that say where it comes from.

    What the conversion named as not in its source (the cross-attention) stays fresh; everything
    else must be there.
    """
    source = config.text.checkpoint
    step, meta = checkpoint.read_meta(source)
    if checkpoint.module_names(source, step=step) != ("text",):
        raise UserError(
            f"config.text.checkpoint={source} is no text encoder: `instap convert --from=bert` "
            "makes one; a run is taken by config.checkpoint.init_from"
        )
    _check_vocabulary(config, meta, source)
    left = {tuple(name.split(".")[1:]) for name in meta["fresh"]}
    places = dict(nnx.to_flat_state(abstract))
    wanted = {place: leaf for place, leaf in places.items() if place not in left}
    read = checkpoint.read_params(source, nnx.from_flat_state(wanted), select=("text",), step=step)
    merged = dict(nnx.to_flat_state(fresh)) | dict(nnx.to_flat_state(nnx.State(_plain(read))))
    count = f", {len(left)} arrays that it has not fresh" if left else ""
    return nnx.from_flat_state(merged).raw_mapping, f"from {source} ({_kind(meta)}){count}"


def _check_vocabulary(config: ConfigDict, meta: dict[str, Any], source: str) -> None:
    """Holds a run to the vocabulary of the text encoder that it takes, where that is known."""
    if meta.get("inputs", {}).get("tokenizer"):  # not of weights converted without a vocabulary
        inputs.check_tokenizer(config, meta, source)


def _kind(meta: dict[str, Any]) -> str:
    return meta["converted"]["kind"]


def _plain(module: Any) -> Any:
    return module.raw_mapping if isinstance(module, nnx.State) else module


def _size(module) -> str:
    leaves = jax.tree.leaves(module)
    count = sum(leaf.size for leaf in leaves)
    return f"{len(leaves)} arrays of {count:,} parameters"
