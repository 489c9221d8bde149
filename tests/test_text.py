"""The text tower against Hugging Face BERT: layer by layer, end to end, value and gradient."""

import dataclasses
import functools

import bert_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.bert import modeling_bert as hf

from instap_jax import config as configuration
from instap_jax import losses
from instap_jax.models import depth
from instap_jax.models.layers import Context
from instap_jax.models.text import FusionTexts, MatchHead, TextEncoder, text_mask

VOCAB, WIDTH, HEADS, HIDDEN, LENGTH, VISION = 60, 32, 4, 64, 12, 24
TEXT_LAYERS, FUSION_LAYERS = 2, 2
LAYER, END_TO_END = 1e-5, 1e-4
IDS = np.array([[2, 17, 33, 5, 9, 3], [2, 8, 59, 3, 0, 0], [2, 3, 0, 0, 0, 0]], np.int32)


def settings(**change):
    c = configuration.default().text
    tiny = {
        "vocab_size": VOCAB,
        "width": WIDTH,
        "heads": HEADS,
        "mlp_ratio": HIDDEN / WIDTH,
        "max_length": LENGTH,
        "depth": TEXT_LAYERS + FUSION_LAYERS,
        "fusion_layers": FUSION_LAYERS,
    }
    c.update(tiny | change)
    return c


def make(vision_width=VISION, dtype=jnp.float32, remat="none", **change):
    rngs = nnx.Rngs(0)
    return TextEncoder(
        settings(**change), vision_width=vision_width, dtype=dtype, remat=remat, rngs=rngs
    )


@functools.cache
def towers():
    """The reference with random weights, and ours with the same."""
    config = reference.make_config(
        vocab=VOCAB, width=WIDTH, heads=HEADS, hidden=HIDDEN, length=LENGTH
    )
    theirs = reference.Tower(config, TEXT_LAYERS, FUSION_LAYERS, VISION).eval()
    reference.randomise(theirs, seed=0)
    ours = nnx.eval_shape(make)
    load(ours, state_of(theirs))
    return theirs, ours


@functools.cache
def compiled():
    """Our (encode, fuse) on arrays, each compiled once per shape."""
    ours = towers()[1]

    def fuse(tokens, ids, visual, visual_mask):
        return ours.fuse(tokens, text_mask(ids), visual, visual_mask=visual_mask)

    return jax.jit(lambda ids: ours.encode(ids).tokens), jax.jit(fuse)


def state_of(tower):
    def stacked(modules):
        blocks = [reference.block(module, HEADS) for module in modules]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)

    return {
        "embeddings": reference.embeddings(tower.embeddings),
        "blocks": stacked(tower.text),
        "fusion_blocks": stacked(tower.fusion),
        "mlm_head": reference.head(tower.head),
    }


def load(module, tree):
    """Sets every parameter of the module; keys and shapes must match exactly."""
    state = nnx.state(module)
    have = {path: leaf.get_value().shape for path, leaf in nnx.to_flat_state(state)}
    flat = {
        tuple(key.key for key in path): value
        for path, value in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    assert {path: value.shape for path, value in flat.items()} == have
    nnx.update(module, nnx.from_flat_state({p: jnp.asarray(v) for p, v in flat.items()}))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def check(ours, theirs, tolerance):
    if isinstance(theirs, torch.Tensor):
        theirs = theirs.detach().numpy()
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=tolerance)


VISUAL = normal(3, 7, VISION, seed=1)
VISUAL_MASK = np.arange(7) < np.array([7, 4, 1])[:, None]


def test_embeddings_match_bert():
    theirs, ours = towers()
    check(ours.embeddings(IDS), theirs.embeddings(torch.tensor(IDS)), LAYER)


@pytest.mark.parametrize("index", range(TEXT_LAYERS))
def test_each_text_layer_matches_bert(index):
    theirs, ours = towers()
    x, mask = normal(3, 6, WIDTH, seed=index), text_mask(IDS)
    expected = theirs.text[index](torch.tensor(x), reference.additive(torch.tensor(mask)))
    check(depth.layer(ours.blocks, index)(x, mask=mask), expected, LAYER)


