"""Losses against float64 references, their invariances, and the sharded contrastive loss."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_losses as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.lax import Precision
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from products import precisions

from instap_jax import losses

TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


def _close(actual, expected, **tolerance):
    np.testing.assert_allclose(np.asarray(actual), expected, **(TOLERANCE | tolerance))


def _pairs(seed, batch, width=5):
    """Embeddings that are correlated within a pair, of lengths other than one."""
    rng = np.random.default_rng(seed)
    video = rng.normal(size=(batch, width)) * 3
    text = video + 8 * rng.normal(size=(batch, width))
    return video.astype(np.float32), (0.5 * text).astype(np.float32)


# 9 pairs: two invalid ones, a video shown twice (0 and 3), a sentence used twice (1 and 4), and an
# invalid row that repeats a valid row's ids.
VALID = np.array([1, 1, 0, 1, 1, 1, 0, 1, 1], bool)
VIDEO_IDS = np.array([7, 8, 9, 7, 10, 11, 8, 12, 13], np.int32)
TEXT_IDS = np.array([1, 2, 3, 4, 2, 5, 1, 6, 7], np.int32)
# As instances: three of one video (two of them with one sentence), two of another, two invalid.
PARENTS = np.array([5, 5, 5, 5, 6, 6, 7, 8, 9], np.int32)
SENTENCES = np.array([1, 2, 3, 2, 4, 1, 5, 6, 6], np.int32)


def _contrastive(video, text, temperature):
    return losses.contrastive_loss(
        video, text, temperature, valid=VALID, video_ids=VIDEO_IDS, text_ids=TEXT_IDS
    )


def _contrastive_reference(video, text, temperature):
    def weight(i, j):
        return float(VIDEO_IDS[i] != VIDEO_IDS[j] and TEXT_IDS[i] != TEXT_IDS[j])

    return reference.contrastive(video, text, temperature, weight, VALID)


def _instance(alpha):
    def loss(instance, text, temperature):
        return losses.instance_contrastive_loss(
            instance,
            text,
            temperature,
            valid=VALID,
            parent_ids=PARENTS,
            text_ids=SENTENCES,
            alpha=alpha,
        )

    return loss


def _instance_reference(alpha):
    def weight(n, m):
        if SENTENCES[n] == SENTENCES[m]:
            return 0.0
        return alpha if PARENTS[n] == PARENTS[m] else 1.0

    return lambda z, s, tau: reference.contrastive(z, s, tau, weight, VALID)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (_contrastive, _contrastive_reference),
        (_instance(0.0), _instance_reference(0.0)),
        (_instance(0.3), _instance_reference(0.3)),
    ],
    ids=["global", "instance", "instance_alpha"],
)
def test_contrastive_losses_and_gradients_equal_the_reference(loss, expected, seed):
    video, text = _pairs(seed, len(VALID))
    tau = np.float32(0.2)
    output = jax.jit(loss)(video, text, tau)
    _close((output.loss, output.accuracy_v2t, output.accuracy_t2v), expected(video, text, tau))
    assert 0 < expected(video, text, tau)[1] < 1  # the accuracy has something to tell apart
    gradients = jax.jit(jax.grad(lambda *args: loss(*args).loss, argnums=(0, 1, 2)))(
        video, text, tau
    )
    v, t = video.astype(np.float64), text.astype(np.float64)
    _close(gradients[0], reference.gradient(lambda x: expected(x, t, tau)[0], v))
    _close(gradients[1], reference.gradient(lambda x: expected(v, x, tau)[0], t))
    _close(gradients[2], reference.gradient(lambda x: expected(v, t, x)[0], np.asarray(tau)))


def test_each_contrastive_loss_answers_to_its_own_temperature():
    video, text = _pairs(3, len(VALID))

    def total(temperature, instance_temperature):
        return (
            _contrastive(video, text, temperature).loss
            + _instance(0.0)(video, text, instance_temperature).loss
        )

    def expected(temperatures):
        return (
            _contrastive_reference(video, text, temperatures[0])[0]
            + _instance_reference(0.0)(video, text, temperatures[1])[0]
        )

    at = np.array([0.1, 0.4])
    _close(total(*at), expected(at))
    _close(
        jax.jit(jax.grad(total, argnums=(0, 1)))(*at), reference.gradient(expected, at), rtol=1e-4
    )


@pytest.mark.parametrize("alpha", [None, 0.0, 0.3], ids=["global", "instance", "instance_alpha"])
def test_sigmoid_loss_and_gradients_equal_the_reference(alpha):
    """In the embeddings, the temperature and the bias; pairs that are no negatives do not count."""
    video, text = _pairs(4, len(VALID))
    tau, bias = np.float32(0.2), np.float32(-1.5)
    if alpha is None:

        def loss(v, t, tau, bias):
            return losses.contrastive_loss(
                v, t, tau, valid=VALID, video_ids=VIDEO_IDS, text_ids=TEXT_IDS, bias=bias
            ).loss

        def weight(i, j):
            return float(VIDEO_IDS[i] != VIDEO_IDS[j] and TEXT_IDS[i] != TEXT_IDS[j])
    else:

        def loss(v, t, tau, bias):
            ids = {"parent_ids": PARENTS, "text_ids": SENTENCES}
            return losses.instance_contrastive_loss(
                v, t, tau, valid=VALID, **ids, alpha=alpha, bias=bias
            ).loss

        def weight(n, m):
            same = SENTENCES[n] == SENTENCES[m]
            return 0.0 if same else (alpha if PARENTS[n] == PARENTS[m] else 1.0)

    at = [video.astype(np.float64), text.astype(np.float64), np.float64(tau), np.float64(bias)]

    def expected(*arguments):
        return reference.sigmoid_contrastive(*arguments, weight, VALID)

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(
        video, text, tau, bias
    )
    _close(value, expected(*at))
    for place, found in enumerate(gradients):

        def partial(x, place=place):
            return expected(*at[:place], x, *at[place + 1 :])

        _close(found, reference.gradient(partial, np.asarray(at[place])), rtol=1e-4)


def test_the_sigmoid_loss_says_the_same_of_who_is_ahead():
    """The accuracies are those of InfoNCE, and a batch of no valid pair has loss 0."""
    video, text = _pairs(0, len(VALID))
    ids = {"video_ids": VIDEO_IDS, "text_ids": TEXT_IDS}
    softmax = losses.contrastive_loss(video, text, 0.2, valid=VALID, **ids)
    sigmoid = losses.contrastive_loss(video, text, 0.2, valid=VALID, **ids, bias=-3.0)
    _close(sigmoid.accuracy_v2t, softmax.accuracy_v2t)
    _close(sigmoid.accuracy_t2v, softmax.accuracy_t2v)
    video[~VALID], text[~VALID] = np.nan, np.inf
    padded = losses.contrastive_loss(video, text, 0.2, valid=VALID, **ids, bias=-3.0)
    _close(padded.loss, sigmoid.loss)
    none = losses.contrastive_loss(video, text, 0.2, valid=~VALID & False, **ids, bias=-3.0)
    assert none.loss == 0


def test_distillation_loss_and_gradient_equal_the_reference():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 2, 3, 4, 5)).astype(np.float32)
    valid = np.array([True, False, True])
    expected = reference.distillation(student, teacher, valid)
    _close(losses.distillation_loss(student, teacher, valid), expected)
    by_student, by_teacher = jax.jit(jax.grad(losses.distillation_loss, argnums=(0, 1)))(
        student, teacher, valid
    )
    finite = reference.gradient(lambda s: reference.distillation(s, teacher, valid), student)
    _close(by_student, finite)
    _close(by_teacher, np.zeros_like(teacher))


def test_matching_loss_and_gradient_equal_the_reference():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 2)).astype(np.float32) * 4
    labels, valid = np.array([1, 0, 0, 1, 0, 1]), np.array([1, 1, 0, 1, 1, 0], bool)

    def expected(x):
        return reference.cross_entropy(x, labels, valid)

    _close(losses.matching_loss(logits, labels, valid), expected(logits))
    _close(
        jax.jit(jax.grad(losses.matching_loss))(logits, labels, valid),
        reference.gradient(expected, logits),
    )


def test_masked_language_loss_and_gradient_equal_the_reference():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 2, 3, 7)).astype(np.float32) * 4
    targets = np.array([[[1, -100, 6], [-100] * 3], [[0, 2, 3], [4, -100, -100]]])
    valid = np.array([[True, True], [False, True]])
    counted = ((targets != -100) & valid[..., None]).ravel()

    def expected(x):
        return reference.cross_entropy(x.reshape(-1, 7), targets.ravel(), counted)

    _close(losses.masked_language_loss(logits, targets, valid), expected(logits))
    _close(
        jax.jit(jax.grad(losses.masked_language_loss))(logits, targets, valid),
        reference.gradient(expected, logits),
    )


@pytest.mark.parametrize("loss", [_contrastive, _instance(0.0), _instance(0.3)])
def test_contrastive_losses_do_not_depend_on_the_order_of_the_batch(loss, monkeypatch):
    video, text = _pairs(5, len(VALID))
    before = loss(video, text, 0.2)
    order = np.random.default_rng(1).permutation(len(VALID))
    for name in ("VALID", "VIDEO_IDS", "TEXT_IDS", "PARENTS", "SENTENCES"):
        monkeypatch.setitem(globals(), name, globals()[name][order])
    after = loss(video[order], text[order], 0.2)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
        _close(a, b)


@pytest.mark.parametrize("filler", [0.0, 1.0, np.nan, np.inf])
def test_padding_instances_change_neither_loss_nor_gradient(filler):
    kept = np.flatnonzero(VALID)
    video, text = _pairs(6, len(VALID))

    def value_and_gradient(rows):
        ids = {"valid": VALID[rows], "parent_ids": PARENTS[rows], "text_ids": SENTENCES[rows]}

        def loss(video, text):
            return losses.instance_contrastive_loss(video, text, 0.2, **ids, alpha=0.3).loss

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(video[rows], text[rows])

    value, gradient = value_and_gradient(kept)
    video[~VALID], text[~VALID] = filler, filler
    padded, padded_gradient = value_and_gradient(np.arange(len(VALID)))
    _close(padded, value)
    for a, b in zip(padded_gradient, gradient):
        _close(a[kept], b)
        _close(a[~VALID], np.zeros_like(a[~VALID]))


def test_invalid_samples_of_every_other_loss_may_hold_anything():
    valid = np.array([True, False])
    student = np.ones((1, 2, 2, 3), np.float32)
    student[:, 1] = np.nan
    value, gradient = jax.jit(jax.value_and_grad(losses.distillation_loss))(student, student, valid)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    logits = np.array([[1.0, 2.0], [np.nan, np.inf]], np.float32)
    value, gradient = jax.jit(jax.value_and_grad(losses.matching_loss))(
        logits, np.array([1, 5]), valid
    )
    assert np.isfinite(value) and np.isfinite(gradient).all()
    value, gradient = jax.jit(jax.value_and_grad(losses.masked_language_loss))(
        logits[:, None], np.array([[1], [0]]), valid
    )
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_a_batch_without_a_valid_sample_has_loss_and_gradient_zero():
    none = np.zeros(2, bool)
    ids = np.arange(2, dtype=np.int32)
    x = np.ones((2, 3), np.float32)

    def contrast(x):
        return losses.contrastive_loss(x, x, 0.07, valid=none, video_ids=ids, text_ids=ids).loss

    cases = [
        (contrast, x),
        (lambda s: losses.distillation_loss(s, s + 1, none), np.ones((1, 2, 3, 4), np.float32)),
        (lambda y: losses.matching_loss(y, ids, none), x[:, :2]),
        (lambda y: losses.masked_language_loss(y[:, None], ids[:, None], none), x),
    ]
    for loss, at in cases:
        value, gradient = jax.jit(jax.value_and_grad(loss))(at)
        assert value == 0 and not np.any(gradient)


def test_zero_vectors_give_finite_gradients():
    zeros, valid = np.zeros((1, 2, 3, 4), np.float32), np.ones(2, bool)
    value, gradient = jax.jit(jax.value_and_grad(losses.distillation_loss))(zeros, zeros + 1, valid)
    assert value == 1 and not np.any(gradient)
    ids, x = np.arange(2, dtype=np.int32), np.zeros((2, 3), np.float32)

    def contrast(x):
        return losses.contrastive_loss(x, x, 0.07, valid=valid, video_ids=ids, text_ids=ids)

    output, gradient = jax.value_and_grad(lambda x: contrast(x).loss)(x)
    _close(output, np.log(2))
    assert not np.any(gradient)
    assert contrast(x).accuracy_v2t == 0  # collapse is not success


def test_a_pair_without_any_negative_contributes_zero():
    video, text = _pairs(0, 3)
    same = np.zeros(3, np.int32)
    output = losses.contrastive_loss(
        video,
        text,
        0.07,
        valid=np.ones(3, bool),
        video_ids=same,
        text_ids=np.arange(3, dtype=np.int32),
    )
    assert output.loss == 0 and output.accuracy_t2v == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_inputs_are_computed_in_float32(dtype):
    video, text = (jnp.asarray(x, dtype) for x in _pairs(2, len(VALID)))
    output = _contrastive(video, text, jnp.float32(0.01))
    assert output.loss.dtype == jnp.float32
    exact = _contrastive_reference(
        np.asarray(video, np.float64), np.asarray(text, np.float64), 0.01
    )
    _close(output.loss, exact[0], rtol=1e-4)


def test_cosines_are_products_in_full_precision():
    def cosines(video, text, temperature):  # of hard negatives
        return losses.cosine_logits(video, text, temperature, valid=VALID)

    for function in (_contrastive, _instance(0.3), cosines):
        assert precisions(function, *_pairs(0, len(VALID)), 0.1) == {Precision.HIGHEST}


# --- eight devices ------------------------------------------------------------------------------


def _mesh():
    return Mesh(np.array(jax.devices()), ("data",))


def _sharded(loss, mesh):
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def constrained(video, text, temperature, *ids):
        video, text = (jax.lax.with_sharding_constraint(x, rows) for x in (video, text))
        return loss(video, text, temperature, *ids)

    arguments = (rows, rows, NamedSharding(mesh, PartitionSpec()), rows, rows, rows)
    step = jax.value_and_grad(constrained, argnums=(0, 1, 2), has_aux=True)
    return jax.jit(step, in_shardings=arguments)


def _global(video, text, temperature, valid, ids, text_ids):
    output = losses.contrastive_loss(
        video, text, temperature, valid=valid, video_ids=ids, text_ids=text_ids
    )
    return output.loss, output


def _per_instance(video, text, temperature, valid, ids, text_ids):
    output = losses.instance_contrastive_loss(
        video, text, temperature, valid=valid, parent_ids=ids, text_ids=text_ids, alpha=0.2
    )
    return output.loss, output


def _sigmoid(video, text, temperature, valid, ids, text_ids):
    output = losses.instance_contrastive_loss(
        video, text, temperature, valid=valid, parent_ids=ids, text_ids=text_ids,
        alpha=0.2, bias=-2.0,
    )  # fmt: skip
    return output.loss, output


SHARDED = {"global": _global, "instance": _per_instance, "sigmoid": _sigmoid}


def _sharded_batch(batch, width):
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, batch // 2, batch).astype(np.int32) for _ in range(2)]
    return *_pairs(0, batch, width), np.float32(0.1), rng.random(batch) < 0.8, *ids


@pytest.mark.parametrize("loss", SHARDED.values(), ids=SHARDED)
def test_one_and_eight_devices_agree_in_value_and_gradient(loss):
    arguments = _sharded_batch(32, 6)
    one = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arguments)
    eight = _sharded(loss, _mesh())(*arguments)
    assert len(eight[1][0].sharding.device_set) == 8
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight)):
        _close(b, np.asarray(a))


@pytest.mark.parametrize("loss", SHARDED.values(), ids=SHARDED)
def test_no_device_holds_all_logits(loss):
    batch, width = 1024, 16
    compiled = _sharded(loss, _mesh()).lower(*_sharded_batch(batch, width)).compile()
    shapes = {
        tuple(map(int, dims.split(",")))
        for dims in re.findall(r"[a-z]+\d*\[([\d,]+)\]", compiled.as_text())
    }
    largest = max(np.prod(shape) for shape in shapes)
    assert (batch // 8, batch) in shapes  # the rows of this device
    assert largest == batch // 8 * batch, f"a buffer of {largest} elements"
    # A handful of such rows at once; one b x b float32 would be 8 of them.
    assert compiled.memory_analysis().temp_size_in_bytes < 7 * 4 * batch // 8 * batch


# --- hard negatives -----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), density=st.floats(0, 1), scale=st.sampled_from([0.1, 1e3]))
def test_a_negative_is_admissible_never_the_positive_and_defined_when_it_can_be(
    seed, density, scale
):
    rng = np.random.default_rng(seed)
    similarity = rng.normal(size=(6, 6)).astype(np.float32) * scale
    admissible = rng.random((6, 6)) < density  # the diagonal too: it must be ignored
    similarity[rng.random((6, 6)) < 0.1] = -np.inf
    index, defined = losses.hard_negatives(jax.random.key(seed), similarity, admissible)
    possible = admissible & ~np.eye(6, dtype=bool)
    np.testing.assert_array_equal(defined, possible.any(axis=1))
    rows = np.arange(6)
    assert possible[rows, index][np.asarray(defined)].all()
    np.testing.assert_array_equal(np.asarray(index)[~np.asarray(defined)], rows[~defined])


def test_negatives_are_drawn_in_proportion_to_softmax_similarity():
    draws = 20_000
    similarity = np.array([[9, 1, 0, -1], [0, 9, 0, 0], [90, 88, 99, 0], [0, 0, 0, 9]], np.float32)
    admissible = ~np.eye(4, dtype=bool)
    admissible[1, 3] = False
    keys = jax.random.split(jax.random.key(0), draws)
    index, defined = jax.vmap(lambda k: losses.hard_negatives(k, similarity, admissible))(keys)
    assert np.all(defined)
    for row in range(4):
        weight = np.where(
            admissible[row], np.exp(similarity[row].astype(float) - similarity[row].max()), 0
        )
        expected = weight / weight.sum()
        found = np.bincount(np.asarray(index)[:, row], minlength=4) / draws
        deviation = np.sqrt(expected * (1 - expected) / draws)
        assert np.all(np.abs(found - expected) <= 5 * deviation + 1e-9), (row, found, expected)


def test_rows_whose_softmax_underflows_are_still_drawn_by_similarity():
    similarity = np.array([[0, -500, -900], [0, 0, 0], [0, 0, 0]], np.float32)
    keys = jax.random.split(jax.random.key(1), 200)
    index, _ = jax.vmap(lambda k: losses.hard_negatives(k, similarity, ~np.eye(3, dtype=bool)))(
        keys
    )
    assert np.all(np.asarray(index)[:, 0] == 1)


def test_admissible_pairs_leave_out_repeats_padding_and_the_pair_itself():
    admissible = np.asarray(losses.admissible_pairs(VALID, VIDEO_IDS, TEXT_IDS))
    for i, j in np.ndindex(admissible.shape):
        expected = (
            i != j
            and VALID[i]
            and VALID[j]
            and VIDEO_IDS[i] != VIDEO_IDS[j]
            and TEXT_IDS[i] != TEXT_IDS[j]
        )
        assert admissible[i, j] == expected


def test_embeddings_that_are_nan_make_the_loss_nan():
    """Taken for zeros they would give a finite loss, which no guard stops."""
    x = jnp.ones((1, 4, 8)).at[0, 1].set(jnp.nan)
    assert jnp.isnan(losses.distillation_loss(x[None], jnp.ones((1, 1, 4, 8)), jnp.ones(1, bool)))
    valid, ids = jnp.ones(4, bool), jnp.arange(4)
    out = losses.contrastive_loss(
        x[0], jnp.eye(4, 8), jnp.float32(0.07), valid=valid, video_ids=ids, text_ids=ids
    )
    assert jnp.isnan(out.loss)
