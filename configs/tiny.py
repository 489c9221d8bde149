"""The embedded set on two CPU cores: the code of the large configurations with small numbers.

`configs/tiny.py:teacher` trains a small CLIP by equation (2) between single frames and one
sentence of their caption: the teacher of stage 1, as CLIP weights are not at hand offline.
`configs/tiny.py:stage1` distils it into the student as `configs/stage1_l16.py` does.
`configs/tiny.py:stage2` aligns the student with text as `configs/stage2_l16.py` does, by the two
contrasts alone, (2) and (8), and under random masks: neither teacher nor fusion layers run.
`configs/tiny.py:stage2,NAME` is a baseline or ablation of docs/ablations.md; `stage2,all_terms`
trains the complete objective, at about twice the time a step; it needs
`--config.teacher.checkpoint=TEACHER`, and the teacher's masks `--config.distill.mask_score=cls`.
`configs/tiny.py:ground` and `configs/tiny.py:classify` fine-tune what stage 2 or stage 1 left, as
`configs/ground_l16.py` and `configs/classify_l16.py` do; docs/finetuning.md has their commands.

Command:  bash launch/quickstart.sh, which runs (DIR is what `instap pack` wrote, TOKENIZER what
          `instap tokenizer` wrote)
          instap train --config=configs/tiny.py:teacher --workdir=TEACHER \\
            --config.data.videos=DIR:train --config.data.images=DIR:train \\
            --config.tokenizer.path=TOKENIZER
          instap train --config=configs/tiny.py:stage1 --workdir=STUDENT \\
            --config.data.videos=DIR:train --config.teacher.checkpoint=TEACHER
          and then
          instap train --config=configs/tiny.py:stage2 --workdir=ALIGNED \\
            --config.data.videos=DIR:train --config.data.images=DIR:train \\
            --config.tokenizer.path=TOKENIZER --config.checkpoint.init_from=STUDENT
Hardware: 2 CPU cores.
Expected: docs/measurements.md.
"""

from instap_jax.ablations import ablate
from instap_jax.config import default

PARTS = ("teacher", "stage1", "stage2", "ground", "classify")
BACKGROUNDS = ("plain", "gradient", "noise", "stripes", "tiles", "grass", "sky")


def get_config(text: str = ""):
    part, _, ablation = text.partition(",")
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
    {
        "teacher": _teacher,
        "stage1": _stage1,
        "stage2": _stage2,
        "ground": _ground,
        "classify": _classify,
    }[part](c)
    if ablation and part != "stage2":
        raise ValueError(f"ablations are of configs/tiny.py:stage2, not of {part}")
    ablate(c, ablation)
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


def _stage2(c) -> None:
    c.stage = "align"
    c.steps = 1000
    c.data.frames = 4
    # Sub-sampling sentences pays in long training; in some hundred steps whole captions teach more.
    c.data.caption_sampling = "first"
    c.data.image_fraction = 0.25
    c.data.instances_per_sample = 2  # of 3 or 4: the rest has its turn in another epoch
    c.distill.update(layers=2, mask_score="random")
    c.text.update(depth=3, fusion_layers=1)
    ablate(c, "contrast_only")
    # The paper's lambda_inst of 0.1 is for long training; in some hundred steps instances learn
    # little by it.
    c.align.update(instance=1.0, crop_size=32, projection=96, cross_attention_heads=4)
    _text_optimizer(c)


def _text_optimizer(c) -> None:
    c.optimizer.update(
        learning_rate=1e-3,
        min_learning_rate=1e-5,
        warmup_steps=50,
        # At this rate and batch, text and vision from scratch collapse now and then without these.
        betas=(0.9, 0.98),
        clip_norm=1.0,
        weight_decay=0.02,
    )


def _ground(c) -> None:
    c.stage = "ground"
    c.steps = 1000
    c.data.frames = 4
    c.data.image_fraction = 0.75  # a step of stills takes a quarter of the time
    c.data.instances_per_sample = 2
    c.data.caption_sampling = "first"  # one sentence alone may fit several entities
    c.text.update(depth=3, fusion_layers=1)
    _text_optimizer(c)


def _classify(c) -> None:
    c.stage = "classify"
    c.steps = 300
    c.data.frames = 4
    c.classify.classes = BACKGROUNDS  # what `instap synth` writes as `label`
    c.optimizer.update(
        learning_rate=1e-3,
        min_learning_rate=1e-5,
        warmup_steps=30,
        betas=(0.9, 0.999),
        layer_decay=0.85,
    )
