"""Attention maps against NumPy by hand, a planted scene, and the scores of pointing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config

from instap_jax.evaluation import attention_maps, pointing
from instap_jax.models.boxes import patch_cover
from instap_jax.models.depth import layer
from instap_jax.models.instap import InstAP
from instap_jax.models.layers import Context
from instap_jax.train.objectives import compute_options

SIDE, FRAMES = 4, 2
TOKENS = FRAMES * SIDE * SIDE


@pytest.fixture(scope="module")
def config():
    return tiny_config("stage2,all_terms", **{"text.depth": 3, "text.fusion_layers": 2})


@pytest.fixture(scope="module")
def model(config):
    """Random weights, and norms and biases that are not at their neutral start."""
    model = InstAP(config, **compute_options(config), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: leaf + rng.normal(0, 0.2, leaf.shape).astype(np.float32),
        nnx.state(model, nnx.Param),
    )
    nnx.update(model, state)
    return model


@pytest.fixture(scope="module")
def maps_of(model):
    """{method: (tokens [2, l, d], ids [3, s], parent [3]) -> NumPy [3, l]}, compiled once."""

    def compiled(function):
        call = jax.jit(lambda *arrays: function(model, *arrays))
        return lambda *arrays: np.asarray(call(*(jnp.asarray(a) for a in arrays)))

    return {
        "similarity": compiled(attention_maps.similarity_maps),
        "match": compiled(attention_maps.match_maps),
    }


PARENT = np.array([1, 0, 1], np.int32)
LENGTH, WORDS = 6, 4  # of the first sentence: the rest is [PAD]


def scenes(seed=0):
    return np.random.default_rng(seed).normal(size=(2, TOKENS, 32)).astype(np.float32)


def sentences():
    ids = np.random.default_rng(1).integers(5, 320, (3, LENGTH)).astype(np.int32)
    ids[:, 0] = 2
    ids[0, WORDS:] = 0
    return ids


def test_grad_cam_of_a_linear_score_by_hand():
    """Score sum over l of a_l (x_l . w): gradient a_l w, channel weights mean(a) w."""
    rng = np.random.default_rng(2)
    tokens, weight, share = rng.normal(size=(7, 5)), rng.normal(size=5), rng.random(7)
    got = attention_maps.grad_cam(
        lambda x: jnp.asarray(share) @ (x @ jnp.asarray(weight)), jnp.asarray(tokens, jnp.float32)
    )
    expected = np.maximum(tokens @ (share.mean() * weight), 0)
    assert (expected > 0).any() and (expected == 0).any()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def embedding(model, pooled):
    """W_v after the LayerNorm, l2-normalised, float64."""
    norm, map_ = model.pool_norm, model.vision_projection
    centred = pooled - pooled.mean()
    x = centred / np.sqrt(np.square(centred).mean() + norm.eps)
    x = x * np.asarray(norm.scale[...], np.float64) + np.asarray(norm.bias[...], np.float64)
    x = x @ np.asarray(map_.kernel[...], np.float64) + np.asarray(map_.bias[...], np.float64)
    return x / np.linalg.norm(x)


def test_similarity_maps_by_finite_differences(model, maps_of):
    """The channel weights from the definition of a derivative, in float64."""
    tokens, ids = scenes(), sentences()
    got = maps_of["similarity"](tokens, ids, PARENT)
    assert got.shape == (3, TOKENS)
    text = np.asarray(model.embed_text(model.text.encode(jnp.asarray(ids)).pooled), np.float64)
    for row, parent in enumerate(PARENT):
        sentence = text[row] / np.linalg.norm(text[row])
        clip = tokens[parent].astype(np.float64)
        pooled, step = clip.mean(axis=0), 1e-6
        slope = [
            (embedding(model, pooled + d) - embedding(model, pooled - d)) @ sentence / (2 * step)
            for d in step * np.eye(32)
        ]
        expected = np.maximum(clip @ (np.array(slope) / TOKENS), 0)
        assert (expected > 0).any() and (expected == 0).any()
        np.testing.assert_allclose(got[row], expected, rtol=2e-3, atol=1e-6)


def test_scene_of_equal_tokens_points_nowhere(maps_of):
    """The map is relative to the scene: what all tokens share neither helps nor hurts."""
    tokens = scenes()
    first = maps_of["similarity"](tokens, sentences(), PARENT)
    tokens[:] = tokens.mean(axis=1, keepdims=True)
    assert maps_of["similarity"](tokens, sentences(), PARENT).max() < 1e-4 * first.max()


def test_planted_token_holds_the_map(model, maps_of):
    """One patch carries what the sentence says, the others little: the map is in its box."""
    noise = scenes(3)
    tokens = noise[:, :1] + 0.02 * noise  # what all tokens share, and a little of their own
    text = attention_maps.aligned.embed_texts(model, jnp.asarray(sentences()))[0]
    pull = jax.grad(lambda pooled: attention_maps.aligned.unit(model.embed_visual(pooled)) @ text)
    direction = np.asarray(pull(jnp.asarray(tokens[1].mean(axis=0))))
    planted = SIDE * SIDE + 2 * SIDE + 1  # frame 1, row 2, column 1
    tokens[1, planted] += direction / np.linalg.norm(direction)
    maps = maps_of["similarity"](tokens, sentences(), PARENT)[:1]
    maps = maps.reshape(1, FRAMES, SIDE, SIDE)
    assert np.unravel_index(maps.argmax(), maps.shape) == (0, 1, 2, 1)
    box = np.tile([1 / 4, 2 / 4, 2 / 4, 3 / 4], (1, FRAMES, 1)).astype(np.float32)
    inside = np.asarray(patch_cover(jnp.asarray(box), SIDE))
    scores = pointing.pointing(maps, inside, box, np.ones((1, FRAMES), bool), np.zeros(1))
    assert scores.mass[0] > 0.5 and scores.hit[0] == 1
    assert scores.area[0] == pytest.approx(1 / 16)


def test_match_maps_by_finite_differences(model, config, maps_of):
    """Every cross-attention probability scaled up and down by itself; the first scene's maps."""
    tokens, ids = scenes(4), sentences()
    depth, heads = config.text.fusion_layers, config.text.heads
    row = 0
    clip, mask = jnp.asarray(tokens[None, PARENT[row]]), jnp.asarray(ids[row : row + 1] != 0)
    words = model.text.encode(jnp.asarray(ids[row : row + 1])).tokens

    def logit(scale):
        x = words
        for index in range(depth):
            block = layer(model.text.fusion_blocks, index)
            x = block(x, mask=mask, contexts=[Context(tokens=clip[None], scale=scale[index][None])])
        return model.match_head(x)[0, 1]

    ones = np.ones((depth, 1, heads, LENGTH, TOKENS), np.float32)
    fused = model.text.fuse(words, mask, clip)
    assert float(logit(jnp.asarray(ones))) == pytest.approx(
        float(model.match_head(fused)[0, 1]), abs=1e-5
    )
    step = 0.05
    moves = step * np.eye(ones.size, dtype=np.float32).reshape(-1, *ones.shape)
    many = jax.jit(lambda moves: jax.lax.map(logit, moves, batch_size=256))
    slope = (np.asarray(many(ones + moves)) - np.asarray(many(ones - moves))) / (2 * step)
    slope = np.maximum(slope.reshape(ones.shape), 0)
    expected = slope[:, 0, :, :WORDS].mean(axis=(0, 1, 2))
    got = maps_of["match"](tokens, ids, PARENT)
    assert got.shape == (3, TOKENS)
    np.testing.assert_allclose(got[row], expected, rtol=0.02, atol=0.01 * expected.max())


