"""Frames of a clip, instances of a group, size on the canvas: properties of pure functions."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from instap_jax.data.groups import fitting_size
from instap_jax.data.sampling import choose_frames, choose_instances, share_budget


@given(st.integers(1, 60), st.integers(1, 40), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_one_frame_of_every_segment(frames, wanted, seed):
    rng = np.random.default_rng(seed)
    chosen = choose_frames(frames, wanted, "random", rng)
    middle = choose_frames(frames, wanted, "uniform", rng)
    for c in (chosen, middle):
        assert c.shape == (wanted,) and c[0] >= 0 and c[-1] < frames and (np.diff(c) >= 0).all()
        if frames < wanted:  # repeats every frame, evenly
            counts = np.bincount(c, minlength=frames)
            assert counts.min() >= wanted // frames and counts.max() <= -(-wanted // frames)
        elif c is chosen:
            edges = [i * frames // wanted for i in range(wanted + 1)]
            assert all(lo <= i < hi for i, lo, hi in zip(c, edges, edges[1:]))
    distance = np.abs(middle + 0.5 - (np.arange(wanted) + 0.5) * frames / wanted)
    assert distance.max() <= 0.5 + 1e-9


def test_random_frames_reach_every_frame():
    rng = np.random.default_rng(0)
    seen = np.bincount(
        np.concatenate([choose_frames(10, 4, "random", rng) for _ in range(2000)]), minlength=10
    )
    # Segments of 2, 3, 2 and 3 frames.
    expected = 2000 / np.array([2, 2, 3, 3, 3, 2, 2, 3, 3, 3])
    np.testing.assert_allclose(seen, expected, rtol=0.15)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 30), st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_budget_is_used_and_shared_fairly(counts, budget, seed):
    kept = share_budget(counts, budget, np.random.default_rng(seed))
    assert kept.sum() == min(budget, sum(counts)) and (kept <= counts).all()
    for i, j in np.ndindex(len(counts), len(counts)):
        # Nobody who wants more has two fewer than somebody else.
        assert kept[i] == counts[i] or kept[i] >= kept[j] - 1
    for picked, keep, count in zip(
        choose_instances(counts, budget, np.random.default_rng(seed)), kept, counts
    ):
        assert len(picked) == keep and (picked < count).all() and (np.diff(picked) > 0).all()


def test_a_crowd_is_no_loop():
    kept = share_budget([10**15, 5, 10**12], 11, np.random.default_rng(0))
    assert sorted(kept) == [3, 4, 4]


def test_who_is_dropped_is_random():
    draws = [choose_instances([3], 1, np.random.default_rng(i))[0][0] for i in range(60)]
    assert set(draws) == {0, 1, 2}
    most = [int(share_budget([2, 2, 2], 4, np.random.default_rng(i)).argmax()) for i in range(60)]
    assert set(most) == {0, 1, 2}


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 500), st.integers(1, 500))
@settings(max_examples=200, deadline=None)
def test_fitting_size_stays_on_the_canvas(height, width, canvas_h, canvas_w):
    h, w = fitting_size(height, width, (canvas_h, canvas_w))
    if height <= canvas_h and width <= canvas_w:
        assert (h, w) == (height, width)
    thin = width / height > canvas_w or height / width > canvas_h
    assert thin or (1 <= h <= canvas_h and 1 <= w <= canvas_w)