@pytest.mark.parametrize("index", range(FUSION_LAYERS))
def test_each_fusion_layer_matches_bert(index):
    theirs, ours = towers()
    x, mask = normal(3, 6, WIDTH, seed=index), text_mask(IDS)
    expected = theirs.fusion[index](
        torch.tensor(x),
        reference.additive(torch.tensor(mask)),
        torch.tensor(VISUAL),
        reference.additive(torch.tensor(VISUAL_MASK)),
    )
    layer = depth.layer(ours.fusion_blocks, index)
    actual = layer(x, mask=mask, contexts=[Context(tokens=VISUAL[None], mask=VISUAL_MASK[None])])
    check(actual, expected, LAYER)


def test_text_only_tower_matches_bert_model_end_to_end():
    config = reference.make_config(
        vocab=VOCAB, width=WIDTH, heads=HEADS, hidden=HIDDEN, length=LENGTH
    )
    config.num_hidden_layers = 3
    theirs = hf.BertModel(config, add_pooling_layer=False).eval()
    reference.randomise(theirs, seed=1)
    blocks = [reference.block(layer, HEADS) for layer in theirs.encoder.layer]
    ours = nnx.eval_shape(lambda: make(vision_width=None, depth=3))
    load(
        ours,
        {
            "embeddings": reference.embeddings(theirs.embeddings),
            "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks),
        },
    )
    expected = theirs(torch.tensor(IDS), attention_mask=torch.tensor(IDS != 0)).last_hidden_state
    output = ours.encode(IDS)
    check(output.tokens, expected, END_TO_END)
    check(output.pooled, expected[:, 0], END_TO_END)


def test_fusion_and_masked_language_head_match_bert_end_to_end():
    theirs, ours = towers()
    ids, mask = torch.tensor(IDS), torch.tensor(IDS != 0)
    fused = theirs.fuse(
        theirs.encode(ids, mask), mask, torch.tensor(VISUAL), torch.tensor(VISUAL_MASK)
    )
    tokens = ours.fuse(ours.encode(IDS).tokens, text_mask(IDS), VISUAL, visual_mask=VISUAL_MASK)
    check(tokens, fused, END_TO_END)
    check(ours.mlm_logits(tokens), theirs.head(fused), END_TO_END)


def test_gradients_of_the_masked_language_loss_match_bert():
    theirs, ours = towers()
    targets = np.array([[-100, 17, -100, 5, -100, 3], [-100, 8] + [-100] * 4, [-100] * 6])
    ids, mask = torch.tensor(IDS), torch.tensor(IDS != 0)
    visual = torch.tensor(VISUAL, requires_grad=True)
    theirs.zero_grad()
    fused = theirs.fuse(theirs.encode(ids, mask), mask, visual, torch.tensor(VISUAL_MASK))
    expected = torch.nn.functional.cross_entropy(
        theirs.head(fused).flatten(0, 1), torch.tensor(targets).flatten()
    )
    expected.backward()

    graph, state = nnx.split(ours)

    def loss(state, visual):
        model = nnx.merge(graph, state)
        tokens = model.encode(IDS).tokens
        fused = model.fuse(tokens, text_mask(IDS), visual, visual_mask=VISUAL_MASK)
        return losses.masked_language_loss(model.mlm_logits(fused), targets, jnp.ones(3, bool))

    value, (by_state, by_visual) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(state, VISUAL)
    check(value, expected, LAYER)
    check(by_visual, visual.grad, LAYER)
    # The reference with every weight replaced by its gradient converts like the weights.
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.grad, parameter.data = None, parameter.grad
    gradients = state_of(theirs)
    reference.randomise(theirs, seed=0)
    # [PAD] has no input gradient in torch (padding_idx) but both have the tied decoder's.
    jax.tree.map(lambda a, b: check(a, b, END_TO_END), nnx.to_pure_dict(by_state), gradients)


