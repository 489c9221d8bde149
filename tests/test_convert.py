"""Converted weights against the models that they come from, through the files that are written and
the code with which training takes them."""

import json
import shutil
from pathlib import Path

import bert_reference
import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_reference
import transformers
from flax import nnx
from tiny import tiny_config

from instap_jax import config_check, sharding
from instap_jax.config_check import LoadedConfig
from instap_jax.errors import UserError
from instap_jax.interop import bert, torch_model
from instap_jax.interop.importing import convert
from instap_jax.interop.keys import leaves
from instap_jax.interop.reading import Weights
from instap_jax.interop.report import Fate
from instap_jax.models import depth, resize, vision
from instap_jax.models.text import text_mask
from instap_jax.train import checkpoint, loop
from instap_jax.train.initialise import initial_params
from instap_jax.train.objectives import OBJECTIVES
from instap_jax.train.state import with_sharding
from instap_jax.train.stop import StopRequest

LAYER, WHOLE = 1e-5, 1e-4  # largest absolute difference of a layer, and end to end


def close(ours, theirs, tolerance):
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=tolerance)


def given(config) -> LoadedConfig:
    return LoadedConfig(config=config, file="test", overrides={})


def on_one_device(abstract, config):
    """The abstract parameters, placed as the training loop places them."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        return with_sharding(abstract, mesh)


def test_interpolation_is_torchs():
    random = np.random.default_rng(0)
    for source, target in ((16, 14), (14, 16), (24, 14), (4, 9), (1, 3), (5, 5)):
        table = random.normal(size=(1, 2, source, source))
        options = {"mode": "bicubic", "align_corners": False}
        expected = torch.nn.functional.interpolate(torch.tensor(table), (target, target), **options)
        matrix = resize.bicubic(source, target)
        np.testing.assert_allclose(matrix @ table @ matrix.T, expected, atol=1e-12)
        expected = torch.nn.functional.interpolate(torch.tensor(table[0]), target, mode="linear")
        np.testing.assert_allclose(table[0] @ resize.linear(source, target).T, expected, atol=1e-12)


@pytest.mark.parametrize("frames", [2, 3, 5, 1])
def test_positions_are_interpolated_as_umt_does(frames):
    """From a table for 3 frames of 4 x 4 patches: fewer frames, as many, more, an image."""
    width, trained, side = 12, 3, 4
    table = torch.tensor(torch_reference.sinusoid(trained * side**2, width))
    if frames == 1:  # img_pos_embed of backbones/vit/vit.py
        table = table[: side**2]
    else:  # get_sinusoid_encoding_table of backbones/vit/vit.py
        table = table.reshape(1, trained, side, side, width).permute(0, 2, 3, 4, 1)
        table = table.reshape(-1, width, trained)
        table = torch.nn.functional.interpolate(table, size=frames, mode="linear")
        table = table.reshape(side, side, width, frames).permute(3, 0, 1, 2).reshape(-1, width)
    grid = vision.PositionGrid(frames=trained, side=side)
    codes = vision.position_codes(frames, side**2, width, grid=grid)
    close(codes, table.numpy(), 1e-6)
    for other in (3, 6):  # interpolate_pos_embed_online of action_detection/modeling_finetune.py
        grown = table.reshape(frames, side, side, width).permute(0, 3, 1, 2)
        options = {"mode": "bicubic", "align_corners": False}
        grown = torch.nn.functional.interpolate(grown, size=(other, other), **options)
        codes = vision.position_codes(frames, other**2, width, grid=grid)
        close(codes, grown.permute(0, 2, 3, 1).reshape(-1, width).numpy(), 1e-6)
    config = {"position_frames": trained, "position_size": side * 5, "patch": 5, "width": width}
    close(torch_model.clip_codes(config, frames, other), np.asarray(codes), 1e-6)


def test_the_encoder_takes_its_positions_from_the_configuration():
    config = tiny_config("stage1")
    config.vision.update(position_frames=3, position_size=12)
    config_check.check(config)
    encoder = nnx.eval_shape(lambda: OBJECTIVES["distill"].create(config, nnx.Rngs(0))).encoder
    assert encoder.positions == vision.PositionGrid(frames=3, side=3)
    expected = vision.position_codes(2, 16, 32, grid=encoder.positions)
    np.testing.assert_array_equal(encoder.position_codes(2, 16), expected)
    assert np.abs(expected - vision.position_codes(2, 16, 32)).max() > 0.1
    config.vision.position_size = 13
    with pytest.raises(UserError, match=r"vision\.position_size=13 is no multiple"):
        config_check.check(config)


# The teacher.


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Directories with Hugging Face's and OpenAI's files of one CLIP, and what became of them."""
    root = tmp_path_factory.mktemp("clips")
    model = foreign.clip_model()
    model.save_pretrained(root / "hf")
    state = foreign.openai_weights(model)
    foreign.save(state, root / "openai.pt")
    visual = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    foreign.save(visual, root / "extracted.pth")
    foreign.save(model.state_dict(), root / "hf.bin")
    return root


