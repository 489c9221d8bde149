"""Weights and the vocabulary that they were trained with stay together, wherever a run goes."""

import shutil
from pathlib import Path

import foreign
import numpy as np
import pytest
import torch
from flax import nnx
from test_convert import align_config, given, on_one_device
from tiny import tiny_config
from torch_export import make_pair, write_run, write_words

import instap_jax
from instap_jax import config_check, main, sharding
from instap_jax.commands.train import train_joined
from instap_jax.data.tokenizer import load_tokenizer, train_sentencepiece
from instap_jax.errors import UserError
from instap_jax.evaluation.encoder import load_encoder
from instap_jax.interop import torch_model
from instap_jax.interop.export import export
from instap_jax.interop.importing import convert
from instap_jax.train import loop
from instap_jax.train.initialise import initial_params
from instap_jax.train.objectives import OBJECTIVES
from instap_jax.train.stop import StopRequest

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
OTHER_TEXTS = ["pole tower stands still beside no water"] * 3
TEXTS = ["a red ball", "rolls to the left"]


def write_vocabulary(path: Path, count: int, word: str = "w") -> Path:
    """A vocab.txt of `count` lines."""
    path.write_text("\n".join([*SPECIAL, *(f"{word}{i}" for i in range(count - 5))]) + "\n")
    return path


def made_run(directory: Path, **text) -> Path:
    """A run of stage 'align' whose vocabulary lies beside it."""
    config = tiny_config("stage2")
    config.text.update(text)
    write_words(directory, config)
    return write_run(directory / "run", config, make_pair(config).params)


def started(stage: str, config):
    """The parameters with which a run begins."""
    objective = OBJECTIVES[stage]
    abstract = nnx.state(nnx.eval_shape(lambda: objective.create(config, nnx.Rngs(0))))
    abstract = on_one_device(abstract, config)
    return initial_params(config, objective, abstract, abstract)


@pytest.mark.parametrize("stage", ["align", "ground"])
def test_a_run_that_takes_a_text_encoder_is_held_to_its_vocabulary(tmp_path, stage):
    source = made_run(tmp_path)
    config = tiny_config({"align": "stage2", "ground": "ground"}[stage])
    config.checkpoint.init_from = str(source)
    config.tokenizer.path = str(tmp_path / "other.model")
    Path(config.tokenizer.path).write_bytes(train_sentencepiece(OTHER_TEXTS, 300))
    with pytest.raises(UserError, match=r"other\.model is not the tokenizer that .*run was"):
        started(stage, config)
    shutil.copy(tmp_path / "words.model", config.tokenizer.path)  # the same, elsewhere
    assert "text" in started(stage, config)


def test_training_keeps_its_tokenizer(tmp_path, monkeypatch):
    config = tiny_config("stage2")
    write_words(tmp_path, config)
    words, run = tmp_path / "words.model", tmp_path / "run"
    seen = []

    def train(config, workdir, *_):
        seen.append((workdir / "tokenizer.model").read_bytes())

    monkeypatch.setattr(loop, "train", train)
    first = words.read_bytes()
    train_joined(given(config), run, StopRequest())
    assert seen == [first]  # before there is any checkpoint
    words.write_bytes(train_sentencepiece(OTHER_TEXTS, 300))
    train_joined(given(config), run, StopRequest())  # nothing was trained: begun anew
    assert seen[1] == words.read_bytes() != first
    (run / "checkpoints" / "2").mkdir(parents=True)
    kept = words.read_bytes()
    words.write_bytes(first)
    train_joined(given(config), run, StopRequest())  # goes on: training will say what is wrong
    assert seen[2] == kept
    assert {path.name for path in run.iterdir()} == {
        "checkpoints",
        "config.json",
        "tokenizer.model",
    }
    words.unlink()
    with pytest.raises(UserError, match=r"cannot read tokenizer\.path .*words\.model': No such"):
        train_joined(given(config), tmp_path / "second", StopRequest())


def test_a_moved_run_is_read_with_its_own_copy(tmp_path):
    run = made_run(tmp_path)
    (run / "checkpoints").rename(run / "aside")  # the copy is made before the first of them
    config_check.keep_tokenizer(config_check.read(run), run)
    (run / "aside").rename(run / "checkpoints")
    expected = instap_jax.load(run).encode_text(TEXTS)
    assert config_check.read(run).tokenizer.path == str(tmp_path / "words.model")
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(run, tmp_path / "elsewhere" / "moved")
    (tmp_path / "words.model").unlink()
    np.testing.assert_array_equal(instap_jax.load(moved).encode_text(TEXTS), expected)
    export(Path(moved), tmp_path / "export", layout="torch")
    assert (tmp_path / "export" / "tokenizer.model").is_file()
    # A copy that is not what the run was trained with is not taken.
    (Path(moved) / "tokenizer.model").write_bytes(train_sentencepiece(OTHER_TEXTS, 300))
    with pytest.raises(UserError, match="is not the tokenizer that"):
        instap_jax.load(moved)


