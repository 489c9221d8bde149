"""The tiny configuration made smaller still, so that a compile takes seconds."""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

CONFIGS = Path(__file__).parent.parent / "configs"


def load_config(name: str, *args: str) -> ConfigDict:
    """What `--config=configs/NAME.py:ARGS` gives."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*args)


def tiny_config(part: str, **changes) -> ConfigDict:
    """`configs/tiny.py:PART` with 2 layers of width 32 on 16 px frames, batch 8."""
    c = load_config("tiny", part)
    c.steps = 6
    c.data.update(batch_size=8, canvas=(24, 32))
    c.tokenizer.length = 8
    c.vision.update(width=32, depth=2, heads=2, patch=4, image_size=16, mlp_ratio=2.0)
    c.teacher.update(
        width=32, depth=2, heads=2, patch=3, image_size=12, projection=16, mlp_ratio=2.0
    )
    fuses = part.startswith(("stage2", "ground"))
    depth = 2 if fuses else 1  # the second one is a fusion layer
    c.text.update(vocab_size=320, width=32, depth=depth, heads=2, max_length=32, mlp_ratio=2.0)
    c.align.update(crop_size=8, projection=16, cross_attention_heads=2)
    c.optimizer.warmup_steps = 2
    c.optimizer.clip_norm = None  # Adam's moments are then those of the gradients
    c.checkpoint.every = 2
    c.log.update(every=1, tensorboard=False)
    c.checkpoint.retries = 0
    c.update_from_flattened_dict(changes)
    return c