def teacher_config(directory: Path):
    """Of a stage-1 run with the converted teacher, whose sizes are in the directory."""
    config = tiny_config("stage1")
    config.teacher = config_check.read(directory).teacher
    config.teacher.checkpoint = str(directory)
    return config


def load_teacher(directory: Path):
    """As the training loop does."""
    config = teacher_config(directory)
    objective = OBJECTIVES["distill"]
    frozen = nnx.eval_shape(lambda: objective.create_frozen(config, nnx.Rngs(0)))
    graphdef, abstract = nnx.split(frozen)
    abstract = on_one_device(abstract, config)
    params = checkpoint.read_params(
        config.teacher.checkpoint, abstract, select=objective.frozen_path
    )
    return nnx.merge(graphdef, params)


def clip_config(size: int = 28):
    """That `foreign.clip_model` fits, its picture `size` pixels a side."""
    config = tiny_config("teacher")
    sizes = {"width": 128, "depth": 3, "heads": 2, "patch": 7, "projection": 12}
    config.teacher.update(mlp_ratio=2.0, image_size=size, **sizes)
    return config


@pytest.mark.parametrize("size", [28, 21])
def test_clip_equals_hugging_face(tmp_path, size):
    """Trained at 28 px; the teacher runs at that size, or at a smaller one."""
    theirs = foreign.clip_model()
    theirs.save_pretrained(tmp_path / "hf")
    report = convert("clip", tmp_path / "hf", tmp_path / "out", given(clip_config(size)))
    side = size // 7
    if side != 4:
        with torch.no_grad():  # as UMT's clip.py
            table = theirs.vision_model.embeddings.position_embedding.weight
            grid = table[1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
            grid = torch.nn.functional.interpolate(
                grid, size=(side, side), mode="bicubic", align_corners=False
            )
            table = torch.cat([table[:1], grid.permute(0, 2, 3, 1).flatten(0, 2)])
        state = theirs.state_dict()
        state["vision_model.embeddings.position_embedding.weight"] = table
        theirs = foreign.clip_model(size)
        theirs.load_state_dict(state)
    images = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    out = load_teacher(tmp_path / "out")(jnp.asarray(images), taps=3, attention=False)
    with torch.no_grad():
        pixels = torch.tensor(images).permute(0, 3, 1, 2)
        expected = theirs.vision_model(pixels, output_hidden_states=True)
        for tap, hidden in zip(out.taps, expected.hidden_states[1:], strict=True):
            patches = theirs.vision_model.post_layernorm(hidden[:, 1:])
            close(tap, theirs.visual_projection(patches), LAYER)
        close(out.embedding, theirs.visual_projection(expected.pooler_output), WHOLE)
    fates = {entry.name: entry.fate for entry in report.entries}
    assert fates["visual.positions"] is (Fate.LOADED if side == 4 else Fate.INTERPOLATED)


@pytest.mark.parametrize("name", ["openai.pt", "extracted.pth", "hf.bin"])
def test_every_layout_of_a_clip_gives_the_same(clips, tmp_path, name):
    report = convert("clip", clips / name, tmp_path / "out", given(clip_config(98)))
    # Nothing beside the file says these.
    assert report.assumed == ("teacher.heads=2", "activation quick_gelu")
    assert "teacher.heads" not in report.sizes
    report = convert("clip", clips / "hf", tmp_path / "reference", None)
    assert report.sizes["teacher.heads"] == 2 and report.assumed == ("teacher.image_size=98",)
    assert config_check.read(tmp_path / "reference").teacher.image_size == 98  # 14 patches a side
    ours, reference = (leaves(nnx.state(load_teacher(tmp_path / d))) for d in ("out", "reference"))
    assert ours.keys() == reference.keys()
    for path, value in ours.items():
        np.testing.assert_array_equal(value, reference[path], err_msg=path)


def test_a_clip_report_accounts_for_every_tensor(clips, tmp_path):
    report = convert("clip", clips / "openai.pt", tmp_path / "out", given(clip_config(98)))
    state = foreign.openai_weights(foreign.clip_model())
    written = json.loads((tmp_path / "out" / "convert_report.json").read_text())
    entries = {entry["name"]: entry for entry in written["entries"]}
    ignored = {name for name, entry in entries.items() if entry["fate"] == "ignored"}
    assert ignored == {name for name in state if not name.startswith("visual.")}
    ours = leaves(nnx.state(load_teacher(tmp_path / "out")))
    assert entries.keys() - ignored == {f"visual.{path}" for path in ours}
    arrays = sum(total["arrays"] for total in written["totals"].values())
    assert arrays == len(ours) + len(ignored)
    assert written["totals"]["interpolated"] == {"arrays": 1, "bytes": 197 * 128 * 4}
    text = report.text()
    assert "bicubic, 4 x 4 to 14 x 14" in text and "CLIP's text tower" in text


def test_a_conversion_is_not_a_run_to_go_on_with(clips, tmp_path):
    convert("clip", clips / "hf", tmp_path / "out", None)
    step, meta = checkpoint.read_meta(str(tmp_path / "out"))
    assert step == 0 and meta["converted"]["sha256"]
    config = config_check.read(tmp_path / "out")
    with pytest.raises(UserError, match="holds converted weights, not a run to go on with"):
        loop.train(config, tmp_path / "out", StopRequest())


def test_step_0_is_read_beside_a_newer_one(tmp_path):
    for step in (0, 3):
        state = nnx.State({"a": {"b": nnx.Param(np.full(2, step, np.float32))}})
        checkpoint.write_params(str(tmp_path / str(step)), state, meta={})
    shutil.copytree(tmp_path / "3/checkpoints/0", tmp_path / "0/checkpoints/3")
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)
    for step, expected in ((0, 0), (None, 3)):
        read = checkpoint.read_params(str(tmp_path / "0"), abstract, step=step)
        assert jax.tree.leaves(read)[0][0] == expected


