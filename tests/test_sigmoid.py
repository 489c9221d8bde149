"""The sigmoid loss in stage 'align': whose bias counts where, and that it is not always there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from runner import batch_for
from tiny import tiny_config

from instap_jax import config_check
from instap_jax.errors import UserError
from instap_jax.train.objectives import objective

NAMES = ("contrastive_bias", "instance_contrastive_bias")


def sigmoid_config(**changes):
    config = tiny_config("stage2,sigmoid", **{"data.frames": 2, "vision.depth": 1})
    config.update_from_flattened_dict(changes)
    return config


def abstract(config):
    """(graphdef, abstract parameters) of the stage."""
    return nnx.split(nnx.eval_shape(lambda: objective(config).create(config, nnx.Rngs(0))))


@pytest.mark.parametrize("own", [True, False])
def test_each_term_answers_to_its_own_bias(own):
    config = sigmoid_config(**{"align.own_temperature": own})
    graphdef, params = abstract(config)
    params = jax.tree.map(
        lambda a: jnp.asarray(np.random.default_rng(a.shape).normal(0, 0.2, a.shape), a.dtype),
        params,
    )
    batch = batch_for(config, groups=2)

    @jax.jit
    def terms(bias, instance_bias):
        for name, value in zip(NAMES, (bias, instance_bias)):
            params[name] = params[name].replace(value)
        model = nnx.merge(graphdef, params)
        _, metrics = objective(config).loss(config, model, nnx.Dict(), batch, jax.random.key(0))
        return metrics["vtc"], metrics["inst_vtc"]

    at = [np.array(terms(*biases)) for biases in ((-3.0, -3.0), (-1.0, -3.0), (-3.0, -1.0))]
    by_bias, by_instance_bias = abs(at[1] - at[0]) > 1e-3, abs(at[2] - at[0]) > 1e-3
    assert by_bias.tolist() == [True, not own]
    assert by_instance_bias.tolist() == [False, own]


def test_a_run_by_infonce_has_no_bias_and_only_alignment_may_have_one():
    assert not set(NAMES) & set(abstract(tiny_config("stage2"))[1])
    params = abstract(sigmoid_config())[1]
    assert set(NAMES) <= set(params)
    assert all(params[name].get_value().shape == () for name in NAMES)
    with pytest.raises(UserError, match="is of stage 'align' alone"):
        config_check.check(tiny_config("teacher", **{"contrastive.loss": "sigmoid"}))
