"""Reads a configuration from the command line, checks it once, and records it with the run.

All of it happens before JAX starts, so that a typo costs a second and not a pod's start-up.
"""

import collections
import contextlib
import dataclasses
import difflib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from instap_jax.config import default, needs_teacher
from instap_jax.errors import UserError, cannot

STAGES = ("teacher", "distill", "align", "ground", "classify")

# Values that a field may take, where that is a short list.
CHOICES = {
    "stage": STAGES,
    "data.sampling": ("random", "uniform"),
    "data.caption_sampling": ("epoch", "first"),
    "tokenizer.kind": ("sentencepiece", "wordpiece"),
    "tokenizer.text": ("plain", "umt"),
    "distill.mask_score": ("cls", "received", "random"),
    "distill.mask_choice": ("sample", "topk"),
    "contrastive.loss": ("softmax", "sigmoid"),
    "compute.dtype": ("bfloat16", "float32"),
    "compute.remat": ("none", "attention", "offload", "dots", "all"),
    "compute.attention": ("auto", "xla", "pallas", "cudnn"),
    "checkpoint.init_which": ("newest", "best"),
    "guard.non_finite": ("stop", "skip"),
}

POSITIVE = (
    "steps",
    "data.batch_size",
    "data.frames",
    "data.instances_per_sample",
    "data.decode_timeout",
    "tokenizer.length",
    "vision.width",
    "vision.depth",
    "vision.heads",
    "vision.patch",
    "vision.image_size",
    "teacher.width",
    "teacher.depth",
    "teacher.heads",
    "teacher.patch",
    "teacher.image_size",
    "teacher.projection",
    "text.vocab_size",
    "text.width",
    "text.depth",
    "text.heads",
    "distill.layers",
    "align.projection",
    "align.cross_attention_depth",
    "align.cross_attention_heads",
    "align.crop_context",
    "align.cross_attention_scale",
    "optimizer.learning_rate",
    "optimizer.accumulate",
    "optimizer.epsilon",
    "optimizer.layer_decay",
    "contrastive.temperature",
    "checkpoint.every",
    "checkpoint.keep",
    "guard.spike_window",
    "distributed.initialization_timeout",
    "distributed.heartbeat_timeout",
    "distributed.step_timeout",
    "mesh.slices",
    "log.every",
    "evaluation.batch_size",
)

# Weights of the terms of stage 'align', and fractions that leave something over.
WEIGHTS = tuple(
    f"align.{name}"
    for name in ("rec", "vtc", "vtm", "mlm", "instance", "inst_vtc", "inst_vtm", "inst_mlm")
)
RATIOS = (
    "distill.mask_ratio",
    "align.mask_ratio_video",
    "align.mask_ratio_image",
    "align.crop_mask_ratio",
    "classify.smoothing",
    "vision.drop_path",
    "text.dropout",
)

NON_NEGATIVE = (
    "seed",
    "data.workers",
    "data.prefetch",
    "data.device_prefetch",
    "data.max_fault_rate",
    "optimizer.warmup_steps",
    "optimizer.min_learning_rate",
    "optimizer.weight_decay",
    "checkpoint.retries",
    "checkpoint.retry_seconds",
    "guard.max_skipped",
    "guard.spike",
    "ground.l1",
    "ground.giou",
    *WEIGHTS,
)
# Positive where they are set at all.
OPTIONAL = (
    "stop_at",
    "data.group_size",
    "optimizer.reference_batch",
    "optimizer.clip_norm",
    "compute.crop_frames",
    "vision.position_frames",
    "vision.position_size",
    "evaluation.every",
    "evaluation.frames",
)
# Key -> (smallest, largest) of each member; all but canvas and betas rise.
TUPLES = {
    "data.canvas": (1, 1 << 14),
    "data.view_area": (1e-3, 1.0),
    "data.view_aspect": (1e-2, 1e2),
    "contrastive.temperature_range": (1e-6, 1e3),
    "optimizer.betas": (0.0, 0.99999),
}
PATHS = (
    "tokenizer.path",
    "teacher.checkpoint",
    "text.checkpoint",
    "checkpoint.init_from",
    "compute.cache_dir",
)

