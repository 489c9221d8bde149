"""Embeddings and scores behind a retrieval measurement, kept on request (`--save_scores`)."""

import contextlib
import os
from pathlib import Path

import jax
import numpy as np

from instap_jax.errors import UserError

MAX_SCORES = 1 << 29  # of a score matrix: 2 GiB
_BLOCK_SCORES = 1 << 24


def save_ranking(directory: Path, suite: str, found, unit, rankings, logits) -> None:
    """Writes `SUITE-UNIT.npz` and, up to 2**29 scores, `SUITE-UNIT-scores.npy`.

    The .npz holds `text` [N, p], `visual` [M, p], the correct pairs as `pair_text` and
    `pair_visual`, `ids` of the samples, `texts`, and where there was a re-ranking the candidates
    `t2v_top` [N, k], `v2t_top` [M, k] with their match logits. The scores [N, M] are float32
    products of these embeddings, rounded from float64 and written block by block; a larger matrix
    is left out, its embeddings give any part of it.
    """
    if jax.process_index():
        return
    stem = f"{suite}-{unit.name.split()[0]}"
    arrays = {
        "text": unit.text,
        "visual": unit.visual,
        "pair_text": unit.positives.text,
        "pair_visual": unit.positives.video,
        "ids": np.array([one.id for one in found.facts]),
        "texts": np.array(unit.texts),
    }
    if logits is not None:
        for name, ranking, mine in zip(("t2v", "v2t"), rankings, logits, strict=True):
            arrays |= {f"{name}_top": ranking.top, f"{name}_logits": mine}
    # Given a path, savez would append .npz to it.
    with _aside(directory / f"{stem}.npz") as path, path.open("wb") as file:
        np.savez(file, **arrays)
    if unit.text.shape[0] * unit.visual.shape[0] > MAX_SCORES:
        print(f"{stem}: more than 2**29 scores, only its embeddings are saved")
        return
    with _aside(directory / f"{stem}-scores.npy") as path:
        write_scores(path, unit.text, unit.visual)


def write_scores(path: Path, text: np.ndarray, visual: np.ndarray) -> None:
    """Writes the scores [N, M] of texts [N, p] and visual items [M, p], block by block."""
    shape = len(text), len(visual)
    scores = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    rows, candidates = max(1, _BLOCK_SCORES // shape[1]), visual.T.astype(np.float64)
    for start in range(0, shape[0], rows):
        # In float64: equal texts would else differ in a last bit by where they stand, and not tie.
        scores[start : start + rows] = text[start : start + rows].astype(np.float64) @ candidates
    scores.flush()


@contextlib.contextmanager
def _aside(path: Path):
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield aside
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        aside.unlink(missing_ok=True)
