"""Probes against brute force, and on features whose answer is known."""

from types import SimpleNamespace

import numpy as np
import pytest

from instap_jax.data.suite import Facts, InstanceFacts
from instap_jax.errors import UserError
from instap_jax.evaluation import probe, probe_task
from instap_jax.evaluation.features import SuiteFeatures
from instap_jax.evaluation.probe import knn_accuracy, linear_probe, wilson
from instap_jax.evaluation.probe_task import measure_probes


def clusters(seed, count, *, classes=4, width=12, spread=0.6, centres_seed=7):
    centres = np.random.default_rng(centres_seed).normal(size=(classes, width))
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, count)
    return centres[y] + spread * rng.normal(size=(count, width)), y


def brute_knn(train_x, train_y, test_x, k, temperature):
    predicted = []
    for x in test_x:
        cosine = [
            float(x @ t / (np.linalg.norm(x) * np.linalg.norm(t))) for t in train_x.astype(float)
        ]
        nearest = sorted(range(len(cosine)), key=lambda i: -cosine[i])[:k]
        votes = {}
        for i in nearest:
            votes[train_y[i]] = votes.get(train_y[i], 0) + np.exp(cosine[i] / temperature)
        predicted.append(max(sorted(votes), key=votes.get))
    return predicted


def test_knn_equals_brute_force(monkeypatch):
    train_x, train_y = clusters(0, 80, spread=2.0)
    test_x, test_y = clusters(1, 60, spread=2.0)
    expected = np.mean(brute_knn(train_x, train_y, test_x, 9, 0.07) == test_y)
    got = knn_accuracy(train_x, train_y, test_x, test_y, k=9)
    assert got.accuracy == pytest.approx(100 * expected)
    assert 30 < got.accuracy < 99  # neither trivial nor chance: the comparison means something
    monkeypatch.setattr(probe, "_BLOCK_ELEMENTS", 500)
    assert knn_accuracy(train_x, train_y, test_x, test_y, k=9) == got


def test_knn_does_not_depend_on_the_length_of_features():
    train_x, train_y = clusters(0, 80, spread=2.0)
    test_x, test_y = clusters(1, 60, spread=2.0)
    short, long = (np.geomspace(1e-3, 1e3, n)[:, None] for n in (80, 60))
    scaled = knn_accuracy(short * train_x, train_y, long * test_x, test_y, k=9)
    assert scaled == knn_accuracy(train_x, train_y, test_x, test_y, k=9)


def test_knn_does_not_depend_on_the_order_of_tied_features():
    train_x = np.repeat(np.random.default_rng(0).normal(size=(3, 4)), 10, axis=0)
    train_y = np.tile([0, 1], 15)
    train_y[:7] = 1
    results = set()
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(30)
        results.add(knn_accuracy(train_x[order], train_y[order], train_x, train_y, k=4))
    assert len(results) == 1


def test_collapsed_features_score_chance():
    y = np.array(["red"] * 30 + ["blue"] * 10)
    for method in (knn_accuracy, linear_probe):
        got = method(np.ones((40, 5)), y, np.ones((40, 5)), y)
        assert got.accuracy == got.chance == 75


def test_linear_probe_equals_explicit_refits():
    """Ridge chosen by really leaving every example out, weights from the normal equations."""
    train_x, train_y = clusters(2, 40, classes=3, width=6, spread=1.5)
    test_x, test_y = clusters(3, 50, classes=3, width=6, spread=1.5)
    x = (train_x - train_x.mean(0)) / train_x.std(0)
    target = np.eye(3)[train_y]

    def fit(x, y, ridge):  # unpenalised intercept as an extra column
        a = np.c_[x, np.ones(len(x))]
        penalty = ridge * np.diag([1.0] * x.shape[1] + [0.0])
        return np.linalg.solve(a.T @ a + penalty, a.T @ y)

    def loo(ridge):
        keep = ~np.eye(40, dtype=bool)
        errors = [
            np.r_[x[i], 1] @ fit(x[k], target[k], ridge) - target[i] for i, k in enumerate(keep)
        ]
        return np.mean(np.square(errors))

    ridges = 40 * 10.0 ** np.arange(3, -6, -1)
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    for ridge in ridges:
        centred = target - target.mean(0)
        assert probe._left_out_error(u, s, centred, ridge) == pytest.approx(loo(ridge), rel=1e-6)
    best = ridges[np.argmin([loo(r) for r in ridges])]
    assert best not in (ridges[0], ridges[-1])
    weights = fit(x, target, best)
    np.testing.assert_allclose(probe._ridge(x, centred), weights[:-1], rtol=1e-8, atol=1e-10)
    z = np.c_[(test_x - train_x.mean(0)) / train_x.std(0), np.ones(50)]
    expected = 100 * np.mean(np.argmax(z @ weights, 1) == test_y)
    assert linear_probe(train_x, train_y, test_x, test_y).accuracy == pytest.approx(expected)