# What a run calls its copy of the tokenizer's file, by `tokenizer.kind`.
TOKENIZER_FILES = {"sentencepiece": "tokenizer.model", "wordpiece": "vocab.txt"}

# What may differ when a run goes on: it changes speed, output or length, not the result of a step.
MAY_CHANGE = (
    "stop_at",
    "data.workers",
    "data.prefetch",
    "data.device_prefetch",
    "data.max_fault_rate",
    "data.decode_timeout",
    "mesh",
    "distributed",
    "compute.remat",
    "compute.attention",
    "compute.cache_dir",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.retries",
    "checkpoint.retry_seconds",
    "guard",
    "log",
    "evaluation",
)

_LONGEST = 366 * 24 * 3600  # seconds

# Words of a split's name that mark it as a test suite: no checkpoint is chosen on one.
TEST_WORDS = ("test", "1k", "10k")
TEST_SPLITS = ("msrvtt", "didemo", "msvd", "lsmdc", "activitynet")
# metric of `evaluation.metric` after the split.
_METRIC = re.compile(r"(global|instance)/(mean_recall|(t2v|v2t)/R@(1|5|10))")


@dataclasses.dataclass(frozen=True)
class LoadedConfig:
    """A checked configuration and where it came from.

    Attributes:
      file: path given with --config.
      overrides: dotted key -> value given on the command line.
    """

    config: ConfigDict
    file: str
    overrides: dict[str, Any]


def define_flag(values: flags.FlagValues) -> None:
    """Defines --config=FILE and its --config.key=value overrides."""
    for arg in sys.argv:
        match = re.fullmatch(r"--?config=(.*)", arg)
        if match and not Path(match[1].split(":")[0]).is_file():
            raise UserError(f"--config={match[1]}: no such file")
    config_flags.DEFINE_config_file(
        "config", None, "configuration file; override with --config.key=value", flag_values=values
    )


def load(values: flags.FlagValues) -> LoadedConfig:
    """The configuration of the parsed flags, complete and checked.

    Raises:
      UserError: naming every field that is wrong.
    """
    if values["config"].value is None:
        raise UserError("--config=FILE is missing, for example --config=configs/tiny.py:teacher")
    config = values["config"].value
    check(config)
    _make_absolute(config)
    return LoadedConfig(
        config=config,
        file=values["config"].config_filename,
        overrides=dict(values["config"].override_values),
    )


def _make_absolute(config: ConfigDict) -> None:
    """So that the run goes on, and is evaluated, from any directory."""
    flat = flatten(config)
    changed = {key: absolute(flat[key]) for key in PATHS if flat[key]}
    for key in ("data.videos", "data.images", "evaluation.videos", "evaluation.images"):
        parts = (part.strip() for part in flat[key].split(",") if part.strip())
        changed[key] = ",".join(absolute(part) for part in parts)
    config.update_from_flattened_dict(changed)


def absolute(path: str) -> str:
    """A local path made absolute; an object-store address as it is."""
    return path if "://" in path else os.path.abspath(path)


def local_workdir(text: str) -> Path:
    """The workdir of a flag.

    Raises:
      UserError: for an object-store address: metrics are appended to, which those cannot do.
    """
    if "://" in text:
        raise UserError(f"--workdir={text}: must be a local or mounted directory")
    return Path(text)


def check(config: ConfigDict) -> None:
    """Checks what can be known without data or devices.

    Raises:
      UserError: one line that names every field that is wrong.
    """
    flat = flatten(config)
    faults = _key_faults(flat) or _value_faults(flat) or _relation_faults(config)
    if faults:
        raise UserError("config: " + "; ".join(faults))


def _key_faults(flat: dict[str, Any]) -> list[str]:
    known = flatten(default())
    unknown = [f"unknown key {key!r}{_suggest(key, known)}" for key in flat if key not in known]
    return unknown + [f"missing key {key!r}" for key in known if key not in flat]


