"""Ranks and metrics against a plain loop that shares no code with them; one and eight devices."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.lax import Precision
from products import precisions
from ranked import mesh_of, retrieval_metrics

from instap_jax.errors import UserError
from instap_jax.evaluation import ranking
from instap_jax.evaluation.ranking import rank_queries
from instap_jax.evaluation.retrieval import Positives
from instap_jax.evaluation.retrieval_task import Unit, dual_softmax_ranks


def reference(scores, positives):
    """Both directions by sorting every list by hand: wrong candidates first among equals."""

    def direction(rows, correct):
        ranks = []
        for row, good in zip(rows, correct):
            if not good:
                continue
            order = sorted(range(len(row)), key=lambda j: (-row[j], j in good))
            ranks.append(next(place for place, j in enumerate(order, 1) if j in good))
        recall = {k: 100 * sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 5, 10)}
        ranks.sort()
        middle = len(ranks) // 2
        median = ranks[middle] if len(ranks) % 2 else (ranks[middle - 1] + ranks[middle]) / 2
        return recall, median, sum(ranks) / len(ranks), len(ranks)

    scores = [[float(s) for s in row] for row in scores]
    columns = [list(column) for column in zip(*scores)]
    owners = [{q for q, row in enumerate(positives) if v in row} for v in range(len(columns))]
    return direction(scores, [set(p) for p in positives]), direction(columns, owners)


def check(scores, positives, **options):
    got = retrieval_metrics(scores, positives, **options)
    for name, (recall, median, mean, queries) in zip(("t2v", "v2t"), reference(scores, positives)):
        one = got[name]
        assert {k: one[f"R@{k}"] for k in recall} == pytest.approx(recall, abs=1e-9)
        assert one["median_rank"] == median
        assert one["mean_rank"] == pytest.approx(mean, abs=1e-9)
        assert one["queries"] == queries
    six = [got[d][f"R@{k}"] for d in ("t2v", "v2t") for k in (1, 5, 10)]
    assert got["mean_recall"] == pytest.approx(sum(six) / 6)
    return got


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_equals_plain_loop_with_ties_many_positives_and_missing_pairs(data):
    q, v = data.draw(st.sampled_from([(14, 9), (9, 14), (1, 9)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    levels = data.draw(st.sampled_from([1, 2, 4, 1000]))  # few levels: many ties
    scores = rng.integers(0, levels, (q, v)).astype(np.float32) / levels - 0.5
    correct = rng.random((q, v)) < data.draw(st.sampled_from([0.1, 0.3, 0.8]))
    correct[rng.integers(q), rng.integers(v)] = True
    check(scores, [list(np.flatnonzero(row)) for row in correct])


@pytest.fixture(scope="module")
def embedded():
    """Embeddings with duplicates, so that scores tie, several correct candidates and none."""
    rng = np.random.default_rng(0)
    text, video = (rng.normal(size=(n, 24)).astype(np.float32) for n in (301, 203))
    video[1::7], text[2::9] = video[0], text[2]
    correct = [sorted({int(i) for i in rng.integers(0, 203, i % 4)}) for i in range(301)]
    return text, video, Positives.of(correct, 203)


def test_one_and_eight_devices_agree_bit_for_bit_over_several_blocks(embedded, monkeypatch):
    text, video, positives = embedded
    whole = rank_queries(text, video, positives, mesh=mesh_of(1), top=7)
    assert ranking.block_rows(203) > len(text)
    monkeypatch.setattr(ranking, "_BLOCK_SCORES", 16 * 203)
    assert ranking.block_rows(203) == 16
    one, eight = (
        rank_queries(text, video, positives, mesh=mesh_of(devices), top=7) for devices in (1, 8)
    )
    for name in ("rank", "top", "log_total"):
        np.testing.assert_array_equal(getattr(one, name), getattr(eight, name))
    ranked = positives.of_each_text() > 0
    np.testing.assert_array_equal(one.rank[ranked], whole.rank[ranked])


def test_ranks_and_candidates_are_those_of_the_scores(embedded):
    text, video, positives = embedded
    found = rank_queries(text, video, positives, mesh=mesh_of(8), top=7, scale=2.0)
    scores = 2 * np.einsum("qp,vp->qv", text.astype(np.float64), video.astype(np.float64))
    order = np.argsort(-np.round(scores, 4), axis=1, kind="stable")  # ties: lower index first
    np.testing.assert_array_equal(found.top, order[:, :7])
    peak = scores.max(1)
    total = peak + np.log(np.exp(scores - peak[:, None]).sum(1))
    np.testing.assert_allclose(found.log_total, total, rtol=1e-4)
    pairs = {(t, v) for t, v in zip(positives.text, positives.video)}
    for t in range(0, 301, 10):
        good = {v for v in range(203) if (t, v) in pairs}
        if good:
            best = max(scores[t, v] for v in good)
            wrong = [v for v in range(203) if v not in good and scores[t, v] > best - 1e-4]
            assert found.rank[t] == 1 + len(wrong)


def shapes_of_blocks(blocks: int, rows: int, candidates: int):
    split = [(blocks, rows, 8), *[(blocks, rows)] * 2]
    shapes = [jax.ShapeDtypeStruct(split[0], np.float32)]
    shapes += [jax.ShapeDtypeStruct(shape, np.int32) for shape in split[1:]]
    shapes += [jax.ShapeDtypeStruct((blocks, rows), np.bool_)]
    return [*shapes, jax.ShapeDtypeStruct((candidates, 8), np.float32)]


def test_scores_are_products_in_full_precision():
    found = precisions(ranking._rank_blocks(mesh_of(1), 4), *shapes_of_blocks(2, 8, 5))
    assert found == {Precision.HIGHEST}


def test_no_device_holds_the_matrix_of_all_scores():
    """Of the compiled ranking: what it needs beyond its inputs stays that of one block."""
    queries, candidates = 4096, 4096
    rows = ranking.block_rows(candidates)
    shapes = shapes_of_blocks(queries // rows, rows, candidates)
    compiled = ranking._rank_blocks(mesh_of(1), 4).lower(*shapes).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    block = 9 * rows * candidates + (1 << 20)  # and what does not grow with the product
    assert rows == 1024 and temporary < block < queries * candidates * 4


def test_a_tie_counts_against_the_model():
    constant = retrieval_metrics(np.ones((20, 20)), [[i] for i in range(20)])
    assert constant["mean_recall"] == 0
    assert constant["t2v"]["median_rank"] == 20


def test_order_of_the_suite_does_not_matter():
    rng = np.random.default_rng(2)
    scores = rng.integers(0, 5, (40, 30)).astype(np.float32)
    correct = rng.random((40, 30)) < 0.1
    rows, columns = rng.permutation(40), rng.permutation(30)
    moved = [list(np.flatnonzero(row)) for row in correct[rows][:, columns]]
    plain = [list(np.flatnonzero(row)) for row in correct]
    assert retrieval_metrics(scores[rows][:, columns], moved) == retrieval_metrics(scores, plain)


def test_perfect_scores_and_duplicated_positives():
    got = retrieval_metrics(np.eye(12), [[i, i] for i in range(12)])
    assert got["mean_recall"] == 100 and got["pairs"] == 12
    assert got["v2t"]["mean_rank"] == 1


def test_chance_is_the_expectation_of_a_random_order():
    chance = retrieval_metrics(np.ones((1, 12)), [[0, 1, 2]])["t2v"]["chance"]
    for k in (1, 5, 10):
        expected = 100 * (1 - math.comb(12 - 3, k) / math.comb(12, k))
        assert chance[f"R@{k}"] == pytest.approx(expected)
    small = retrieval_metrics(np.ones((2, 3)), [[0], [1]])["t2v"]["chance"]
    assert small["R@5"] == pytest.approx(100)


def test_unmatched_queries_are_counted_not_ranked():
    got = check(np.array([[3.0, 2.0], [1.0, 5.0]]), [[0], []])
    assert (got["t2v"]["queries"], got["t2v"]["unmatched"]) == (1, 1)
    assert (got["v2t"]["queries"], got["v2t"]["unmatched"]) == (1, 1)


def test_faults_of_the_input():
    text = np.ones((40, 3), np.float32)
    text[17, 1] = np.nan
    positives = Positives.of([[0]] * 40, 30)
    with pytest.raises(UserError, match=r"NaN scores: 1 of 40 queries .* is query 17"):
        rank_queries(text, np.ones((30, 3)), positives, mesh=mesh_of(8))
    with pytest.raises(UserError, match="NaN scores: 30 of 30"):
        rank_queries(np.ones((30, 3)), text, positives.reversed(), mesh=mesh_of(8))
    with pytest.raises(UserError, match="0 texts and 5 videos"):
        Positives.of([], 5)
    with pytest.raises(UserError, match="no correct pair"):
        Positives.of([[], []], 2)
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        Positives.of([[0], [2]], 2)


def test_dual_softmax_is_the_product_of_both_softmaxes(embedded):
    text, video, positives = embedded
    text, video = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (text, video))
    text, video = text + 0.01 * np.eye(301, 24), video + 0.01 * np.eye(203, 24)  # fewer ties
    unit = Unit(
        name="global captions", texts=[], text=text, visual=video, positives=positives,
        temperature=0.1, term="vtm", shown="",
    )  # fmt: skip
    got = dual_softmax_ranks(unit, mesh_of(8))
    logits = text.astype(np.float64) @ video.T.astype(np.float64) / 0.1
    product = np.exp(logits - logits.max())
    product = product**2 / product.sum(0, keepdims=True) / product.sum(1, keepdims=True)
    pairs = np.zeros((301, 203), bool)
    pairs[positives.text, positives.video] = True
    for ranks, scores, good in ((got[0], product, pairs), (got[1], product.T, pairs.T)):
        best = np.where(good, scores, -np.inf).max(1)[:, None]
        # What is equal in exact arithmetic need not be in float32: any order of those will do.
        least, most = (1 + ((scores > best * (1 + side * 1e-5)) & ~good).sum(1) for side in (1, -1))
        ranked = good.any(1)
        assert (least <= ranks)[ranked].all() and (ranks <= most)[ranked].all()
        assert (least == most)[ranked].mean() > 0.8
