"""Attention-guided masks and caption corruption: exact counts, distributions, odd scores."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instap_jax import masking


@pytest.mark.parametrize(
    ("tokens", "ratio", "frames", "expected"),
    [
        (1568, 0.8, 1, 313),  # the paper: ceil(1254.4) masked
        (1568, 0.8, 8, 312),  # 39 of 196 in each of 8 frames
        (30, 0.1, 1, 27),  # 0.1 * 30 > 3 in floating point
        (10, 0.8, 1, 2),
        (4, 0.99, 1, 1),
        (8, 0.0, 2, 8),
    ],
)
def test_visible_count(tokens, ratio, frames, expected):
    assert masking.visible_count(tokens, ratio, frames=frames) == expected


@pytest.mark.parametrize(("tokens", "ratio", "frames"), [(9, 0.5, 2), (8, 1.0, 1), (8, -0.1, 1)])
def test_visible_count_rejects_nonsense(tokens, ratio, frames):
    with pytest.raises(ValueError):
        masking.visible_count(tokens, ratio, frames=frames)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    choice=st.sampled_from(["sample", "topk"]),
    frames=st.sampled_from([1, 3]),
    ratio=st.sampled_from([0.0, 0.5, 0.8, 0.95]),
    spoil=st.sampled_from([None, 0.0, -1.0, np.nan, np.inf]),
)
def test_masks_hold_distinct_rising_indices_equally_many_per_frame(
    seed, choice, frames, ratio, spoil
):
    rng = np.random.default_rng(seed)
    scores = rng.random((2, 12)).astype(np.float32)
    if spoil is not None:
        scores[rng.random(scores.shape) < 0.6] = spoil
    count = masking.visible_count(12, ratio, frames=frames)
    index = np.asarray(
        masking.choose_visible(jax.random.key(seed), scores, count, choice, frames=frames)
    )
    assert index.shape == (2, count) and index.dtype == np.int32
    assert (np.diff(index, axis=1) > 0).all()
    assert index.min() >= 0 and index.max() < 12
    per_frame = [(index // (12 // frames) == frame).sum(axis=1) for frame in range(frames)]
    np.testing.assert_array_equal(per_frame, count // frames)


def test_topk_keeps_the_highest_scores_and_breaks_ties_by_lower_index():
    scores = jnp.array([[0.1, 0.5, 0.3, 0.5, 0.3, 0.2], [1, 1, 1, 1, 1, 1]])
    index = masking.choose_visible(jax.random.key(0), scores, 3, "topk")
    np.testing.assert_array_equal(index, [[1, 2, 3], [0, 1, 2]])
    per_frame = masking.choose_visible(jax.random.key(0), scores, 2, "topk", frames=2)
    np.testing.assert_array_equal(per_frame, [[1, 3], [0, 3]])


def test_topk_ranks_nan_last():
    scores = jnp.array([[jnp.nan, -5.0, 0.0, jnp.nan]])
    index = masking.choose_visible(jax.random.key(0), scores, 2, "topk")
    np.testing.assert_array_equal(index, [[1, 2]])


def _probability_of_sets(scores, count):
    """Exact law of sequential draws without replacement, as torch.multinomial makes them."""
    total = {}
    for order in itertools.permutations(range(len(scores)), count):
        chance, left = 1.0, sum(scores)
        for token in order:
            chance *= scores[token] / left
            left -= scores[token]
        key = tuple(sorted(order))
        total[key] = total.get(key, 0.0) + chance
    return total


def test_sampled_masks_follow_draws_without_replacement_in_proportion():
    scores, draws = (0.5, 0.25, 0.2, 0.05), 20_000
    rows = np.tile(np.float32(scores), (draws, 1))
    index = np.asarray(masking.choose_visible(jax.random.key(0), rows, 2, "sample"))
    for members, chance in _probability_of_sets(scores, 2).items():
        found = (index == members).all(axis=1).mean()
        assert abs(found - chance) < 5 * np.sqrt(chance * (1 - chance) / draws), members


def test_tokens_without_a_score_are_drawn_last_and_uniformly():
    draws = 4_000
    rows = np.tile(np.float32([0.0, 1e-30, np.nan, 1.0, -1.0]), (draws, 1))
    index = np.asarray(masking.choose_visible(jax.random.key(1), rows, 3, "sample"))
    assert (index == 1).any(axis=1).all() and (index == 3).any(axis=1).all()
    for token in (0, 2, 4):
        assert abs((index == token).any(axis=1).mean() - 1 / 3) < 0.04


def test_masks_depend_on_the_key_alone():
    scores = np.random.default_rng(0).random((3, 20)).astype(np.float32)
    draw = jax.jit(lambda seed: masking.choose_visible(jax.random.key(seed), scores, 5, "sample"))
    np.testing.assert_array_equal(draw(3), draw(3))
    assert (np.asarray(draw(3)) != np.asarray(draw(4))).any()


@pytest.mark.parametrize(
    ("count", "frames", "choice"), [(3, 2, "topk"), (0, 1, "topk"), (2, 1, "x")]
)
def test_impossible_masks_are_refused(count, frames, choice):
    with pytest.raises(ValueError):
        masking.choose_visible(jax.random.key(0), jnp.ones((1, 8)), count, choice, frames=frames)


PAD, CLS, SEP, MASK, VOCAB = 0, 2, 3, 4, 100


def _corrupt(key, ids, **change):
    arguments = {"vocab_size": VOCAB, "mask_id": MASK, "special_ids": (PAD, CLS, SEP)} | change
    return masking.corrupt_tokens(key, ids, **arguments)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), ratio=st.floats(0, 1))
def test_corruption_spares_special_tokens_and_targets_only_what_it_chose(seed, ratio):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 8, (2, 3, 10)).astype(np.int32)
    corrupted, targets = map(np.asarray, _corrupt(jax.random.key(seed), ids, ratio=ratio))
    assert corrupted.shape == targets.shape == ids.shape and corrupted.dtype == ids.dtype
    chosen = targets != -100
    assert not chosen[np.isin(ids, (PAD, CLS, SEP))].any()
    np.testing.assert_array_equal(targets[chosen], ids[chosen])
    np.testing.assert_array_equal(corrupted[~chosen], ids[~chosen])
    assert corrupted.min() >= 0 and corrupted.max() < VOCAB


def test_corruption_is_half_of_the_tokens_and_80_10_10_of_those():
    ids = np.full((100, 400), 50, np.int32)
    corrupted, targets = map(np.asarray, _corrupt(jax.random.key(0), ids))
    chosen = targets != -100
    assert abs(chosen.mean() - 0.5) < 0.013
    among = corrupted[chosen]
    # A random token is [MASK] or the original in 1 of 100 cases each.
    assert abs((among == MASK).mean() - 0.801) < 0.015
    assert abs((among == 50).mean() - 0.101) < 0.011
    others = among[(among != MASK) & (among != 50)]
    assert abs(others.size / among.size - 0.098) < 0.011
    assert len(np.unique(others)) == VOCAB - 3 and PAD not in others  # all the vocabulary but [PAD]


def test_no_ratio_no_corruption():
    ids = np.arange(20, dtype=np.int32)[None]
    corrupted, targets = _corrupt(jax.random.key(0), ids, ratio=0.0)
    np.testing.assert_array_equal(corrupted, ids)
    assert (np.asarray(targets) == -100).all()
