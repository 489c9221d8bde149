"""Numbers that are not right: refused by the step, counted by the guard, blamed by replay."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import tiny_config

from instap_jax import sharding
from instap_jax.errors import UserError
from instap_jax.train import replay
from instap_jax.train import step as step_module
from instap_jax.train.guard import Guard
from instap_jax.train.objectives import Objective
from instap_jax.train.optimizer import learning_rate_schedule, make_optimizer
from instap_jax.train.state import TrainState
from instap_jax.types import Kind


class _Layer(nnx.Module):
    def __init__(self):
        kernel = np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2)
        self.kernel = nnx.Param(jnp.asarray(kernel), logical_axes=("embed", "mlp"))


def _loss(config, model, frozen, batch, key):
    """sqrt: an infinite gradient, under a finite loss, where a row is 0."""
    del config, frozen, key
    out = jnp.sqrt(jnp.sum((batch["x"] @ model.kernel) ** 2, axis=-1))
    loss = jnp.sum(jnp.where(batch["valid"], out, 0))
    return loss, {"term": loss}


SEED = np.uint32(0)
OBJECTIVE = Objective(create=lambda c, r: _Layer(), create_frozen=None, loss=_loss)


def make_step(config):
    graphdef, params = nnx.split(_Layer())
    tx = make_optimizer(config)
    frozen_graphdef, frozen = nnx.split(nnx.Dict())
    step = step_module.make_train_step(config, OBJECTIVE, graphdef, frozen_graphdef, tx)
    zero = jnp.int32(0)
    state = TrainState(step=zero, params=params, opt_state=tx.init(params), refused=zero)
    compiled = jax.jit(step).lower(state, frozen, batch(), SEED).compile()
    return lambda state, batch: compiled(state, frozen, batch, SEED), state


def batch(seed: int = 0, **harm):
    x = np.random.default_rng(seed).normal(size=(4, 3)).astype(np.float32)
    for row, value in harm.items():
        x[int(row[1:])] = value
    return {"x": x, "valid": np.ones(4, bool)}


def values(state) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves((state.params, state.opt_state[0]))]


def same(first, second) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(values(first), values(second), strict=True))


@pytest.fixture(scope="module")
def stop():
    return make_step(tiny_config("stage1"))


@pytest.fixture(scope="module")
def skip():
    return make_step(tiny_config("stage1", **{"guard.non_finite": "skip", "guard.max_skipped": 1}))


def test_where_all_is_finite_the_guard_changes_no_bit(stop, monkeypatch):
    guarded, state = stop
    monkeypatch.setattr(step_module, "keep_unless", lambda condition, new, old: new)
    plain, unguarded = make_step(tiny_config("stage1"))
    for seed in range(5):
        state, metrics = guarded(state, batch(seed))
        unguarded, expected = plain(unguarded, batch(seed))
        assert same(state, unguarded)
        assert {k: float(v) for k, v in metrics.items()} == {
            k: float(v) for k, v in expected.items()
        }
    assert int(state.step) == 5 and int(state.refused) == 0


@pytest.mark.parametrize("harm", [{"r1": np.nan}, {"r2": np.inf}, {"r0": 0.0}])
def test_a_bad_update_is_refused_and_the_state_waits(stop, harm):
    step, state = stop
    before, _ = step(state, batch())
    after, metrics = step(before, batch(1, **harm))
    assert same(before, after) and not same(state, before)
    assert np.isfinite(float(metrics["loss"])) == (0.0 in harm.values())  # the gradient alone
    later, metrics = step(after, batch(2))  # started before the metrics were read
    assert same(before, later) and int(later.step) == 3 and float(metrics["refused"]) == 1


def test_skipping_leaves_out_the_update_and_no_more(skip):
    step, state = skip
    first, _ = step(state, batch())
    skipped, _ = step(first, batch(1, r1=np.nan))
    third, metrics = step(skipped, batch(2))
    assert same(first, skipped) and not same(skipped, third)
    config = tiny_config("stage1")
    assert float(metrics["learning_rate"]) == float(learning_rate_schedule(config)(2))
    # Adam's counter knows of two updates, the schedule of three steps.
    assert int(third.opt_state[0].count) == 2 and int(third.opt_state[-1].count) == 3
    fourth, metrics = step(third, batch(3, r1=np.nan))
    assert float(metrics["refused"]) == 2  # one more than max_skipped: nothing is applied any more
    assert same(third, step(fourth, batch(4))[0])


def scalars(loss=1.0, refused=0, **more):
    return {"loss": loss, "grad_norm": 1.0, "update_norm": 1.0, "refused": refused} | more


def test_guard_tells_stops_and_counts():
    guard = Guard(tiny_config("stage1"), None)
    assert guard.judge(Kind.VIDEO, scalars()) is None
    alarm = guard.judge(Kind.VIDEO, scalars(float("nan"), 1, vtc=float("inf"), learning_rate=0.1))
    assert alarm.stop and alarm.refused
    assert alarm.what == "loss is nan (loss nan, grad_norm 1, update_norm 1, vtc inf)"
    skipping = tiny_config("stage1", **{"guard.non_finite": "skip", "guard.max_skipped": 1})
    guard = Guard(skipping, None)
    first = guard.judge(Kind.VIDEO, scalars(float("inf"), 1))
    assert not first.stop and "update 1 of 1 that may be skipped" in first.what
    assert guard.counts() == {"guard/skipped": 1.0}
    guard = Guard(skipping, json.loads(json.dumps(guard.state())))  # as a checkpoint keeps it
    assert guard.judge(Kind.VIDEO, scalars(2.0, 1)) is None
    last = guard.judge(Kind.VIDEO, scalars(float("inf"), 2))
    assert last.stop and "more than config.guard.max_skipped=1" in last.what


def test_a_run_that_has_skipped_more_than_it_now_may_does_not_go_on():
    """Its step would refuse every update, without a word."""
    kept = {"refused": 3, "spikes": 0, "losses": {}}
    with pytest.raises(UserError, match=r"skipped 3 updates .* config.guard.max_skipped=3 or more"):
        Guard(tiny_config("stage1"), kept)
    skipping = {"guard.non_finite": "skip", "guard.max_skipped": 2}
    with pytest.raises(UserError, match="may now skip 2"):
        Guard(tiny_config("stage1", **skipping), kept)
    Guard(tiny_config("stage1", **skipping | {"guard.max_skipped": 3}), kept)


def test_spike_alarm_follows_its_rule_across_a_restart():
    config = tiny_config("stage1", **{"guard.spike": 4.0, "guard.spike_window": 5})
    losses = [1.0, 1.2, 0.9, 1.1, 1.0]  # median 1, MAD 0.1: the limit is 1.4
    guard = Guard(config, None)
    assert not any(guard.judge(Kind.VIDEO, scalars(loss)) for loss in [9.0, *losses])
    again = Guard(config, json.loads(json.dumps(guard.state())))
    for one in (guard, again):
        assert one.judge(Kind.IMAGE, scalars(9.0)) is None  # losses of another kind
        assert one.judge(Kind.VIDEO, scalars(1.39)) is None
    alarm = again.judge(Kind.VIDEO, scalars(2.5))
    assert not alarm.stop and not alarm.refused and again.counts() == {"guard/spikes": 1.0}
    assert "times the usual spread (0.1) above the median (1.1) of the last 5" in alarm.what
    config.guard.update(spike_stop=True)
    assert Guard(config, guard.state()).judge(Kind.VIDEO, scalars(2.5)).stop
    config.guard.update(spike=0.0)
    assert Guard(config, guard.state()).judge(Kind.VIDEO, scalars(1e9)) is None


def test_a_constant_loss_makes_no_alarm_of_rounding():
    guard = Guard(tiny_config("stage1", **{"guard.spike_window": 3}), None)
    assert not any(guard.judge(Kind.VIDEO, scalars(x)) for x in (2.0, 2.0, 2.0, 2.0001))
    assert guard.judge(Kind.VIDEO, scalars(2.1))


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        ([{5}], [[5]]),
        ([{0}, {7}], [[0], [7]]),
        ([{2, 3}], [[2, 3]]),  # only together, in one half
        ([{1, 6}], [list(range(8))]),  # only together, across halves
        ([], []),
    ],
)
def test_samples_are_found_by_halving(bad, found):
    def is_bad(places):
        return any(one <= set(places) for one in bad)

    assert list(replay.smallest(is_bad, list(range(8)))) == found


def test_replay_takes_fewer_chips_where_so_many_are_no_rectangle(monkeypatch):
    """JAX lays a mesh on TPU chips only if they are one, which it asserts."""
    make = sharding.make_mesh

    def make_of_rectangles(config, devices):
        assert len(devices) in (1, 2, 4, 8)
        return make(config, devices)

    monkeypatch.setattr(sharding, "make_mesh", make_of_rectangles)
    mesh, _ = replay._fitting(tiny_config("stage1"), groups=6)
    assert mesh.size == 2
