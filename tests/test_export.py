"""Exports: what is in the directory, that it opens and comes back bit for bit, what is refused."""

import json
import shutil
import struct
from pathlib import Path

import foreign
import numpy as np
import pytest
import torch
from flax import nnx
from ml_collections import ConfigDict
from safetensors import safe_open
from tiny import tiny_config
from torch_export import make_pair, to_torch, write_run, write_words

from instap_jax import config_check, main
from instap_jax.config_check import LoadedConfig
from instap_jax.data.tokenizer import train_sentencepiece
from instap_jax.errors import UserError
from instap_jax.interop import instap, reading, torch_model, umt
from instap_jax.interop.export import describe, export
from instap_jax.interop.importing import convert
from instap_jax.interop.keys import leaves
from instap_jax.interop.reading import Weights
from instap_jax.interop.safetensors_file import SafetensorsWriter
from instap_jax.train import checkpoint
from instap_jax.train.checkpoint import StoredParams
from instap_jax.train.objectives import term_weights


@pytest.fixture(scope="module")
def pair():
    config = tiny_config("stage2")
    config.text.update(vocab_size=320, depth=3, fusion_layers=1)
    config.data.frames = 3
    return make_pair(config)


@pytest.fixture(scope="module")
def run(pair, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("run")
    write_words(root, pair.config)
    return write_run(root / "run", pair.config, pair.params)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "torch"
    assert main.main(["convert", "--to=torch", f"--input={run}", f"--output={out}"]) == 0
    return out


def failed(capsys, *args: str) -> str:
    assert main.main(["convert", *args]) == 2
    err = [x for x in capsys.readouterr().err.splitlines() if x.startswith("instap convert:")]
    assert len(err) == 1
    return err[0]


def test_directory_holds_everything(pair, exported):
    names = {path.name for path in exported.iterdir()}
    assert names == {
        "config.json", "convert_report.json", "model.safetensors", "tokenizer.model",
        "torch_model.py",
    }  # fmt: skip
    assert (exported / "torch_model.py").read_text() == Path(torch_model.__file__).read_text()
    assert not list(exported.parent.glob(".*"))  # nothing left of the writing aside
    expected = to_torch(pair.params)
    with safe_open(exported / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == expected.keys()
        for key in file.keys():  # noqa: SIM118 - it is no dictionary
            assert torch.equal(file.get_tensor(key), expected[key]), key
    with open(exported / "model.safetensors", "rb") as file:
        assert struct.unpack("<Q", file.read(8))[0] % 8 == 0
    report = json.loads((exported / "convert_report.json").read_text())
    assert {entry["name"] for entry in report["entries"]} == expected.keys()
    size = sum(total["bytes"] for total in report["totals"].values())
    assert size == sum(4 * leaf.size for leaf in leaves(pair.params).values())


def test_opens_strictly(pair, exported, tmp_path):
    model = torch_model.InstAP.from_pretrained(exported).eval()
    texts = ["A red ball rolls.", "", "[MASK] box " * 9]
    with torch.inference_mode():
        ids = model.text_ids(texts)
        assert torch.equal(model.encode_text(texts), pair.theirs.encode_text(ids))
    damaged = tmp_path / "damaged"
    shutil.copytree(exported, damaged)
    state = foreign.save(dict(list(model.state_dict().items())[1:]), damaged / "model.safetensors")
    with pytest.raises(RuntimeError, match="Missing key"):
        torch_model.InstAP.from_pretrained(state.parent)
    (damaged / "config.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="not an export"):
        torch_model.InstAP.from_pretrained(damaged)


def test_back_bit_for_bit(pair, exported, tmp_path, capsys):
    out = tmp_path / "back"
    assert main.main(["convert", "--from=torch", f"--input={exported}", f"--output={out}"]) == 0
    assert "fresh                0" in capsys.readouterr().out
    stored = StoredParams(str(out))
    for name, value in leaves(pair.params).items():
        np.testing.assert_array_equal(stored.read(name), np.asarray(value), err_msg=name)
    # And out again: the same bytes.
    export(out, tmp_path / "again", layout="torch")
    for name in ("model.safetensors", "tokenizer.model"):
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()
    files = (exported / "config.json", tmp_path / "again" / "config.json")
    first, again = (json.loads(file.read_text()) for file in files)
    assert first == again
    config = config_check.read(out)
    assert (config.data.frames, config.compute.dtype) == (3, "float32")


# Terms without weight -> those that the export says it was trained by.
ABLATIONS = {
    ("vtm", "inst_vtm"): ["rec", "vtc", "mlm", "inst_vtc", "inst_mlm"],
    ("inst_vtc",): ["rec", "vtc", "vtm", "mlm", "inst_vtm", "inst_mlm"],
    ("instance",): ["rec", "vtc", "vtm", "mlm"],
    (): ["rec", "vtc", "vtm", "mlm", "inst_vtc", "inst_vtm", "inst_mlm"],
}


def without_terms(*terms: str, **text: int) -> ConfigDict:
    """All terms but these, whose weight is 0."""
    config = tiny_config("stage2", **dict.fromkeys(config_check.WEIGHTS, 0.5))
    config.align.update(dict.fromkeys(terms, 0.0))
    config.text.update(vocab_size=320, depth=3, fusion_layers=1)
    config.text.update(text)
    return config


def described(directory: Path, config: ConfigDict, **trained) -> Weights:
    """An export as its import's plan sees it: the description, and names and shapes."""
    content = describe(config, 7)
    content["trained"] |= trained
    (directory / "config.json").write_text(json.dumps(content))
    path = directory / "model.safetensors"
    shapes = {k: tuple(v.shape) for k, v in to_torch(make_pair(config).params).items()}
    return Weights(path, shapes, read=None)


@pytest.mark.parametrize("absent", ABLATIONS)
def test_an_import_uses_no_head_that_was_not_trained(tmp_path, absent):
    config = without_terms(*absent)
    plan = instap.plan(described(tmp_path, config), None)
    terms = ABLATIONS[absent]
    assert describe(config, 7)["trained"]["terms"] == terms == list(term_weights(config))
    assert list(term_weights(plan.config)) == terms
    config_check.check(plan.config)
    assert all(plan.sizes[f"align.{term}"] == 0 for term in absent if term != "instance")
    assert not any("trained" in what for what in plan.assumed)
    assert describe(plan.config, 7) | {"trained": 0} == describe(config, 7) | {"trained": 0}
    # The configuration that the run had fits.
    assert list(term_weights(instap.plan(described(tmp_path, config), config).config)) == terms


def test_a_configuration_must_not_use_an_untrained_head(tmp_path):
    weights = described(tmp_path, without_terms("vtm", "inst_vtm"))
    with pytest.raises(UserError) as error:
        instap.plan(weights, without_terms("mlm"))
    assert str(error.value) == (
        f"{weights.path} was not trained by vtm, inst_vtm, to which the configuration gives "
        "weight; add --config.align.vtm=0 --config.align.inst_vtm=0"
    )


def test_terms_of_an_export_that_does_not_name_them_are_assumed(tmp_path):
    """Exports of before: as they were read then, and said."""
    cases = {(): ABLATIONS[()], ("inst_vtc", "vtm"): ["rec", "vtc", "vtm", "mlm"]}
    for absent, terms in cases.items():
        config = without_terms(*absent)
        plan = instap.plan(described(tmp_path, config, terms=None), None)
        assert list(term_weights(plan.config)) == terms
        line = f"trained by {', '.join(terms)}: the file does not say by which terms"
        assert line in plan.assumed
    for damaged in ({"frames": 0}, {"frames": "8"}, {"dtype": "float16"}):
        weights = described(tmp_path, config, **damaged)
        with pytest.raises(UserError, match=r"config\.json: trained\.frames is .*, trained\.dtype"):
            instap.plan(weights, None)
    for damaged in ("vtm", [], ["vtm", "vtx"], [["vtm"]], 3):
        weights = described(tmp_path, config, terms=damaged)
        with pytest.raises(UserError, match=r"config\.json: trained\.terms is .*, not a list"):
            instap.plan(weights, None)


def test_umt_and_back_knows_the_terms(tmp_path, capsys):
    config = without_terms("vtm", "inst_vtm", vocab_size=60, max_length=40)
    run = write_run(tmp_path / "run", config, make_pair(config).params)
    assert main.main(["convert", "--to=umt", f"--input={run}", f"--output={tmp_path}/umt"]) == 0
    names = {path.name for path in (tmp_path / "umt").iterdir()}
    assert names == {
        "convert_report.json", "instap_config.json", "instap_extra.pth", "umt.pth",
    }  # fmt: skip
    back = ["convert", "--from=umt", f"--input={tmp_path}/umt/umt.pth"]
    assert main.main([*back, f"--output={tmp_path}/back"]) == 0
    assert "align.vtm=0.0" in (printed := capsys.readouterr().out)
    assert "trained by" not in printed
    back = config_check.read(tmp_path / "back")
    assert list(term_weights(back)) == ["rec", "vtc", "mlm"]
    assert (back.data.frames, back.compute.dtype) == (config.data.frames, config.compute.dtype)
    # The run's own configuration fits; one that would re-rank does not.
    weights = reading.open_weights(tmp_path / "umt" / "umt.pth")
    assert list(term_weights(umt.plan(weights, config).config)) == ["rec", "vtc", "mlm"]
    config.align.vtm = 1.0
    with pytest.raises(UserError, match="was not trained by vtm, to which the configuration gives"):
        umt.plan(weights, config)
    (tmp_path / "umt" / "instap_config.json").write_text('{"trained": {"terms": ["inst_vtc"]}}')
    with pytest.raises(UserError, match="only terms of instances have weight, and UMT embeds none"):
        umt.plan(weights, None)
    # An export of before `tokenizer.text`: texts went as they are.
    (tmp_path / "umt" / "instap_config.json").write_text('{"trained": {"terms": ["vtc"]}}')
    assert umt.plan(weights, None).config.tokenizer.text == "plain"
    # UMT's own file, without a word of it: as UMT trains.
    (tmp_path / "umt" / "instap_config.json").unlink()
    plan = umt.plan(weights, None)
    assert list(term_weights(plan.config)) == ["rec", "vtc", "vtm", "mlm"]
    assert plan.config.tokenizer.text == "umt"
    assert "trained by rec, vtc, vtm, mlm: the file does not say by which terms" in plan.assumed


def test_umt_gets_its_own_keys_and_ours_beside(tmp_path, capsys):
    config = tiny_config("stage2")
    config.text.update(vocab_size=60, depth=3, fusion_layers=1, max_length=40)
    config.distill.layers = 2
    pair = make_pair(config)
    run = write_run(tmp_path / "run", config, pair.params)
    to_torch_args = ("--to=torch", f"--input={run}", f"--output={tmp_path}/torch")
    assert "tokenizer.path is not set" in failed(capsys, *to_torch_args)
    assert main.main(["convert", "--to=umt", f"--input={run}", f"--output={tmp_path}/umt"]) == 0
    state = torch.load(tmp_path / "umt" / "umt.pth", weights_only=True)["model"]
    theirs = foreign.umt_weights(foreign.UMT())
    del theirs["clip_teacher.proj"]
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in theirs.items()}
    assert all(state[k].dtype == v.dtype for k, v in theirs.items())
    words = state["text_encoder.bert.embeddings.word_embeddings.weight"]
    assert torch.equal(state["text_encoder.cls.predictions.decoder.weight"], words)
    extra = torch.load(tmp_path / "umt" / "instap_extra.pth", weights_only=True)["model"]
    ours, tied = to_torch(pair.params), state.keys() - to_torch(pair.params).keys()
    assert extra.keys() == ours.keys() - state.keys() and len(extra) == 13 and len(tied) == 3
    for key, value in ours.items():
        assert torch.equal((state | extra)[key], value), key
    loaded = LoadedConfig(config=config, file="", overrides={})
    convert("umt", tmp_path / "umt" / "umt.pth", tmp_path / "back", loaded)
    stored = StoredParams(str(tmp_path / "back"))
    for name, value in leaves(pair.params).items():
        if not name.startswith(("cross_attention", "instance_temperature")):
            np.testing.assert_array_equal(stored.read(name), np.asarray(value), err_msg=name)


def test_every_option_is_known_to_the_export():
    """A new field of these sections must be placed: does it change what the model computes?"""
    config = tiny_config("stage2")
    for section, fields in instap.FORWARD.items():
        placed = [*fields, *instap.TRAINING[section]]
        assert sorted(placed) == sorted(config[section].keys()), section
    assert instap.FORMAT == torch_model.FORMAT


def test_refusals_leave_nothing(pair, run, exported, tmp_path, capsys, monkeypatch):
    out = f"--output={tmp_path}/out"
    to = ("--to=torch", out)
    assert "/nowhere/config.json" in failed(capsys, "--input=/nowhere", *to)
    assert "exists" in failed(capsys, "--to=torch", f"--input={run}", f"--output={exported}")
    stage1 = tiny_config("stage1", **{"teacher.checkpoint": str(run)})
    config_only = tmp_path / "stage1"
    config_only.mkdir()
    (config_only / "config.json").write_text(json.dumps({"config": stage1.to_dict()}))
    assert "stage 'distill'" in failed(capsys, f"--input={config_only}", *to)
    flat = dict(nnx.to_flat_state(pair.params))
    path = ("vision_projection", "bias")
    flat[path] = flat[path].replace(np.where(np.arange(16) == 1, np.nan, 0).astype(np.float32))
    params = nnx.from_flat_state(flat)
    other = write_run(tmp_path / "nan", pair.config, params)
    message = failed(capsys, f"--input={other}", *to)
    assert "vision_projection.bias" in message and "not finite" in message
    monkeypatch.setitem(instap.TRAINING, "align", instap.TRAINING["align"][1:])
    assert "config.align.rec" in failed(capsys, f"--input={run}", *to)
    monkeypatch.undo()
    words = Path(pair.config.tokenizer.path)
    before = words.read_bytes()
    try:
        words.write_bytes(train_sentencepiece(["something else altogether"] * 3, 280))
        assert "is not the tokenizer" in failed(capsys, f"--input={run}", *to)
    finally:
        words.write_bytes(before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["nan", "stage1"]


def test_weights_and_description_are_of_one_step(pair, run, tmp_path, monkeypatch):
    """A run that trains writes its next checkpoint between the two."""
    shutil.copytree(run, tmp_path / "run")
    steps = tmp_path / "run" / "checkpoints"
    read = checkpoint.read_meta

    def read_and_train(workdir):
        found = read(workdir)
        flat = {path: leaf.replace(leaf[...] + 1) for path, leaf in nnx.to_flat_state(pair.params)}
        checkpoint.write_params(str(tmp_path / "next"), nnx.from_flat_state(flat), meta={})
        shutil.move(tmp_path / "next" / "checkpoints" / "0", steps / "3")
        return found

    monkeypatch.setattr(checkpoint, "read_meta", read_and_train)
    export(tmp_path / "run", tmp_path / "out", layout="torch")
    assert json.loads((tmp_path / "out/config.json").read_text())["trained"]["step"] == 0
    expected = to_torch(pair.params)
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("text_proj.bias"), expected["text_proj.bias"])


def test_writer_wants_every_key_once_and_as_announced(tmp_path):
    shapes = {"a": (2, 3), "b": ()}
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    with SafetensorsWriter(tmp_path / "x.safetensors", shapes) as writer:
        writer.write("b", np.float32(7))  # in any order
        writer.write("a", array.T.copy().T)  # not contiguous
    with safe_open(tmp_path / "x.safetensors", framework="np") as file:
        np.testing.assert_array_equal(file.get_tensor("a"), array)
        assert file.get_tensor("b") == 7
    unfinished = SafetensorsWriter(tmp_path / "y", shapes)
    with pytest.raises(ValueError, match="1 keys not written, first b"), unfinished as writer:
        writer.write("a", array)
    other = SafetensorsWriter(tmp_path / "z", {"a": (3, 2)})
    with pytest.raises(ValueError, match="not float32"), other as writer:
        writer.write("a", array)
