"""The complete objective of stage 'align' on random batches: what counts, and what must not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict
from runner import Runner, assert_close, batch_for, gradients, largest
from tiny import tiny_config

from instap_jax.errors import UserError
from instap_jax.evaluation import encoder
from instap_jax.models import depth
from instap_jax.train import checkpoint, flops
from instap_jax.train.initialise import initial_params
from instap_jax.train.objectives import objective
from instap_jax.train.objectives.align import TERMS
from instap_jax.train.objectives.pairs import Pairs, matching
from instap_jax.train.saving import Checkpointer


def align_config(**changes) -> ConfigDict:
    """All terms, the teacher's masks, 8 groups of 2 samples and 4 instances."""
    c = tiny_config("stage2,all_terms")
    c.steps = 60
    c.distill.mask_score = "cls"
    c.align.instance = 0.1
    c.data.update(batch_size=16, frames=2)
    c.vision.depth = c.teacher.depth = 2
    c.text.dropout = 0.1
    c.update_from_flattened_dict(changes)
    return c


@pytest.fixture(scope="module")
def runner():
    return Runner(align_config(), 1)


@pytest.fixture(scope="module")
def batch():
    return batch_for(align_config())


@pytest.fixture(scope="module")
def reference(runner, batch):
    """State and metrics after one step on `batch`."""
    return runner.run(batch)


def changed(batch, **arrays):
    return batch | {name: np.asarray(array) for name, array in arrays.items()}


def without(batch, unused: np.ndarray, seed: int):
    """The batch with these instance slots unused, whatever is in them."""
    rng = np.random.default_rng(seed)
    noise = {
        "boxes": rng.uniform(0, 1, batch["boxes"].shape).astype(np.float32),
        "present": rng.random(batch["present"].shape) < 0.5,
        "parent": rng.integers(0, 2, batch["parent"].shape, np.int32),
        "instance_text": rng.integers(0, 300, batch["instance_text"].shape, np.int32),
        "instance_text_hash": rng.integers(0, 9, batch["parent"].shape, np.int32),
    }
    mixed = {}
    for name, array in noise.items():
        place = unused.reshape(unused.shape + (1,) * (array.ndim - 2))
        mixed[name] = np.where(place, array, batch[name])
    return changed(batch, instance_valid=batch["instance_valid"] & ~unused, **mixed)


def test_eight_devices_that_offload_equal_one_that_keeps_everything(
    runner, batch, reference, monkeypatch
):
    monkeypatch.setattr(depth, "OFFLOADED_FROM", 0)
    config = align_config()
    assert config.compute.remat == "all"
    config.compute.remat = "offload"
    config.mesh.update(replica=2, fsdp=2, tensor=2)
    many, history = Runner(config, 8).run(batch)
    one, one_history = reference
    assert one_history[0] == pytest.approx(history[0], rel=1e-4, abs=1e-6)
    assert_close(one.opt_state, many.opt_state, 1e-5)


def test_loss_is_the_weighted_sum_and_every_gradient_is_there(reference):
    state, (metrics,) = reference
    total = sum((0.1 if term.startswith("inst") else 1.0) * metrics[term] for term in TERMS)
    assert metrics["loss"] == pytest.approx(total, rel=1e-5)
    assert metrics["instances"] == 32
    found = gradients(state)
    for name in ("temperature", "instance_temperature"):
        assert abs(found[name]) > 1e-6, name
    for name, part in found["cross_attention"]["blocks"].items():
        assert largest(part) > 1e-6, name
    for name in ("heads", "pool_norm", "match_head", "vision_projection", "text_projection"):
        assert largest(found[name]) > 1e-6, name
    assert largest(found["text"]["mlm_head"]) > 1e-6


def test_unused_slots_change_nothing(runner, batch):
    unused = np.zeros(batch["parent"].shape, bool)
    unused[:, 2] = unused[0] = True  # group 0 has no instance left
    a, b = (runner.run(without(batch, unused, seed)) for seed in (1, 2))
    assert a[1] == b[1]
    assert_close(a[0].opt_state, b[0].opt_state, 1e-7)
    assert a[1][0]["instances"] == 21


def test_boxes_of_absent_frames_do_not_count(runner, batch):
    present = batch["present"].copy()
    present[..., 0], present[:, 1, 1] = True, False
    moved = np.where(present[..., None], batch["boxes"], batch["boxes"][..., ::-1, :] * 0.5)
    a, b = (runner.run(changed(batch, present=present, boxes=x)) for x in (batch["boxes"], moved))
    assert a[1][0] == pytest.approx(b[1][0], rel=1e-5)


