"""Results files, `DIR/eval/TASK.json`: every number together with the protocol it was taken under.

A measurement cannot be built, written or printed without its protocol, so two numbers taken in
different ways never meet unlabelled.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import instap_jax
from instap_jax.errors import UserError
from instap_jax.evaluation.report_shapes import check_fields
from instap_jax.evaluation.retrieval import RECALL_AT

DIRECTORY = "eval"
_PACKAGES = ("jax", "flax", "numpy")
# What the fields of a results file must be; `metrics` is nested at will.
_RESULT_FIELDS = {
    **dict.fromkeys(("task", "written", "config_hash", "checkpoint_hash"), "text"),
    "versions": "an object of texts",
    "measurements": "a list of objects",
}
_MEASUREMENT_FIELDS = {
    "protocol": "an object",
    "metrics": "an object",
    "counts": "an object of whole numbers",
    "remarks": "a list of texts",
}
_PROTOCOL_FIELDS = {
    **dict.fromkeys(("suite", "unit", "scoring", "weights", "notes"), "text"),
    **dict.fromkeys(("frames", "step"), "a whole number"),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """What a number was measured on, with, and how. Runs are compared only where all but the
    weights and the step agree.

    Attributes:
      suite: name of the evaluation split, as 'video_1k'.
      unit: what is matched or named: 'global captions', 'instance captions', 'instances'.
      scoring: how: 'dual encoder', 'dual encoder, VTM re-ranked top 128', '20-NN', 'ridge'.
      frames: T, frames of a clip (1 for stills).
      weights: whose: 'student', 'teacher'; with ', random' behind it, as they were initialised.
      step: optimizer steps that the run took to them; 0 of random weights, and of converted ones,
        which were trained elsewhere.
      notes: anything else a reader must know to repeat it.
    """

    suite: str
    unit: str
    scoring: str
    frames: int
    weights: str
    step: int
    notes: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """The metrics of one suite under one protocol.

    Attributes:
      metrics: of `metrics_of_ranks`; for task 'probe' {attribute: ProbeResult or its dict}; other
        tasks: numbers by name, nested at will.
      counts: sizes of what was measured, as {'texts': 64, 'videos': 64}.
      remarks: what holds for this run alone, and so is no part of the protocol, as 'not re-ranked:
        this run did not train VTM, equation (3)'.
    """

    protocol: Protocol
    metrics: Mapping[str, Any]
    counts: Mapping[str, int]
    remarks: Sequence[str] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One results file.

    Attributes:
      written: UTC, ISO 8601.
      config_hash: of the run's configuration. checkpoint_hash: of the parameters that were
        measured (`evaluation/fingerprint.py`); '' where the file does not say.
      versions: of the packages that measured.
    """

    task: str
    written: str
    config_hash: str
    versions: Mapping[str, str]
    measurements: Sequence[Measurement]
    checkpoint_hash: str = ""


def write_result(
    workdir: Path,
    task: str,
    measurements: Sequence[Measurement],
    *,
    config: Mapping[str, Any],
    checkpoint_hash: str = "",
) -> Path:
    """Writes `workdir/eval/TASK.json` (replacing an older one in one move) and returns its path.

    Args:
      task: 'retrieval', 'probe', ...: letters, digits, hyphens, underscores.
      measurements: at least one.
      config: the resolved configuration of the run; its hash is stored.
      checkpoint_hash: of the parameters that were measured.

    Raises:
      UserError: nothing was measured, or the file cannot be written.
    """
    if not re.fullmatch(r"[a-z0-9_-]+", task):
        raise ValueError(f"task {task!r} cannot name a file")
    if not measurements:
        raise UserError(f"task {task!r} measured nothing: name a suite to evaluate on")
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    result = Result(
        task=task,
        written=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        config_hash=config_hash(config),
        checkpoint_hash=checkpoint_hash,
        versions={"instap_jax": instap_jax.__version__, **versions},
        measurements=measurements,
    )
    plain = dataclasses.asdict(result)
    text = json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False, default=_plain)
    path = Path(workdir) / DIRECTORY / f"{task}.json"
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text + "\n", encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    return path


def read_results(workdir: Path) -> dict[str, Result]:
    """All results of a run by task, in the order of their names; {} where nothing was measured.

    Raises:
      UserError: a file that is not a results file.
    """
    paths = sorted((Path(workdir) / DIRECTORY).glob("[!.]*.json"))
    return {path.stem: read_result(path) for path in paths}


def read_result(path: Path) -> Result:
    """One results file.

    Raises:
      UserError: it is not one.
    """
    try:
        return _parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        # A plain ValueError says in words which field is wrong.
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path} is not a results file ({reason}); delete it or run `instap evaluate` again"
        ) from error


def _parse(plain: Any) -> Result:
    check_fields(plain, _RESULT_FIELDS)
    measurements = [_parse_measurement(one) for one in plain["measurements"]]
    return Result(**{**plain, "measurements": measurements})


