"""Ranking and re-ranking a suite of made-up embeddings, beside a plain loop over the queries.

    python benchmarks/ranking.py [--size=10000] [--top=128] [--sample=200]

SIZE texts against SIZE videos, both directions: cosine ranking, then VTM re-ranking of the TOP best
by one fusion layer of width 64 over 256 visual tokens (ViT-L at 16 frames: 3,136 to 32 text
tokens; here 256 to 8). The plain loop does the same query by query,
as UMT does: all cosines, argsort, the rank, and one call of the fusion layer and match head for the
TOP candidates, each with its own copy of the tokens. Of the loop SAMPLE queries of each direction
are run and their time is multiplied by SIZE / SAMPLE (every query costs the same); its ranks must
equal ours. Ours runs whole. The two take turns in one process, on one device. Processor seconds
count all threads: on a machine that others use they say more than the clock. Prints Markdown.
"""

import argparse
import os
import threading
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import psutil
from flax import nnx

from instap_jax import sharding
from instap_jax.config import default
from instap_jax.evaluation.ranking import block_rows, rank_queries
from instap_jax.evaluation.rerank import Matcher, Texts, rerank
from instap_jax.evaluation.retrieval import Positives
from instap_jax.models.text import text_mask
from instap_jax.train.objectives import OBJECTIVES

EMBEDDING, TEXT_LENGTH, TOKENS, WIDTH, BLOCK = 256, 8, 256, 64, 256


def make_model():
    c = default()
    c.stage = "align"
    c.vision.update(width=WIDTH, depth=1, heads=2, image_size=32, patch=16)
    c.teacher.update(projection=16)
    c.distill.layers = 1
    c.text.update(width=WIDTH, depth=2, fusion_layers=1, heads=2, vocab_size=64, dropout=0.0)
    c.align.update(projection=16, cross_attention_heads=2)
    c.compute.dtype = "float32"
    return OBJECTIVES["align"].create(c, nnx.Rngs(0))


class Cost:
    """Seconds, processor seconds, and the largest resident memory above that at the start."""

    def __enter__(self):
        self.seconds, self.cpu = -time.perf_counter(), -time.process_time()
        self._process, self._done = psutil.Process(), threading.Event()
        self.start = self.peak = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._done.wait(0.01):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __exit__(self, *exc):
        self.seconds += time.perf_counter()
        self.cpu += time.process_time()
        self._done.set()
        self._thread.join()
        self.mib = (self.peak - self.start) / (1 << 20)


def visual_blocks(visual: np.ndarray, mesh):
    for start in range(0, len(visual), BLOCK):
        part = visual[start : start + BLOCK]
        padded = np.pad(part, [(0, BLOCK - len(part)), (0, 0), (0, 0)])
        yield sharding.place(padded, sharding.replicated(mesh))


def loop(queries, candidates, rows, top, match):
    """(ranks, re-ranked ranks) of some rows, one after the other; row i fits candidate i."""
    ranks, reranked = [], []
    for row in rows:
        scores = candidates @ queries[row]
        order = np.argsort(-scores)
        ranks.append(1 + np.count_nonzero(np.delete(scores, row) >= scores[row]))
        best = order[:top]
        logits = np.asarray(match(row, best))
        mine = np.flatnonzero(best == row)
        if len(mine):
            others = np.delete(logits, mine[0])
            reranked.append(1 + np.count_nonzero(others >= logits[mine[0]]))
        else:
            reranked.append(ranks[-1])
    return np.array(ranks), np.array(reranked)


