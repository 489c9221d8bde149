"""UMT's checkpoints: every key that its source code gives them, and the same numbers in and out."""

import foreign
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_reference
from flax import nnx
from test_convert import LAYER, WHOLE, close, given, on_one_device
from tiny import tiny_config

from instap_jax import config_check
from instap_jax.config import default
from instap_jax.errors import UserError
from instap_jax.interop import umt
from instap_jax.interop.importing import convert
from instap_jax.interop.keys import leaves
from instap_jax.interop.plan import shapes_of
from instap_jax.interop.report import Fate
from instap_jax.models.text import text_mask
from instap_jax.train import checkpoint
from instap_jax.train.checkpoint import StoredParams
from instap_jax.train.initialise import initial_params
from instap_jax.train.objectives import OBJECTIVES, term_weights

# Width, layers, BERT layers before the first fusion layer, CLIP's projection, shared projection:
# single_modality/models/modeling_pretrain_umt.py and multi_modality/exp/pretraining/*.py.
SIZES = {"b16": (768, 12, 9, 512, 512), "l16": (1024, 24, 19, 768, 768)}


def linear(name: str, inputs: int, outputs: int) -> dict:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> dict:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def published_vision(d: int, depth: int, projection: int) -> dict:
    """PretrainVisionTransformer: single_modality/models/modeling_pretrain_umt.py."""
    keys = {"encoder.patch_embed.proj.weight": (d, 3, 1, 16, 16)}
    keys["encoder.patch_embed.proj.bias"] = (d,)
    for i in range(depth):
        block = f"encoder.blocks.{i}"
        keys |= norm(f"{block}.norm1", d) | norm(f"{block}.norm2", d)
        keys |= {f"{block}.attn.q_bias": (d,), f"{block}.attn.v_bias": (d,)}
        keys[f"{block}.attn.qkv.weight"] = (3 * d, d)
        keys |= linear(f"{block}.attn.proj", d, d)
        keys |= linear(f"{block}.mlp.fc1", d, 4 * d) | linear(f"{block}.mlp.fc2", 4 * d, d)
    keys |= norm("encoder.norm", d)
    for i in range(6):
        keys |= linear(f"clip_decoder.{i}.head", d, projection)
        keys |= norm(f"clip_decoder.{i}.norm", projection)
    return keys


def published_text(d: int, depth: int, fusion: int) -> dict:
    """BertForMaskedLM: multi_modality/models/backbones/bert/xbert.py."""
    body = "text_encoder.bert.embeddings"
    rows = {"word": 30522, "position": 512, "token_type": 2}
    keys = {f"{body}.{name}_embeddings.weight": (count, d) for name, count in rows.items()}
    keys[f"{body}.position_ids"] = (1, 512)
    keys |= norm(f"{body}.LayerNorm", d)
    for i in range(depth):
        layer = f"text_encoder.bert.encoder.layer.{i}"
        kinds = ("attention", "crossattention") if i >= fusion else ("attention",)
        for kind in kinds:
            for part in ("query", "key", "value"):
                keys |= linear(f"{layer}.{kind}.self.{part}", d, d)
            keys |= linear(f"{layer}.{kind}.output.dense", d, d)
            keys |= norm(f"{layer}.{kind}.output.LayerNorm", d)
        keys |= linear(f"{layer}.intermediate.dense", d, 4 * d)
        keys |= linear(f"{layer}.output.dense", 4 * d, d) | norm(f"{layer}.output.LayerNorm", d)
    head = "text_encoder.cls.predictions"
    keys |= {f"{head}.bias": (30522,), f"{head}.decoder.bias": (30522,)}
    keys[f"{head}.decoder.weight"] = (30522, d)
    return keys | linear(f"{head}.transform.dense", d, d) | norm(f"{head}.transform.LayerNorm", d)


def published_align(d: int, depth: int, fusion: int, projection: int, shared: int) -> dict:
    """UMT: multi_modality/models/umt.py, its clip_teacher apart."""
    keys = {f"vision_encoder.{k}": v for k, v in published_vision(d, depth, projection).items()}
    keys |= norm("vision_encoder.pool_norm", d) | published_text(d, depth, fusion)
    keys |= linear("vision_proj", d, shared) | linear("text_proj", d, shared)
    return keys | linear("itm_head", d, 2) | {"temp": ()}


