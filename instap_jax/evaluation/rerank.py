"""VTM re-ranking: the best candidates of the dual encoder in the order of the match head.

Formula (UMT `multi_modality/tasks/retrieval_utils.py`). For every query, in both directions, the k
best candidates by cosine (k = 128; of equal cosines at the k-th place the lower index) are scored
by the match logit of (3), the second of the head's two, of text and visual tokens fused; nothing
of the cosine is added. Among the k the logit orders them, ties counting against the model; all
others come after the k, in the dual encoder's order. (UMT gives those one constant score instead:
the same recalls up to k.) For instances the visual input is that of (9): the raw pooled crop as one
token.

The pairs of both directions are scored together. They are sorted by visual item, so that each
item's tokens travel once, and cut into units: one item with up to 32 texts, for which the fusion
layers compute the item's keys and values once. Units are split evenly over the devices.

Memory of one device, in bytes, for blocks of B visual items of V tokens of width e, text blocks of
T texts of s tokens of width d, H heads, activations of a bytes:
    a B V e + a T s d          a block of visual items and one of texts, T s d a <= 2**28
    + 2 a V d + 32 s V H (4 + a) + O(32 s d)     one unit at work: keys, values, attention
On the host: a N s d for the tokens of all N texts, 4 k (N + M) for candidates, 8 bytes a pair.
"""

import dataclasses
from collections.abc import Iterable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from instap_jax import sharding
from instap_jax.errors import UserError
from instap_jax.evaluation.ranking import Ranking
from instap_jax.evaluation.retrieval import Positives
from instap_jax.models.text import text_mask
from instap_jax.progress import Progress

TOP_K = 128
_UNIT_TEXTS = 32
_UNITS_PER_CALL = 4  # of one device
_TEXT_BLOCK_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """ids: int32 [N, s]. tokens: [N, s, d], after the text-only layers, in the compute dtype."""

    ids: np.ndarray
    tokens: np.ndarray


