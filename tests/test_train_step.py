"""The step as a function: devices, accumulation, randomness, optimizer, FLOPs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from runner import Runner, assert_close, batch_for
from tiny import tiny_config

from instap_jax import sharding
from instap_jax.errors import UserError
from instap_jax.models import depth
from instap_jax.train import flops, optimizer
from instap_jax.train.feed import abstract_batch, batch_shape
from instap_jax.train.kinds import kind_of_step
from instap_jax.train.objectives import OBJECTIVES
from instap_jax.train.program import build_program, offloaded_bytes
from instap_jax.types import Kind


@pytest.mark.parametrize("part", ["teacher", "stage1"])
def test_eight_devices_equal_one(part):
    config = tiny_config(part)
    batch = batch_for(config)
    one, history_one = Runner(config, 1).run(batch)
    config.mesh.update(replica=2, fsdp=2, tensor=2)
    many, history_many = Runner(config, 8).run(batch)
    assert history_one[0] == pytest.approx(history_many[0], rel=1e-4, abs=1e-6)
    # The first moments are the gradients; Adam's first update is only their signs.
    assert_close(one.opt_state, many.opt_state, 1e-6)


def test_parameters_are_split_as_the_rules_say():
    config = tiny_config("stage1")
    config.mesh.update(replica=1, fsdp=4, tensor=2)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        program = build_program(config, mesh)
    params = program.abstract.params["encoder"]
    kernel = jax.tree.leaves(params["blocks"]["mlp"])
    specs = {leaf.sharding.spec for leaf in kernel}
    assert jax.sharding.PartitionSpec(None, "fsdp", "tensor") in specs
    moments = jax.tree.map(lambda leaf: leaf.sharding.spec, program.abstract.opt_state[0].mu)
    assert jax.tree.all(
        jax.tree.map(
            lambda spec, leaf: spec == leaf.sharding.spec, moments, program.abstract.params
        )
    )


def test_accumulation_averages_the_parts():
    """Two groups one after the other give the mean of their gradients, as one batch would."""
    config = tiny_config("stage1")
    config.distill.mask_choice = "topk"  # no draw: the parts then see what the whole sees
    config.data.update(view_area=(1.0, 1.0), view_aspect=(1.0, 1.0), flip=False, canvas=(24, 24))
    batch = batch_for(config, groups=2)
    batch["extent"][:] = 1.0  # a square picture: the one allowed view is the whole of it
    whole, whole_history = Runner(config, 1).run(batch)
    config.optimizer.accumulate = 2
    parts, parts_history = Runner(config, 1).run(batch)
    assert parts_history[0]["loss"] == pytest.approx(whole_history[0]["loss"], rel=1e-5)
    assert_close(whole.opt_state, parts.opt_state, 1e-6)


@pytest.fixture(scope="module")
def distill_runner():
    return Runner(tiny_config("stage1"), 1)


def test_randomness_depends_on_the_step_alone(distill_runner):
    batch = batch_for(tiny_config("stage1"))
    _, first = distill_runner.run(batch, 2)
    _, again = distill_runner.run(batch, 2)
    _, later = distill_runner.run(batch, 1, first=7)
    assert first == again
    assert first[0]["loss"] != later[0]["loss"]


def test_invalid_samples_carry_no_weight(distill_runner):
    config = tiny_config("stage1")
    batch, noisy = batch_for(config), batch_for(config)
    for one in (batch, noisy):
        one["sample_valid"][2:] = False
    batch["frames"][2:] = 0
    a, _ = distill_runner.run(batch)
    b, _ = distill_runner.run(noisy)
    assert_close(a.params, b.params, 0)


def test_batch_shape_and_its_error():
    config = tiny_config("stage1")
    mesh = sharding.make_mesh(config.mesh)
    assert batch_shape(config, mesh) == (8, 1)
    config.data.batch_size = 12
    with pytest.raises(UserError, match="choose a multiple of 8"):
        batch_shape(config, mesh)
    config.data.update(batch_size=32, group_size=2)
    assert batch_shape(config, mesh) == (16, 2)


def test_kind_schedule_is_even_and_a_function_of_the_step():
    config = tiny_config("stage1")
    config.data.update(videos="a:train", images="b:train", image_fraction=0.3)
    kinds = [kind_of_step(config, step) for step in range(1000)]
    assert kinds.count(Kind.IMAGE) == 300
    runs = "".join("i" if kind is Kind.IMAGE else "v" for kind in kinds).split("i")
    assert max(map(len, runs)) <= 3
    config.data.images = ""
    assert {kind_of_step(config, step) for step in range(50)} == {Kind.VIDEO}


class Encoder(nnx.Module):
    def __init__(self):
        self.patch_embedding = nnx.Param(jnp.ones((3, 2)), logical_axes=("patch", "embed"))
        self.blocks = nnx.Dict(
            kernel=nnx.Param(jnp.ones((4, 2, 2)), logical_axes=("embed", "mlp")),
            bias=nnx.Param(jnp.ones((4, 2)), logical_axes=("mlp",)),
        )
        self.norm = nnx.Param(jnp.ones(2), logical_axes=("embed",))
        self.position_table = nnx.Param(jnp.ones((5, 2)), logical_axes=(None, "embed"))
        self.token_types = nnx.Param(jnp.ones((2, 2)), logical_axes=(None, "embed"))


class Model(nnx.Module):
    def __init__(self):
        self.encoder = Encoder()
        self.head = nnx.Param(jnp.ones((2, 3)), logical_axes=("embed", "proj"))
        self.temperature = nnx.Param(jnp.float32(0.07), logical_axes=())


def test_decay_spares_biases_norms_tables_and_temperatures():
    decays = nnx.to_pure_dict(optimizer.decay_mask(nnx.state(Model())))
    assert decays == {
        "encoder": {
            "patch_embedding": True,
            "blocks": {"kernel": True, "bias": False},
            "norm": False,
            "position_table": False,
            "token_types": False,
        },
        "head": True,
        "temperature": False,
    }


# Last words of the names of every parameter that the stages have, by whether it is decayed.
DECAYED = {"kernel", "qkv", "query", "key_value", "words"}
SPARED = {
    "bias", "qkv_bias", "query_bias", "key_value_bias", "scale", "positions", "token_types",
    "class_token", "temperature", "instance_temperature",
    "contrastive_bias", "instance_contrastive_bias",
}  # fmt: skip


def abstract_params(part):
    config = tiny_config(part)
    config.classify.classes = ("a", "b")
    stage = OBJECTIVES[config.stage]
    return nnx.state(nnx.eval_shape(lambda: stage.create(config, nnx.Rngs(0))))


def test_decay_of_every_parameter_of_every_stage():
    """Attention's biases have three axes, and none of them is a weight of a product."""
    parts = ("teacher", "stage1", "stage2,box_codes", "stage2,sigmoid", "ground", "classify")
    found = {
        (path[-1], leaf.get_value())
        for part in parts
        for path, leaf in nnx.to_flat_state(optimizer.decay_mask(abstract_params(part)))
    }
    assert {name for name, decays in found if decays} == DECAYED
    assert {name for name, decays in found if not decays} == SPARED


