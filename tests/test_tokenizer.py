"""Both tokenizers, their layout and faults, and the command that trains one."""

import hashlib
import json
import pickle

import numpy as np
import pytest
import transformers
from ml_collections import ConfigDict

from instap_jax import main
from instap_jax.commands.tokenizer import _captions
from instap_jax.config import default
from instap_jax.data.tokenizer import (
    SentencePieceTokenizer,
    check_vocab_size,
    load_tokenizer,
    train_sentencepiece,
    umt_text,
)
from instap_jax.errors import UserError

TEXTS = [
    f"A {color} {shape} moves to the left of the {size} car. It stops."
    for color in ("red", "green", "blue", "yellow")
    for shape in ("square", "circle", "triangle", "star")
    for size in ("big", "small")
]
VOCAB = [
    "[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "##s", "run", "##ning",
    "the", "cafe", "un", "##aff", "##able", ",", ".", "!", "'", "-", "[", "]", "mask", "犬", "2",
    "##0", "i", "ß", "##ı", "straße", "t",
]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_sentencepiece(TEXTS, 400)


def words_config(kind, path, **fields) -> ConfigDict:
    config = default().tokenizer
    config.update(kind=kind, path=str(path), **fields)
    return config


@pytest.fixture
def wordpiece(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    return load_tokenizer(words_config("wordpiece", tmp_path / "vocab.txt"))


def test_training_is_deterministic_and_has_the_special_pieces(model):
    assert train_sentencepiece(iter(TEXTS), 400) == model
    tokenizer = SentencePieceTokenizer(model)
    ids = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id)
    assert (*ids, tokenizer.mask_id) == tokenizer.special_ids == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    "text", ["A red square 犬 stops 😀.", "[MASK] [SEP] [PAD] <s>", "", "\ud800"]
)
def test_sentencepiece_never_gives_a_special_id_for_text(model, text):
    ids = SentencePieceTokenizer(model).encode(text, 64)
    used = ids[: np.argmax(ids == 3) + 1]
    assert ids.dtype == np.int32 and ids[0] == 2 and used[-1] == 3
    assert not np.isin(used[1:-1], range(5)).any()  # byte fallback: not even [UNK]
    assert (ids[len(used) :] == 0).all()


@pytest.mark.parametrize("length", [3, 8, 32])
def test_truncation_keeps_the_separator(model, wordpiece, length):
    for tokenizer in (SentencePieceTokenizer(model), wordpiece):
        ids = tokenizer.encode("a dog running " * 5000, length)
        assert ids.shape == (length,) and ids[0] == tokenizer.cls_id
        assert ids[-1] == tokenizer.sep_id and tokenizer.pad_id not in ids


@pytest.mark.parametrize(
    "text",
    [
        "A dog RUNNING, the dogs!",
        "Café unaffable 犬犬 2000",
        "straße I ß İ",
        "dog\u200b\u00ad\ttab\x00 run'n-a",
        "zebra " + "a" * 200,
        "",
    ],
)
@pytest.mark.parametrize("length", [5, 40])
def test_wordpiece_equals_transformers(wordpiece, tmp_path, text, length):
    reference = transformers.BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=True)
    expected = reference(text, padding="max_length", truncation=True, max_length=length)
    np.testing.assert_array_equal(wordpiece.encode(text, length), expected["input_ids"])


def test_wordpiece_reads_special_names_as_text(wordpiece):
    ids = wordpiece.encode("the [MASK]", 8)
    names = [VOCAB[i] for i in ids]
    assert names == ["[CLS]", "the", "[", "mask", "]", "[SEP]", "[PAD]", "[PAD]"]
    assert wordpiece.special_ids == (0, 2, 3, 4, 5)


def test_pickle_and_fingerprint(model, wordpiece):
    for tokenizer in (SentencePieceTokenizer(model), wordpiece):
        expected = tokenizer.encode("the dog runs", 16)  # the library object now exists
        copy = pickle.loads(pickle.dumps(tokenizer))
        np.testing.assert_array_equal(copy.encode("the dog runs", 16), expected)
        assert copy.fingerprint() == tokenizer.fingerprint()
    other = SentencePieceTokenizer(train_sentencepiece(TEXTS[:-1], 400))
    assert len({t.fingerprint() for t in (SentencePieceTokenizer(model), wordpiece, other)}) == 3


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A man, in a red T-shirt, isn't out/in.", "a man in a red t shirt isnt out in"),
        ("  Two   <person>s (at *home*): ~yes!?;#\"\n\n", "two persons at home yes "),
        ("", ""),
    ],
)  # fmt: skip
def test_umts_clean_up(wordpiece, tmp_path, text, cleaned):
    """What `pre_text` of UMT's multi_modality/dataset/utils.py gives."""
    umt = load_tokenizer(words_config("wordpiece", tmp_path / "vocab.txt", text="umt"))
    assert umt_text(text) == cleaned.rstrip()
    np.testing.assert_array_equal(umt.encode(text, 32), wordpiece.encode(cleaned, 32))
    assert umt.fingerprint() != wordpiece.fingerprint()
    copy = pickle.loads(pickle.dumps(umt))
    assert copy.text == "umt" and copy.fingerprint() == umt.fingerprint()