# The text encoder.


def align_config(**changes):
    config = tiny_config("stage2")
    config.text.update(vocab_size=60, depth=3, fusion_layers=1, max_length=40)
    config.update_from_flattened_dict(changes)
    return config


def loaded_text(config, fresh_value: float = 0.25):
    """The text encoder of a stage-2 run as it starts, where fresh parameters are all the same."""
    objective = OBJECTIVES["align"]
    model = nnx.eval_shape(lambda: objective.create(config, nnx.Rngs(0)))
    graphdef, abstract = nnx.split(model)
    fresh = jax.tree.map(lambda a: jnp.full(a.shape, fresh_value, a.dtype), abstract)
    params = initial_params(config, objective, on_one_device(abstract, config), fresh)
    assert jax.tree.structure(params) == jax.tree.structure(fresh)
    return nnx.merge(graphdef, params)


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertModel", "BertForPreTraining"])
def test_bert_equals_hugging_face(tmp_path, capsys, kind):
    theirs = foreign.bert_model(getattr(transformers, kind))
    theirs.save_pretrained(tmp_path / "hf")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(55))]
    (tmp_path / "hf" / "vocab.txt").write_text("\n".join(words))
    report = convert("bert", tmp_path / "hf", tmp_path / "out", given(align_config()))
    vocabulary = str(tmp_path / "out" / "vocab.txt")
    config = align_config(**{
        "text.checkpoint": str(tmp_path / "out"), "tokenizer.kind": "wordpiece",
        "tokenizer.path": vocabulary, "tokenizer.cls_id": 2, "tokenizer.mask_id": 4,
    })  # fmt: skip
    assert config_check.read(tmp_path / "out").tokenizer == config.tokenizer
    model = loaded_text(config)
    assert "init text: 42 arrays" in (out := capsys.readouterr().out), out
    ids = np.random.default_rng(0).integers(1, 60, (2, 9)).astype(np.int32)
    ids[1, 6:] = 0
    body = theirs if kind == "BertModel" else theirs.bert
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor(ids).long(), "attention_mask": torch.tensor(ids != 0)}
        hidden = body(**inputs, output_hidden_states=True).hidden_states
    text, mask = model.text, text_mask(jnp.asarray(ids))
    seen = ids != 0
    x = text.embeddings(jnp.asarray(ids))
    close(x, hidden[0], LAYER)
    for i in range(2):
        x = depth.layer(text.blocks, i)(x, mask=mask)
        close(np.asarray(x)[seen], hidden[i + 1][seen], LAYER)
    close(np.asarray(text.encode(jnp.asarray(ids)).tokens)[seen], hidden[2][seen], WHOLE)
    fusion = depth.layer(text.fusion_blocks, 0)  # its BERT half: the look at visual tokens is new
    y = fusion.attention_norm(x + fusion.attention(x, mask=mask))
    y = fusion.mlp_norm(y + fusion.mlp(y))
    close(np.asarray(y)[seen], hidden[3][seen], LAYER)
    fates = {entry.name: entry.fate for entry in report.entries}
    fresh = {path for path, fate in fates.items() if fate is Fate.FRESH}
    kept = {f"text.{k}" for k, v in leaves(nnx.state(text)).items() if bool((v == 0.25).all())}
    assert fresh == kept
    assert "text.fusion_blocks.cross.query" in fresh
    if kind == "BertModel":
        assert "text.mlm_head.bias" in fresh
    else:
        assert not any("mlm_head" in path for path in fresh)
        expected = theirs.cls.predictions(hidden[3]).detach()
        close(np.asarray(text.mlm_logits(y))[seen], expected[seen], WHOLE)