def test_instances_of_unreadable_samples_do_not_count(runner, batch):
    valid = batch["sample_valid"].copy()
    valid[0, 1] = False
    parts = {"sample_valid": valid, "extent": batch["extent"] * valid[..., None]}
    state, (metrics,) = runner.run(changed(batch, **parts))
    assert metrics["instances"] == 30
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_batch_without_instances(runner, batch):
    unused = np.ones(batch["parent"].shape, bool)
    state, (metrics,) = runner.run(without(batch, unused, 0))
    assert [metrics[term] for term in ("inst_vtc", "inst_vtm", "inst_mlm", "instances")] == [0] * 4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    assert largest(gradients(state)["cross_attention"]) == 0
    assert metrics["vtc"] > 0


def test_siblings_are_no_negatives_and_strangers_are(runner, batch):
    """Equation (8), alpha = 0; ids of parents hold over the whole batch, not within a group."""
    one_video = changed(batch, media_hash=np.full_like(batch["media_hash"], 7))
    metrics = runner.run(one_video)[1][0]
    assert metrics["inst_vtc"] == pytest.approx(0, abs=1e-6)
    # One instance a group, each the first sample's: eight strangers.
    valid = np.zeros_like(batch["instance_valid"])
    valid[:, 0] = True
    parents = np.zeros_like(batch["parent"])
    metrics = runner.run(changed(batch, instance_valid=valid, parent=parents))[1][0]
    assert metrics["instances"] == 8
    assert metrics["inst_vtc"] > 0.5
    # The same sentence is no negative either.
    same = np.full_like(batch["instance_text_hash"], 3)
    metrics = runner.run(changed(batch, instance_text_hash=same))[1][0]
    assert metrics["inst_vtc"] == pytest.approx(0, abs=1e-6)


def test_thirty_steps_on_one_batch_lower_every_term(runner, batch):
    _, history = runner.run(batch, 30)
    assert history[-1]["loss"] < 0.85 * history[0]["loss"]
    for term in TERMS:
        assert history[-1][term] < history[0][term], term
    assert history[-1]["temperature"] != history[-1]["instance_temperature"]


def test_groups_in_another_order_give_the_same():
    """Without draws: the contrasts, the whole square picture, unmasked, never flipped."""
    config = tiny_config("stage2,unmasked")
    config.data.update(
        batch_size=16, frames=2, canvas=(24, 24), view_area=(1.0, 1.0), view_aspect=(1.0, 1.0)
    )
    config.data.flip = False
    batch = batch_for(config)
    batch["extent"][:] = 1.0
    loss, (params, frozen, _) = traced(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(0.1, 0.1, a.shape).astype(a.dtype), params)
    order = rng.permutation(8)
    loss = jax.jit(loss)
    a = loss(params, frozen, batch)
    b = loss(params, frozen, {name: array[order] for name, array in batch.items()})
    assert_close(a, b, 1e-5)


class Matcher:
    """Stands for the model: pairs carry the number of their video and text, and match if equal."""

    def __init__(self):
        self.pairs = None

    def match_head(self, fused):
        same = fused[:, 0] == fused[:, 1]
        return jnp.where(same[:, None], jnp.asarray([0.0, 9.0]), jnp.asarray([9.0, 0.0]))

    def judge(self, reading):
        """(loss, details) of a term; `pairs` [g, 3 m, 2] are those it reads."""
        texts = reading.texts
        # Of text i the first i + 1 places: as `texts_of` made it.
        np.testing.assert_array_equal(texts.mask.sum(-1), texts.tokens[:, :, 0, 0] + 1)
        fused = jnp.stack([texts.visual[:, :, 0, 0], texts.tokens[:, :, 0, 0]], axis=-1)
        self.pairs = np.asarray(fused).astype(int)
        return reading.loss(fused)


def texts_of(number: np.ndarray) -> jax.Array:
    """int32 [g, m, s]: text i has i + 1 words."""
    return jnp.asarray(np.arange(number.max() + 1) <= number[..., None], jnp.int32)