def _value_faults(flat: dict[str, Any]) -> list[str]:
    """Faults of single fields."""
    faults = [
        f"{key}={flat[key]!r} is none of {', '.join(choices)}{_suggest(flat[key], choices)}"
        for key, choices in CHOICES.items()
        if flat[key] not in choices
    ]
    given = [key for key in OPTIONAL if flat[key] is not None]
    faults += [f"{k}={flat[k]} must be positive" for k in (*POSITIVE, *given) if flat[k] <= 0]
    faults += [f"{k}={flat[k]} must not be negative" for k in NON_NEGATIVE if flat[k] < 0]
    faults += [f"{k}={flat[k]} must be in [0, 1)" for k in RATIOS if not 0 <= flat[k] < 1]
    for key, (low, high) in TUPLES.items():
        value = flat[key]
        fits = len(value) == 2 and all(
            isinstance(member, int | float) and low <= member <= high for member in value
        )
        if not fits or (key not in ("data.canvas", "optimizer.betas") and value[0] > value[1]):
            faults.append(f"{key}={value} must be two values within [{low}, {high}], rising")
    steps = re.fullmatch(r"(\d+):(\d+)", flat["log.profile"] or "1:1")
    if not steps or not 1 <= int(steps[1]) <= int(steps[2]):
        faults.append(f"log.profile={flat['log.profile']!r} must be A:B, first and last step")
    if flat["distributed.step_timeout"] > _LONGEST:
        faults.append(f"distributed.step_timeout must be {_LONGEST} s, a year, at most")
    if flat["seed"] >= 1 << 32:
        faults.append(f"seed={flat['seed']} must be below 2^32")
    for axis in ("replica", "fsdp", "tensor"):
        if flat[f"mesh.{axis}"] < 1 and flat[f"mesh.{axis}"] != -1:
            faults.append(f"mesh.{axis}={flat[f'mesh.{axis}']} must be positive, or -1")
    return faults