def plain_filter(image):
    """The published filter, window by window, float64."""
    rows, columns = image.shape
    out = np.zeros((rows, columns))
    padded = np.pad(np.asarray(image, np.float64), 1, mode="reflect")
    for r in range(rows):
        for c in range(columns):
            values = sorted(padded[r : r + 3, c : c + 3].ravel())
            mean = sum(values) / 9
            if mean <= 0:
                continue
            sigma = np.std(values) / mean
            if sigma < 1e-6:
                out[r, c] = values[4]
                continue
            weights = [np.exp(-((k - 4) ** 2) / (2 * sigma**2)) for k in range(9)]
            out[r, c] = np.dot(values, weights) / sum(weights)
    return out


def test_rank_gaussian_filter_against_plain_loops():
    rng = np.random.default_rng(5)
    maps = np.maximum(rng.normal(size=(3, 2, 5, 7)), 0) * (rng.random((3, 2, 5, 7)) < 0.7)
    maps[2, 1] = 0
    maps[2, 0] = 3.25
    got = np.asarray(attention_maps.rank_gaussian_filter(jnp.asarray(maps, jnp.float32)))
    for index in np.ndindex(3, 2):
        np.testing.assert_allclose(got[index], plain_filter(maps[index]), rtol=1e-4, atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 100))
