"""Text to token ids: sentencepiece (trained here) or WordPiece (for BERT vocabularies).

Both give BERT's layout, [CLS] text [SEP] [PAD] ..., and both read every text as plain text: a
caption that contains '[MASK]' or '[SEP]' does not become that token.
"""

import functools
import hashlib
import io
import re
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import sentencepiece
import tokenizers
from ml_collections import ConfigDict

from instap_jax.errors import UserError, cannot

SPECIAL_PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # sentencepiece ids 0-4

KINDS = ("sentencepiece", "wordpiece")
_MAX_LENGTH = 1 << 16  # tokens; only guards against a mistyped tokenizer.length


def umt_text(text: str) -> str:
    """As UMT's `pre_text` (multi_modality/dataset/utils.py) changes every caption."""
    text = re.sub(r"[,.'!?\"()*#:;~]", "", text.lower())
    text = text.replace("-", " ").replace("/", " ").replace("<person>", "person")
    return re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")


# `tokenizer.text` -> what a text goes through before it is cut into tokens.
CLEAN = {"plain": str, "umt": umt_text}


class Tokenizer(Protocol):
    """What the pipeline and the objectives use of a tokenizer. Instances pickle to workers.

    Attributes:
      vocab_size: number of ids, [0, vocab_size).
      special_ids: the ids that stand for no text; masking never draws them.
    """

    vocab_size: int
    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    special_ids: tuple[int, ...]

    def encode(self, text: str, length: int) -> np.ndarray:
        """Returns int32 [length]: [CLS], the text's ids cut to length - 2, [SEP], then [PAD]."""
        ...

    def fingerprint(self) -> str:
        """Returns a hash of kind, vocabulary and clean-up: equal means that ids mean the same."""
        ...


class _Base:
    """What both kinds share; a subclass sets the ids and defines `_ids`.

    Attributes:
      text: what texts go through first, in `CLEAN`.
    """

    text = "plain"

    def __init__(self, *, kind: str, data: bytes, vocab_size: int, special_ids: tuple[int, ...]):
        self.vocab_size = vocab_size
        self.special_ids = special_ids
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = special_ids
        self._kind, self._data = kind, data

    def encode(self, text: str, length: int) -> np.ndarray:
        """See `Tokenizer.encode`."""
        # Surrogates have no UTF-8 form and would raise in both libraries.
        text = text.encode("utf-8", "replace").decode("utf-8")
        ids = self._ids(CLEAN[self.text](text))[: length - 2]
        out = np.full(length, self.pad_id, np.int32)
        out[0] = self.cls_id
        out[1 : len(ids) + 1] = ids
        out[len(ids) + 1] = self.sep_id
        return out

    def fingerprint(self) -> str:
        """See `Tokenizer.fingerprint`."""
        kind = self._kind if self.text == "plain" else f"{self._kind} {self.text}"
        return hashlib.blake2b(kind.encode() + b"\0" + self._data, digest_size=16).hexdigest()

    def __getstate__(self):
        # The libraries' own objects are built again in the worker, from the same bytes.
        return {name: value for name, value in self.__dict__.items() if name != "_model"}


class SentencePieceTokenizer(_Base):
    """A .model file made by `train_sentencepiece`; raises ValueError on any other bytes."""

    def __init__(self, data: bytes):
        try:
            model = sentencepiece.SentencePieceProcessor(model_proto=data)
            size = model.vocab_size()
        except (RuntimeError, OSError) as error:
            raise ValueError("not a sentencepiece model") from error
        first = tuple(model.id_to_piece(i) for i in range(min(5, size)))
        if first != SPECIAL_PIECES:
            raise ValueError(
                f"its ids 0-4 are {' '.join(first)}, not {' '.join(SPECIAL_PIECES)}; train one "
                "with `instap tokenizer`"
            )
        super().__init__(
            kind="sentencepiece", data=data, vocab_size=size, special_ids=(0, 1, 2, 3, 4)
        )

    @functools.cached_property
    def _model(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self._data)

    def _ids(self, text: str) -> list[int]:
        return self._model.encode(text)


