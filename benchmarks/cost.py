"""What a sample of stage 2 costs at the paper's scale, term by term, and what crop options save.

    python benchmarks/cost.py [--batch_size=32]

Floating-point operations of all matrix products of `configs/stage2_l16.py`, counted in the traced
program (`instap_jax.train.flops`) from shapes alone: nothing is computed and no weights exist, so
that any machine will do. Three tables in Markdown:
  terms  the objective built up one term at a time; a row is what its term adds to those above,
         forward and backward, so the rows add up to the whole
  parts  single functions of the model, traced by themselves, forward alone
  crops  the whole objective with one option of the instance crops changed
Counted without rematerialisation, except for the last line of the first table. A sample's share of
the two contrasts depends on the global batch; here it is that of --batch_size samples.
"""

import argparse
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from instap_jax import masking
from instap_jax.train.flops import count_flops
from instap_jax.train.objectives import objective
from instap_jax.types import Batch

# Label -> what it changes, each on top of the ones before, from the first contrast alone.
_TERMS = ("rec", "vtm", "mlm", "inst_vtc", "inst_vtm", "inst_mlm")
START = {f"align.{term}": 0.0 for term in _TERMS} | {"distill.mask_score": "random"}
LADDER: dict[str, dict[str, Any]] = {
    "(2) VTC: scene under its mask, captions": {},
    "teacher's masks: its attention": {"distill.mask_score": "cls"},
    "(1) L_rec: the teacher's features, heads": {"align.rec": 1.0},
    "(3) VTM: fusion of three pairs a sample": {"align.vtm": 1.0},
    "(4) MLM: masked captions, fusion, vocabulary": {"align.mlm": 1.0},
    "(8) instance VTC: crops, XAttn, sentences": {"align.inst_vtc": 1.0},
    "(9) instance VTM: fusion with one token": {"align.inst_vtm": 1.0},
    "(10) instance MLM: fusion with crop tokens": {"align.inst_mlm": 1.0},
}
CROPS: dict[str, dict[str, Any]] = {
    "the paper's (224 px, unmasked, 4 instances)": {},
    "112 px": {"align.crop_size": 112},
    "96 px": {"align.crop_size": 96},
    "half of the crop tokens masked": {"align.crop_mask_ratio": 0.5},
    "80 % of them masked": {"align.crop_mask_ratio": 0.8},
    "112 px, half masked": {"align.crop_size": 112, "align.crop_mask_ratio": 0.5},
    "2 instances a sample": {"data.instances_per_sample": 2},
    "1 instance a sample": {"data.instances_per_sample": 1},
    "no cross-attention": {"align.cross_attention": False},
    "still boxes": {"align.still_boxes": True},
}


def large() -> ConfigDict:
    """`configs/stage2_l16.py`."""
    path = Path(__file__).parent.parent / "configs" / "stage2_l16.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def abstract_batch(config: ConfigDict, *, size: int, frames: int) -> Batch:
    """Shapes of one group of `size` samples of `frames` frames, every instance slot used."""
    count, length = round(size * config.data.instances_per_sample), config.tokenizer.length
    shapes = {
        "frames": ((size, frames, *config.data.canvas, 3), jnp.uint8),
        "extent": ((size, 2), jnp.float32),
        "text": ((size, length), jnp.int32),
        "sample_valid": ((size,), jnp.bool_),
        "media_hash": ((size,), jnp.int32),
        "text_hash": ((size,), jnp.int32),
        "keep_side": ((size,), jnp.bool_),
        "boxes": ((count, frames, 4), jnp.float32),
        "present": ((count, frames), jnp.bool_),
        "instance_valid": ((count,), jnp.bool_),
        "parent": ((count,), jnp.int32),
        "instance_text": ((count, length), jnp.int32),
        "instance_text_hash": ((count,), jnp.int32),
    }
    return {name: jax.ShapeDtypeStruct((1, *s), dtype) for name, (s, dtype) in shapes.items()}


def changed(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    return config


def step_flops(config: ConfigDict, *, size: int, frames: int, backward: bool, remat="all") -> float:
    """FLOPs a sample of the loss, with `backward` of its gradients too."""
    config = changed(config, {"compute.remat": remat})
    stage = objective(config)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: stage.create(config, nnx.Rngs(0))))
    frozen = nnx.eval_shape(lambda: stage.create_frozen(config, nnx.Rngs(0)))
    frozen_graphdef, frozen = nnx.split(frozen)

    def loss(params, frozen, batch):
        model, teacher = nnx.merge(graphdef, params), nnx.merge(frozen_graphdef, frozen)
        return stage.loss(config, model, teacher, batch, jax.random.key(0))

    traced = jax.value_and_grad(loss, has_aux=True) if backward else loss
    batch = abstract_batch(config, size=size, frames=frames)
    return count_flops(traced, params, frozen, batch) / size


def term_costs(config: ConfigDict, *, size: int, frames: int) -> dict[str, tuple[float, float]]:
    """Label of `LADDER` -> FLOPs a sample that it adds, (forward, forward and backward)."""
    config, costs, before = changed(config, START), {}, (0.0, 0.0)
    for label, changes in LADDER.items():
        config = changed(config, changes)
        now = tuple(
            step_flops(config, size=size, frames=frames, backward=backward)
            for backward in (False, True)
        )
        costs[label] = now[0] - before[0], now[1] - before[1]
        before = now
    return costs


