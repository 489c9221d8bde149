"""Our own layout in PyTorch (`torch_model.py`): UMT's names, and names for what UMT has not."""

from collections.abc import Mapping

from instap_jax.interop import umt
from instap_jax.interop.keys import (
    HEADS,
    HEADS_BIAS,
    Rule,
    Shape,
    Table,
    linear,
    norm,
    resolve,
)


def table(shapes: Mapping[str, Shape]) -> Table:
    """The layout of an export of stage 'align', every parameter in it.

    Args:
      shapes: of the model's parameters, by dotted path (`keys.leaves`).
    """
    return resolve([*umt.align_rules(shapes), *own_rules(shapes)], shapes)


def own_rules(shapes: Mapping[str, Shape]) -> list[Rule]:
    """What `umt.OWN` names, as far as the model has it."""
    blocks = "cross_attention.blocks"
    theirs = "cross_attention.blocks.{}"
    attention = f"{theirs}.attention"
    rules = [
        *norm(f"{blocks}.norm", f"{theirs}.norm"),
        *norm(f"{blocks}.scene_norm", f"{theirs}.scene_norm"),
        Rule(f"{blocks}.attention.query", (f"{attention}.query.weight",), HEADS),
        Rule(f"{blocks}.attention.query_bias", (f"{attention}.query.bias",), HEADS_BIAS),
        Rule(
            f"{blocks}.attention.key_value",
            (f"{attention}.key.weight", f"{attention}.value.weight"),
            HEADS,
        ),
        Rule(
            f"{blocks}.attention.key_value_bias",
            (f"{attention}.key.bias", f"{attention}.value.bias"),
            HEADS_BIAS,
        ),
        *linear(f"{blocks}.attention.out", f"{attention}.out"),
        Rule("instance_temperature", ("instance_temp",)),
        *linear("box_codes.projection", "box_codes.projection"),
        Rule("contrastive_bias", ("contrastive_bias",)),
        Rule("instance_contrastive_bias", ("instance_contrastive_bias",)),
    ]
    return [rule for rule in rules if rule.ours in shapes]