@pytest.mark.parametrize("width", [6, 200])  # fewer and more dimensions than examples
def test_linear_probe_reads_a_linear_attribute_and_not_noise(width):
    rng = np.random.default_rng(4)
    x = rng.normal(size=(300, width))
    y = (x[:, 0] > 0).astype(int)
    x[:, 0] *= 20  # scale must not matter
    seen = linear_probe(x[:150], y[:150], x[150:], y[150:])
    assert seen.accuracy > (90 if width == 6 else 65)
    noise = rng.integers(0, 2, 300)
    blind = linear_probe(x[:150], noise[:150], x[150:], noise[150:])
    assert blind.low < 50 < blind.high


def test_linear_probe_ignores_affine_changes_of_a_feature():
    train_x, train_y = clusters(5, 60)
    test_x, test_y = clusters(6, 60)
    scale, shift = np.geomspace(1e-3, 1e3, 12), np.arange(12.0)
    changed = linear_probe(train_x * scale + shift, train_y, test_x * scale + shift, test_y)
    assert changed == linear_probe(train_x, train_y, test_x, test_y)


def test_chance_comes_from_the_training_labels_and_unknown_labels_are_wrong():
    x = np.eye(4)
    got = knn_accuracy(x, ["a", "a", "a", "b"], x, ["a", "b", "b", "z"], k=1)
    assert got.accuracy == 25 and got.chance == 25
    assert (got.classes, got.train_examples, got.test_examples) == (2, 4, 4)


def test_wilson_known_values():
    # Newcombe 1998, table I: 81 of 263 and 0 of 20.
    assert wilson(81, 263) == pytest.approx((25.53, 36.62), abs=0.01)
    assert wilson(0, 20) == pytest.approx((0.0, 16.11), abs=0.01)


def test_faults_of_the_input():
    x, y = np.ones((5, 3)), [0, 1, 0, 1, 0]
    with pytest.raises(UserError, match="no test features"):
        linear_probe(x, y, np.ones((0, 3)), [])
    with pytest.raises(UserError, match="training feature 2 is not finite"):
        bad = x.copy()
        bad[2, 1] = np.inf
        knn_accuracy(bad, y, x, y)
    with pytest.raises(UserError, match="every training label is 3"):
        linear_probe(x, [3] * 5, x, y)
    with pytest.raises(UserError, match="20 neighbours"):
        knn_accuracy(x, y, x, y)
    with pytest.raises(ValueError, match="labels"):
        linear_probe(x, y[:4], x, y)


def suite_of(name, count, *, seed, aligned=True):
    """Instances whose embedding tells their size and side; tokens under the boxes tell nothing."""
    rng = np.random.default_rng(seed)
    sizes, sides = rng.choice(["small", "large"], count), rng.choice(["left_of", "above"], count)
    instances = tuple(
        InstanceFacts(
            id=str(i),
            category="ring",
            captions=("a ring",),
            attributes={
                "size": str(size),
                "position": "top",
                "position_when": "always" if i % 2 else "start",
                "facts": [["larger", "a ring", "1"], [str(side), "a ring", "1"], ["below", "", ""]],
            },
        )
        for i, (size, side) in enumerate(zip(sizes, sides))
    )
    telling = np.where(np.stack([sizes == "small", sides == "above"], axis=1), 1, -1)
    return SuiteFeatures(
        name=name,
        frames=1,
        facts=[Facts(id="0", captions=(), instances=instances)],
        video=np.ones((1, 2)),
        text=np.ones((1, 2)),
        entity=rng.normal(size=(count, 4)),
        parent=np.zeros(count, np.int64),
        instance=telling + 0.1 * rng.random((count, 2)) if aligned else None,
    )


def test_aligned_models_are_probed_at_their_instance_embeddings_too():
    encoder = SimpleNamespace(weights="aligned", step=3)
    suite, fit = suite_of("a", 200, seed=0), suite_of("b", 300, seed=1)
    found = {
        (m.protocol.unit, m.protocol.scoring): m.metrics
        for m in measure_probes(encoder, suite, fit)
    }
    assert len(found) == 4
    for (unit, _), metrics in found.items():
        # 'position' holds all the time for half of them, which are all at the top.
        assert metrics.keys() == {"size", "side"}
        for one in metrics.values():
            told = unit == "instance attributes"
            assert one.accuracy > 99 if told else 35 < one.accuracy < 65
    with_tokens_alone = measure_probes(encoder, suite_of("a", 200, seed=0, aligned=False), fit)
    assert {m.protocol.unit for m in with_tokens_alone} == {"entity attributes"}


def test_an_attribute_that_few_have_is_named_and_not_probed():
    encoder = SimpleNamespace(weights="aligned", step=3)
    suite, fit = suite_of("a", 120, seed=0), suite_of("b", 120, seed=1)
    for instance in fit.instance_facts[:91]:
        del instance.attributes["size"]
    for measurement in measure_probes(encoder, suite, fit):
        assert measurement.metrics.keys() == {"side"}
        assert measurement.remarks == ["too few in b to fit on: size (29)"]
    with pytest.raises(UserError, match="b: 29 entities are too few to fit probes on"):
        measure_probes(encoder, suite, suite_of("b", 29, seed=1))


def test_a_position_counts_where_it_holds_all_the_time():
    always = {"position": "top", "position_when": "always"}
    assert probe_task._label(always, "position") == "top"
    assert probe_task._label(always | {"position_when": "end"}, "position") is None
    assert probe_task._label({}, "side") is None