def test_padding_changes_no_token():
    encode, fuse = compiled()
    tokens, short = encode(IDS), encode(IDS[:, :4])
    check(tokens[1:, :4], np.asarray(short[1:]), LAYER)  # sample 0 has six tokens
    fused = fuse(tokens, IDS, VISUAL, VISUAL_MASK)
    without = fuse(short[1:2], IDS[1:2, :4], VISUAL[1:2, :4], np.ones((1, 4), bool))
    check(fused[1:2, :4], np.asarray(without), LAYER)
    noise = np.where(VISUAL_MASK[..., None], VISUAL, 1e4)
    check(fuse(tokens, IDS, noise, VISUAL_MASK), np.asarray(fused), LAYER)


def test_texts_fused_together_are_as_if_fused_by_kind():
    """Kinds of other counts, lengths of context and masks; two groups; values and gradients."""
    _, ours = towers()
    rng = np.random.default_rng(0)
    kinds = []
    for count, visible in ((3, 7), (1, 1), (2, 4)):
        seen = rng.random((2, count, visible)) < 0.7
        kinds.append(
            FusionTexts(
                tokens=jnp.asarray(rng.normal(size=(2, count, 5, WIDTH)), jnp.float32),
                mask=jnp.arange(5) < rng.integers(2, 6, (2, count, 1)),
                visual=jnp.asarray(rng.normal(size=(2, count, visible, VISION)), jnp.float32),
                visual_mask=None if visible == 1 else jnp.asarray(seen),
            )
        )

    def together(kinds):
        return ours.fuse_together(kinds)

    def apart(kinds):
        def fuse(kind):
            flat = jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), kind)
            fused = ours.fuse(flat.tokens, flat.mask, flat.visual, visual_mask=flat.visual_mask)
            return fused.reshape(kind.tokens.shape)

        return [fuse(kind) for kind in kinds]

    def value_and_gradient(fuse):
        def loss(floats):
            pairs = zip(kinds, floats)
            given = [dataclasses.replace(kind, tokens=t, visual=v) for kind, (t, v) in pairs]
            fused = fuse(given)
            return sum(jnp.sum(jnp.sin((i + 1) * x)) for i, x in enumerate(fused)), fused

        floats = [(kind.tokens, kind.visual) for kind in kinds]
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(floats)

    (_, fused), gradient = value_and_gradient(together)
    (_, expected), expected_gradient = value_and_gradient(apart)
    jax.tree.map(lambda a, b: check(a, np.asarray(b), LAYER), fused, expected)
    jax.tree.map(lambda a, b: check(a, np.asarray(b), END_TO_END), gradient, expected_gradient)


def test_a_sample_without_text_or_visual_tokens_stays_finite():
    encode, fuse = compiled()
    ids = np.zeros_like(IDS)
    fused = fuse(encode(ids), ids, VISUAL, np.zeros_like(VISUAL_MASK))
    assert np.isfinite(np.asarray(fused)).all()


def test_dropout_needs_a_key_and_follows_it():
    _, ours = towers()
    encode, fuse = compiled()
    tokens = encode(IDS)
    plain = tokens, fuse(tokens, IDS, VISUAL, VISUAL_MASK)

    @jax.jit
    def run(seed):
        encode_key, fuse_key = jax.random.split(jax.random.key(seed))
        fused = ours.fuse(tokens, text_mask(IDS), VISUAL, visual_mask=VISUAL_MASK, key=fuse_key)
        return ours.encode(IDS, key=encode_key).tokens, fused

    for first, again, other, without in zip(run(0), run(0), run(1), plain):
        np.testing.assert_array_equal(first, again)
        assert np.abs(np.asarray(first - other)).max() > 0.1
        assert np.abs(np.asarray(first - without)).max() > 0.1


