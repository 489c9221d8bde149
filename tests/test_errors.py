"""Rules that sort wrong retrievals, each on made-up instances; retrieval against plain loops."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instap_jax.errors import UserError
from instap_jax.evaluation import errors
from instap_jax.evaluation.errors_task import CASES, choose_cases

BOX = [0.2, 0.2, 0.6, 0.6]


def instance(record=0, caption="a red star", *, look=(), **changes):
    """One that is plain to see: 16 % of the picture, in every frame, under nothing."""
    attributes = {"shape": "x", "colour": "y"} | dict(zip(errors.LOOK, look))
    boxes, present = np.tile(BOX, (1, 4, 1)), np.ones((1, 4), bool)
    (made,) = errors.describe_instances(
        record, [caption], [{"attributes": attributes}], boxes, present
    )
    return dataclasses.replace(made, **changes)


def kinds(query, retrieved):
    return list(errors.classify(query, retrieved))


def test_each_rule_and_their_order():
    plain = instance(0, "the red star turns")
    far = instance(1, "some blue ring that rests")
    assert kinds(plain, far) == ["other"]
    assert kinds(plain, instance(0, "some blue ring that rests")) == ["multi_instance"]
    assert kinds(plain, instance(1, "the red star blinks")) == ["cross_sample"]
    small = dataclasses.replace(plain, area=0.9 * errors.SMALL_AREA)
    assert kinds(small, far) == ["weak_evidence"]
    assert kinds(dataclasses.replace(plain, seen=0.25), far) == ["weak_evidence"]
    assert kinds(dataclasses.replace(plain, covered=0.6), far) == ["weak_evidence"]
    # Before and after: what comes first counts, what holds too is known.
    assert kinds(small, instance(0)) == ["multi_instance", "weak_evidence"]
    assert kinds(small, instance(1, "the red star blinks")) == ["weak_evidence", "cross_sample"]
    # It is the query's evidence that counts, not the retrieved one's.
    assert kinds(far, dataclasses.replace(plain, area=0.0)) == ["other"]


def test_limits_are_where_they_are_said_to_be():
    far = instance(1, "some blue ring that rests")
    for exact in ({"area": errors.SMALL_AREA}, {"seen": errors.FEW_FRAMES}, {"covered": 0.5}):
        assert kinds(instance(0, **exact), far) == ["other"]
    assert errors.word_overlap("A b c", "c, B! d e") == pytest.approx(2 / 5)
    assert errors.word_overlap("", "") == 0
    # 2 of 4 words: exactly one half is a match.
    assert kinds(instance(0, "a b c"), instance(1, "a b d")) == ["cross_sample"]
    assert kinds(instance(0, "a b c"), instance(1, "a b d e")) == ["other"]


def test_same_look_is_a_match_only_where_all_of_it_is_annotated():
    look = ("star", "red", "plain")
    first, second = instance(0, "one two three", look=look), instance(1, "four five", look=look)
    assert errors.classify(first, second) == {"cross_sample": "both are annotated star red plain"}
    assert kinds(first, instance(1, "four five", look=("star", "red", "dotted"))) == ["other"]
    # Two unknown textures are not a known one.
    assert kinds(instance(0, "one two"), instance(1, "four five")) == ["other"]
    bare = {"attributes": "red"}
    boxes, present = np.tile(BOX, (1, 4, 1)), np.ones((1, 4), bool)
    (made,) = errors.describe_instances(0, ["a"], [bare], boxes, present)
    assert made.look == ()


def test_evidence_from_boxes():
    boxes = np.array(
        [
            [[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 1.0, 0.5]],  # area 1/4, then absent
            [[0.25, 0.0, 0.5, 0.5], [0.0, 0.0, 1.0, 1.0]],  # right half of it, then all
            [[0.0, 0.25, 0.5, 0.5], [0.0, 0.0, 0.1, 0.1]],  # lower half of it: 3/4 in all
            [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]],  # absent: covers nothing
        ]
    )
    present = np.array([[True, False], [True, True], [True, True], [False, True]])
    made = errors.describe_instances(3, list("abcd"), [{}] * 4, boxes, present)
    assert made[0].area == pytest.approx(0.25) and made[0].seen == 0.5
    assert made[0].covered == pytest.approx(0.75)
    assert made[1].area == pytest.approx((0.125 + 1) / 2)
    # Of the second: all under the first, then all under the fourth.
    assert made[1].covered == pytest.approx(1.0)
    assert [one.place for one in made] == [0, 1, 2, 3] and made[2].record == 3
    outside = errors.box_area(np.array([0.5, -1.0, 2.0, 2.0]))
    assert outside == pytest.approx(0.5)  # only what lies in the picture
    never = errors.describe_instances(0, ["a"], [{}], boxes[:1], np.zeros((1, 2), bool))[0]
    assert never.area == 0 and "present in 0 of 2 frames" in never.weakness()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9))
def test_wrong_retrievals_against_plain_loops(seed, count):
    rng = np.random.default_rng(seed)
    queries = rng.integers(-2, 3, (count, 2)).astype(np.float32)
    candidates = rng.integers(-2, 3, (count, 2)).astype(np.float32)
    retrieved, margin = errors.wrong_retrievals(queries, candidates)
    for i in range(count):
        scores = [float(queries[i] @ candidates[j]) for j in range(count)]
        others = [j for j in range(count) if j != i]
        best = max(others, key=lambda j: (scores[j], -j))
        wrong = scores[best] >= scores[i]  # a tie counts against the model
        assert retrieved[i] == (best if wrong else -1)
        assert margin[i] == scores[best] - scores[i]


def test_wrong_retrievals_in_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(2, 50, 4)).astype(np.float32)
    whole = errors.wrong_retrievals(*arrays)
    monkeypatch.setattr(errors, "_BLOCK", 7 * 50)
    for first, second in zip(errors.wrong_retrievals(*arrays), whole):
        np.testing.assert_allclose(first, second, rtol=1e-5)
    arrays[0, 3] = np.nan
    with pytest.raises(UserError, match="not finite"):
        errors.wrong_retrievals(*arrays)


def test_every_error_is_counted_once_beside_its_chance():
    made = [instance(i // 2, f"word{i} here") for i in range(6)]
    made[4] = dataclasses.replace(made[4], area=0.0)
    retrieved = np.array([1, 0, -1, 0, 5, 0])
    found, metrics = errors.sort_errors(made, retrieved, np.arange(6, dtype=np.float32))
    assert [(e.query, e.retrieved, e.kind) for e in found] == [
        (0, 1, "multi_instance"),
        (1, 0, "multi_instance"),
        (3, 0, "other"),
        (4, 5, "multi_instance"),
        (5, 0, "other"),
    ]
    assert metrics["wrong"] == 5 and metrics["queries"] == 6
    assert metrics["multi_instance"]["share"] == pytest.approx(60)
    assert metrics["weak_evidence"]["count"] == 0 and metrics["weak_evidence"]["holds"] == 1
    assert sum(metrics[name]["count"] for name in errors.CLASSES) == 5
    assert sum(metrics[name]["chance"] for name in errors.CLASSES) == pytest.approx(100)
    # One sibling among five others; one query in five is weak unless it is a sibling (4 of 5).
    assert metrics["multi_instance"]["chance"] == pytest.approx(20, abs=12)
    assert metrics["weak_evidence"]["chance"] == pytest.approx(16, abs=10)
    assert found[3].margin == 4.0


def test_chance_never_retrieves_the_query_itself():
    made = [instance(0, "one two"), instance(1, "three four")]
    metrics = errors.sort_errors(made, np.array([1, 0]), np.zeros(2))[1]
    assert metrics["other"]["chance"] == 100


def test_nothing_wrong():
    metrics = errors.sort_errors([instance(0), instance(1)], np.array([-1, -1]), np.zeros(2))[1]
    assert metrics["wrong"] == 0 and metrics["other"]["share"] == 0


def test_cases_are_few_and_the_same_every_time():
    found = [
        errors.Error(query=i, retrieved=0, margin=0.0, kind=kind, reason="")
        for i, kind in enumerate(["other"] * 30 + ["cross_sample"])
    ]
    first = choose_cases(found)
    assert [error.kind for error in first] == ["cross_sample"] + ["other"] * CASES
    assert first == choose_cases(found)
    assert [error.query for error in first[1:]] != list(range(CASES))


def test_paper_shares_are_the_paper_s():
    assert errors.PAPER_SHARES.keys() == errors.CLASSES.keys()
    assert list(errors.PAPER_SHARES.values())[:3] == [44.6, 24.6, 13.1]
    assert sum(errors.PAPER_SHARES.values()) == pytest.approx(100)