class Matcher:
    """Scores pairs by fusion layers and match head.

    Args:
      graphdef, params: of a model with `text.fuse` and `match_head`, on `mesh`.
    """

    def __init__(self, graphdef: nnx.GraphDef, params, mesh: Mesh):
        self._mesh = mesh
        self._held: tuple | None = None
        whole = sharding.replicated(mesh)
        # Fusion layers and head whole on every device; the rest is not read and stays as it is.
        self._params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: jax.device_put(leaf, whole) if _is_read(path) else leaf, params
        )
        specs = jax.tree.map(lambda leaf: leaf.sharding.spec, self._params)
        self._score = _score(graphdef, mesh, specs)

    def score(
        self,
        visual_blocks: Iterable[jax.Array],
        texts: Texts,
        text: np.ndarray,
        visual: np.ndarray,
    ) -> np.ndarray:
        """float32 [P], the match logit of each pair of text[i] with visual item visual[i].

        Args:
          visual_blocks: [B, V, e] each, of the items in order.
          text, visual: int64 [P].
        """
        logits = np.full(len(text), np.nan, np.float32)
        order = np.argsort(visual, kind="stable")
        edges, start = visual[order], 0
        with Progress("re-rank", len(text), unit="pairs") as progress:
            for block in visual_blocks:
                low, high = np.searchsorted(edges, (start, start + len(block)))
                mine = order[low:high]
                if len(mine):
                    whole = jax.device_put(block, sharding.replicated(self._mesh))
                    places = visual[mine] - start
                    logits[mine] = self._score_block(whole, texts, text[mine], places, progress)
                start += len(block)
        return logits

    def _score_block(self, block, texts: Texts, text, visual, progress) -> np.ndarray:
        logits = np.empty(len(text), np.float32)
        rows = max(1, _TEXT_BLOCK_BYTES // max(1, texts.tokens[0].nbytes))
        rows = min(rows, len(texts.ids))
        for start in range(0, len(texts.ids), rows):
            mine = np.flatnonzero((text >= start) & (text < start + rows))
            if not len(mine):
                continue
            tokens, ids = self._text_block(texts, start, rows)
            units = _units(text[mine] - start, visual[mine])
            scores = self._score_units(block, tokens, ids, *units[:2])
            logits[mine] = scores[units[2], units[3]]
            progress.update(len(mine))
        return logits

    def _text_block(self, texts: Texts, start: int, rows: int) -> tuple[jax.Array, jax.Array]:
        """Padded to `rows`; kept on the devices as long as the next call wants the same."""
        key = id(texts), start
        if self._held is None or self._held[0] != key:
            whole = sharding.replicated(self._mesh)
            placed = []
            for array in (texts.tokens, texts.ids):
                part = array[start : start + rows]
                missing = [(0, rows - len(part)), *[(0, 0)] * (array.ndim - 1)]
                placed.append(sharding.place(np.pad(part, missing), whole))
            self._held = key, texts, placed
        return self._held[2]

    def _score_units(self, block, tokens, ids, item: np.ndarray, text: np.ndarray) -> np.ndarray:
        size = _UNITS_PER_CALL * sharding.data_shards(self._mesh)
        split, scores = sharding.batch_sharding(self._mesh), []
        for start in range(0, len(item), size):
            part = [array[start : start + size] for array in (item, text)]
            padded = [np.pad(a, [(0, size - len(a)), *[(0, 0)] * (a.ndim - 1)]) for a in part]
            placed = [sharding.place(array, split) for array in padded]
            out = self._score(self._params, block, tokens, ids, *placed)
            scores.append((out, len(part[0])))
        return np.concatenate([jax.device_get(out)[:count] for out, count in scores])


def _is_read(path) -> bool:
    names = {str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path}
    return bool(names & {"fusion_blocks", "match_head"})


def _units(text: np.ndarray, visual: np.ndarray):
    """Pairs in units of one visual item and up to 32 texts.

    Returns:
      item int32 [U], texts int32 [U, 32] (0 where there is none), and of every pair the unit and
      the place in it.
    """
    order = np.argsort(visual, kind="stable")
    items, first, count = np.unique(visual[order], return_index=True, return_counts=True)
    place = np.empty(len(text), np.int64)
    place[order] = np.arange(len(text)) - np.repeat(first, count)
    units_of_item = -(-count // _UNIT_TEXTS)
    first_unit = np.cumsum(units_of_item) - units_of_item
    unit = first_unit[np.searchsorted(items, visual)] + place // _UNIT_TEXTS
    place %= _UNIT_TEXTS
    texts = np.zeros((int(units_of_item.sum()), _UNIT_TEXTS), np.int32)
    texts[unit, place] = text
    return np.repeat(items, units_of_item).astype(np.int32), texts, unit, place


def _score(graphdef: nnx.GraphDef, mesh: Mesh, specs):
    """The jitted score of units: [U], [U, 32] -> float32 [U, 32], split over the devices."""

    def score(params, block, tokens, ids, item, text):
        model = nnx.merge(graphdef, params)

        def one(unit):
            item, text = unit
            visual = block[item][None]  # not batched below: its keys and values are computed once

            def logit(tokens, ids):
                fused = model.text.fuse(tokens[None], text_mask(ids)[None], visual)
                return model.match_head(fused)[0, 1]

            return jax.vmap(logit)(tokens[text], ids[text])

        return jax.lax.map(one, (item, text))

    over, whole = P(sharding.DATA_AXES), P()
    mapped = jax.shard_map(
        score,
        mesh=mesh,
        in_specs=(specs, whole, whole, whole, over, over),
        out_specs=over,
        check_vma=False,
    )
    return jax.jit(mapped, out_shardings=sharding.replicated(mesh))


def rerank(ranking: Ranking, logits: np.ndarray, positives: Positives) -> np.ndarray:
    """Ranks after re-ordering each query's top k by its logits.

    Args:
      ranking: of the dual encoder. logits: float32 [N, k], of `ranking.top`.
      positives: its texts are the queries.

    Returns:
      int64 [N], 1 is best. Where no correct candidate is among the k, the dual encoder's rank: all
      k come before it, and behind them nothing has moved.

    Raises:
      UserError: a logit is NaN.
    """
    if np.isnan(logits).any():
        raise UserError(
            f"NaN match scores ({int(np.isnan(logits).sum())} of {logits.size}): the checkpoint or "
            "its inputs are not finite; nothing was measured"
        )
    code = positives.text * positives.videos + positives.video
    queries = np.arange(len(logits))[:, None]
    correct = np.isin(queries * positives.videos + ranking.top, code)
    best = np.where(correct, logits, -np.inf).max(axis=1)
    rank = 1 + np.count_nonzero((logits >= best[:, None]) & ~correct, axis=1)
    return np.where(correct.any(axis=1), rank, ranking.rank).astype(np.int64)