def _parse_measurement(plain: dict[str, Any]) -> Measurement:
    check_fields(plain, _MEASUREMENT_FIELDS, within="a measurement")
    check_fields(plain["protocol"], _PROTOCOL_FIELDS, within="a protocol")
    return Measurement(
        protocol=Protocol(**plain["protocol"]),
        metrics=plain["metrics"],
        counts=plain["counts"],
        remarks=tuple(plain.get("remarks", ())),
    )


def config_hash(config: Mapping[str, Any]) -> str:
    """First 16 hex digits of the SHA-256 of the configuration, independent of key order."""
    text = json.dumps(config, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def shared_line(protocol: Protocol, counts: Mapping[str, int]) -> str:
    """What compared runs have in common: all of the protocol but the weights and their step.

    `video_1k · global captions · dual encoder · 8 frames · 64 texts, 64 videos`
    """
    frames = "1 frame" if protocol.frames == 1 else f"{protocol.frames} frames"
    sizes = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    parts = (protocol.suite, protocol.unit, protocol.scoring, frames, sizes, protocol.notes)
    return " · ".join(part for part in parts if part)


def weights_line(protocol: Protocol) -> str:
    """Whose weights, and how far trained: `student at step 300`."""
    return f"{protocol.weights} at step {protocol.step:,}"


def format_table(task: str, measurements: Sequence[Measurement]) -> str:
    """Measurements as text for the terminal: each under its protocol line."""
    blocks = []
    for measurement in measurements:
        metrics = json.loads(json.dumps(measurement.metrics, default=_plain))
        rows = _ROWS.get(task, _any_rows)(metrics)
        shared = shared_line(measurement.protocol, measurement.counts)
        title = f"{task}: {weights_line(measurement.protocol)} · {shared}"
        remarks = "".join(f"\n  {remark}" for remark in measurement.remarks)
        blocks.append(f"{title}\n{_aligned(rows)}{remarks}")
    return "\n\n".join(blocks)


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested metrics as {'outer/inner': value}."""
    flat = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = value
    return flat


def _retrieval_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    names = [f"R@{k}" for k in RECALL_AT]
    rows = [["direction", *names, "median rank", "mean rank", "queries"]]
    for direction, label in (("t2v", "text -> video"), ("v2t", "video -> text")):
        one = metrics[direction]
        ranks = [f"{one['median_rank']:g}", f"{one['mean_rank']:.1f}", str(one["queries"])]
        rows.append([label, *(f"{one[name]:.2f}" for name in names), *ranks])
        chance = one["chance"]
        rows.append(["  by chance", *(f"{chance[name]:.2f}" for name in names), "", "", ""])
    rows.append(["mean recall", f"{metrics['mean_recall']:.2f}"])
    return rows


def _probe_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    rows = [["attribute", "accuracy %", "95 % interval", "majority %", "classes", "train", "test"]]
    for attribute, one in metrics.items():
        interval = f"{one['low']:.1f} .. {one['high']:.1f}"
        sizes = [str(one[key]) for key in ("classes", "train_examples", "test_examples")]
        scores = [f"{one['accuracy']:.2f}", interval, f"{one['chance']:.2f}"]
        rows.append([attribute, *scores, *sizes])
    return rows


def _choice_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    rows = [["fact", "accuracy %", "95 % interval", "by chance", "sentences", "questions"]]
    for about, one in metrics.items():
        interval = f"{one['low']:.1f} .. {one['high']:.1f}"
        numbers = [f"{one['accuracy']:.2f}", interval, f"{one['chance']:.2f}"]
        rows.append([about, *numbers, str(one["sentences"]), str(one["questions"])])
    return rows


def _grounding_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    return _with_floors(metrics, metrics["floors"])


def _classification_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    interval = metrics["top-1 interval"]
    rows = _with_floors(metrics, {"majority classes": metrics["majority"]})
    return [*rows, [f"top-1, 95 % interval: {interval['low']:.2f} .. {interval['high']:.2f}"]]


def _with_floors(metrics: Mapping[str, Any], floors: Mapping[str, Any]) -> list[list[str]]:
    names = [name for name, value in metrics.items() if not isinstance(value, Mapping)]
    rows = [["percent", *names]]
    for label, one in {"model": metrics, **floors}.items():
        rows.append([label, *(f"{one[name]:.2f}" for name in names)])
    return rows


def _any_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    return [["metric", "value"], *([name, f"{v:g}"] for name, v in flatten(metrics).items())]


_ROWS = {
    "retrieval": _retrieval_rows,
    "probe": _probe_rows,
    "choice": _choice_rows,
    "grounding": _grounding_rows,
    "classification": _classification_rows,
}


def _aligned(rows: list[list[str]]) -> str:
    full = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[i]) for row in full) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _plain(value: Any) -> Any:
    """JSON form of what NumPy, JAX and dataclasses leave in metrics and configurations."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written to a results file")