def sized(size: str):
    width, depth, fusion, projection, shared = SIZES[size]
    config = default()
    for part in (config.vision, config.text):
        part.update(width=width, depth=depth, heads=width // 64)
    config.text.fusion_layers = depth - fusion
    config.teacher.projection, config.align.projection = projection, shared
    return config


@pytest.mark.parametrize("size", SIZES)
def test_every_published_key_has_its_place_and_shape(size):
    width, depth, fusion, projection, shared = SIZES[size]
    config = sized(size)
    stages = {
        "distill": published_vision(width, depth, projection),
        "align": published_align(width, depth, fusion, projection, shared),
    }
    for stage, published in stages.items():
        config.stage = stage
        shapes = shapes_of(lambda rngs, s=stage: OBJECTIVES[s].create(config, rngs))
        table = umt.table(stage, shapes)
        assert table.shapes() == published
        # Ours: every parameter in the table once for each of its layers, or InstAP's own.
        rows = {}
        for row in table.rows:
            rows.setdefault(row.ours, []).append(row.layer)
        assert rows.keys() | set(table.own) == shapes.keys() and not rows.keys() & set(table.own)
        for path, layers in rows.items():
            stacked = [None] if layers == [None] else list(range(shapes[path][0]))
            assert layers == stacked and ("blocks." in path or "heads." in path) != (
                layers == [None]
            ), path
        own = {path.split(".")[0] for path in table.own}
        assert own == (set() if stage == "distill" else {"cross_attention", "instance_temperature"})


@pytest.mark.parametrize("stage", ["distill", "align"])
def test_ours_to_umt_to_ours_is_bit_equal(stage):
    config = tiny_config({"distill": "stage1", "align": "stage2"}[stage])
    shapes = shapes_of(lambda rngs: OBJECTIVES[stage].create(config, rngs))
    table = umt.table(stage, shapes)
    random = np.random.default_rng(0)
    ours = {path: random.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    theirs, back = {}, {path: np.full(shape, np.nan) for path, shape in shapes.items()}
    for row in table.rows:
        array = ours[row.ours] if row.layer is None else ours[row.ours][row.layer]
        tensors = row.to_theirs(array)
        assert not tensors.keys() & theirs.keys()
        assert {k: v.shape for k, v in tensors.items()} == dict(zip(row.theirs, row.shapes))
        theirs |= tensors
    for row in table.rows:
        back[row.ours][() if row.layer is None else row.layer] = row.to_ours(theirs)
    for path, value in ours.items():
        if path not in table.own:
            np.testing.assert_array_equal(back[path], value, err_msg=path)


def umt_config():
    config = tiny_config("stage2")
    config.text.update(vocab_size=60, depth=3, fusion_layers=1, max_length=40)
    config.distill.layers = 2
    return config


def loaded(stage: str, config, directory):
    """A run of the stage as it starts from the converted directory."""
    objective = OBJECTIVES[stage]
    config = config.copy_and_resolve_references()
    config.stage, config.checkpoint.init_from = stage, str(directory)
    model = nnx.eval_shape(lambda: objective.create(config, nnx.Rngs(0)))
    graphdef, abstract = nnx.split(model)
    abstract = on_one_device(abstract, config)
    return nnx.merge(graphdef, initial_params(config, objective, abstract, abstract))


@pytest.fixture(scope="module")
def theirs():
    return foreign.UMT().eval()


def video_and_mask():
    random = np.random.default_rng(0)
    video = random.normal(size=(2, 3, 8, 8, 3)).astype(np.float32)
    visible = np.sort(random.permuted(np.tile(np.arange(12), (2, 1)), axis=1)[:, :5], axis=1)
    masked = np.ones((2, 12), bool)
    np.put_along_axis(masked, visible, False, axis=1)
    return video, visible.astype(np.int32), torch.tensor(masked)


def test_stage_1_equals_umt(theirs, tmp_path):
    state = theirs.vision_encoder.state_dict()
    state = {name: value for name, value in state.items() if not name.startswith("pool_norm")}
    foreign.save({"module." + name: value for name, value in state.items()}, tmp_path / "umt.pth")
    report = convert("umt", tmp_path / "umt.pth", tmp_path / "out", given(umt_config()))
    assert report.stage == "distill" and report.totals()["fresh"]["arrays"] == 0
    student = loaded("distill", umt_config(), tmp_path / "out")
    video, visible, masked = video_and_mask()
    with torch.no_grad():
        expected = theirs.vision_encoder(torch.tensor(video).permute(0, 4, 1, 2, 3), masked)
    close(student(jnp.asarray(video), visible=jnp.asarray(visible)), expected, WHOLE)


def test_stage_2_equals_umt(theirs, tmp_path, capsys):
    content = {"model": foreign.umt_weights(theirs), "epoch": 3, "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "ckpt_09.pth")
    report = convert("umt", tmp_path / "ckpt_09.pth", tmp_path / "out", given(umt_config()))
    assert set(report.beside) == {"epoch", "optimizer"}
    fates = {entry.name: entry.fate for entry in report.entries}
    assert fates["clip_teacher.proj"] is Fate.IGNORED
    ours = loaded("align", umt_config(), tmp_path / "out")
    fresh = {path for path, fate in fates.items() if fate is Fate.FRESH}
    own = {"cross_attention", "instance_temperature"}
    assert {path.split(".")[0] for path in fresh} == own
    assert float(ours.instance_temperature[...]) == np.float32(0.07)
    video, visible, masked = video_and_mask()
    ids = np.random.default_rng(1).integers(5, 60, (2, 7)).astype(np.int32)
    ids[0, 4:] = 0
    with torch.no_grad():
        taps = theirs.vision_encoder.encoder(torch.tensor(video).permute(0, 4, 1, 2, 3), masked)
        pooled = theirs.vision_encoder.pool_norm(taps[-1].mean(1))
        seen = torch.tensor(ids != 0)
        text = theirs.tower.encode(torch.tensor(ids).long(), seen)
        everything = torch.ones(taps.shape[1:3], dtype=torch.bool)
        fused = theirs.tower.fuse(text, seen, taps[-1], everything)
        expected = {
            "video": theirs.vision_proj(pooled),
            "text": theirs.text_proj(text[:, 0]),
            "match": theirs.itm_head(fused[:, 0]),
            "mlm": theirs.tower.head(fused)[seen],
        }
    out = ours.encoder(jnp.asarray(video), visible=jnp.asarray(visible), taps=2)
    for tap, expected_tap in zip(out.taps, taps, strict=True):
        close(tap, expected_tap, LAYER)
    encoded = ours.text.encode(jnp.asarray(ids))
    fused = ours.text.fuse(encoded.tokens, text_mask(jnp.asarray(ids)), out.tokens)
    close(ours.embed_visual(out.tokens.mean(1)), expected["video"], WHOLE)
    close(ours.embed_text(encoded.pooled), expected["text"], WHOLE)
    close(ours.match_head(fused), expected["match"], WHOLE)
    close(np.asarray(ours.text.mlm_logits(fused))[ids != 0], expected["mlm"], WHOLE)
    assert float(ours.tau()) == pytest.approx(0.05)


def test_a_checkpoint_fine_tuned_for_retrieval(theirs, tmp_path):
    """Without distillation heads (`clip_return_layer=0`) and language head, so without `bert.`."""
    full = foreign.umt_weights(theirs)
    state = {
        name.replace("text_encoder.bert.", "text_encoder."): tensor
        for name, tensor in full.items()
        if not name.startswith(("text_encoder.cls.", "vision_encoder.clip_decoder."))
    }
    foreign.save(state, tmp_path / "ret.pth")
    report = convert("umt", tmp_path / "ret.pth", tmp_path / "out", None)
    assert report.kind == "umt (stage 2, fine-tuned)"
    fresh = {entry.name for entry in report.entries if entry.fate is Fate.FRESH}
    assert {"text.mlm_head.bias", "heads.heads.linear.kernel"} < fresh
    config = config_check.read(tmp_path / "out")
    assert list(term_weights(config)) == ["vtc", "vtm"]
    assert "distill.layers=2" in report.assumed
    config = umt_config()
    config.align.update(rec=0.0, mlm=0.0)
    convert("umt", tmp_path / "ret.pth", tmp_path / "given", given(config))
    torch.save(full, tmp_path / "full.pth")
    convert("umt", tmp_path / "full.pth", tmp_path / "full", given(umt_config()))
    ours, whole = (StoredParams(str(tmp_path / name)) for name in ("given", "full"))
    assert ours.shapes == whole.shapes
    for name in ours.shapes.keys() - fresh:
        np.testing.assert_array_equal(ours.read(name), whole.read(name), err_msg=name)
    config.align.update(rec=1.0, mlm=1.0)
    with pytest.raises(UserError, match="was not trained by rec, mlm, to which the configuration"):
        convert("umt", tmp_path / "ret.pth", tmp_path / "other", given(config))


def test_position_tables_must_be_the_fixed_ones(theirs, tmp_path):
    name = "vision_encoder.encoder.pos_embed"
    state = foreign.umt_weights(theirs)
    state[name] = torch.tensor(torch_reference.sinusoid(12, 32)[None], dtype=torch.float32)
    path = foreign.save(state, tmp_path / "umt.safetensors")
    report = convert("umt", path, tmp_path / "out", given(umt_config()))
    notes = {entry.name: entry.note for entry in report.entries}
    assert "recomputed" in notes[name]
    state[name][0, 3, 5] += 0.1
    foreign.save(state, path)
    with pytest.raises(UserError, match=f"{name}' is not the fixed sine-cosine table"):
        convert("umt", path, tmp_path / "other", given(umt_config()))


def test_without_a_configuration_sizes_are_the_files(theirs, tmp_path):
    foreign.save(foreign.umt_weights(theirs), tmp_path / "umt.safetensors")
    report = convert("umt", tmp_path / "umt.safetensors", tmp_path / "out", None)
    meta = checkpoint.read_meta(str(tmp_path / "out"))[1]
    assert meta["config"]["align"]["projection"] == 16 and meta["config"]["text"]["depth"] == 3
    assert report.sizes["text.fusion_layers"] == 1 and report.sizes["distill.layers"] == 2
    assert meta["config"]["align"]["instance"] == 0  # it was trained without instances
    assert {"vision.heads=1", "data.frames=8"} < set(report.assumed)
    assert leaves(nnx.state(loaded("align", sized_as(meta), tmp_path / "out")))


def sized_as(meta):
    config = default()
    config.update(meta["config"])
    return config
