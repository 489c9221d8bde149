"""Whether a stored checkpoint is what was written: checksums of its files, from before the commit.

`checksums.json` in the directory of a step names every file of its items with size and SHA-256. It
is written, and everything is flushed to the disk, while the checkpoint still has its temporary
name: one that has its final name has the list, too.
"""

import asyncio
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent import futures

import orbax.checkpoint as ocp
from etils import epath

MANIFEST = "checksums.json"
MARK = {"checksums": MANIFEST}  # in `meta`: the list was written, so that its loss is noticed
_THREADS = 8
_verified: set[tuple] = set()  # (file, digest, size, times) that this process has read


class Damaged(Exception):
    """A checkpoint is not what was written; the message names the file and what is wrong."""


class _Listed:
    """Mixed into orbax's temporary directory: writes the list just before the commit."""

    async def finalize(self) -> None:
        if self.get_final().name.isdigit():  # of a step, not of one of its items
            await asyncio.to_thread(write_manifest, self.get())
        await super().finalize()


class _RenamedListed(_Listed, ocp.path.atomicity.AtomicRenameTemporaryPath):
    pass


class _MarkedListed(_Listed, ocp.path.atomicity.CommitFileTemporaryPath):
    pass


def temporary_path_class(directory: epath.Path) -> type:
    """How checkpoints under `directory` are committed: by rename, on object stores by a marker."""
    return _MarkedListed if "://" in str(directory) else _RenamedListed


def write_manifest(directory: epath.Path) -> None:
    """Writes the list of all files in the items of a step's directory, and flushes them."""
    files = [path for item in directory.iterdir() if item.is_dir() for path in _walk(item)]
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(_digest, files))
    content = {
        path.relative_to(directory).as_posix(): [_stamp(path)[0], digest]
        for path, digest in zip(files, digests, strict=True)
    }
    manifest = directory / MANIFEST
    manifest.write_text(json.dumps(content, sort_keys=True))
    for path in (*files, *{file.parent for file in files}, manifest, directory):
        _flush(path)


def _walk(directory: epath.Path) -> Iterator[epath.Path]:
    for path in directory.iterdir():
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path


def check(directory: epath.Path, items: Sequence[str]) -> None:
    """Reads the files of some items of a step and compares them with its list.

    What this process has read before, and whose sizes and times are the same, is not read again.
    A checkpoint of a version that wrote no list is only looked at for missing items.

    Raises:
      Damaged: something is missing or differs.
      OSError: the storage fails; that says nothing about the checkpoint.
    """
    try:
        listed = _listed(directory)
        if listed is None:
            _check_unlisted(directory, items)
        else:
            _check_listed(directory, items, listed)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        name = os.path.relpath(error.filename, directory) if error.filename else "a file"
        raise Damaged(f"{name} is missing") from error


def _listed(directory: epath.Path) -> dict[str, list] | None:
    """The list of a step; None where it was written without one."""
    if not any(directory.iterdir()):
        raise Damaged("it is empty")
    manifest = directory / MANIFEST
    if not manifest.exists():
        meta = _json(directory / "meta" / "metadata", directory)
        if MARK.items() <= meta.items():
            raise Damaged(f"{MANIFEST} is missing")
        return None
    return _json(manifest, directory)


def _json(path: epath.Path, directory: epath.Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise Damaged(f"{path.relative_to(directory)} cannot be parsed")
    return content


def _check_unlisted(directory: epath.Path, items: Sequence[str]) -> None:
    for item in items:
        if not any((directory / item).iterdir()):
            raise Damaged(f"{item} is empty")


def _check_listed(directory: epath.Path, items: Sequence[str], listed: dict[str, list]) -> None:
    wanted = {name: fact for name, fact in listed.items() if name.split("/")[0] in items}
    lacking = [item for item in items if not any(name.startswith(f"{item}/") for name in wanted)]
    if lacking:
        raise Damaged(f"{MANIFEST} does not list its {lacking[0]}")
    unread = {}
    for name, (size, digest) in wanted.items():
        stamp = _stamp(directory / name)
        if stamp[0] != size:
            raise Damaged(f"{name} has {stamp[0]} bytes, not {size}")
        fact = (str(directory / name), digest, *stamp)
        if fact not in _verified:
            unread[name] = fact
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(_digest, [directory / name for name in unread])
        for (name, fact), digest in zip(unread.items(), digests, strict=True):
            if digest != fact[1]:
                raise Damaged(f"the content of {name} is not what was written")
            _verified.add(fact)


def _stamp(path: epath.Path) -> tuple[int, ...]:
    """(size, what changes when the file does)."""
    if "://" in str(path):
        stat = path.stat()
        return stat.length, stat.mtime
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _digest(path: epath.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: epath.Path) -> None:
    """To the disk itself, for a power failure; object stores have no such step."""
    if "://" in str(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
