"""What a run was trained with besides its configuration: the same path can hold something else.

Checkpoints carry these facts; resuming and evaluating compare them, so that a tokenizer trained
anew or a teacher trained further is never taken for the one that the run knows.
"""

from typing import Any

from ml_collections import ConfigDict

from instap_jax.config_check import needs_teacher
from instap_jax.data.tokenizer import Tokenizer, check_vocab_size, load_tokenizer
from instap_jax.errors import UserError
from instap_jax.train import checkpoint


def identify(config: ConfigDict) -> dict[str, Any]:
    """Facts by name: the tokenizer's fingerprint, the teacher's step; None where there is none."""
    return {
        "tokenizer": _fingerprint(config),
        "teacher": checkpoint.read_meta(config.teacher.checkpoint)[0]
        if needs_teacher(config) and config.teacher.checkpoint
        else None,
    }


def check_same(config: ConfigDict, meta: dict[str, Any], workdir: str) -> None:
    """Compares what the paths of `config` hold now with what the run at `workdir` was trained with.

    Raises:
      UserError: naming what differs.
    """
    check_tokenizer(config, meta, workdir)
    teacher = identify(config)["teacher"]
    if teacher != meta["inputs"]["teacher"]:
        raise UserError(
            f"{config.teacher.checkpoint} is at step {teacher}, but {workdir} was trained "
            f"with its step {meta['inputs']['teacher']}"
        )


def check_tokenizer(config: ConfigDict, meta: dict[str, Any], workdir: str) -> None:
    """What `check_same` does, for uses of a run that need no teacher."""
    if "inputs" not in meta:
        raise UserError(f"{workdir}: its checkpoint does not say what it was trained with")
    own = meta.get("config", {}).get("tokenizer", {}).get("text", "plain")
    if config.tokenizer.path and config.tokenizer.text != own:
        raise UserError(
            f"{workdir} was trained with tokenizer.text={own!r}, not {config.tokenizer.text!r}; "
            "set it so"
        )
    if _fingerprint(config) != meta["inputs"]["tokenizer"]:
        raise UserError(
            f"{config.tokenizer.path} is not the tokenizer that {workdir} was trained with"
        )


def run_tokenizer(config: ConfigDict, meta: dict[str, Any], workdir: str) -> Tokenizer:
    """The tokenizer with which the run at `workdir` reads texts.

    Raises:
      UserError: it has none, it is not the one that the run was trained with, or it has more ids
        than the run has embeddings.
    """
    check_tokenizer(config, meta, workdir)
    if not config.tokenizer.path and "converted" in meta:
        raise UserError(
            f"{workdir} was converted without a vocabulary and can read no text: put the vocab.txt "
            "of its BERT beside the weights, and convert them again"
        )
    tokenizer = load_tokenizer(config.tokenizer)
    check_vocab_size(tokenizer, config.text.vocab_size, weights=workdir)
    return tokenizer


def _fingerprint(config: ConfigDict) -> str | None:
    return load_tokenizer(config.tokenizer).fingerprint() if config.tokenizer.path else None