def umt_file(directory: Path) -> Path:
    directory.mkdir()
    return foreign.save(foreign.umt_weights(foreign.UMT()), directory / "umt.safetensors")


def test_a_moved_conversion_is_read_with_its_own_copy(tmp_path):
    file = umt_file(tmp_path / "in")
    vocabulary = write_vocabulary(tmp_path / "words.txt", 60)
    config = align_config()
    config.tokenizer.update(kind="wordpiece", path=str(vocabulary))
    report = convert("umt", file, tmp_path / "out", given(config))
    assert not report.missing
    vocabulary.unlink()
    moved = shutil.move(tmp_path / "out", tmp_path / "moved")
    assert config_check.read(Path(moved)).tokenizer.path == str(tmp_path / "moved" / "vocab.txt")
    assert instap_jax.load(moved).encode_text(["w1 w2"]).shape == (1, 16)
    tokenizer = config_check.read(Path(moved)).tokenizer
    assert (tokenizer.cls_id, tokenizer.mask_id) == (2, 4)


def test_a_conversion_without_a_vocabulary_says_so(tmp_path, capsys):
    file, out = umt_file(tmp_path / "in"), tmp_path / "out"
    assert main.main(["convert", "--from=umt", f"--input={file}", f"--output={out}"]) == 0
    printed = capsys.readouterr().out
    assert "missing: the vocabulary, without which no text can be read" in printed
    assert "(BERT's vocab.txt) beside the file and convert again" in printed
    message = "was converted without a vocabulary and can read no text: put the vocab.txt"
    with pytest.raises(UserError, match=message):
        instap_jax.load(out)
    with pytest.raises(UserError, match=message):
        load_encoder(out, sharding.mesh_of_all())
    with pytest.raises(UserError, match=message):
        export(out, tmp_path / "torch", layout="torch")
    write_vocabulary(file.with_name("vocab.txt"), 60)
    assert not convert("umt", file, tmp_path / "again", None).missing
    instap_jax.load(tmp_path / "again")


def test_a_vocabulary_larger_than_the_embeddings_is_refused(tmp_path):
    file = umt_file(tmp_path / "in")
    write_vocabulary(file.with_name("vocab.txt"), 61)
    message = "embeds {} tokens, but the tokenizer has {} ids; take the vocabulary that belongs"
    with pytest.raises(UserError, match=r"umt\.safetensors " + message.format(60, 61)):
        convert("umt", file, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()
    run = made_run(tmp_path, vocab_size=200)
    size = load_tokenizer(config_check.read(run).tokenizer).vocab_size
    for read in (instap_jax.load, lambda r: export(r, tmp_path / "torch", layout="torch")):
        with pytest.raises(UserError, match=f"run {message.format(200, size)}"):
            read(run)


def test_another_vocabulary_beside_the_weights_is_not_taken_for_the_given_one(tmp_path):
    file = umt_file(tmp_path / "in")
    config = align_config()
    path = write_vocabulary(tmp_path / "mine.txt", 60)
    config.tokenizer.update(kind="wordpiece", path=str(path))
    beside = write_vocabulary(file.with_name("vocab.txt"), 60, word="v")
    with pytest.raises(UserError) as error:
        convert("umt", file, tmp_path / "out", given(config))
    assert str(error.value).startswith(
        f"{beside} is another vocabulary than tokenizer.path={path}; take away the one that"
    )
    shutil.copy(path, beside)
    convert("umt", file, tmp_path / "out", given(config))


def test_captions_of_a_converted_umt_are_cleaned_as_in_its_training(tmp_path):
    file = umt_file(tmp_path / "in")
    write_vocabulary(file.with_name("vocab.txt"), 60)
    report = convert("umt", file, tmp_path / "out", None)
    assert "tokenizer.text=umt" in report.assumed
    model = instap_jax.load(tmp_path / "out", dtype="float32")
    ours = model.encode_text(["W1, w2-w3!"])
    np.testing.assert_array_equal(ours, model.encode_text(["w1 w2 w3"]))
    export(tmp_path / "out", tmp_path / "torch", layout="torch")
    theirs = torch_model.InstAP.from_pretrained(tmp_path / "torch").eval()
    with torch.inference_mode():
        np.testing.assert_allclose(ours, theirs.encode_text(["W1, w2-w3!"]), atol=1e-4)
    convert("torch", tmp_path / "torch", tmp_path / "back", None)
    assert config_check.read(tmp_path / "back").tokenizer.text == "umt"
    export(tmp_path / "out", tmp_path / "umt", layout="umt")
    shutil.copy(tmp_path / "out" / "vocab.txt", tmp_path / "umt")
    convert("umt", tmp_path / "umt" / "umt.pth", tmp_path / "again", None)
    assert config_check.read(tmp_path / "again").tokenizer.text == "umt"
    config = align_config(**{"checkpoint.init_from": str(tmp_path / "out")})
    config.tokenizer.update(kind="wordpiece", path=str(tmp_path / "out" / "vocab.txt"))
    with pytest.raises(
        UserError, match=r"was trained with tokenizer\.text='umt', not 'plain'; set"
    ):
        started("align", config)
