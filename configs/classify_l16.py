"""Kinetics-400 from a stage-1 or stage-2 run: a linear head and full fine-tuning.

Command:  instap train --config=configs/classify_l16.py:CLASSES_FILE --workdir=DIR \\
            --config.data.videos=K400:train --config.checkpoint.init_from=STAGE1_DIR
          instap evaluate --workdir=DIR --task=classification --videos=K400:val --clips=4 --crops=3
          CLASSES_FILE: the names of the classes, one a line. With --config.classify.frozen=True
          and --config.optimizer.layer_decay=1 it is a linear probe.
Hardware: planned for 64 TPU chips, batch 4 a chip: UMT's total of 256.
Expected: 87.84 top-1 / 97.77 top-5 (paper). Not yet run. UMT also trains with RandAugment, mixup,
          cutmix, random erasing and two augmentations of every clip; we do not, so expect less.

20 epochs, 2 of them warm-up, rate 1e-4 * batch * 2 / 256 (the 2 is UMT's two augmentations), layer
decay 0.85: UMT's exp/finetuning/k710 of ViT-L, the fine-tuning that starts from pre-training.
"""

from pathlib import Path

from instap_jax.config import default

CLIPS = 240_000
DEVICES = 64


def _read(path: str) -> tuple[str, ...]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"configs/classify_l16.py:{path}: the list of classes cannot be read"
        ) from error
    return tuple(line.strip() for line in lines if line.strip())


def get_config(classes_file: str = ""):
    if not classes_file:
        raise ValueError("configs/classify_l16.py:CLASSES_FILE needs a file, one class a line")
    c = default()
    c.stage = "classify"
    c.classify.classes = _read(classes_file)
    c.data.batch_size = 4 * DEVICES
    c.data.view_area = (0.08, 1.0)
    steps_per_epoch = CLIPS / c.data.batch_size
    c.steps = round(20 * steps_per_epoch)
    c.optimizer.update(
        learning_rate=2e-4,
        reference_batch=256,
        min_learning_rate=2e-6,
        warmup_steps=round(2 * steps_per_epoch),
        betas=(0.9, 0.999),
        layer_decay=0.85,
    )
    return c