def test_rank_gaussian_filter_scales_and_stays_in_range(seed, factor):
    image = np.random.default_rng(seed).random((4, 4)).astype(np.float32)
    first = np.asarray(attention_maps.rank_gaussian_filter(jnp.asarray(image)))
    second = np.asarray(attention_maps.rank_gaussian_filter(jnp.asarray(image * factor)))
    np.testing.assert_allclose(second, first * factor, rtol=1e-3)
    assert first.min() >= image.min() - 1e-6 and first.max() <= image.max() + 1e-6


def test_patch_cover_counts_cut_patches_by_area():
    box = jnp.asarray([0.125, 0.25, 0.625, 1.0])  # columns half, whole, half; rows from the second
    expected = np.outer([0, 1, 1, 1], [0.5, 1, 0.5, 0])
    np.testing.assert_allclose(patch_cover(box, 4), expected, atol=1e-6)


def make_case():
    """Two instances of sample 7 and one of sample 9, on two frames of 2 x 2 patches."""
    left, top = [0, 0, 0.5, 1], [0, 0, 1, 0.5]
    boxes = np.array([[left, left], [top, top], [left, top]], np.float32)
    present = np.array([[True, True], [True, False], [True, True]])
    maps = np.zeros((3, 2, 2, 2))
    maps[0, 0] = [[3, 1], [0, 0]]  # 3 of 4 on the left in frame 0
    maps[0, 1] = [[0, 0], [0, 4]]  # all of it outside in frame 1, where the peak is
    maps[1, 0] = [[1, 1], [0, 2]]
    maps[1, 1] = [[9, 9], [9, 9]]  # absent there: does not count
    maps[2, 0] = [[5, 0], [5, 0]]
    maps[2, 1] = [[0, 0], [0, 0]]
    inside = np.asarray(patch_cover(jnp.asarray(boxes), 2))
    return maps, inside, boxes, present, np.array([7, 7, 9])


def test_pointing_by_hand():
    case = make_case()
    scores = pointing.pointing(*case)
    np.testing.assert_allclose(scores.mass, [3 / 8, 2 / 4, 1.0])
    np.testing.assert_allclose(scores.area, [0.5, 0.5, 0.5])
    np.testing.assert_allclose(scores.hit, [0, 0, 1])
    np.testing.assert_allclose(scores.hit_chance, [0.5, 0.5, 0.5])
    # The other's map in one's own box and frames: 1 + 9 + 9 of 4 + 36; 4 of 4.
    np.testing.assert_allclose(scores.sibling, [19 / 40, 1.0, np.nan])
    summary = pointing.summarise(scores, case[-1])
    assert summary["mass"] == pytest.approx(100 * (3 / 8 + 1 / 2 + 1) / 3)
    assert summary["sibling_mass"] == pytest.approx(100 * (19 / 40 + 1) / 2)
    assert summary["selectivity"] == pytest.approx(100 * (3 / 8 + 1 / 2 - 19 / 40 - 1) / 2)
    assert summary["selectivity_margin"] == 0  # one sample: no spread to see


def test_empty_and_flat_maps_score_no_more_than_their_floor():
    maps, inside, boxes, present, sample = make_case()
    empty = pointing.pointing(maps * 0, inside, boxes, present, sample)
    np.testing.assert_array_equal(empty.mass, 0)
    np.testing.assert_allclose(empty.hit, empty.hit_chance)
    flat = pointing.pointing(maps * 0 + 1, inside, boxes, present, sample)
    np.testing.assert_allclose(flat.mass, flat.area)
    np.testing.assert_allclose(flat.hit, flat.hit_chance)
    only = pointing.summarise(pointing.pointing(*(x[2:] for x in make_case())), sample[2:])
    assert "selectivity" not in only


def test_margin_takes_a_cluster_as_one():
    rng = np.random.default_rng(6)
    values = rng.normal(size=400)
    single = pointing.margin(values, np.arange(400))
    assert single == pytest.approx(1.96 * values.std(ddof=1) / 20, rel=1e-3)
    copies = pointing.margin(np.repeat(values, 4), np.repeat(np.arange(400), 4))
    assert copies == pytest.approx(single, rel=1e-3)  # four copies tell no more


def test_scores_of_batches_join():
    case = make_case()
    parts = [pointing.pointing(*(x[rows] for x in case)) for rows in (slice(0, 2), slice(2, 3))]
    whole, joined = pointing.pointing(*case), pointing.join(parts)
    for name in ("mass", "area", "hit", "hit_chance", "sibling"):
        np.testing.assert_allclose(getattr(joined, name), getattr(whole, name))
