"""Re-ranking: the match logits of the right pairs, whatever the blocks, units and devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ranked import mesh_of
from tiny import tiny_config

from instap_jax import sharding
from instap_jax.errors import UserError
from instap_jax.evaluation import rerank as module
from instap_jax.evaluation.ranking import Ranking
from instap_jax.evaluation.rerank import Matcher, Texts, rerank
from instap_jax.evaluation.retrieval import Positives
from instap_jax.models.text import text_mask
from instap_jax.train.objectives import OBJECTIVES

TEXTS, VIDEOS, TOKENS = 37, 11, 6


@pytest.fixture(scope="module")
def model():
    config = tiny_config("stage2")
    return OBJECTIVES["align"].create(config, nnx.Rngs(0)), config


@pytest.fixture(scope="module")
def inputs(model):
    net, config = model
    rng = np.random.default_rng(0)
    ids = rng.integers(5, config.text.vocab_size, (TEXTS, config.tokenizer.length))
    ids = np.where(np.arange(ids.shape[1]) < rng.integers(2, ids.shape[1], (TEXTS, 1)), ids, 0)
    ids = ids.astype(np.int32)
    visual = rng.normal(size=(VIDEOS, TOKENS, config.vision.width)).astype(np.float32)
    text, video = rng.integers(TEXTS, size=90), rng.integers(VIDEOS, size=90)
    text[:40], video[:40] = np.arange(40) % TEXTS, 3  # more than one unit of one item
    return Texts(ids=ids, tokens=np.asarray(net.text.encode(ids).tokens)), visual, text, video


def blocks(visual, size, mesh):
    for start in range(0, len(visual), size):
        part = visual[start : start + size]
        padded = np.pad(part, [(0, size - len(part)), (0, 0), (0, 0)])
        yield sharding.place(padded, sharding.replicated(mesh))


def score(model, inputs, devices, size=4):
    texts, visual, text, video = inputs
    mesh = mesh_of(devices)
    graphdef, params = nnx.split(model[0])
    params = jax.device_put(params, sharding.replicated(mesh))
    matcher = Matcher(graphdef, params, mesh)
    return matcher.score(blocks(visual, size, mesh), texts, text, video)


def test_scores_are_the_match_logits_of_each_pair(model, inputs):
    texts, visual, text, video = inputs
    net = model[0]
    tokens, ids = jnp.asarray(texts.tokens[text]), jnp.asarray(texts.ids[text])
    expected = net.match_head(net.text.fuse(tokens, text_mask(ids), jnp.asarray(visual[video])))
    np.testing.assert_allclose(score(model, inputs, 8), expected[:, 1], atol=1e-5)


def test_one_and_eight_devices_and_text_blocks_agree_bit_for_bit(model, inputs, monkeypatch):
    eight = score(model, inputs, 8)
    monkeypatch.setattr(module, "_TEXT_BLOCK_BYTES", 16 * inputs[0].tokens[0].nbytes)
    np.testing.assert_array_equal(score(model, inputs, 1), eight)


def sorted_by_hand(top, logits, dual, good, k):
    """Rank of the first correct one in the list that re-ranking gives; wrong first among equals."""
    order = sorted(range(k), key=lambda j: (-logits[j], top[j] in good))
    order = [top[j] for j in order] + [c for c in dual if c not in set(top[:k])]
    return next(place for place, c in enumerate(order, 1) if c in good)


def test_ranks_after_reranking_equal_sorting_by_hand():
    rng = np.random.default_rng(1)
    queries, candidates, k = 60, 20, 6
    scores = rng.permuted(np.tile(np.arange(candidates), (queries, 1)), axis=1)
    correct = [sorted(set(rng.integers(candidates, size=1 + i % 3).tolist())) for i in range(60)]
    order = np.argsort(-scores, axis=1)
    dual = [next(p for p, c in enumerate(row, 1) if c in good) for row, good in zip(order, correct)]
    ranking = Ranking(rank=np.array(dual), top=order[:, :k], log_total=np.zeros(queries))
    logits = rng.integers(0, 4, (queries, k)).astype(np.float32)  # many ties
    got = rerank(ranking, logits, Positives.of(correct, candidates))
    expected = [
        sorted_by_hand(order[q, :k].tolist(), logits[q], order[q].tolist(), correct[q], k)
        for q in range(queries)
    ]
    outside = np.array(dual) > k
    assert outside.any() and not outside.all()
    # Several correct ones beyond the k do not push each other down: compared where it is one.
    single = np.array([len(good) == 1 for good in correct]) | ~outside
    np.testing.assert_array_equal(got[single], np.array(expected)[single])
    np.testing.assert_array_equal(got[outside], np.array(dual)[outside])


def test_nan_logits_are_refused():
    ranking = Ranking(rank=np.ones(2), top=np.zeros((2, 1), np.int32), log_total=np.zeros(2))
    with pytest.raises(UserError, match="NaN match scores"):
        rerank(ranking, np.array([[0.0], [np.nan]]), Positives.of([[0], [1]], 2))