def test_matching_draws_negatives_within_the_group_and_only_true_ones():
    groups, size = 2, 5
    number = np.arange(groups * size).reshape(groups, size)
    rng = np.random.default_rng(0)
    valid = np.ones((groups, size), bool)
    valid[0, 4] = False
    video_ids = number.astype(np.int32)
    video_ids[0, :2] = 77  # two of one video
    video_ids[1] = 88  # a group of one video: no negative anywhere
    text_ids = number.astype(np.int32)
    text_ids[0, 2:4] = 99  # two of one sentence
    pairs = Pairs(
        video=jnp.asarray(rng.normal(size=(groups, size, 4)), jnp.float32),
        text=jnp.asarray(rng.normal(size=(groups, size, 4)), jnp.float32),
        tau=jnp.float32(0.1),
        valid=jnp.asarray(valid),
        video_ids=jnp.asarray(video_ids),
        text_ids=jnp.asarray(text_ids),
    )
    model = Matcher()
    ids = texts_of(number)
    carried = jnp.asarray(number[..., None, None], jnp.float32)
    for seed in range(5):
        reading = matching(model, pairs, ids, carried, carried, jax.random.key(seed))
        loss, details = model.judge(reading)
        # Pairs without a negative repeat the true one: counted, they would be called wrong.
        assert details["accuracy"] == 1 and loss < 1e-3
        drawn = model.pairs.reshape(groups, 3, size, 2)
        np.testing.assert_array_equal(drawn[:, 0, :, 0], drawn[:, 0, :, 1])
        np.testing.assert_array_equal(drawn[:, 1, :, 1], number)  # own text, another video
        np.testing.assert_array_equal(drawn[:, 2, :, 0], number)  # own video, another text
        for video, text in drawn[0, 1:, :4].reshape(-1, 2):
            assert text_ids[0, video] != text_ids[0, text], "the same sentence"
            assert video_ids[0, video] != video_ids[0, text], "the same video"
            assert valid[0, video] and valid[0, text]
    alone = dataclasses.replace(pairs, video_ids=jnp.zeros((groups, size), jnp.int32))
    _, details = model.judge(matching(model, alone, ids, carried, carried, jax.random.key(0)))
    assert details["accuracy"] == 0, "true pairs count only beside false ones"


def test_anchors_lie_where_the_patches_of_a_crop_do():
    """A crop twice as wide as its box, in a corner, ends at the picture's edge; so do its codes."""
    embedded = []
    for context, corner in ((1.0, 0.75), (2.0, 0.5)):
        config = align_config(**{"align.scene_anchor": True, "align.crop_context": context})
        batch = batch_for(config, groups=1)
        boxes = np.broadcast_to(np.float32([0, 0, corner, corner]), batch["boxes"].shape)
        model = objective(config).create(config, nnx.Rngs(0))
        out, _ = encoder._embed_aligned(config, model, changed(batch, boxes=boxes))
        embedded.append(out["instance"])
    np.testing.assert_allclose(*embedded, atol=1e-5)


def traced(config):
    """(loss function, abstract arguments) of the stage, nothing computed."""
    stage = objective(config)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: stage.create(config, nnx.Rngs(0))))
    frozen = nnx.eval_shape(lambda: stage.create_frozen(config, nnx.Rngs(0)))
    frozen_graphdef, frozen = nnx.split(frozen)

    def loss(params, frozen, batch):
        model, teacher = nnx.merge(graphdef, params), nnx.merge(frozen_graphdef, frozen)
        return stage.loss(config, model, teacher, batch, jax.random.key(0))

    return loss, (params, frozen, batch_for(config))


def test_terms_of_weight_zero_cost_nothing():
    cost, names = {}, {}
    for name in ("all_terms", "contrast_only", "umt_g", "umt_gi"):
        config = tiny_config(f"stage2,{name}")
        config.distill.mask_score = "cls" if name == "all_terms" else "random"
        loss, arguments = traced(config)
        cost[name] = flops.count_flops(loss, *arguments)
        names[name] = set(jax.eval_shape(loss, *arguments)[1]) & set(TERMS)
        assert bool(jax.tree.leaves(arguments[1])) == (name == "all_terms")  # a teacher
    assert names == {
        "all_terms": set(TERMS),
        "contrast_only": {"vtc", "inst_vtc"},
        "umt_g": {"vtc"},
        "umt_gi": {"vtc"},
    }
    assert cost["umt_g"] < cost["umt_gi"] < cost["contrast_only"] < cost["all_terms"]


