"""The embedded set on two CPU cores: the code of the large configurations with small numbers.

`configs/tiny.py:teacher` trains a small CLIP by equation (2) between single frames and one
sentence of their caption: the teacher of stage 1, as CLIP weights are not at hand offline.
`configs/tiny.py:stage1` distils it into the student as `configs/stage1_l16.py` does.

Command:  bash launch/quickstart.sh, which runs (DIR is what `instap pack` wrote)
          instap train --config=configs/tiny.py:teacher --workdir=TEACHER \\
            --config.data.videos=DIR:train --config.data.images=DIR:train \\
            --config.tokenizer.path=DIR/tokenizer.model
          instap train --config=configs/tiny.py:stage1 --workdir=STUDENT \\
            --config.data.videos=DIR:train --config.tokenizer.path=DIR/tokenizer.model \\
            --config.teacher.checkpoint=TEACHER
Hardware: 2 CPU cores.
Expected: docs/measurements.md.
"""

from instap_jax.config import default

PARTS = ("teacher", "stage1")


def get_config(part: str = ""):
    if part not in PARTS:
        raise ValueError(f"configs/tiny.py:PART needs a part, one of {', '.join(PARTS)}")
    c = default()
    c.data.canvas = (64, 96)
    c.data.batch_size = 32
    c.data.workers = 0
    c.data.view_area = (0.6, 1.0)
    c.tokenizer.length = 32
    c.vision.update(width=128, depth=4, heads=4, patch=8, image_size=64, drop_path=0.0)
    c.teacher.update(width=128, depth=4, heads=4, patch=7, image_size=56, projection=96)
    c.text.update(vocab_size=512, width=128, depth=2, heads=4, max_length=64, dropout=0.0)
    c.compute.dtype = "float32"
    c.compute.remat = "all"
    c.checkpoint.every = 200
    c.log.every = 10
    if part == "teacher":
        _teacher(c)
    else:
        _stage1(c)
    return c


def _teacher(c) -> None:
    c.stage = "teacher"
    c.steps = 800
    c.data.frames = 1
    c.data.batch_size = 64
    c.optimizer.update(learning_rate=1e-3, warmup_steps=50, betas=(0.9, 0.98))


def _stage1(c) -> None:
    c.stage = "distill"
    c.steps = 400
    c.data.frames = 4
    c.distill.layers = 2
    c.optimizer.update(learning_rate=1e-3, warmup_steps=40)
