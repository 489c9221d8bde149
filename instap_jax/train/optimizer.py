"""AdamW with warm-up cosine, decay mask, layer decay and clipping, from `config.optimizer`."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict

# Parameters with these words in their path are never decayed (UMT `no_weight_decay`): they are
# tables or tokens rather than weights of a product.
NO_DECAY = ("position", "class_token", "token_type", "temperature")

# Names of what an encoder has beneath its blocks, for layer decay.
BELOW_BLOCKS = ("embedding", "position", "class_token", "ln_pre")


def learning_rate_schedule(config: ConfigDict) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then cosine to the minimum at `config.steps`.

    With `optimizer.reference_batch` set, both rates scale with batch_size / reference_batch, the
    linear rule of UMT's run_umt_pretraining.py.
    """
    c = config.optimizer
    scale = config.data.batch_size / c.reference_batch if c.reference_batch else 1.0
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=c.learning_rate * scale,
        warmup_steps=c.warmup_steps,
        decay_steps=config.steps,
        end_value=c.min_learning_rate * scale,
    )


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """The update rule of every stage.

    Order: clip the global gradient norm, Adam moments, decoupled weight decay, layer decay, rate.
    Layer decay comes after weight decay, so that both shrink together, as with the per-group
    learning rates of UMT's optim_factory.py.
    """
    c = config.optimizer
    parts = []
    if c.clip_norm:
        parts.append(optax.clip_by_global_norm(c.clip_norm))
    parts += [
        optax.scale_by_adam(b1=c.betas[0], b2=c.betas[1], eps=c.epsilon),
        optax.add_decayed_weights(c.weight_decay, mask=decay_mask),
    ]
    if c.layer_decay != 1.0:
        parts.append(_scale_by_layer(c.layer_decay))
    if config.stage == "classify" and config.classify.frozen:
        parts.append(_train_only("head"))
    parts.append(optax.scale_by_learning_rate(learning_rate_schedule(config)))
    return optax.chain(*parts)


def decay_mask(params: nnx.State) -> nnx.State:
    """True for weight matrices and word embeddings, False for biases, norms, `NO_DECAY`.

    Biases are known by their name: those of attention have an axis for each of query, key and
    value and one for the heads. Norms' scales are known by their single axis: `logical_axes`
    describes a parameter without its stacked layer axis.
    """

    def decays(path, leaf: nnx.Variable):
        keys = _keys(path)
        spared = keys[-1].endswith("bias") or any(word in key for word in NO_DECAY for key in keys)
        return leaf.replace(len(leaf.get_metadata().get("logical_axes", ())) >= 2 and not spared)

    return _map_variables(decays, params)


def layer_scales(params: nnx.State, decay: float) -> nnx.State:
    """Factors of the learning rate: decay ** (number of layers above).

    For an encoder of L blocks, block i (0 at the bottom) gets decay ** (L - i), what lies below
    the blocks (patch and token embeddings, class token, position table) decay ** (L + 1), what
    lies above them 1 (UMT optim_factory.py LayerDecayValueAssigner).
    """
    depths: dict[tuple[str, ...], int] = {}  # path of a module that owns `blocks` -> how many
    for keys, leaf in _variables(params):
        if "blocks" in keys:
            depths[keys[: keys.index("blocks")]] = leaf.get_value().shape[0]

    def scale(path, leaf: nnx.Variable):
        keys, value = _keys(path), leaf.get_value()
        owner = next((keys[:n] for n in reversed(range(len(keys))) if keys[:n] in depths), None)
        if owner is None:
            return leaf.replace(jnp.float32(1.0))
        if keys[len(owner)] == "blocks":
            powers = decay ** (depths[owner] - jnp.arange(depths[owner], dtype=jnp.float32))
            return leaf.replace(powers.reshape((-1,) + (1,) * (value.ndim - 1)))
        below = any(word in keys[len(owner)] for word in BELOW_BLOCKS)
        return leaf.replace(jnp.float32(decay ** (depths[owner] + 1) if below else 1.0))

    return _map_variables(scale, params)


def _scale_by_layer(decay: float) -> optax.GradientTransformation:
    def update(updates, state, params=None):
        del params
        scaled = jax.tree.map(jnp.multiply, updates, layer_scales(updates, decay))
        return scaled, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _train_only(module: str) -> optax.GradientTransformation:
    """No update at all, not even weight decay, to what lies outside a top-level module."""

    def update(updates, state, params=None):
        del params

        def keep(path, leaf: nnx.Variable):
            return leaf if _keys(path)[0] == module else leaf.replace(0 * leaf.get_value())

        return _map_variables(keep, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _map_variables(function, tree):
    return jax.tree_util.tree_map_with_path(
        function, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )


def _variables(params) -> list[tuple[tuple[str, ...], nnx.Variable]]:
    leaves = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    return [(_keys(path), leaf) for path, leaf in leaves]


def _keys(path) -> tuple[str, ...]:
    return tuple(str(getattr(entry, "key", entry)) for entry in path)
