"""Our own layout in PyTorch (`torch_model.py`): UMT's names, and names for what UMT has not.

A directory of it is what `export.py` writes; `plan` reads one back.
"""

from collections.abc import Mapping

from flax import nnx
from ml_collections import ConfigDict

from instap_jax.config_check import flatten
from instap_jax.errors import UserError
from instap_jax.interop import terms, umt
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
from instap_jax.interop.plan import Plan, assumed, fit, shapes_of
from instap_jax.interop.reading import Weights, read_config
from instap_jax.train.objectives import OBJECTIVES
from instap_jax.train.objectives.align import INSTANCE_TERMS

FORMAT = "instap-torch-1"  # of config.json; `torch_model.FORMAT`

# Every field of the sections that describe the model. FORWARD: what it computes depends on these,
# and torch_model.py reads them. TRAINING: it does not. A field in neither is one that this export
# has never heard of: refused, for what it does would silently be missing.
FORWARD = {
    "vision": (
        "width", "depth", "heads", "mlp_ratio", "patch", "image_size", "position_frames",
        "position_size",
    ),
    "text": ("vocab_size", "width", "depth", "fusion_layers", "heads", "mlp_ratio", "max_length"),
    "align": (
        "projection", "own_temperature", "crop_size", "still_boxes", "cross_attention",
        "cross_attention_depth", "cross_attention_heads", "scene_anchor", "crop_context",
        "size_code", "motion_code",
    ),
    "contrastive": ("loss", "temperature_range"),
}  # fmt: skip
TRAINING = {
    "vision": ("drop_path",),
    "text": ("dropout", "checkpoint"),
    "align": (
        "rec", "vtc", "vtm", "mlm", "instance", "inst_vtc", "inst_vtm", "inst_mlm",
        "mask_ratio_video", "mask_ratio_image", "mlm_ratio", "alpha", "crop_mask_ratio",
        "global_instances", "cross_attention_scale",
    ),
    "contrastive": ("temperature", "bias"),
}  # fmt: skip


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


def plan(weights: Weights, config: ConfigDict | None) -> Plan:
    """An export of ours as a run of stage 'align'.

    Raises:
      UserError: no such export, or it does not fit the configuration.
    """
    described = read_config(weights.path) or {}
    if described.get("format") != FORMAT:
        raise UserError(f"{weights.path}: no config.json of format {FORMAT!r} beside it")
    wanted = [f"{section}.{key}" for section, keys in FORWARD.items() for key in keys]
    wanted += ["distill.layers", "teacher.projection", "tokenizer.kind", "tokenizer.length"]
    flat = flatten(described)
    if missing := [key for key in wanted if key not in flat]:
        raise UserError(f"{weights.path.parent}/config.json: {missing[0]!r} is missing")
    sizes = {k: tuple(flat[k]) if isinstance(flat[k], list) else flat[k] for k in wanted}
    if sizes["align.crop_size"] == sizes["vision.image_size"]:
        del sizes["align.crop_size"]  # which is what an unset one means
    sizes["tokenizer.text"] = flat.get("tokenizer.text", "plain")  # older exports know no other
    trained = terms.recorded(weights, "config.json")
    instances = flat.get("align.instance_embedding") == "contextual"
    if trained is not None:
        instances = any(term in trained for term in INSTANCE_TERMS)
    if config is None:
        sizes |= terms.zeros(trained) | terms.options(weights, "config.json")
    side = flat["vision.image_size"] // flat["vision.patch"]
    guesses = {"align.instance": 0.1 if instances else 0.0, "teacher.image_size": 14 * side}
    fitted = fit(config, "align", weights, sizes, guesses)
    terms.check(fitted, trained, weights.path)

    def create(rngs: nnx.Rngs) -> nnx.Module:
        return OBJECTIVES["align"].create(fitted, rngs)

    return Plan(
        kind="torch (our own export)",
        config=fitted,
        create=create,
        table=table(shapes_of(create)),
        draw=True,
        sizes=sizes,
        assumed=assumed(fitted, guesses) + terms.assumed(fitted, trained),
    )
