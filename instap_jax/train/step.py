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
StepFunction = Callable[[TrainState, nnx.State, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    config: ConfigDict,
    objective: Objective,
    graphdef: nnx.GraphDef,
    frozen_graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
) -> StepFunction:
    """Returns `step(state, frozen, batch) -> (state, metrics)`, to be jitted by the caller.

    All randomness comes from fold_in(seed, step), so a resumed run draws what the uninterrupted
    one would have drawn. Metrics are float32 scalars: the objective's own terms, `loss`,
    `learning_rate`, `grad_norm`, `param_norm`, `update_norm`.
    """
    schedule = learning_rate_schedule(config)
    accumulate = config.optimizer.accumulate

    def loss_fn(params, frozen, batch, key):
        model = nnx.merge(graphdef, params)
        teacher = nnx.merge(frozen_graphdef, frozen)
        return objective.loss(config, model, teacher, batch, key)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def step(state: TrainState, frozen: nnx.State, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        if accumulate == 1:
            (loss, metrics), grads = grad_fn(state.params, frozen, batch, key)
        else:
            (loss, metrics), grads = _accumulate(
                grad_fn, state.params, frozen, batch, key, accumulate
            )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = metrics | {
            "loss": loss,
            "learning_rate": schedule(state.step),
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
            "update_norm": optax.tree.norm(updates),
        }
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return step


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