def test_a_plain_fingerprint_is_what_it_was(tmp_path, wordpiece):
    data = b"wordpiece\0" + (tmp_path / "vocab.txt").read_bytes()
    assert wordpiece.fingerprint() == hashlib.blake2b(data, digest_size=16).hexdigest()


def test_config_faults(tmp_path, model):
    config = words_config("sentencepiece", tmp_path / "x.model")

    def fault() -> str:
        with pytest.raises(UserError) as error:
            load_tokenizer(config)
        return str(error.value)

    assert "cannot read" in fault() and "x.model" in fault()
    for damaged in (b"", b"garbage", model[: len(model) // 2]):
        (tmp_path / "x.model").write_bytes(damaged)
        assert "is no sentencepiece vocabulary" in fault()
    config.kind = "wordpiece"
    for damaged in (b"", b"\xff\xfe", b"[PAD]\n[UNK]\n", "\n".join(VOCAB[1:]).encode()):
        (tmp_path / "x.model").write_bytes(damaged)
        assert "is no wordpiece vocabulary" in fault()
    (tmp_path / "x.model").write_text("\n".join(reversed(VOCAB)))
    assert "line" in fault()
    config.length = 2
    assert "tokenizer.length" in fault()
    config.kind = "bpe"
    assert "sentencepiece, wordpiece" in fault()
    config.update(kind="wordpiece", length=32, path="")
    assert "not set" in fault()


def with_words(tmp_path, *words: str) -> ConfigDict:
    path = tmp_path / "more.txt"
    path.write_text("\n".join([*VOCAB, *words]), encoding="utf-8")
    return words_config("wordpiece", path)


@pytest.mark.parametrize("word", ["London", "##S", "McDonald", "Été"])
def test_a_cased_vocabulary_is_refused(tmp_path, word):
    with pytest.raises(UserError) as error:
        load_tokenizer(with_words(tmp_path, "london", word))
    message = str(error.value)
    assert f"it is cased ({word!r} on line {len(VOCAB) + 2})" in message
    assert "more.txt" in message and "an uncased vocabulary is needed" in message
    assert "\n" not in message


def test_upper_case_that_loses_no_word_is_borne(tmp_path):
    """As bert-base-uncased has it, and bert-base-chinese, which is lower-cased too."""
    words = ["[unused99]", "[Entity]", "<S>", "Ⅻ", "Ｉ", "ℝ", "##ℝ", "ᴬ"]
    assert load_tokenizer(with_words(tmp_path, *words)).vocab_size == len(VOCAB) + len(words)


def test_text_encoder_must_hold_the_vocabulary(wordpiece):
    check_vocab_size(wordpiece, len(VOCAB))
    with pytest.raises(UserError, match=rf"at least {len(VOCAB)}"):
        check_vocab_size(wordpiece, len(VOCAB) - 1)


@pytest.fixture
def annotations(tmp_path):
    lines = []
    for i, text in enumerate(TEXTS):
        line = {"id": f"s{i}", "media": "a.jpg", "kind": "image", "source": "t", "caption": text}
        boxes = [[0, 1, 1, 9, 9]]
        instance = {"id": 0, "category": "x", "caption": f"quokka {text}", "boxes": boxes}
        split = "train" if i else "img-1k"
        lines.append(line | {"split": split, "instances": [instance]})
    path = tmp_path / "annotations.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_of_too_many_captions_some_are_drawn_evenly(tmp_path):
    path = tmp_path / "many.jsonl"
    line = {"media": "a.jpg", "kind": "image"}
    lines = [json.dumps(line | {"id": str(i), "caption": f"word {i}"}) for i in range(1000)]
    path.write_text("\n".join(lines))
    drawn, found = _captions(path, "train", 200)
    assert found == 1000 and len(set(drawn)) == 200
    numbers = np.array([int(text.split()[1]) for text in drawn])
    # The mean of 200 of 0 to 999 is 499.5 with a standard deviation of 18; the first 200: 99.5.
    assert abs(numbers.mean() - 499.5) < 72
    assert drawn == _captions(path, "train", 200)[0]
    assert _captions(path, "train", 1000) == ([f"word {i}" for i in range(1000)], 1000)


def test_command_trains_on_all_captions_of_a_split(annotations, tmp_path, capsys):
    out = tmp_path / "t.model"
    args = ["tokenizer", f"--annotations={annotations}", f"--out={out}", "--vocab_size=400"]
    assert main.main(args) == 0
    tokenizer = SentencePieceTokenizer(out.read_bytes())
    printed = capsys.readouterr().out
    assert f"training on {2 * len(TEXTS) - 2} captions" in printed
    assert f"{tokenizer.vocab_size} pieces" in printed
    # Only the instance captions have a q and a k: no byte fallback (ids 5-260) is needed.
    assert (tokenizer.encode("quokka", 8)[1:7] > 260).all()
    assert main.main(args) == 2  # never overwrites
    assert main.main([*args[:2], f"--out={tmp_path}/u.model", "--vocab_size=20"]) == 2
    assert main.main([*args[:2], f"--out={tmp_path}/u.model", "--vocab_size=99999999999"]) == 2
    assert "must be at least" in capsys.readouterr().err
    args[2] = f"--out={tmp_path}/u.model"
    assert main.main([*args, "--split=missing"]) == 2
    assert "img_1k, train" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["annotations.jsonl", "t.model"]