def test_every_dropout_of_a_layer_draws_its_own_noise():
    block = depth.layer(towers()[1].fusion_blocks, 0)
    x, mask, key = normal(2, 6, WIDTH), np.ones((2, 6), bool), jax.random.key(0)
    drawn, rates = [], []

    def record(x, *, rate, key):
        rates.append(rate)
        drawn.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))
        return x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("instap_jax.models.text.dropout", record)
        patch.setattr("instap_jax.models.layers.dropout", record)
        contexts = [Context(tokens=VISUAL[None, i : i + 1]) for i in range(2)]
        block(x, mask=mask, contexts=contexts, key=key)
    # BERT: attention probabilities and output of each attention, and the MLP's output.
    assert len(drawn) == 6 == len(set(drawn)) and set(rates) == {0.1}


@pytest.mark.parametrize("remat", ["dots", "all"])
def test_rematerialisation_changes_nothing(remat):
    _, ours = towers()
    other = nnx.eval_shape(lambda: make(remat=remat))
    nnx.update(other, nnx.state(ours))
    encode, fuse = compiled()
    tokens = encode(IDS)
    check(jax.jit(other.encode)(IDS).tokens, np.asarray(tokens), LAYER)
    fused = jax.jit(other.fuse)(tokens, text_mask(IDS), VISUAL, visual_mask=VISUAL_MASK)
    check(fused, np.asarray(fuse(tokens, IDS, VISUAL, VISUAL_MASK)), LAYER)


def test_bfloat16_tower_stays_close_and_keeps_float32_parameters_and_logits():
    _, ours = towers()
    other = nnx.eval_shape(lambda: make(dtype=jnp.bfloat16))
    nnx.update(other, nnx.state(ours))
    output = other.encode(IDS)
    assert output.tokens.dtype == jnp.bfloat16
    check(output.tokens.astype(jnp.float32), np.asarray(compiled()[0](IDS)), 0.15)
    assert other.mlm_logits(output.tokens).dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(other)))


def test_bert_large_has_exactly_umts_weights_and_names_their_axes():
    ours = nnx.eval_shape(
        lambda: TextEncoder(
            configuration.default().text,
            vision_width=1024,
            dtype=jnp.bfloat16,
            remat="none",
            rngs=nnx.Rngs(0),
        )
    )
    leaves = nnx.to_flat_state(nnx.state(ours))
    with torch.device("meta"):
        config = reference.make_config(vocab=30522, width=1024, heads=16, hidden=4096, length=512)
        theirs = reference.Tower(config, 19, 5, 1024)
    expected = sum(parameter.numel() for parameter in theirs.parameters())
    assert sum(np.prod(leaf.get_value().shape) for _, leaf in leaves) == expected
    for path, leaf in leaves:
        stacked = path[0] in ("blocks", "fusion_blocks")
        axes = leaf.get_metadata()["logical_axes"]
        assert len(axes) + stacked == len(leaf.get_value().shape), path


def test_match_head_reads_the_class_token():
    head = MatchHead(WIDTH, rngs=nnx.Rngs(0))
    x = normal(3, 6, WIDTH)
    changed = x.copy()
    changed[:, 1:] += 1
    assert head(x).shape == (3, 2)
    np.testing.assert_array_equal(head(x), head(changed))


def test_match_logits_of_rounded_tokens_are_not_rounded():
    """Two candidates in a thousand at most may tie; in bfloat16 hundreds do."""
    head = MatchHead(WIDTH, rngs=nnx.Rngs(0))
    logits = head(jnp.asarray(normal(1000, 1, WIDTH), jnp.bfloat16))
    assert logits.dtype == jnp.float32
    assert len(np.unique(logits[:, 1])) > 997


@pytest.mark.parametrize("fusion_layers", [0, 4, 5])
def test_impossible_numbers_of_fusion_layers_are_refused(fusion_layers):
    with pytest.raises(ValueError, match=f"fusion_layers is {fusion_layers}"):
        make(fusion_layers=fusion_layers)


def test_a_text_longer_than_the_position_table_is_refused():
    with pytest.raises(ValueError, match="13 tokens"):
        towers()[1].encode(np.ones((1, 13), np.int32))