def test_layer_decay_falls_towards_the_input():
    scales = nnx.to_pure_dict(optimizer.layer_scales(nnx.state(Model()), 0.5))
    blocks = scales["encoder"]["blocks"]
    np.testing.assert_allclose(blocks["kernel"].ravel(), [0.0625, 0.125, 0.25, 0.5])
    np.testing.assert_allclose(blocks["bias"].ravel(), [0.0625, 0.125, 0.25, 0.5])
    assert scales["encoder"]["patch_embedding"] == scales["encoder"]["position_table"] == 0.5**5
    assert scales["encoder"]["norm"] == scales["head"] == scales["temperature"] == 1.0


def test_layer_decay_shrinks_weight_decay_too():
    config = tiny_config("stage1")
    config.optimizer.update(warmup_steps=0, layer_decay=0.5, weight_decay=0.1, learning_rate=0.01)
    params = nnx.state(Model())
    tx = optimizer.make_optimizer(config)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    kernel = updates["encoder"]["blocks"]["kernel"][...][:, 0, 0]
    np.testing.assert_allclose(kernel, -0.001 * np.array([0.0625, 0.125, 0.25, 0.5]), rtol=1e-5)
    np.testing.assert_allclose(updates["head"][...], -0.001, rtol=1e-5)


def test_adamw_equals_torch():
    config = tiny_config("stage1")
    config.steps, config.data.batch_size = 10, 8
    config.optimizer.update(warmup_steps=3, reference_batch=4, clip_norm=0.5)
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(3, 4)), rng.normal(size=4)
    grads = [(rng.normal(size=(3, 4)), rng.normal(size=4)) for _ in range(10)]
    schedule = optimizer.learning_rate_schedule(config)

    params = nnx.State(
        {
            "kernel": nnx.Param(jnp.asarray(kernel, jnp.float32), logical_axes=("embed", "mlp")),
            "bias": nnx.Param(jnp.asarray(bias, jnp.float32), logical_axes=("mlp",)),
        }
    )
    tx = optimizer.make_optimizer(config)
    state = tx.init(params)
    w = torch.nn.Parameter(torch.tensor(kernel))
    b = torch.nn.Parameter(torch.tensor(bias))
    c = config.optimizer
    reference = torch.optim.AdamW(
        [
            {"params": [w], "weight_decay": c.weight_decay},
            {"params": [b], "weight_decay": 0.0},
        ],
        betas=tuple(c.betas),
        eps=c.epsilon,
    )
    for step, (gw, gb) in enumerate(grads):
        grad = jax.tree.map(jnp.zeros_like, params)
        grad["kernel"][...] = jnp.asarray(gw, jnp.float32)
        grad["bias"][...] = jnp.asarray(gb, jnp.float32)
        updates, state = tx.update(grad, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        w.grad, b.grad = torch.tensor(gw), torch.tensor(gb)
        torch.nn.utils.clip_grad_norm_([w, b], 0.5)
        for group in reference.param_groups:
            group["lr"] = float(schedule(step))
        reference.step()
    np.testing.assert_allclose(params["kernel"][...], w.detach().numpy(), atol=2e-6)
    np.testing.assert_allclose(params["bias"][...], b.detach().numpy(), atol=2e-6)


def test_schedule_scales_with_the_batch():
    config = tiny_config("stage1")
    config.steps = 100
    config.data.batch_size = 512
    config.optimizer.update(
        learning_rate=1.0, min_learning_rate=0.1, warmup_steps=10, reference_batch=256
    )
    schedule = optimizer.learning_rate_schedule(config)
    assert [float(schedule(s)) for s in (0, 5, 10, 100)] == pytest.approx([0, 1, 2, 0.2])


def test_all_seeds_are_one_program():
    texts = []
    for seed in (0, 1):
        config = tiny_config("stage1", seed=seed)
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
        with jax.set_mesh(mesh):
            program = build_program(config, mesh)
            frozen = program.frozen_abstract
            batch = abstract_batch(config, mesh, Kind.VIDEO)
            args = (program.abstract, frozen, batch, program.seed)
            texts.append(program.step.lower(*args).as_text())
    assert texts[0] == texts[1]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_bytes_that_a_step_keeps_in_the_hosts_memory(monkeypatch, accumulate):
    changes = {"compute.remat": "offload", "optimizer.accumulate": accumulate}
    config = tiny_config("stage1", **changes)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:2])

    def found() -> int:
        with jax.set_mesh(mesh):
            program = build_program(config, mesh)
            return offloaded_bytes(program, abstract_batch(config, mesh, Kind.VIDEO))

    assert found() == 0  # activations of a tiny model stay where they are
    monkeypatch.setattr(depth, "OFFLOADED_FROM", 1)
    samples, tokens = config.data.batch_size // accumulate, visible_tokens(config)
    layers = config.vision.depth
    assert found() == layers * samples * tokens * config.vision.width * 4