def _relation_faults(config: ConfigDict) -> list[str]:
    """Faults between fields, once each field alone is right."""
    c, faults = config, []
    for name in ("vision", "teacher"):
        part = c[name]
        if part.image_size % part.patch:
            faults.append(f"{name}.image_size={part.image_size} is no multiple of its patch")
    if (c.vision.position_size or 0) % c.vision.patch:
        faults.append(f"vision.position_size={c.vision.position_size} is no multiple of its patch")
    for name in ("vision", "teacher", "text"):
        if c[name].width % c[name].heads:
            faults.append(f"{name}.width={c[name].width} is no multiple of its heads")
    if c.stage != "distill" and c.tokenizer.length > c.text.max_length:
        faults.append(f"tokenizer.length={c.tokenizer.length} is more than text.max_length")
    if c.text.checkpoint and c.stage != "align":
        faults.append(f"text.checkpoint is read by stage 'align' only, not by {c.stage!r}")
    if not 0 <= c.data.image_fraction <= 1:
        faults.append(f"data.image_fraction={c.data.image_fraction} must be in [0, 1]")
    if not c.optimizer.warmup_steps < c.steps:
        faults.append(f"optimizer.warmup_steps={c.optimizer.warmup_steps} must be below steps")
    low, high = c.optimizer.min_learning_rate, c.optimizer.learning_rate
    if low > high:
        faults.append(f"optimizer.min_learning_rate={low} is above the peak, learning_rate={high}")
    if c.contrastive.loss != "softmax" and c.stage != "align":
        faults.append(f"contrastive.loss={c.contrastive.loss!r} is of stage 'align' alone")
    if needs_teacher(c):
        grids = [c[name].image_size // c[name].patch for name in ("vision", "teacher")]
        if grids[0] != grids[1]:
            faults.append(f"student and teacher see {grids[0]} and {grids[1]} patches a side")
        if c.distill.layers > min(c.vision.depth, c.teacher.depth):
            faults.append(f"distill.layers={c.distill.layers} is more than the depth")
    of_stage = {"align": _align_faults, "ground": _ground_faults, "classify": _classify_faults}
    faults += of_stage[c.stage](c) if c.stage in of_stage else []
    return faults + _evaluation_faults(c)


def _evaluation_faults(c: ConfigDict) -> list[str]:
    """Faults of retrieval during training."""
    if c.evaluation.every is None:
        return []
    if c.stage not in ("teacher", "distill", "align"):
        return [f"evaluation.every: stage {c.stage!r} embeds no clips and texts to retrieve"]
    splits, faults = set(), []
    for key in ("videos", "images"):
        trained = {_corpus(part) for part in c.data[key].split(",")}
        for part in filter(None, map(str.strip, c.evaluation[key].split(","))):
            directory, split = _corpus(part)
            if split in splits:
                faults.append(
                    f"evaluation.{key}: {part}: another suite is called {split!r}, and metrics are "
                    "named by that alone; pack one of the two under another split name"
                )
            splits.add(split)
            if set(split.split("_")) & set(TEST_WORDS) or split in TEST_SPLITS:
                faults.append(
                    f"evaluation.{key}: {split!r} is a test suite; choose checkpoints on a "
                    "validation split"
                )
            if (directory, split) in trained:
                faults.append(f"evaluation.{key}: {part} is trained on")
    if not splits:
        faults.append(
            "evaluation.every is set, but evaluation.videos and evaluation.images are empty"
        )
    return faults + _metric_faults(c, splits)


def _metric_faults(c: ConfigDict, splits: set[str]) -> list[str]:
    if c.evaluation.metric is None:
        return []
    split, _, rest = c.evaluation.metric.partition("/")
    if split not in splits or not _METRIC.fullmatch(rest):
        return [
            f"evaluation.metric={c.evaluation.metric!r} must be SPLIT/global or SPLIT/instance and "
            f"then mean_recall or as t2v/R@1, SPLIT one of {', '.join(sorted(splits)) or 'none'}"
        ]
    if rest.startswith("instance") and c.stage != "align":
        return [f"evaluation.metric: stage {c.stage!r} embeds no instances"]
    return []


def _corpus(part: str) -> tuple[str, str]:
    """(directory, split) of 'DIR:SPLIT=WEIGHT', as the pipeline reads it."""
    directory, _, split = part.strip().partition("=")[0].rpartition(":")
    return absolute(directory), split.replace("-", "_")


def _align_faults(c: ConfigDict) -> list[str]:
    faults, align = [], c.align
    if not any(c.align[key.removeprefix("align.")] for key in WEIGHTS[:5]):
        faults.append("align: every term has weight 0")
    if align.global_instances and not align.vtc:
        faults.append("align.global_instances adds pairs to align.vtc, which is 0")
    if not 0 < align.mlm_ratio <= 1:
        faults.append(f"align.mlm_ratio={align.mlm_ratio} must be in (0, 1]")
    if not 0 <= align.alpha <= 1:
        faults.append(f"align.alpha={align.alpha} must be in [0, 1]")
    if align.crop_size is not None and (align.crop_size <= 0 or align.crop_size % c.vision.patch):
        faults.append(f"align.crop_size={align.crop_size} is no multiple of vision.patch")
    if c.vision.width % align.cross_attention_heads:
        faults.append(
            f"align.cross_attention_heads={align.cross_attention_heads} do not divide vision.width"
        )
    return faults + _fusion_faults(c)


def _fusion_faults(c: ConfigDict) -> list[str]:
    if 0 < c.text.fusion_layers < c.text.depth:
        return []
    return [
        f"text.fusion_layers={c.text.fusion_layers} must be 1 to text.depth - 1 "
        f"= {c.text.depth - 1}"
    ]


def _ground_faults(c: ConfigDict) -> list[str]:
    faults = [] if c.ground.l1 or c.ground.giou else ["ground.l1 and ground.giou are both 0"]
    return faults + _fusion_faults(c)


def _classify_faults(c: ConfigDict) -> list[str]:
    classes = c.classify.classes
    if len(classes) < 2 or not all(isinstance(name, str) and name for name in classes):
        return [
            f"classify.classes has {len(classes)} names: stage 'classify' needs two or more, "
            "for example from configs/classify_l16.py:CLASSES_FILE"
        ]
    twice = [name for name, count in collections.Counter(classes).items() if count > 1]
    return [f"classify.classes names {twice[0]!r} twice"] if twice else []


def flatten(config: ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of every leaf."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


_ASIDE = "config.partial"  # `config.json` while it is written


def record(loaded: LoadedConfig, workdir: Path) -> None:
    """Creates the workdir with `config.json`, or checks that it holds a run of this configuration.

    A run without a checkpoint yet (a first start that failed) has nothing to protect: its
    configuration is replaced.

    Raises:
      UserError: when the workdir holds another configuration's run, or other files.
    """
    path = workdir / "config.json"
    check_workdir(loaded.config, workdir)
    resolved = json.loads(json.dumps(loaded.config.to_dict()))
    base = json.loads(json.dumps(flatten(default())))
    flat = flatten(resolved)
    content = {
        "file": loaded.file,
        "overrides": [f"{key}={value}" for key, value in loaded.overrides.items()],
        "changed": {k: [base[k], flat[k]] for k in sorted(flat) if flat[k] != base[k]},
        "config": resolved,
    }
    _write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def keep_tokenizer(config: ConfigDict, workdir: Path) -> None:
    """Copies the tokenizer's file beside `config.json`: `read` finds it there once the run is
    moved. A run with a checkpoint is left as it is: whether this is its tokenizer is not known yet.

    Raises:
      UserError: the file cannot be read, or the copy not be written.
    """
    if not config.tokenizer.path or _has_checkpoint(workdir):
        return
    copy = workdir / TOKENIZER_FILES[config.tokenizer.kind]
    try:
        content = Path(config.tokenizer.path).read_bytes()
    except OSError as error:
        raise cannot(f"cannot read tokenizer.path {config.tokenizer.path!r}", error) from error
    _write_whole(copy, content)


def _write_whole(path: Path, content: bytes) -> None:
    aside = path.with_name(f"{path.stem}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content)
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise cannot(f"cannot write {path}", error) from error


def _has_checkpoint(workdir: Path) -> bool:
    return any((workdir / "checkpoints").glob("[0-9]*"))


def check_workdir(config: ConfigDict, workdir: Path) -> None:
    """Checks that a run of `config` may start or go on in `workdir`.

    Raises:
      UserError: when it holds another configuration's run, or other files.
    """
    path = workdir / "config.json"
    try:
        if _has_checkpoint(workdir):
            _check_same(path, json.loads(json.dumps(config.to_dict())))
            return
        found = {entry.name for entry in workdir.iterdir()} if workdir.exists() else set()
        if found - {_ASIDE} and path.name not in found:
            raise UserError(f"{workdir}: not empty and not a run (it has no config.json)")
    except OSError as error:
        raise cannot(str(workdir), error) from error


def read(workdir: Path) -> ConfigDict:
    """The resolved configuration of a run.

    A field that the record lacks is younger than the run and has its default: a new field's
    default is, by rule, what the code did before. A tokenizer that is no longer where the record
    says is the run's own copy of it (`keep_tokenizer`).

    Raises:
      UserError: when there is none, or it has a key that this version does not know.
    """
    path = workdir / "config.json"
    config = default()
    flat, known = _stored(path), flatten(config)
    if not flat.keys() <= known.keys():
        faults = _key_faults(known | flat)
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(f"{path} is of another version: {'; '.join(faults[:3])}{more}")
    try:
        for key, value in flat.items():
            if value is not None:
                is_tuple = isinstance(known[key], tuple)
                config.update_from_flattened_dict({key: tuple(value) if is_tuple else value})
        check(config)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: {error}") from error
    tokenizer = config.tokenizer
    copy = workdir / TOKENIZER_FILES[tokenizer.kind]
    if tokenizer.path and not os.path.exists(tokenizer.path) and copy.is_file():
        tokenizer.path = str(copy.absolute())
    return config


def _stored(path: Path) -> dict[str, Any]:
    """The flat configuration in a `config.json`."""
    try:
        return flatten(json.loads(path.read_text())["config"])
    except OSError as error:
        raise cannot(f"{path} is not the config.json of a run", error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not the config.json of a run: damaged") from error


def _check_same(path: Path, resolved: dict[str, Any]) -> None:
    younger = json.loads(json.dumps(flatten(default())))  # fields that the record lacks
    stored, new = younger | _stored(path), flatten(resolved)
    differ = [
        f"{key} ({_shown(stored.get(key))} there, {_shown(new.get(key))} now)"
        for key in sorted(stored.keys() | new.keys())
        if stored.get(key) != new.get(key)
        and not any(key == free or key.startswith(free + ".") for free in MAY_CHANGE)
    ]
    if differ:
        raise UserError(
            f"{path.parent} holds a run of another configuration: {', '.join(differ[:4])}"
            f"{' ...' if len(differ) > 4 else ''}; use another directory"
        )


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _suggest(word: Any, known) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