@pytest.mark.parametrize("frames", [1, 2])
def test_options_together(frames):
    changes = {
        "align.scene_anchor": True,
        "align.size_code": True,
        "align.motion_code": frames == 2,
        "align.crop_context": 1.5,
        "align.still_boxes": True,
        "align.crop_mask_ratio": 0.5,
        "align.cross_attention": frames == 1,
        "align.global_instances": True,
        "data.frames": frames,
    }
    loss, arguments = traced(align_config(**changes))
    value, metrics = jax.eval_shape(loss, *arguments)
    assert value.shape == () and metrics["inst_mlm"].shape == ()


@pytest.mark.parametrize("own", [True, False])
def test_instances_have_their_own_temperature_or_share_tau(own):
    config = align_config(**{"align.own_temperature": own})
    abstract = nnx.eval_shape(lambda: objective(config).create(config, nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    state["temperature"] = state["temperature"].replace(jnp.float32(0.2))
    state["instance_temperature"] = state["instance_temperature"].replace(jnp.float32(0.3))
    model = nnx.merge(graphdef, state)
    assert model.instance_tau() == pytest.approx(0.3 if own else 0.2)
    assert model.tau() == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("name", "instances"),
    [
        ("all_terms", "cross-attended to the scene"),
        ("umt_gi", "crop of its box trajectory"),
        ("no_cross_attention", "crop of its box trajectory"),
    ],
)
def test_evaluation_embeds_samples_and_instances(name, instances):
    config = tiny_config(f"stage2,{name}")
    graphdef, params = nnx.split(
        nnx.eval_shape(lambda: objective(config).create(config, nnx.Rngs(0)))
    )
    batch = {key: array[:1] for key, array in batch_for(config, groups=2).items()}

    def embed(params, batch):
        return encoder._embed_aligned(config, nnx.merge(graphdef, params), batch)

    out, tokens = jax.eval_shape(embed, params, batch)
    shapes = {key: array.shape for key, array in out.items()}
    count = batch["parent"].shape[1]
    embeddings = {"video": (4, 16), "instance": (count, 16)}
    assert shapes == embeddings | {"entity": (count, 32), "crop": (count, 32)}
    assert tokens.shape[0] == 4 and tokens.shape[2] == 32
    assert encoder._instances_name(config).endswith(instances)


def save(workdir, runner: Runner, stage: str) -> None:
    with jax.set_mesh(runner.mesh):
        state = jax.device_put(runner.initial)
        checkpointer = Checkpointer(str(workdir), every=1, keep=1)
        checkpointer.save(state, 3, data={}, meta={"stage": stage})
        checkpointer.close()


def start(runner: Runner, source, **changes):
    config = align_config(**{"checkpoint.init_from": str(source), "seed": 5} | changes)
    fresh = jax.tree.map(lambda leaf: leaf + 1, runner.initial.params)
    with jax.set_mesh(runner.mesh):
        return initial_params(
            config, objective(config), runner.program.abstract.params, fresh
        ), fresh


def test_all_modules_are_of_one_step_of_a_run_that_goes_on(runner, tmp_path, monkeypatch):
    save(tmp_path / "run", runner, "align")
    read, steps = checkpoint.read_params, []

    def read_params(*args, step, **options):
        steps.append(step)
        return read(*args, step=step, **options)

    monkeypatch.setattr(checkpoint, "read_params", read_params)
    start(runner, tmp_path / "run")
    assert len(steps) > 5 and set(steps) == {3}


def test_starts_from_a_distilled_student_strictly(runner, tmp_path, capsys):
    config = tiny_config("stage1")
    config.vision.depth = config.teacher.depth = 2
    student = Runner(config, 1)
    save(tmp_path / "student", student, "distill")
    params, fresh = start(runner, tmp_path / "student")
    for name in ("encoder", "heads"):
        assert_close(params[name], student.initial.params[name], 0)
    for name in ("text", "cross_attention", "pool_norm"):
        assert_close(params[name], fresh[name], 0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(params)
    assert sum("student (distill, newest, step 3)" in line for line in lines) == 2
    assert sum(line.endswith("fresh") for line in lines) == len(lines) - 2
    save(tmp_path / "other", student, "teacher")
    with pytest.raises(UserError, match="stage 'align' starts from align, distill"):
        start(runner, tmp_path / "other")
    save(tmp_path / "aligned", runner, "align")
    params, _ = start(runner, tmp_path / "aligned")
    assert_close(params, runner.initial.params, 0)
    save(tmp_path / "wrong", runner, "distill")
    with pytest.raises(UserError, match="has no place for its 'cross_attention'"):
        start(runner, tmp_path / "wrong")
