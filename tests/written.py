"""Runs of stages 'teacher' and 'distill' that were written, not trained: random parameters."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx
from tiny import tiny_config

from instap_jax import config_check
from instap_jax.train import checkpoint, inputs
from instap_jax.train.objectives import OBJECTIVES


def write_run(config, workdir: Path, *, scale: float = 0.1, only: str = "") -> Path:
    """Writes a run of this configuration at step 0, or of its model the module `only`."""
    config_check.check(config)
    loaded = config_check.LoadedConfig(config=config, file="test", overrides={})
    config_check.record(loaded, workdir)
    create = OBJECTIVES[config.stage].create
    abstract = nnx.state(nnx.eval_shape(lambda: create(config, nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    draw = lambda leaf: scale * rng.normal(size=leaf.shape).astype(leaf.dtype)
    flat = dict(nnx.to_flat_state(jax.tree.map(draw, abstract)))
    params = nnx.from_flat_state({k: v for k, v in flat.items() if only in ("", k[0])})
    meta = {"stage": config.stage, "inputs": inputs.identify(config)}
    checkpoint.write_params(str(workdir), params, meta=meta)
    return workdir


def write_teacher(small_set: Path, workdir: Path, *, only: str = "") -> Path:
    """A CLIP; with only='visual' what `instap convert --from=clip` makes of one."""
    tokenizer = "" if only else f"{small_set}/tokenizer.model"
    data = {"data.videos": f"{small_set}/packed:train", "tokenizer.path": tokenizer}
    return write_run(tiny_config("teacher", **data), workdir, only=only)


def student_config(small_set: Path, teacher: Path | None, **changes):
    data = {"data.videos": f"{small_set}/packed:train", "data.workers": 0}
    if teacher:
        data["teacher.checkpoint"] = str(teacher)
    return tiny_config("stage1", **(data | changes))