def visible_tokens(config) -> int:
    side = config.vision.image_size // config.vision.patch
    a_frame = side**2 - math.ceil(config.distill.mask_ratio * side**2)
    return config.data.frames * a_frame


def test_what_a_step_draws_follows_the_seed():
    runner = Runner(tiny_config("stage1"), 1)
    batch = batch_for(tiny_config("stage1"))
    losses = []
    for seed in (0, 0, 1):  # the same parameters: those of seed 0
        runner.program = dataclasses.replace(runner.program, seed=np.uint32(seed))
        losses.append(runner.run(batch)[1][0]["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_flops_of_scans_and_remat_are_exact():
    weights = jnp.ones((6, 8, 8))

    def forward(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()

    one = 2 * 4 * 8 * 8
    x = jnp.ones((4, 8))
    assert flops.count_flops(forward, x, weights) == 6 * one
    # backward: one product for the input, one for the weight of each layer
    assert flops.count_flops(jax.jit(jax.grad(forward, (0, 1))), x, weights) == 3 * 6 * one

    def branch(x):
        return jax.lax.cond(x.sum() > 0, lambda x: x @ weights[0], lambda x: x, x)

    assert flops.count_flops(branch, x) == one


def test_model_flops_of_the_student_by_hand():
    config = tiny_config("stage1")
    config.update_from_flattened_dict({"compute.remat": "all"})
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    from instap_jax.models.vision import VisionEncoder

    with jax.set_mesh(mesh):
        encoder = nnx.eval_shape(
            lambda: VisionEncoder(config.vision, dtype=jnp.float32, remat="all", rngs=nnx.Rngs(0))
        )
        graphdef, params = nnx.split(encoder)
        video = jax.ShapeDtypeStruct((2, 4, 16, 16, 3), jnp.float32)
        count = flops.count_flops(lambda p, v: nnx.merge(graphdef, p)(v).tokens, params, video)
    d, n, hidden, patch = 32, 4 * 16, 64, 4 * 4 * 3
    block = 4 * n * d * d + 2 * n * n * d + 2 * n * d * hidden
    assert count == 2 * 2 * (n * patch * d + 2 * block)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("cpu", None),
    ],
)
def test_peak_of_known_chips(kind, peak):
    class Device:
        device_kind = kind

    assert flops.peak_flops(Device()) == peak
