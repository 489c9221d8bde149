"""Random batches of the real layout, for tests that need no files."""

import numpy as np

from instap_jax.types import Batch


def random_batch(
    *,
    groups: int,
    group_size: int,
    frames: int,
    canvas: tuple[int, int],
    text_length: int,
    vocab_size: int,
    instances: int = 2,
    seed: int = 0,
) -> Batch:
    """A batch as `types.Batch` describes it, every sample valid and different."""
    rng = np.random.default_rng(seed)
    g, b, t, s = groups, group_size, frames, text_length
    n = b * instances
    corner = rng.uniform(0, 0.5, (g, n, t, 2))
    size = rng.uniform(0.2, 0.5, (g, n, t, 2))

    def text(*shape: int) -> np.ndarray:
        ids = rng.integers(5, vocab_size, (*shape, s))
        length = rng.integers(4, s, shape)
        ids = np.where(np.arange(s) < length[..., None], ids, 0)
        ids[..., 0] = 2
        return ids.astype(np.int32)

    def unique(*shape: int) -> np.ndarray:
        return (rng.permutation(np.prod(shape)) + 1).reshape(shape).astype(np.int32)

    return Batch(
        frames=rng.integers(0, 256, (g, b, t, *canvas, 3), dtype=np.uint8),
        extent=rng.uniform(0.6, 1.0, (g, b, 2)).astype(np.float32),
        text=text(g, b),
        sample_valid=np.ones((g, b), bool),
        fault=np.zeros((g, b), np.int32),
        corpus=np.zeros((g, b), np.int32),
        record=unique(g, b),
        media_hash=unique(g, b),
        text_hash=unique(g, b),
        keep_side=rng.random((g, b)) < 0.5,
        label=(np.arange(g * b) % 3).reshape(g, b).astype(np.int32),
        boxes=np.concatenate([corner, corner + size], axis=-1).astype(np.float32),
        present=rng.random((g, n, t)) < 0.9,
        instance_valid=np.ones((g, n), bool),
        parent=np.broadcast_to(np.arange(n) % b, (g, n)).astype(np.int32),
        instance_text=text(g, n),
        instance_text_hash=unique(g, n),
        dropped=np.zeros(g, np.int32),
    )
