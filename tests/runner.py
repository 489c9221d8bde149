"""A stage compiled for tests: one or eight devices, a random batch, the teacher at random."""

import dataclasses

import jax
import numpy as np
from batches import random_batch
from flax import nnx

from instap_jax import sharding
from instap_jax.train.program import build_program
from instap_jax.train.state import shardings


class Runner:
    """A compiled stage on the first `devices` devices, its teacher at random."""

    def __init__(self, config, devices: int):
        self.mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
        with jax.set_mesh(self.mesh):
            self.program = build_program(config, self.mesh)
            self.initial = jax.device_get(self.program.init())
            self.frozen = jax.tree.map(random_like, self.program.frozen_abstract)

    def run(self, batch, steps: int = 1, *, first: int = 0):
        """State and metrics after `steps` steps on the same batch, counting from `first`."""
        state = dataclasses.replace(self.initial, step=np.int32(first))
        state = jax.device_put(state, shardings(self.program.abstract))
        batch = jax.device_put(batch, sharding.batch_sharding(self.mesh))
        history = []
        with jax.set_mesh(self.mesh):
            for _ in range(steps):
                state, metrics = self.program.step(state, self.frozen, batch, self.program.seed)
                history.append({name: float(value) for name, value in metrics.items()})
        return jax.device_get(state), history


def batch_for(config, groups: int = 8):
    return random_batch(
        groups=groups,
        group_size=config.data.batch_size // groups,
        frames=config.data.frames,
        canvas=tuple(config.data.canvas),
        text_length=config.tokenizer.length,
        vocab_size=config.text.vocab_size,
    )


def random_like(leaf):
    rng = np.random.default_rng(list(leaf.shape))
    value = rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype)
    return jax.device_put(value, leaf.sharding)


def assert_close(first, second, tolerance):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(second)):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)


def gradients(state) -> dict:
    """Adam's first moments after one step: the gradients, times 0.1."""
    return nnx.to_pure_dict(state.opt_state[0].mu)


def largest(tree) -> float:
    return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))
