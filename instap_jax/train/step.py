"""One optimizer step, for every stage: a pure function of state, frozen parameters and batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict

from instap_jax import sharding
from instap_jax.train.objectives import Objective
from instap_jax.train.optimizer import learning_rate_schedule
from instap_jax.train.state import TrainState
from instap_jax.types import Batch

Metrics = dict[str, jax.Array]

MUST_BE_FINITE = ("loss", "grad_norm", "update_norm")
StepFunction = Callable[[TrainState, nnx.State, Batch, jax.Array], tuple[TrainState, Metrics]]


def make_train_step(
    config: ConfigDict,
    objective: Objective,
    graphdef: nnx.GraphDef,
    frozen_graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
) -> StepFunction:
    """Returns `step(state, frozen, batch, seed) -> (state, metrics)`, to be jitted by the caller.

    All randomness comes from fold_in(seed, step), so a resumed run draws what the uninterrupted
    one would have drawn. `seed` is a uint32 scalar and an argument, so that runs of all seeds are
    one program and find each other's compiled one. Metrics are float32 scalars: the objective's
    own terms, `loss`, `learning_rate`, `grad_norm`, `param_norm`, `update_norm`, and `refused`.

    An update whose loss, gradient or size is not finite is refused: parameters and optimizer state
    stay as they were before the step, and `refused` counts it. After more refusals than
    `refusals_allowed` every update is refused, without being counted: the state waits, unharmed,
    for whoever reads the metrics some steps later.
    """
    schedule = learning_rate_schedule(config)
    gradient = make_gradient(config, objective, graphdef, frozen_graphdef)
    allowed = refusals_allowed(config)

    def step(state: TrainState, frozen: nnx.State, batch: Batch, seed: jax.Array):
        loss, terms, grads = gradient(state.params, frozen, batch, step_key(seed, state.step))
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = terms | {
            "loss": loss,
            "learning_rate": schedule(state.step),
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
        }
        finite = jnp.isfinite(jnp.stack([metrics[name] for name in MUST_BE_FINITE])).all()
        going_on = state.refused <= allowed
        params, opt_state = keep_unless(
            finite & going_on, (params, opt_state), (state.params, state.opt_state)
        )
        refused = state.refused + (going_on & ~finite)
        metrics |= {"param_norm": optax.tree.norm(params), "refused": refused.astype(jnp.float32)}
        state = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=advance_schedule(opt_state, state.step + 1),
            refused=refused,
        )
        return state, metrics

    return step


def step_key(seed: jax.Array, done: jax.Array | int) -> jax.Array:
    """What all randomness of a step comes from, `done` steps after the start of the run."""
    return jax.random.fold_in(jax.random.key(seed), done)


def refusals_allowed(config: ConfigDict) -> int:
    """How many updates that are not finite a run bears: `config.guard`."""
    return config.guard.max_skipped if config.guard.non_finite == "skip" else 0


def keep_unless(condition: jax.Array, new, old):
    """`new` where the scalar condition holds, else `old`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def advance_schedule(opt_state: optax.OptState, step: jax.Array) -> optax.OptState:
    """The learning rate is that of the step number, whether or not an update was refused."""

    def advance(part):
        scheduled = isinstance(part, optax.ScaleByScheduleState)
        return part._replace(count=step) if scheduled else part

    return jax.tree.map(
        advance, opt_state, is_leaf=lambda part: isinstance(part, optax.ScaleByScheduleState)
    )


def make_gradient(
    config: ConfigDict,
    objective: Objective,
    graphdef: nnx.GraphDef,
    frozen_graphdef: nnx.GraphDef,
) -> Callable[[nnx.State, nnx.State, Batch, jax.Array], tuple[jax.Array, Metrics, nnx.State]]:
    """Returns `gradient(params, frozen, batch, key) -> (loss, terms, gradient)` of a step.

    `key` is that of `step_key`.
    """
    accumulate = config.optimizer.accumulate

    def loss_fn(params, frozen, batch, key):
        model = nnx.merge(graphdef, params)
        teacher = nnx.merge(frozen_graphdef, frozen)
        return objective.loss(config, model, teacher, batch, key)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def gradient(params, frozen, batch, key):
        if accumulate == 1:
            (loss, terms), grads = grad_fn(params, frozen, batch, key)
        else:
            (loss, terms), grads = _accumulate(grad_fn, params, frozen, batch, key, accumulate)
        return loss, terms, grads

    return gradient


def _accumulate(grad_fn, params, frozen, batch, key, count: int):
    """Averages loss, metrics and gradients over `count` parts of the batch, one after another.

    Every device has `count` consecutive groups; part i takes the i-th of each, so cutting the
    batch moves nothing between devices.
    """

    def cut(array):
        return array.reshape((-1, count, *array.shape[1:])).swapaxes(0, 1)

    def body(total, part):
        index, part = part
        part = jax.tree.map(sharding.constrain_batch, part)
        out = grad_fn(params, frozen, part, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, out), None

    parts = jax.tree.map(cut, batch)
    shapes = jax.eval_shape(grad_fn, params, frozen, jax.tree.map(lambda a: a[0], parts), key)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    total, _ = jax.lax.scan(body, zeros, (jnp.arange(count), parts))
    return jax.tree.map(lambda a: a / count, total)
