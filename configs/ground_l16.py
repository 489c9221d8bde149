"""Grounding (the paper's Table 3): sentences of instances to boxes, from a stage-2 run.

Command:  instap train --config=configs/ground_l16.py --workdir=DIR \\
            --config.data.videos=INSTVL:train --config.data.images=INSTVL:train \\
            --config.tokenizer.path=BERT_LARGE/vocab.txt \\
            --config.checkpoint.init_from=STAGE2_DIR
          instap evaluate --workdir=DIR --task=grounding --videos=INSTVL:video_1k \\
            --images=INSTVL:img_1k,INSTVL:img_zero_1k
Hardware: planned for 64 TPU chips, batch 16 a chip. The paper does not say.
Expected: IoU@50/70/90 of 76.17/67.04/48.20 (img), 68.52/58.91/42.14 (img-zero),
          60.02/48.85/25.13 (video) (paper, Table 3). Not yet run.

Not from the paper, which names the head and the two losses alone: DETR's weights of the losses
(`ground.l1`, `ground.giou`), the whole caption as the sentence, and the length and rates of the
training, which are those of UMT's retrieval fine-tuning (10 epochs, rate 2e-5).
"""

from instap_jax.config import default

VIDEOS, IMAGES = 50_000, 2_000_000  # InstVL
DEVICES = 64


def get_config():
    c = default()
    c.stage = "ground"
    c.data.frames = 16
    c.data.batch_size = 16 * DEVICES
    c.data.image_fraction = IMAGES / (IMAGES + VIDEOS)
    c.data.caption_sampling = "first"  # one sentence alone may fit several entities
    steps_per_epoch = (IMAGES + VIDEOS) / c.data.batch_size
    c.steps = round(10 * steps_per_epoch)
    c.tokenizer.update(kind="wordpiece", cls_id=101, mask_id=103)
    c.optimizer.update(
        learning_rate=2e-5,
        min_learning_rate=2e-7,
        warmup_steps=round(steps_per_epoch),
        betas=(0.9, 0.999),
        weight_decay=0.02,
    )
    return c