@pytest.mark.parametrize(("depth", "fusion"), [(12, 3), (24, 5)])
def test_berts_have_as_many_fusion_layers_as_umt_makes_of_them(tmp_path, depth, fusion):
    config = bert_reference.make_config(vocab=60, width=64, heads=1, hidden=64, length=40)
    config.num_hidden_layers = depth
    with torch.device("meta"):
        state = transformers.BertForMaskedLM(config).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    plan = bert.plan(Weights(tmp_path / "bert.bin", shapes, read=None), None)
    assert plan.config.text.fusion_layers == fusion
    assert f"text.fusion_layers={fusion}" in plan.assumed


def test_ids_of_the_tokenizer_are_those_of_the_vocabulary(tmp_path):
    foreign.bert_model().save_pretrained(tmp_path / "hf")
    words = ["[PAD]", "[MASK]", "[UNK]", "[SEP]", "[CLS]", *map(str, range(55))]
    (tmp_path / "hf" / "vocab.txt").write_text("\n".join(words))
    convert("bert", tmp_path / "hf", tmp_path / "out", given(align_config()))
    tokenizer = config_check.read(tmp_path / "out").tokenizer
    assert (tokenizer.kind, tokenizer.cls_id, tokenizer.mask_id) == ("wordpiece", 4, 1)


def test_where_a_text_encoder_is_not_taken_from(clips, tmp_path):
    convert("clip", clips / "hf", tmp_path / "clip", None)
    objective = OBJECTIVES["align"]

    def start(**changes):
        config = align_config(**changes)
        config_check.check(config)
        model = nnx.eval_shape(lambda: objective.create(config, nnx.Rngs(0)))
        abstract = nnx.state(model)
        initial_params(config, objective, abstract, abstract)

    clip = {"text.checkpoint": str(tmp_path / "clip")}
    with pytest.raises(UserError, match="is no text encoder"):
        start(**clip)
    with pytest.raises(UserError, match="is read by stage 'align' only, not by 'distill'"):
        start(**clip, stage="distill")
    foreign.bert_model().save_pretrained(tmp_path / "hf")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(55))]
    (tmp_path / "hf" / "vocab.txt").write_text("\n".join(words))
    convert("bert", tmp_path / "hf", tmp_path / "bert", given(align_config()))
    (tmp_path / "other.txt").write_text("\n".join([*words[:-1], "other"]))
    tokenizer = {
        "kind": "wordpiece",
        "path": str(tmp_path / "other.txt"),
        "cls_id": 2,
        "mask_id": 4,
    }
    tokenizer = {f"tokenizer.{key}": value for key, value in tokenizer.items()}
    bert = {"text.checkpoint": str(tmp_path / "bert")}
    with pytest.raises(UserError, match=r"other\.txt is not the tokenizer"):
        start(**bert, **tokenizer)
    tokenizer["tokenizer.path"] = str(tmp_path / "bert" / "vocab.txt")
    with pytest.raises(UserError, match="do not fit this config"):
        start(**bert, **tokenizer, **{"text.fusion_layers": 2})
    # A run of stage 'align' as `init_from` has a text encoder of its own.
    foreign.save(foreign.umt_weights(foreign.UMT()), tmp_path / "umt.safetensors")
    convert("umt", tmp_path / "umt.safetensors", tmp_path / "umt", given(align_config()))
    with pytest.raises(UserError, match="both give 'text'"):
        start(**bert, **tokenizer, **{"checkpoint.init_from": str(tmp_path / "umt")})