def part_costs(config: ConfigDict, *, frames: int) -> dict[str, float]:
    """FLOPs of single functions, forward, for what one sample or one sentence gives them."""
    config = changed(config, {"compute.remat": "all"})
    stage = objective(config)
    model = nnx.eval_shape(lambda: stage.create(config, nnx.Rngs(0)))
    teacher = nnx.eval_shape(lambda: stage.create_frozen(config, nnx.Rngs(0)))
    side, length = config.vision.image_size, config.tokenizer.length
    crop = config.align.crop_size or side
    dtype = jnp.dtype(config.compute.dtype)

    def array(*shape: int, kind=dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind)

    def flops(module: nnx.Module, function: Callable, *args) -> float:
        graphdef, params = nnx.split(module)
        return count_flops(lambda p, *a: function(nnx.merge(graphdef, p), *a), params, *args)

    tokens = frames * (side // config.vision.patch) ** 2
    align = config.align
    ratio = align.mask_ratio_image if frames == 1 else align.mask_ratio_video
    seen = masking.visible_count(tokens, ratio, frames=frames)
    crop_tokens = frames * (crop // config.vision.patch) ** 2
    width = config.vision.width
    text, mask = array(1, length, config.text.width), array(1, length, kind=jnp.bool_)
    teacher_side = config.teacher.image_size

    def fuse(visual: int) -> float:
        context = array(1, visual, width)
        return flops(model, lambda m, t, k, v: m.text.fuse(t, k, v), text, mask, context)

    return {
        f"teacher, {frames} x {teacher_side} px": flops(
            teacher,
            lambda m, x: m(x, taps=config.distill.layers, attention=True),
            array(frames, teacher_side, teacher_side, 3),
        ),
        f"student on the scene, {seen:,} of {tokens:,} tokens": flops(
            model,
            lambda m, x, v: m.encoder(x, visible=v).tokens,
            array(1, frames, side, side, 3),
            array(1, seen, kind=jnp.int32),
        ),
        f"student on one crop, {crop_tokens:,} tokens": flops(
            model,
            lambda m, x: m.encoder(x).tokens,
            array(1, frames, crop, crop, 3),
        ),
        "XAttn of one crop": flops(
            model,
            lambda m, c, s, p, k: m.cross_attention(c, s, p, mask=k).tokens,
            array(1, 1, crop_tokens, width),
            array(1, 1, seen, width),
            array(1, 1, kind=jnp.int32),
            array(1, 1, crop_tokens, kind=jnp.bool_),
        ),
        f"text layers, one sentence of {length} tokens": flops(
            model, lambda m, ids: m.text.encode(ids).tokens, array(1, length, kind=jnp.int32)
        ),
        f"fusion of one sentence with {seen:,} scene tokens": fuse(seen),
        f"fusion with {crop_tokens:,} crop tokens": fuse(crop_tokens),
        "fusion with one token": fuse(1),
        "vocabulary of MLM, one sentence": flops(model, lambda m, t: m.text.mlm_logits(t), text),
    }


def report(size: int) -> None:
    config = large()
    kinds = {"video": config.data.frames, "image": 1}
    head = [f"video, {kinds['video']} frames", "image"]
    terms = {kind: term_costs(config, size=size, frames=t) for kind, t in kinds.items()}
    print("GFLOPs a sample, forward / forward and backward; in brackets the share of the whole.\n")
    _print_row("term, on top of those above", *head)
    _print_row("---", *("---:" for _ in head))
    whole = {
        kind: [sum(c[i] for c in costs.values()) for i in (0, 1)] for kind, costs in terms.items()
    }
    for label in LADDER:
        cells = []
        for kind, costs in terms.items():
            forward, both = costs[label]
            share = 100 * both / whole[kind][1]
            cells.append(f"{_giga(forward)} / {_giga(both)} ({share:.1f} %)")
        _print_row(label, *cells)
    _print_row("**(11)-(13), the whole**", *(f"{_giga(f)} / {_giga(b)}" for f, b in whole.values()))
    remat = [
        step_flops(config, size=size, frames=t, backward=True, remat="none") for t in kinds.values()
    ]
    _print_row("the same as run with remat='none'", *map(_giga, remat))

    print("\nGFLOPs, forward, of single functions.\n")
    parts = [part_costs(config, frames=frames) for frames in kinds.values()]
    _print_row("video", "", "image", "")
    _print_row("---", "---:", "---", "---:")
    for (a, x), (b, y) in zip(*(part.items() for part in parts)):
        _print_row(a, _giga(x), b, _giga(y))

    print("\nGFLOPs a sample, forward and backward, of the whole objective, and the change.\n")
    _print_row("crops", *head)
    _print_row("---", *("---:" for _ in head))
    for label, changes in CROPS.items():
        cells = []
        for kind, frames in kinds.items():
            both = step_flops(changed(config, changes), size=size, frames=frames, backward=True)
            change = 100 * (both / whole[kind][1] - 1)
            cells.append(f"{_giga(both)} ({change:+.0f} %)")
        _print_row(label, *cells)


def _print_row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def _giga(flops: float) -> str:
    return f"{flops / 1e9:,.1f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch_size", type=int, default=32, help="samples of the counted batch")
    report(parser.parse_args().batch_size)
