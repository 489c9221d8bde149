"""`instap pack`: annotations and media -> TFDS directories of ArrayRecord shards. No JAX.

The annotation file is read twice: once to find its faults and to plan which line goes into which
shard (`plan`), and once, line by line, by the workers (`workers`, `shard`). Every shard can be
made alone, in any order, again and again.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import Any

import av
import PIL
import tensorflow_datasets as tfds

import instap_jax
from instap_jax.data import plan, records
from instap_jax.data.shard import Options, Task, write_json
from instap_jax.data.workers import WorkerDied, write_shards
from instap_jax.errors import UserError
from instap_jax.progress import Progress


class TooManyRejects(UserError):
    """More samples were rejected than allowed; `rejects` are those found, in file order."""

    def __init__(self, message: str, rejects: list[dict]):
        super().__init__(message)
        self.rejects = rejects


def pack(
    annotations: str,
    media_root: str,
    out: str,
    *,
    options: Options,
    shard_size: int | None = None,
    processes: int = 0,
    max_reject_rate: float = 0.01,
    seed: int = 0,
) -> dict[str, Any]:
    """Packs a data set into `out/video` and `out/image` (those that the file has samples of).

    The work happens in `out.partial`, which the last step renames. A run that was stopped (Ctrl-C,
    a full disk, a lost machine) continues when the same command is given again.

    Args:
      annotations: annotation file (`schema.read_annotations`).
      media_root: directory that its media paths start from.
      shard_size: samples of a shard; None: `plan.SHARD_SIZE`, or fewer in a small set.
      processes: worker processes; 0: one per core. The result does not depend on it.
      max_reject_rate: fraction of the samples; more rejected ones are an error.
      seed: of the order of the records, shuffled once, here, per kind and split.

    Returns:
      The content of `out/manifest.json`.

    Raises:
      TooManyRejects, UserError: nothing is left behind, except where the work can be continued.
    """
    out = os.path.abspath(out)
    _check_paths(media_root, out)
    index = plan.Index(annotations)
    partial = out + ".partial"
    settings = {**dataclasses.asdict(options), "shard_size": shard_size, "seed": seed}
    pack_id = _pack_id(index.sha256, settings)
    tasks = plan.make_tasks(
        index,
        media_root,
        partial,
        options=options,
        shard_size=shard_size,
        seed=seed,
        pack=pack_id,
    )
    # Everything that decides the bytes of the shards.
    fingerprint = {"annotations": index.sha256, "media": os.path.realpath(media_root)}
    fingerprint |= settings | {"versions": _versions()}
    try:
        with _claim(partial, fingerprint):
            try:
                reports = _write_all(tasks, index, processes, max_reject_rate)
                _check_splits(reports, index)
                index.check_unchanged()
                manifest = _describe(f"{partial}/data", reports, index, settings, pack_id)
                os.rename(f"{partial}/data", out)
            except (OSError, WorkerDied) as error:
                raise UserError(f"{error}; give the same command again to continue") from error
            except UserError:
                _discard(partial)
                raise
            _discard(partial)
    finally:
        # Not before the lock is closed: NFS keeps the directory of an open file.
        shutil.rmtree(_discarded(partial), ignore_errors=True)
    return manifest


# --- the work ------------------------------------------------------------------------------------


def _check_paths(media_root: str, out: str) -> None:
    if not os.path.isdir(media_root):
        raise UserError(f"media directory {media_root!r} does not exist")
    if os.path.lexists(out):
        raise UserError(f"output {out!r} exists; remove it or choose another --out")
    parent = os.path.dirname(out)
    if not os.path.isdir(parent):
        raise UserError(f"cannot create {out!r}: {parent!r} is not a directory")


@contextlib.contextmanager
def _claim(partial: str, fingerprint: dict[str, Any]) -> Iterator[None]:
    """Makes the directory of unfinished work, or takes up that of the same command."""
    with contextlib.ExitStack() as stack:
        try:
            os.makedirs(partial, exist_ok=True)
            lock = stack.enter_context(open(f"{partial}/lock", "w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _check_plan(f"{partial}/plan.json", fingerprint)
        except BlockingIOError as error:
            raise UserError(f"another `instap pack` is writing {partial!r}; wait for it") from error
        except OSError as error:
            raise UserError(f"cannot write to {partial!r}: {error.strerror}") from error
        yield


def _discarded(partial: str) -> str:
    return f"{partial}.removed"


def _discard(partial: str) -> None:
    """Takes the work away in one step: no later run takes up what a removal cut short leaves."""
    with contextlib.suppress(OSError):  # then it stays as it is: whole, with its plan
        shutil.rmtree(_discarded(partial), ignore_errors=True)
        os.rename(partial, _discarded(partial))


def _check_plan(path: str, fingerprint: dict[str, Any]) -> None:
    """Writes the plan file, or raises UserError where there is another command's."""
    if not os.path.exists(path):
        write_json(path, fingerprint)
        return
    theirs = _read_json(path) or {}
    differ = [key for key in fingerprint if fingerprint[key] != theirs.get(key)]
    if differ:
        raise UserError(
            f"{os.path.dirname(path)!r} is the unfinished work of another command (not the same: "
            f"{', '.join(differ)}); give that command again, or remove the directory"
        )


