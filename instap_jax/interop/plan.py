"""What a conversion will write, and the sizes that a foreign file determines."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from instap_jax import config_check
from instap_jax.config import default
from instap_jax.errors import UserError
from instap_jax.interop.keys import Shape, Table, leaves
from instap_jax.interop.reading import Weights


@dataclasses.dataclass(frozen=True)
class Resize:
    """A foreign table of another size than the model's.

    Attributes:
      shape: of it in the file. apply: to the shape that the key table has. note: for the report.
    """

    shape: Shape
    apply: Callable[[np.ndarray], np.ndarray]
    note: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Attributes:
    kind: which layout, for the report.
    config: of the directory that is written.
    create: the modules that are written, inside a module of the checkpoint's structure.
    table: their key table; its `own` parameters are not in the file and are fresh.
    draw: whether fresh parameters are drawn now, from config.seed, or left out of the checkpoint
      and drawn by the run that takes it.
    resized: foreign key -> how its table gets the model's size.
    sizes: configuration fields that the file determined.
    assumed: what it does not say.
    """

    kind: str
    config: ConfigDict
    create: Callable[[nnx.Rngs], nnx.Module]
    table: Table
    draw: bool
    resized: Mapping[str, Resize] = dataclasses.field(default_factory=dict)
    sizes: Mapping[str, Any]
    assumed: tuple[str, ...] = ()


def dimensions(weights: Weights, name: str, rank: int) -> Shape:
    """The shape of a tensor that must be there.

    Raises:
      UserError: when it is not, or has another number of axes.
    """
    shape = weights.shapes.get(name)
    if shape is None:
        raise UserError(f"{weights.path}: has no {name!r}")
    if len(shape) != rank:
        raise UserError(f"{weights.path}: {name!r} has shape {shape}, not {rank} axes")
    return shape


def count(weights: Weights, pattern: str) -> int:
    """Layers: one more than the largest number where `pattern` has '{}'; 0 for none."""
    expression = re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)"))
    numbers = [int(found[1]) for name in weights.shapes if (found := expression.match(name))]
    return max(numbers, default=-1) + 1


def fit(
    config: ConfigDict | None,
    stage: str,
    weights: Weights,
    sizes: Mapping[str, Any],
    guesses: Mapping[str, Any],
) -> ConfigDict:
    """The configuration that is written: the given one, which the file must fit, or the default
    with what the file says.

    Args:
      sizes: what the file determines, by dotted field.
      guesses: what it does not say; a given configuration does.

    Raises:
      UserError: naming every field in which the given configuration and the file differ, or the
        result is impossible.
    """
    if config is None:
        config = default()
        if stage == "align":  # BERT's vocab.txt, as Google publishes it
            config.tokenizer.update(kind="wordpiece", cls_id=101, mask_id=103)
        config.update_from_flattened_dict({**sizes, **guesses})
    else:
        config = config.copy_and_resolve_references()
        flat = config_check.flatten(config)
        differ = [f"{k} is {v} there, {flat[k]} here" for k, v in sizes.items() if flat[k] != v]
        if differ:
            raise UserError(f"{weights.path} does not fit the configuration: {'; '.join(differ)}")
    config.stage = stage
    try:
        config_check.check(config)
    except UserError as error:
        raise UserError(f"{weights.path}: with the sizes it has, {error}") from error
    return config


def assumed(config: ConfigDict, guesses: Iterable[str]) -> tuple[str, ...]:
    """What the file does not say, with the value it was given."""
    flat = config_check.flatten(config)
    return tuple(f"{key}={flat[key]}" for key in guesses)


def shapes_of(create: Callable[[nnx.Rngs], nnx.Module]) -> dict[str, Shape]:
    """Dotted path -> shape of every parameter of a module, which is not built."""
    abstract = nnx.state(nnx.eval_shape(lambda: create(nnx.Rngs(0))))
    return {path: tuple(leaf.shape) for path, leaf in leaves(abstract).items()}
