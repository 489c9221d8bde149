"""Retrieval metrics against a plain loop that shares no code with them."""

import math
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instap_jax.errors import UserError
from instap_jax.evaluation import retrieval
from instap_jax.evaluation.retrieval import retrieval_metrics


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


def check(scores, positives):
    got = retrieval_metrics(scores, positives)
    for name, (recall, median, mean, queries) in zip(("t2v", "v2t"), reference(scores, positives)):
        one = got[name]
        assert {k: one[f"R@{k}"] for k in recall} == pytest.approx(recall, abs=1e-9)
        assert one["median_rank"] == median
        assert one["mean_rank"] == pytest.approx(mean, abs=1e-9)
        assert one["queries"] == queries
    six = [got[d][f"R@{k}"] for d in ("t2v", "v2t") for k in (1, 5, 10)]
    assert got["mean_recall"] == pytest.approx(sum(six) / 6)
    return got


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_plain_loop_with_ties_many_positives_and_missing_pairs(data):
    q, v = data.draw(st.integers(1, 14)), data.draw(st.integers(1, 14))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    levels = data.draw(st.sampled_from([1, 2, 4, 1000]))  # few levels: many ties
    scores = rng.integers(0, levels, (q, v)).astype(np.float32) / levels - 0.5
    scores[rng.random((q, v)) < data.draw(st.sampled_from([0.0, 0.2]))] = -np.inf
    correct = rng.random((q, v)) < data.draw(st.sampled_from([0.1, 0.3, 0.8]))
    correct[rng.integers(q), rng.integers(v)] = True
    rows = [list(np.flatnonzero(row)) for row in correct]
    assert check(scores, rows) == retrieval_metrics(scores, correct)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_other_float_types(dtype):
    rng = np.random.default_rng(0)
    check(rng.normal(size=(30, 20)).astype(dtype), [[i % 20, (i + 7) % 20] for i in range(30)])


def test_blocks_do_not_change_the_result(monkeypatch):
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 9, (57, 23)).astype(np.float32)
    positives = [[int(rng.integers(23))] for _ in range(57)]
    whole = check(scores, positives)
    monkeypatch.setattr(retrieval, "_BLOCK_ELEMENTS", 100)
    assert retrieval_metrics(scores, positives) == whole


def test_a_tie_counts_against_the_model():
    constant = retrieval_metrics(np.ones((20, 20)), [[i] for i in range(20)])
    assert constant["mean_recall"] == 0
    assert constant["t2v"]["median_rank"] == 20


def test_order_of_the_suite_does_not_matter():
    rng = np.random.default_rng(2)
    scores = rng.integers(0, 5, (40, 30)).astype(np.float32)
    correct = rng.random((40, 30)) < 0.1
    rows, columns = rng.permutation(40), rng.permutation(30)
    shuffled = retrieval_metrics(scores[rows][:, columns], correct[rows][:, columns])
    assert shuffled == retrieval_metrics(scores, correct)


def test_perfect_scores_and_duplicated_positives():
    got = retrieval_metrics(np.eye(12), [[i, i] for i in range(12)])
    assert got["mean_recall"] == 100 and got["pairs"] == 12
    assert got["v2t"]["mean_rank"] == 1


def test_chance_is_the_expectation_of_a_random_order():
    correct = np.zeros((1, 12), bool)
    correct[0, :3] = True
    chance = retrieval_metrics(np.ones((1, 12)), correct)["t2v"]["chance"]
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
    scores = np.zeros((40, 30), np.float32)
    scores[17, 4] = np.nan
    with pytest.raises(UserError, match="NaN score of text 17 with video 4"):
        retrieval_metrics(scores, [[0]] * 40)
    with pytest.raises(UserError, match="0 texts and 5 videos"):
        retrieval_metrics(np.zeros((0, 5)), [])
    with pytest.raises(UserError, match="no correct pair"):
        retrieval_metrics(np.zeros((2, 2)), [[], []])
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        retrieval_metrics(np.zeros((2, 2)), [[0], [2]])
    with pytest.raises(ValueError, match="3 texts"):
        retrieval_metrics(np.zeros((2, 2)), [[0]] * 3)


def test_memory_stays_bounded():
    scores = np.zeros((3000, 6000), np.float32)
    np.fill_diagonal(scores, 1)
    tracemalloc.start()
    retrieval_metrics(scores, [[i] for i in range(3000)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 << 20, f"{peak >> 20} MiB beyond the scores"