def _write_all(
    tasks: list[Task], index: plan.Index, processes: int, max_reject_rate: float
) -> list[dict[str, Any]]:
    """Writes the shards that are not there yet; returns the reports of all, in plan order."""
    for directory in {os.path.dirname(path) for t in tasks for path in (t.path, t.report)}:
        os.makedirs(directory, exist_ok=True)
    reports = {task.report: report for task in tasks if (report := _finished(task))}
    todo = [task for task in tasks if task.report not in reports]
    limit = max_reject_rate * index.total
    rejected = len(index.duplicates) + sum(len(r["rejects"]) for r in reports.values())
    with (
        Progress("packing", sum(len(task.lines) for task in todo)) as progress,
        contextlib.closing(
            write_shards(todo, processes or os.cpu_count() or 1, progress)
        ) as shards,
    ):
        while rejected <= limit and (item := next(shards, None)):
            task, reports[task.report] = item
            rejected += len(reports[task.report]["rejects"])
    if rejected > limit:
        raise _too_many(
            _all_rejects(reports.values(), index),
            total=index.total,
            rate=max_reject_rate,
            complete=len(reports) == len(tasks),
        )
    return [reports[task.report] for task in tasks]


def _finished(task: Task) -> dict[str, Any] | None:
    """Returns the report of a shard that an earlier run has completed."""
    report = _read_json(task.report)
    if report is None or not os.path.isfile(task.path):
        return None
    return report if os.path.getsize(task.path) == report["bytes"] else None


def _read_json(path: str) -> dict[str, Any] | None:
    """Returns the content, or None where there is no file or it was cut short by a crash."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (FileNotFoundError, ValueError):
        return None


# --- rejects -------------------------------------------------------------------------------------


def _too_many(
    rejects: list[dict[str, Any]], *, total: int, rate: float, complete: bool
) -> TooManyRejects:
    first = rejects[0]
    return TooManyRejects(
        f"{len(rejects)} of {total} samples rejected{'' if complete else ' so far'}, more than "
        f"--max_reject_rate={rate:g} allows; first: line {first['line']}, id {first['id']!r}: "
        f"{first['reason']}; nothing was kept; `instap validate` lists every fault",
        rejects,
    )


def _check_splits(reports: list[dict[str, Any]], index: plan.Index) -> None:
    """Raises UserError where rejects left a kind of a split with nothing."""
    samples = Counter()
    for report in reports:
        samples[report["kind"], report["split"]] += report["samples"]
    for kind, split in index.lines:
        if not samples[kind, split]:
            raise UserError(
                f"every {kind} sample of split {split!r} was rejected; nothing was kept; "
                "`instap validate` lists every fault"
            )


def _all_rejects(reports: Iterable[dict[str, Any]], index: plan.Index) -> list[dict[str, Any]]:
    rejects = index.duplicates + [reject for report in reports for reject in report["rejects"]]
    return sorted(rejects, key=lambda reject: reject["line"])


def _by_reason(rejects: list[dict[str, Any]]) -> dict[str, int]:
    """Counts rejects by their first reason, without its particulars: names, numbers, boxes."""
    counts = Counter()
    for reject in rejects:
        reason = re.sub(r"^instance '[^']*': ", "", reject["reason"].split("; ")[0])
        reason = re.sub(r"'[^']*'", "...", reason.split(": ")[0])
        counts[re.sub(r"\d+", "N", reason)] += 1
    return dict(counts.most_common())


# --- description ---------------------------------------------------------------------------------


def _pack_id(annotations: str, settings: dict[str, Any]) -> str:
    """The same for the same annotations and options, wherever they were packed."""
    text = json.dumps([annotations, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _describe(
    data: str,
    reports: list[dict[str, Any]],
    index: plan.Index,
    settings: dict[str, Any],
    pack_id: str,
) -> dict[str, Any]:
    """Writes TFDS's metadata, rejects.jsonl and manifest.json; returns the manifest."""
    rejects = _all_rejects(reports, index)
    shard_keys = ("file", "samples", "bytes", "sha256")
    counts: dict[str, dict[str, Counter]] = {}
    for report in reports:
        of_split = counts.setdefault(report["kind"], {}).setdefault(report["split"], Counter())
        for key in ("samples", "instances", "frames", "bytes"):
            of_split[key] += report[key]
    manifest = {
        "pack": pack_id,
        "annotations": {"sha256": index.sha256, "samples": index.total},
        "options": settings,
        "counts": counts,
        "rejects": {"total": len(rejects), "reasons": _by_reason(rejects)},
        "versions": _versions(),
        "shards": [{key: report[key] for key in shard_keys} for report in reports],
    }
    for kind in counts:
        _write_dataset_info(f"{data}/{kind}", [r for r in reports if r["kind"] == kind])
    with open(f"{data}/rejects.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects)
    write_json(f"{data}/manifest.json", manifest)
    return manifest


def _write_dataset_info(directory: str, reports: list[dict[str, Any]]) -> None:
    """Writes what `tfds.builder_from_directory` reads. No TensorFlow."""
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=records.DATASET_NAME,
        version=tfds.core.Version(records.DATASET_VERSION),
        data_dir=directory,
        module_name="",
        config_name=reports[0]["kind"],
    )
    info = tfds.core.DatasetInfo(builder=identity, features=records.FEATURES)
    info.set_file_format("array_record")
    splits = []
    for split in dict.fromkeys(report["split"] for report in reports):
        of_split = [report for report in reports if report["split"] == split]
        splits.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[report["samples"] for report in of_split],
                num_bytes=sum(report["bytes"] for report in of_split),
                filename_template=plan.shard_names(directory, split),
            )
        )
    info.set_splits(tfds.core.splits.SplitDict(splits))
    info.write_to_directory(directory)


def _versions() -> dict[str, Any]:
    libraries = {name: ".".join(map(str, v)) for name, v in sorted(av.library_versions.items())}
    return {
        "instap_jax": instap_jax.__version__,
        "av": av.__version__,
        "ffmpeg": libraries,
        "pillow": PIL.__version__,
        "tensorflow_datasets": tfds.__version__,
        "array_record": version("array_record"),
    }