class WordPieceTokenizer(_Base):
    """A BERT vocab.txt, lower-cased, as `transformers.BertTokenizer` reads it (BERT uncased).

    Raises ValueError on bytes that are no such vocabulary, a cased one among them.
    """

    def __init__(self, data: bytes):
        vocab = _parse_vocab(data)
        missing = [piece for piece in SPECIAL_PIECES if piece not in vocab]
        if missing:
            raise ValueError(f"it has no {missing[0]} line")
        _check_uncased(vocab)
        super().__init__(
            kind="wordpiece",
            data=data,
            vocab_size=max(vocab.values()) + 1,
            special_ids=tuple(vocab[piece] for piece in SPECIAL_PIECES),
        )
        if self.pad_id != 0:
            raise ValueError(f"[PAD] is on line {self.pad_id + 1}; batches need it on line 1")

    @functools.cached_property
    def _model(self) -> tokenizers.Tokenizer:
        wordpiece = tokenizers.models.WordPiece(
            _parse_vocab(self._data), unk_token="[UNK]", max_input_chars_per_word=100
        )
        model = tokenizers.Tokenizer(wordpiece)
        model.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
        model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        return model

    def _ids(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids


def load_tokenizer(tokenizer_config: ConfigDict) -> Tokenizer:
    """Loads what `config.tokenizer` names.

    Raises:
      UserError: unknown kind, path unset, missing or not such a file, length out of range.
    """
    kind, path, length = (tokenizer_config[key] for key in ("kind", "path", "length"))
    if kind not in KINDS:
        raise UserError(f"tokenizer.kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    if not 3 <= length <= _MAX_LENGTH:
        raise UserError(f"tokenizer.length is {length}; it must be in [3, {_MAX_LENGTH}]")
    if not path:
        raise UserError(
            "tokenizer.path is not set; train one with `instap tokenizer` or name a BERT vocab.txt"
        )
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise cannot(f"cannot read tokenizer.path {path!r}", error) from error
    try:
        found = (SentencePieceTokenizer if kind == "sentencepiece" else WordPieceTokenizer)(data)
    except ValueError as error:
        raise UserError(f"tokenizer.path {path!r} is no {kind} vocabulary: {error}") from error
    found.text = tokenizer_config.text
    return found


def check_vocab_size(tokenizer: Tokenizer, vocab_size: int, *, weights: str = "") -> None:
    """Raises UserError where the text encoder has fewer embeddings than the tokenizer has ids.

    Args:
      weights: where the embeddings are, whose number is given; '' for a model yet to be trained.
    """
    if vocab_size >= tokenizer.vocab_size:
        return
    if weights:
        raise UserError(
            f"{weights} embeds {vocab_size} tokens, but the tokenizer has {tokenizer.vocab_size} "
            "ids; take the vocabulary that belongs to these weights"
        )
    raise UserError(
        f"text.vocab_size is {vocab_size}, but the tokenizer has {tokenizer.vocab_size} ids; "
        f"set text.vocab_size to at least {tokenizer.vocab_size}"
    )


def check_ids(tokenizer: Tokenizer, config: ConfigDict) -> None:
    """Raises UserError where the ids in the `tokenizer` section are not those of the file."""
    for name in ("cls_id", "mask_id"):
        own = getattr(tokenizer, name)
        if config[name] != own:
            raise UserError(
                f"tokenizer.{name} is {config[name]}, but in {config.path} it is {own}; "
                f"set tokenizer.{name}={own}"
            )


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """Trains a unigram model with byte fallback on `texts`; returns the .model file's bytes.

    Lower-cases (NFKC case folding), as the BERT vocabularies do. The same texts in the same order
    give the same bytes. A corpus too small for `vocab_size` gives fewer pieces.

    Raises:
      UserError: no text, or a vocabulary too small for the bytes and characters.
    """
    lines = (text.encode("utf-8", "replace").decode("utf-8") for text in texts)
    sentences = [line for text in lines for line in text.splitlines() if line.strip()]
    if not sentences:
        raise UserError("there is no caption to train the tokenizer on")
    pad, unk, cls, sep, mask = SPECIAL_PIECES
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=out,
            vocab_size=vocab_size,
            model_type="unigram",
            normalization_rule_name="nmt_nfkc_cf",
            byte_fallback=True,
            hard_vocab_limit=False,
            # Every sentence is read, in order: a drawn subset would depend on a hidden seed.
            input_sentence_size=0,
            shuffle_input_sentence=False,
            # Not the machine's number of cores: it changes the order of floating-point sums.
            num_threads=8,
            max_sentence_length=1 << 20,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=pad,
            unk_piece=unk,
            bos_piece=cls,
            eos_piece=sep,
            control_symbols=[mask],
            minloglevel=2,
        )
    except (RuntimeError, ValueError, OverflowError) as error:
        least = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
        why = f"it must be at least {least[1]}" if least else str(error)
        raise UserError(
            f"cannot make a vocabulary of {vocab_size} from {len(sentences)} lines: {why}"
        ) from error
    return out.getvalue()


def _check_uncased(vocab: dict[str, int]) -> None:
    """Raises ValueError on a word that no text can give: texts are lower-cased.

    Exempt are special tokens, and single characters: vocabularies that are lower-cased may keep a
    few (BERT's Chinese one: 8), and lose no word by that.
    """
    for piece, row in vocab.items():
        special = piece[:1] + piece[-1:] in ("[]", "<>")
        if piece != piece.lower() and len(piece) > 1 and not special:
            raise ValueError(
                f"it is cased ({piece!r} on line {row + 1}), but texts are lower-cased here; an "
                "uncased vocabulary is needed, with the weights that belong to it"
            )


def _parse_vocab(data: bytes) -> dict[str, int]:
    """Maps every line to its number, from 0; raises ValueError where that is no vocabulary."""
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8 text") from error
    lines = [line.rstrip("\r") for line in lines]
    if lines and not lines[-1]:
        lines.pop()
    return {line: i for i, line in enumerate(lines)}