def ours(text, video, positives, mesh, top, matcher, texts, visual):
    t2v = rank_queries(text, video, positives, mesh=mesh, top=top)
    v2t = rank_queries(video, text, positives.reversed(), mesh=mesh, top=top)
    size = len(video)
    codes = (
        np.arange(len(text))[:, None] * size + t2v.top,
        v2t.top.astype(np.int64) * size + np.arange(size)[:, None],
    )
    pairs = np.unique(np.concatenate([code.ravel() for code in codes]))
    logits = matcher.score(visual_blocks(visual, mesh), texts, pairs // size, pairs % size)
    t2v_re, v2t_re = (
        rerank(ranking, logits[np.searchsorted(pairs, code)], positives)
        for ranking, code in zip((t2v, v2t), codes)
    )
    return (t2v.rank, t2v_re, v2t.rank, v2t_re), len(pairs)


class Case:
    """A made-up suite on one device, and both ways of ranking it."""

    def __init__(self, size: int, top: int):
        rng, self.top = np.random.default_rng(0), top
        text = rng.normal(size=(size, EMBEDDING)).astype(np.float32)
        video = text + 5 * rng.normal(size=(size, EMBEDDING)).astype(np.float32)
        self.text, self.video = (
            x / np.linalg.norm(x, axis=1, keepdims=True) for x in (text, video)
        )
        self.visual = rng.normal(size=(size, TOKENS, WIDTH)).astype(np.float32)
        self.ids = rng.integers(5, 64, (size, TEXT_LENGTH)).astype(np.int32)
        self.tokens = rng.normal(size=(size, TEXT_LENGTH, WIDTH)).astype(np.float32)
        self.mesh = sharding.make_mesh(default().mesh, jax.devices()[:1])
        graphdef, params = nnx.split(make_model())
        self.params = jax.device_put(params, sharding.replicated(self.mesh))
        self.matcher = Matcher(graphdef, self.params, self.mesh)

        def fuse(params, tokens, ids, visual):
            model = nnx.merge(graphdef, params)
            return model.match_head(model.text.fuse(tokens, text_mask(ids), visual))[:, 1]

        self.fuse = jax.jit(fuse)

    def blocks(self, rows: int):
        """Ours, of the first `rows` pairs."""
        text, video, visual = self.text[:rows], self.video[:rows], self.visual[:rows]
        texts = Texts(ids=self.ids[:rows], tokens=self.tokens[:rows])
        positives = Positives.of([[i] for i in range(rows)], rows)
        return ours(text, video, positives, self.mesh, self.top, self.matcher, texts, visual)

    def plain(self, rows):
        """The loop over these queries of each direction."""
        first = loop(self.text, self.video, rows, self.top, self.of_text)
        return (*first, *loop(self.video, self.text, rows, self.top, self.of_video))

    def of_text(self, row, best):
        tokens, ids = (np.repeat(x[row][None], len(best), 0) for x in (self.tokens, self.ids))
        return self.fuse(self.params, tokens, ids, self.visual[best])

    def of_video(self, row, best):
        visual = np.repeat(self.visual[row][None], len(best), 0)
        return self.fuse(self.params, self.tokens[best], self.ids[best], visual)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=10000)
    parser.add_argument("--top", type=int, default=128)
    parser.add_argument("--sample", type=int, default=200)
    args = parser.parse_args()
    case = Case(args.size, args.top)
    case.blocks(min(args.size, 2 * BLOCK))  # compiled beforehand, both
    case.plain([0])
    sample = np.random.default_rng(1).choice(args.size, args.sample, replace=False)
    costs, found = [], []
    for turn, half in enumerate(np.array_split(sample, 2)):  # before and after ours
        with Cost() as cost:
            found.append(case.plain(half))
        costs.append(cost)
        if turn == 0:
            with Cost() as mine:
                ranks, pairs = case.blocks(args.size)
    for one, theirs in zip(ranks, zip(*found)):
        equal = np.mean(one[sample] == np.concatenate(theirs))
        assert equal > 0.98, f"only {equal:.3f} of the ranks agree"  # sums in another order
    report(args, mine, costs, pairs)


def report(args, mine: Cost, costs: list[Cost], pairs: int) -> None:
    size, share = args.size, args.size / args.sample
    seconds, cpu = share * sum(c.seconds for c in costs), share * sum(c.cpu for c in costs)
    memory, rows = max(c.mib for c in costs), block_rows(size)
    print(f"{size:,} x {size:,}, both directions, top {args.top} re-ranked: {pairs:,} pairs\n")
    print("| | seconds | processor seconds | peak memory above the inputs |")
    print("|---|---|---|---|")
    print(f"| blocks | {mine.seconds:.0f} | {mine.cpu:.0f} | {mine.mib:.0f} MiB |")
    run = f"{2 * args.sample} of {2 * size:,} queries run"
    print(f"| loop ({run}) | {seconds:.0f} | {cpu:.0f} | {memory:.0f} MiB |")
    print(f"| ratio | {seconds / mine.seconds:.1f} | {cpu / mine.cpu:.1f} | |")
    block, whole = 9 * rows * size / (1 << 20), 4 * size * size / (1 << 20)
    print(f"\nscores on the device: {rows} rows at a time, {block:.0f} MiB; all: {whole:.0f} MiB")


if __name__ == "__main__":
    main()
