"""Checks of what a run reads: data sets, tokenizer, teacher, initial parameters."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
from etils import epath
from ml_collections import ConfigDict

from instap_jax.config import needs_teacher
from instap_jax.data.pipeline import Corpus, open_tokenizer, parse_corpora
from instap_jax.data.records import open_source
from instap_jax.errors import UserError
from instap_jax.preflight.rows import Row, failed, gather, passed, warned
from instap_jax.train import checkpoint
from instap_jax.train.guard import Guard
from instap_jax.train.inputs import check_same
from instap_jax.types import Kind

_KINDS = {"videos": Kind.VIDEO, "images": Kind.IMAGE}


def corpora(config: ConfigDict) -> Row:
    """Opens every corpus, reads its first and last record, compares its size with the manifest."""
    parts = [
        (corpus, kind)
        for section in ("data", "evaluation")
        for key, kind in _KINDS.items()
        for corpus in parse_corpora(config[section][key])
        if section == "data" or config.evaluation.every
    ]
    if not parts:
        raise UserError("config.data.videos and config.data.images are both empty: no data")
    counted, unknown = [], []
    for corpus, kind in parts:
        source = open_source(corpus.directory, corpus.split, kind)
        for index in {0, len(source) - 1} if len(source) else ():
            source[index]  # raises for a record that is damaged
        expected = _manifest_count(corpus, kind)
        where = f"{corpus.directory}:{corpus.split}"
        if not len(source) or expected not in (None, len(source)):
            return failed(
                "data",
                f"{where} has {len(source)} {kind} samples, its manifest says {expected}",
                "copy it again, or pack it again",
            )
        counted.append(f"{where} {len(source)} {kind}")
        unknown += [where] if expected is None else []
    found = ", ".join(counted)
    if unknown:
        return warned("data", f"{found}; no manifest of {unknown[0]}", "copy manifest.json, too")
    return passed("data", f"{found}, as the manifests say")


def _manifest_count(corpus: Corpus, kind: Kind) -> int | None:
    """Samples that `instap pack` wrote, by its manifest; None where there is none."""
    path = epath.Path(corpus.directory) / "manifest.json"
    try:
        return json.loads(path.read_text())["counts"][kind.value][corpus.split]["samples"]
    except (OSError, ValueError, KeyError):
        return None


def tokenizer(config: ConfigDict) -> Row:
    """Loads it and compares its size and special ids with the configuration."""
    if open_tokenizer(config) is None:
        return passed("tokenizer", f"stage {config.stage!r} reads no text")
    return passed("tokenizer", f"{config.tokenizer.path}, ids within text.vocab_size")


def checkpoints(config: ConfigDict, workdir: Path) -> Row:
    """Where parameters will come from, and whether those runs are there; in a workdir that holds a
    run, everything that training looks at before it restores."""
    sources = {
        "config.teacher.checkpoint": (config.teacher.checkpoint, "newest", needs_teacher(config)),
        "config.checkpoint.init_from": (
            config.checkpoint.init_from,
            config.checkpoint.init_which,
            False,
        ),
        "config.text.checkpoint": (config.text.checkpoint, "newest", False),
    }
    paths = [path for path, *_ in sources.values() if path]
    if where := _not_everywhere([*paths, str(workdir)]):
        return failed("checkpoints", where, "put it on storage that all hosts see")
    found = []
    for key, (path, which, needed) in sources.items():
        if not path and needed:
            return failed("checkpoints", f"{key} is not set", f"stage {config.stage!r} needs it")
        if path:
            step, _ = checkpoint.read_meta(path, which=which)
            found.append(f"{key.split('.')[1]} at step {step}")
    return passed("checkpoints", "; ".join(found + _resumed(config, workdir)) or "none needed")


def _resumed(config: ConfigDict, workdir: Path) -> list[str]:
    """From where the run of the workdir goes on, if it holds one.

    Raises:
      UserError: training would refuse to go on.
    """
    if not (workdir / checkpoint.DIRECTORY).exists():
        return []
    resumed = checkpoint.read_resumed(str(workdir))
    if resumed is None:
        return []
    step, meta, data = resumed
    check_same(config, meta, str(workdir))
    Guard(config, data.get("guard"))  # raises where it has already skipped too much
    return [f"the workdir holds a run, which will go on from step {step}"]


def _not_everywhere(paths: Sequence[str]) -> str:
    """Names a run that some hosts see and others do not; '' where all see the same.

    Hosts read a checkpoint together: one that is alone with it would wait for the others.
    """
    if jax.process_count() == 1:
        return ""
    everyone = gather([(epath.Path(path) / checkpoint.DIRECTORY).exists() for path in paths])
    for path, seen in zip(paths, zip(*everyone)):
        if len(set(seen)) > 1:
            return f"{path} is there on host {seen.index(True)}, not on host {seen.index(False)}"
    return ""
