"""Key tables: which of our parameters is which tensor of another layout, and how to get there.

A layout is a list of `Rule`s. `resolve` lays them over the parameters of a model, of which only
the shapes are needed, and gives a `Table`: one `Row` for every (parameter, layer), each with its
foreign keys and their shapes. Rows go both ways without loss (`to_ours`, `to_theirs`); importing
and exporting read the same ones.

Strict both ways: every parameter of the model has exactly one rule or is named as not part of the
layout, and every rule finds its parameter.

Letters: d input width, n projections in one kernel, h heads, c channels of a head, p patch.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """How one parameter of ours relates to its foreign tensors.

    Attributes:
      name: for reports; 'same' where the numbers lie in memory as they do there.
      shapes: (our shape, number of foreign tensors) -> the foreign shapes.
      to_ours: (foreign tensors, our shape) -> our array.
      to_theirs: (our array, foreign shapes) -> the foreign tensors.
    """

    name: str
    shapes: Callable[[Shape, int], list[Shape]]
    to_ours: Callable[[Sequence[np.ndarray], Shape], np.ndarray]
    to_theirs: Callable[[np.ndarray, Sequence[Shape]], list[np.ndarray]]


SAME = Transform(
    "same",
    shapes=lambda shape, count: [shape],
    to_ours=lambda tensors, shape: tensors[0],
    to_theirs=lambda array, shapes: [array],
)

# torch's Linear keeps [out, in]; ours is [in, out].
TRANSPOSED = Transform(
    "transposed",
    shapes=lambda shape, count: [shape[::-1]],
    to_ours=lambda tensors, shape: tensors[0].T,
    to_theirs=lambda array, shapes: [array.T],
)


def _convolution(time: Shape) -> Transform:
    """Conv kernel [out, 3, *time, p, p] <-> [p p 3, out], in the order of `vision.patchify`."""

    def shapes(shape: Shape, count: int) -> list[Shape]:
        patch = int((shape[0] // 3) ** 0.5 + 0.5)
        return [(shape[1], 3, *time, patch, patch)]

    def to_ours(tensors: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
        (kernel,) = tensors
        kernel = kernel.reshape((*kernel.shape[:2], *kernel.shape[-2:]))
        return kernel.transpose(2, 3, 1, 0).reshape(shape)

    def to_theirs(array: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        (shape,) = shapes
        kernel = array.reshape((*shape[-2:], 3, shape[0])).transpose(3, 2, 0, 1)
        return [kernel.reshape(shape)]

    return Transform(f"convolution {len(time) + 2}d", shapes, to_ours, to_theirs)


CONVOLUTION_2D = _convolution(())
CONVOLUTION_3D = _convolution((1,))


def _split_rows(array: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
    return np.split(array, len(shapes))


# Projections to heads [d, n, h, c] <-> torch weights [rows, d], the n of them in one tensor (CLIP's
# in_proj, UMT's qkv) or in several (BERT's query, key, value).
HEADS = Transform(
    "heads",
    shapes=lambda shape, count: [(int(np.prod(shape[1:])) // count, shape[0])] * count,
    to_ours=lambda tensors, shape: np.concatenate(tensors).T.reshape(shape),
    to_theirs=lambda array, shapes: _split_rows(array.reshape(array.shape[0], -1).T, shapes),
)

HEADS_BIAS = Transform(
    "heads",
    shapes=lambda shape, count: [(int(np.prod(shape)) // count,)] * count,
    to_ours=lambda tensors, shape: np.concatenate(tensors).reshape(shape),
    to_theirs=lambda array, shapes: _split_rows(array.reshape(-1), shapes),
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One parameter of ours in another layout.

    Attributes:
      ours: dotted path, as `leaves` names it.
      theirs: foreign keys. With '{}' the parameter is a stack of layers, and layer i of it has the
        foreign number `first + i` there.
    """

    ours: str
    theirs: tuple[str, ...]
    transform: Transform = SAME
    first: int = 0

    @property
    def stacked(self) -> bool:
        return "{}" in self.theirs[0]


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter, or one layer of a stacked one.

    Attributes:
      ours: dotted path. layer: index into its leading axis; None for one that is not stacked.
      shape: ours, without the layer axis.
      theirs: foreign keys. shapes: theirs.
    """

    ours: str
    layer: int | None
    shape: Shape
    theirs: tuple[str, ...]
    shapes: tuple[Shape, ...]
    transform: Transform

    def to_ours(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """What the foreign tensors, of the row's shapes, are for us; a view where possible."""
        return self.transform.to_ours([tensors[key] for key in self.theirs], self.shape)

    def to_theirs(self, array: np.ndarray) -> dict[str, np.ndarray]:
        """The foreign tensors of our array, which is one layer of the stack; possibly views."""
        arrays = self.transform.to_theirs(array, self.shapes)
        return dict(zip(self.theirs, arrays, strict=True))


@dataclasses.dataclass(frozen=True)
class Table:
    """A layout laid over a model.

    Attributes:
      rows: in the order of our parameters, layers of one together.
      own: our parameters that the layout has no place for.
      tied: foreign key -> the key it is another name of (in a state_dict both are there).
      constants: foreign key -> values of a buffer that is no parameter.
      ignored: prefix of foreign keys -> why they have no place here.
    """

    rows: tuple[Row, ...]
    own: tuple[str, ...] = ()
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def shapes(self) -> dict[str, Shape]:
        """Foreign key -> shape, of everything that a complete foreign file holds."""
        found = {key: shape for row in self.rows for key, shape in zip(row.theirs, row.shapes)}
        found |= {key: found[origin] for key, origin in self.tied.items()}
        return found | {key: value.shape for key, value in self.constants.items()}

    def reason_to_ignore(self, key: str) -> str | None:
        """Why a foreign key has no place here; None for one that the layout does not know."""
        for prefix, reason in self.ignored.items():
            if key.startswith(prefix):
                return reason
        return None


def resolve(
    rules: Iterable[Rule],
    shapes: Mapping[str, Shape],
    *,
    own: Sequence[str] = (),
    **others: Any,
) -> Table:
    """Lays rules over a model.

    Args:
      shapes: of every parameter of the model, by dotted path, layer axes included.
      own: prefixes of parameters that the layout has no place for.
      others: further attributes of the `Table`.

    Raises:
      ValueError: a parameter without a rule, a rule without its parameter, or two rules for one.
    """
    by_path: dict[str, Rule] = {}
    for rule in rules:
        if rule.ours in by_path:
            raise ValueError(f"two rules for {rule.ours}")
        by_path[rule.ours] = rule
    left = [path for path in shapes if path not in by_path and not path.startswith(tuple(own))]
    if left:
        raise ValueError(f"no rule for {left[0]} ({len(left)} parameters)")
    if missing := [path for path in by_path if path not in shapes]:
        raise ValueError(f"the model has no {missing[0]} ({len(missing)} rules)")
    rows = [row for path in shapes if path in by_path for row in _rows(by_path[path], shapes[path])]
    kept = tuple(path for path in shapes if path not in by_path)
    return Table(rows=tuple(rows), own=kept, **others)


def _rows(rule: Rule, shape: Shape) -> list[Row]:
    layers: Sequence[int | None] = (None,)
    if rule.stacked:
        layers, shape = range(shape[0]), shape[1:]
    shapes = tuple(rule.transform.shapes(shape, len(rule.theirs)))
    rows = []
    for layer in layers:
        number = None if layer is None else rule.first + layer
        theirs = tuple(key.format(number) for key in rule.theirs)
        rows.append(Row(rule.ours, layer, shape, theirs, shapes, rule.transform))
    return rows


def linear(ours: str, theirs: str, *, bias: bool = True, first: int = 0) -> list[Rule]:
    """A Linear with a kernel and mostly a bias."""
    rules = [Rule(f"{ours}.kernel", (f"{theirs}.weight",), TRANSPOSED, first)]
    return rules + ([Rule(f"{ours}.bias", (f"{theirs}.bias",), first=first)] if bias else [])


def norm(ours: str, theirs: str, *, first: int = 0) -> list[Rule]:
    """A LayerNorm."""
    pairs = (("scale", "weight"), ("bias", "bias"))
    return [Rule(f"{ours}.{a}", (f"{theirs}.{b}",), first=first) for a, b in pairs]


def leaves(tree: Any) -> dict[str, Any]:
    """Dotted path -> leaf, of a State, a pure dict or what orbax restores."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [str(getattr(e, "key", getattr(e, "name", getattr(e, "idx", e)))) for e in path]
        found[".".join(name for name in names if name not in ("value", ".value"))] = leaf
    return found
