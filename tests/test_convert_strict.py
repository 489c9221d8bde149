"""What a conversion refuses, each in one line, with nothing written."""

import argparse
import hashlib
import json
import os
import shutil
import sys
import types
import zipfile

import bert_reference
import foreign
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file
from test_convert import align_config, clip_config, given

from instap_jax import main
from instap_jax.errors import UserError
from instap_jax.interop import reading
from instap_jax.interop.importing import convert
from instap_jax.interop.keys import Rule, resolve
from instap_jax.train import checkpoint

TABLE = "visual.positional_embedding"
KERNEL = "visual.transformer.resblocks.1.mlp.c_fc.weight"


@pytest.fixture(scope="module")
def state():
    return foreign.openai_weights(foreign.clip_model())


def refused(path, *words, kind="clip"):
    """The one line that a conversion of `path` ends in; nothing is left behind."""
    before = sorted(path.parent.iterdir()) if path.parent.exists() else None
    with pytest.raises(UserError) as fault:
        convert(kind, path, path.parent / "out", given(clip_config()))
    assert (sorted(path.parent.iterdir()) if path.parent.exists() else None) == before
    line = str(fault.value)
    assert "\n" not in line and str(path.name) in line, line
    for word in words:
        assert word in line, line


CHANGES = {
    "missing": (lambda s: s.pop(KERNEL), f"{KERNEL!r} is missing"),
    "missing layer": (
        lambda s: [s.pop(k) for k in list(s) if "resblocks.1." in k and "visual" in k],
        "'visual.transformer.resblocks.1.attn.out_proj.bias' is missing (and 11 more)",
    ),
    "extra": (
        lambda s: s.update({"visual.class_head.weight": torch.ones(2)}),
        "'visual.class_head.weight' has no place in the layout clip (OpenAI)",
    ),
    "shape": (
        lambda s: s.update({KERNEL: s[KERNEL].T}),
        f"{KERNEL!r} has shape (128, 256), not (256, 128)",
    ),
    "axes": (
        lambda s: s.update({"visual.conv1.weight": torch.ones(128, 3, 1, 7, 7)}),
        "'visual.conv1.weight' has shape (128, 3, 1, 7, 7), not 4 axes",
    ),
    "not a square": (
        lambda s: s.update({TABLE: s[TABLE][:-1]}), f"{TABLE!r} has 16 rows, not 1 and a square"
    ),
    "NaN": (lambda s: s[KERNEL][0].fill_(torch.nan), f"{KERNEL!r} has 128 values that are NaN"),
    "NaN in the table": (lambda s: s[TABLE][3].fill_(torch.nan), f"{TABLE!r} has 128 values"),
    "infinite": (lambda s: s[KERNEL][0, 0].fill_(-torch.inf), f"{KERNEL!r} has 1 values"),
    "beyond float32": (
        lambda s: s.update({KERNEL: s[KERNEL].double() * 1e300}),
        f"{KERNEL!r} has 32768 values that are NaN or infinite",
    ),
    "integers": (
        lambda s: s.update({KERNEL: s[KERNEL].int()}), f"{KERNEL!r} is int32, not floating point"
    ),
    "other kind": (lambda s: [s.pop(k) for k in list(s) if "visual" in k], "no CLIP vision"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_damaged_state_dict_is_refused(state, tmp_path, name):
    change, message = CHANGES[name]
    changed = {key: tensor.clone() for key, tensor in state.items()}
    change(changed)
    refused(foreign.save(changed, tmp_path / "clip.safetensors"), message)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("part", [0, 5, 0.5, 0.999])
def test_a_truncated_file_is_refused(state, tmp_path, suffix, part):
    path = foreign.save(state, tmp_path / f"clip{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content)) if part < 1 else part])
    refused(path, "truncated or damaged" if suffix != ".pt" or part != 5 else "clip.pt")


def test_old_torch_files_are_read_and_checked_too(state, tmp_path):
    path = tmp_path / "clip.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    weights = reading.open_weights(path)
    np.testing.assert_array_equal(weights.read(KERNEL), state[KERNEL])
    path.write_bytes(path.read_bytes()[:-9])
    refused(path, "truncated or damaged")


class _Code:
    def __reduce__(self):
        return os.mkdir, (f"{os.environ['CONVERT_TEST_TRAP']}",)


def test_a_pickle_with_code_is_not_run(state, tmp_path, monkeypatch):
    trap = tmp_path / "ran"
    monkeypatch.setenv("CONVERT_TEST_TRAP", str(trap))
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "clip.pt"
    torch.save(state | {"more": _Code()}, path)
    advice = "torch.save(C['model'], OTHER)"
    refused(path, "not opened: it names 'posix.mkdir'", "may run code", advice)
    assert not trap.exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_program_is_not_run(tmp_path):
    path = tmp_path / "ViT-L-14.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(2)), path)
    assert any(name.endswith("constants.pkl") for name in zipfile.ZipFile(path).namelist())
    refused(path, "TorchScript archive", "torch.save(torch.jit.load('ViT-L-14.pt', 'cpu')")


def test_other_content_than_tensors_is_refused(state, tmp_path):
    for content, message in (
        ([1, 2], "holds a list"),
        ({}, "holds no tensors"),
        (state | {"epochs": 3}, "'epochs' is a int, not a tensor"),
    ):
        torch.save(content, tmp_path / "clip.pt")
        refused(tmp_path / "clip.pt", message)


def test_paths_are_checked(tmp_path, state):
    refused(tmp_path / "none" / "clip.pt", "no such file or directory")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "no weights in it")
    for name in ("a.pt", "b.pth"):
        foreign.save({"a": torch.ones(1)}, empty / name)
    refused(empty, "2 weight files in it; name one")
    (tmp_path / "clip.txt").write_text("weights")
    refused(tmp_path / "clip.txt", "not one of *.safetensors")
    path = foreign.save(state, tmp_path / "clip.pt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").touch()
    with pytest.raises(UserError, match="out: exists and is not an empty directory"):
        convert("clip", path, tmp_path / "out", given(clip_config(98)))


def test_torch_is_needed_for_its_own_files_only(state, tmp_path, monkeypatch):
    path = foreign.save(state, tmp_path / "clip.pt")
    plain = foreign.save(state, tmp_path / "clip.safetensors")
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(path, "needs torch: pip install -e '.[torch]'")
    np.testing.assert_array_equal(reading.open_weights(plain).read(KERNEL), state[KERNEL])


def test_half_precision_and_training_arguments_are_read(tmp_path):
    values = np.array([1.5, -2.0, 3.0e-3], np.float32)
    save_file({"a": values.astype(ml_dtypes.bfloat16)}, tmp_path / "a.safetensors")
    read = reading.open_weights(tmp_path / "a.safetensors").read("a")
    np.testing.assert_array_equal(read.astype(np.float32), values.astype(ml_dtypes.bfloat16))
    for dtype in (torch.bfloat16, torch.float16):
        content = {
            "model": {"a": torch.tensor(values, dtype=dtype)},
            "args": argparse.Namespace(x=1),
        }
        torch.save(content, tmp_path / "a.pt")
        weights = reading.open_weights(tmp_path / "a.pt")
        assert weights.beside == ("args",)
        np.testing.assert_array_equal(weights.read("a"), content["model"]["a"].float())


def test_umts_training_checkpoints_are_read_without_its_code(tmp_path, monkeypatch):
    """`multi_modality/tasks/pretrain.py` saves its arguments as `utils.easydict.EasyDict`."""
    modules = {name: types.ModuleType(name) for name in ("utils", "utils.easydict")}
    kind = type("EasyDict", (dict,), {"__module__": "utils.easydict"})
    modules["utils.easydict"].EasyDict = kind
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    arguments = kind(a=1, b=kind(c=[1, 2]))
    arguments.a = 1  # as its __init__ does: an attribute for every key
    torch.save({"model": {"w": torch.ones(2)}, "config": arguments, "epoch": 3}, tmp_path / "a.pth")
    for name in modules:
        monkeypatch.delitem(sys.modules, name)
    weights = reading.open_weights(tmp_path / "a.pth")
    assert weights.shapes == {"w": (2,)} and weights.beside == ("config", "epoch")


def test_weights_in_several_files_are_read(state, tmp_path):
    model = foreign.clip_model()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "parts", max_shard_size="300KB")
    files = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 2
    index = tmp_path / "parts" / "model.safetensors.index.json"
    for source in ("parts", f"parts/{index.name}"):
        convert("clip", tmp_path / source, tmp_path / "out", given(clip_config(98)))
        shutil.rmtree(tmp_path / "out")
    parts, whole = (
        reading.open_weights(reading.locate(tmp_path / name)) for name in ("parts", "whole")
    )
    assert parts.shapes == whole.shapes and parts.files == tuple(files)
    for name in whole.shapes:
        np.testing.assert_array_equal(parts.read(name), whole.read(name))
    content = b"".join(file.read_bytes() for file in files)
    assert reading.digest(files) == hashlib.sha256(content).hexdigest()
    files[1].rename(tmp_path / "other")
    refused_in(tmp_path / "parts", "clip", f"{files[1].name}: no such file, but {index.name} names")
    shutil.copy(files[0], files[1])
    refused_in(tmp_path / "parts", "clip", f"a tensor lies in two of its {len(files)} files")
    for said in ('{"weight_map": {"a": "../other"}}', '{"weight_map": {"a": 1}}', "{}"):
        index.write_text(said)
        refused_in(tmp_path / "parts", "clip", "names no weight files beside it")


def test_two_conversions_to_one_output_leave_one_of_them_whole(tmp_path, monkeypatch):
    """Each in a process of its own, the second from start to end within the first."""
    path = bert_state(tmp_path, lambda s: None)
    write = checkpoint.write_params

    def write_late(*args, **kwargs):
        monkeypatch.setattr(checkpoint, "write_params", write)
        write(*args, **kwargs)
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: 1)
            convert("bert", path, tmp_path / "out", given(align_config()))

    monkeypatch.setattr(checkpoint, "write_params", write_late)
    with pytest.raises(UserError, match="out: cannot be written: Directory not empty"):
        convert("bert", path, tmp_path / "out", given(align_config()))
    assert checkpoint.read_meta(str(tmp_path / "out"))[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bert.pt", "out"]


def test_hidden_sizes_that_no_ratio_gives_exactly_are_kept(tmp_path):
    config = bert_reference.make_config(vocab=60, width=176, heads=2, hidden=240, length=40)
    config.num_hidden_layers = 2
    foreign.save(transformers.BertForMaskedLM(config).state_dict(), tmp_path / "bert.pt")
    ours = align_config(**{"text.depth": 2, "text.width": 176, "text.mlp_ratio": 240 / 176})
    convert("bert", tmp_path / "bert.pt", tmp_path / "out", given(ours))
    stored = checkpoint.StoredParams(str(tmp_path / "out"))
    assert stored.shapes["text.blocks.mlp.expand.bias"] == (1, 240)


def test_hugging_face_options_that_we_do_not_compute_are_refused(tmp_path):
    model = foreign.clip_model()
    model.save_pretrained(tmp_path / "hf")
    config = tmp_path / "hf" / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"quick_gelu"', '"gelu"'))
    refused_in(tmp_path / "hf", "clip", "hidden_act is 'gelu'; the teacher computes with")
    config.write_text(text[:20])
    refused_in(tmp_path / "hf", "clip", "config.json: not JSON")
    transformers.CLIPVisionModel(model.config.vision_config).save_pretrained(tmp_path / "vision")
    refused_in(tmp_path / "vision", "clip", "has no 'visual_projection.weight'")
    foreign.bert_model().save_pretrained(tmp_path / "bert")
    refused_in(tmp_path / "bert", "bert", "3 layers; how many of them are fusion layers")
    config = tmp_path / "bert" / "config.json"
    said = json.loads(config.read_text())
    others = {
        "hidden_act": "relu",
        "layer_norm_eps": 1e-5,
        "position_embedding_type": "relative_key",
    }
    for field, value in others.items():
        config.write_text(json.dumps(said | {field: value}))
        refused_in(tmp_path / "bert", "bert", f"{field} is {value!r}; the text encoder computes")
    refused_in(tmp_path / "bert", "umt", "no UMT pre-training checkpoint")
    refused_in(tmp_path / "hf", "bert", "no BERT")


HIDDEN = {"hidden_size": 256, "num_hidden_layers": 24, "intermediate_size": 4096}


@pytest.mark.parametrize("kind", ["clip", "bert"])
def test_a_config_json_of_another_size_of_model_is_refused(tmp_path, kind):
    model = foreign.clip_model() if kind == "clip" else foreign.bert_model()
    model.save_pretrained(tmp_path / "hf")
    config = tmp_path / "hf" / "config.json"
    text = json.loads(config.read_text())

    def describe(**changes):
        if kind == "clip":
            changes = {"vision_config": text["vision_config"] | changes}
        config.write_text(json.dumps(text | changes))

    for field, value in (HIDDEN | ({"patch_size": 14} if kind == "clip" else {})).items():
        describe(**{field: value})
        message = f"config.json: {field} is {value}, but .* in the weights; take the file that"
        with pytest.raises(UserError, match=message):
            convert(kind, tmp_path / "hf", tmp_path / "out", None)
    for value in (None, "2", 0, True):
        describe(num_attention_heads=value)
        refused_in(tmp_path / "hf", kind, f"num_attention_heads is {value!r}, no number of heads")


def refused_in(directory, kind, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        convert(kind, directory, directory.parent / "out", None)
    assert not (directory.parent / "out").exists()


def bert_state(tmp_path, change):
    state = {k: v.clone() for k, v in foreign.bert_model().state_dict().items()}
    change(state)
    return foreign.save(state, tmp_path / "bert.pt")


def test_tied_tensors_must_be_equal_and_may_be_missing(tmp_path):
    def run(change, out):
        path = bert_state(tmp_path, change)
        return convert("bert", path, tmp_path / out, given(align_config()))

    decoder = "cls.predictions.decoder.weight"
    with pytest.raises(UserError, match=f"'{decoder}' is not equal to 'bert.embeddings.word_"):
        run(lambda s: s.update({decoder: s[decoder] + 1}), "out")
    ids = "bert.embeddings.position_ids"
    with pytest.raises(UserError, match=f"{ids}' does not count"):
        run(lambda s: s.update({ids: torch.zeros(1, 40, dtype=torch.long)}), "out")

    def as_in_2018(state):
        del state[decoder]
        for name in [name for name in state if "LayerNorm" in name]:
            old = name.replace("weight", "gamma").replace("bias", "beta")
            state[old] = state.pop(name)

    assert run(as_in_2018, "out").totals()["loaded"]["arrays"]
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(UserError, match="are the same tensor"):
        run(lambda s: s.update({"embeddings.LayerNorm.bias": torch.ones(32)}), "again")


def test_a_configuration_that_differs_is_named_field_by_field(state, tmp_path, capsys):
    path = foreign.save(state, tmp_path / "clip.safetensors")
    flags = ["--from=clip", f"--input={path}", f"--output={tmp_path}/out"]
    assert main.main(["convert", *flags, "--config=configs/stage1_l16.py"]) == 2
    line = capsys.readouterr().err
    assert "does not fit the configuration: teacher.width is 128 there, 1024 here" in line
    assert "teacher.projection is 12 there, 768 here" in line
    for wrong, message in (
        ([flags[0].replace("clip", "clap"), *flags[1:]], "--from=clap: one of clip, bert, umt"),
        (flags[1:], "give one of --from=KIND"),
        ([*flags, "--to=umt"], "give one of --from=KIND"),
    ):
        assert main.main(["convert", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_a_key_table_with_holes_is_a_fault_of_the_program():
    shapes = {"a.kernel": (2, 3), "b": (1,)}
    rule = Rule("a.kernel", ("x",))
    with pytest.raises(ValueError, match="no rule for b"):
        resolve([rule], shapes)
    with pytest.raises(ValueError, match=r"two rules for a\.kernel"):
        resolve([rule, rule], shapes, own=("b",))
    with pytest.raises(ValueError, match="the model has no c"):
        resolve([rule, Rule("c", ("y",))], shapes, own=("b",))
    assert resolve([rule], shapes, own=("b",)).own == ("b",)
