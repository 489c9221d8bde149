"""Shared by the tests of the input pipeline: a packed corpus and a configuration of it."""

from pathlib import Path

import psutil
import pytest
from clips import write_corpus
from ml_collections import ConfigDict

from instap_jax.config import default


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pipeline")
    write_corpus(root)
    return root


@pytest.fixture
def config(corpus) -> ConfigDict:
    c = default()
    c.stage = "teacher"
    c.data.update(videos=f"{corpus}/jpeg:train", frames=4, canvas=(40, 48), workers=0, prefetch=1)
    c.tokenizer.path = str(corpus / "t.model")
    c.tokenizer.length = 48
    return c


def command_line(process: psutil.Process) -> list[str]:
    """Of a process; empty when it has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []
