"""Ranks of all queries against all candidates, on all devices, without the matrix of all scores.

Queries are cut into blocks of R rows; every device takes its share of the blocks, one after the
other, and holds one block of scores. R depends on the number of candidates alone, so each product
has the same shape, and each score the same bits, on any number of devices.

Memory of one device, in bytes, for N queries and M candidates of width p on D devices:
    4 p (N / D + M)        embeddings: its queries, all candidates
    + 9 R M                one block of scores and what is compared with it, R M <= 2**22 (or R = 8)
    + 4 k N / D            the k best candidates of its queries
No term has N x M. On the host: embeddings and the k best, 4 p (N + M) + 4 k N.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from instap_jax import sharding
from instap_jax.errors import UserError
from instap_jax.evaluation.retrieval import Positives

_BLOCK_SCORES = 1 << 22
_MIN_ROWS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking:
    """Queries against candidates.

    Attributes:
      rank: int64 [N], of the best correct candidate, by the tie rule of `retrieval`; 1 where a
        query has none.
      top: int32 [N, k], the k best candidates, best first; of equal scores the lower index first.
      log_total: float32 [N], log of the sum of exp(scores) over all candidates.
    """

    rank: np.ndarray
    top: np.ndarray
    log_total: np.ndarray


def block_rows(candidates: int) -> int:
    """R: a multiple of 8, a function of the number of candidates alone."""
    return max(_MIN_ROWS, min(1024, _BLOCK_SCORES // candidates // _MIN_ROWS * _MIN_ROWS))


def rank_queries(
    queries: np.ndarray,
    candidates: np.ndarray,
    positives: Positives,
    *,
    mesh: Mesh,
    top: int = 0,
    scale: float = 1.0,
    offset: np.ndarray | None = None,
) -> Ranking:
    """Ranks every query by score = scale * (query . candidate) - offset of the candidate.

    Products are float32 throughout.

    Args:
      queries: float32 [N, p]. candidates: float32 [M, p].
      positives: its texts are the queries, its videos the candidates.
      top: k, how many of the best candidates to return; at most M.
      offset: float32 [M]; None: 0.

    Raises:
      UserError: a score is NaN.
    """
    queries, candidates = np.float32(scale) * queries, np.asarray(candidates, np.float32)
    if offset is not None:
        # As one more product: a sum after it may be computed again, and rounded otherwise, where a
        # score is compared with itself, and the rank would be off by one.
        queries = np.pad(queries, ((0, 0), (0, 1)), constant_values=1)
        candidates = np.column_stack([candidates, -np.asarray(offset, np.float32)])
    rows = block_rows(len(candidates))
    shards = sharding.data_shards(mesh)
    blocks = math.ceil(len(queries) / (rows * shards)) * shards
    padded = np.zeros((blocks * rows, queries.shape[1]), np.float32)
    padded[: len(queries)] = queries
    pair_row, pair_column, pair_valid = _pairs_of_blocks(positives, blocks, rows)
    over_blocks = NamedSharding(mesh, P(sharding.DATA_AXES))
    whole = sharding.replicated(mesh)
    arrays = [
        sharding.place(padded.reshape((blocks, rows, -1)), over_blocks),
        *(sharding.place(array, over_blocks) for array in (pair_row, pair_column, pair_valid)),
        sharding.place(candidates, whole),
    ]
    out = jax.device_get(_rank_blocks(mesh, top)(*arrays))
    rank, best, log_total, bad = (array.reshape((blocks * rows, -1)) for array in out)
    if bad[: len(queries)].any():
        row = int(np.argmax(bad[: len(queries), 0] > 0))
        raise UserError(
            f"NaN scores: {int(np.count_nonzero(bad[: len(queries)]))} of {len(queries)} queries "
            f"have one, the first is query {row}: the checkpoint or its inputs are not finite; "
            "nothing was measured"
        )
    return Ranking(
        rank=rank[: len(queries), 0].astype(np.int64),
        top=best[: len(queries)],
        log_total=log_total[: len(queries), 0],
    )


def _pairs_of_blocks(positives: Positives, blocks: int, rows: int):
    """The correct pairs block by block, padded: row in the block, candidate, whether it is one."""
    block = positives.text // rows
    count = np.bincount(block, minlength=blocks)
    place = np.arange(len(block)) - np.repeat(np.cumsum(count) - count, count)
    # A power of two: few shapes are compiled.
    shape = blocks, 1 << int(count.max() - 1).bit_length() if count.max() else 1
    row, column = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    valid = np.zeros(shape, bool)
    row[block, place], column[block, place] = positives.text % rows, positives.video
    valid[block, place] = True
    return row, column, valid


@functools.lru_cache(maxsize=8)
def _rank_blocks(mesh: Mesh, top: int):
    """The jitted ranking of all blocks: every device maps over its own."""

    def ranked(queries, row, column, valid, candidates):
        def one(block):
            queries, row, column, valid = block
            scores = jnp.einsum("rp,mp->rm", queries, candidates, precision="highest")
            # Correct candidates that reach the best score (it itself among them) compete with none.
            own = jnp.where(valid, scores[row, column], -jnp.inf)
            best = jnp.full(len(scores), -jnp.inf).at[row].max(own)
            reached = jnp.sum(scores >= best[:, None], axis=1, dtype=jnp.int32)
            correct = jnp.zeros_like(reached).at[row].add(valid & (own >= best[row]))
            has_any = jnp.zeros(len(scores), bool).at[row].max(valid)
            rank = jnp.where(has_any, 1 + reached - correct, 1)
            found = jax.lax.top_k(scores, top)[1]
            # Not logsumexp: one pass, and no second matrix of the size of the block.
            peak = jnp.max(scores, axis=1)
            total = peak + jnp.log(jnp.sum(jnp.exp(scores - peak[:, None]), axis=1))
            # Not isnan(peak): a fast maximum may pass over a NaN.
            return rank, found, total, jnp.isnan(scores).any(axis=1)

        return jax.lax.map(one, (queries, row, column, valid))

    over, whole = P(sharding.DATA_AXES), P()
    mapped = jax.shard_map(
        ranked,
        mesh=mesh,
        in_specs=(over, over, over, over, whole),
        out_specs=over,
        check_vma=False,
    )
    return jax.jit(mapped, out_shardings=sharding.replicated(mesh))
