"""Packed samples: their TFDS features, and random access to them. NumPy only, no JAX.

`instap pack` writes one TFDS directory per kind (`OUT/video`, `OUT/image`), because a batch is of
one kind and a loader never has to filter. `open_source` reads one split of one of them.
"""

import bisect
import collections
import difflib
import errno
import functools
import itertools
import json
import math
import os
import resource
import threading
import weakref
import zlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.proto import tf_example_pb2

from instap_jax.data import media
from instap_jax.errors import StorageError, UserError, cannot, passes
from instap_jax.types import Fault, Kind, Record

DATASET_NAME = "instap"
DATASET_VERSION = "1.0.0"

# One JSON text for everything textual, the rest as arrays: nested TFDS sequences of strings cost
# ten times the parsing. The media are `Text` because that is TFDS's plain bytes feature; `Image`
# and `Video` need TensorFlow to read back.
FEATURES = tfds.features.FeaturesDict(
    {
        "annotation": tfds.features.Text(doc="JSON: id, kind, captions, instances, ..."),
        "media": tfds.features.Sequence(tfds.features.Text(), doc="JPEG files, or one MP4 file"),
        "frame_index": tfds.features.Tensor(shape=(None,), dtype=np.int32),
        "boxes": tfds.features.Tensor(shape=(None, None, 4), dtype=np.float32, encoding="zlib"),
        "present": tfds.features.Tensor(shape=(None, None), dtype=np.bool_, encoding="zlib"),
    }
)

_MAX_INFLATED = 1 << 27  # bytes; `pack` stores no more than half of it

_SERIALIZER = ExampleSerializer(FEATURES.get_serialized_info())

# Readers open at once in a process, over all its sources: each holds a file descriptor, and a soft
# limit of 1,024 is usual.
_MAX_READERS = 256

# The textual fields of a Record, in the order they are written.
_SCALARS = ("id", "media", "source", "encoding", "fps")


class CorruptRecordError(Exception):
    """One record cannot be read back; its neighbours can. The message names it."""

    fault = Fault.CORRUPT_RECORD


class MissingRecordError(CorruptRecordError):
    """Its shard is not there, or holds fewer records than the data set's description says."""

    fault = Fault.MISSING_RECORD


class ForeignRecordError(CorruptRecordError):
    """The record in its place is whole, but was packed for another one: files were mixed up."""

    fault = Fault.FOREIGN_RECORD


def to_example(record: Record) -> dict[str, Any]:
    """Returns the TFDS example of a record, as `FEATURES` describes it."""
    annotation = {name: getattr(record, name) for name in _SCALARS}
    annotation |= {
        "place": record.place,
        "kind": record.kind.value,
        "size": list(record.size),
        "captions": list(record.captions),
        "extra": dict(record.extra),
        "instances": [
            {"id": id, "category": category, "captions": list(captions), "extra": dict(extra)}
            for id, category, captions, extra in zip(
                record.instance_ids,
                record.categories,
                record.instance_captions,
                record.instance_extra,
                strict=True,
            )
        ],
    }
    return {
        # ASCII escapes: a lone surrogate in a caption has no UTF-8 form.
        "annotation": json.dumps(annotation, separators=(",", ":")),
        "media": list(record.media_bytes),
        "frame_index": np.asarray(record.frame_index, np.int32),
        "boxes": np.asarray(record.boxes, np.float32),
        "present": np.asarray(record.present, np.bool_),
    }


def place_of(pack: str, shard: str, position: int) -> str:
    """What a record says about where it belongs, so that no other passes for it.

    Args:
      pack: of the manifest: a hash of what the data set was packed from.
      shard: file name of the shard, below the data set's directory.
    """
    return f"{pack} {shard} {position}"


def serialize(record: Record) -> bytes:
    """Returns the bytes of a record in a shard: equal records give equal bytes."""
    example = _SERIALIZER.get_tf_example(FEATURES.encode_example(to_example(record)))
    # Not FEATURES.serialize_example: a protocol buffer orders its map by a per-process salt.
    return example.SerializeToString(deterministic=True)


def parse_example(data: bytes) -> dict[str, Any]:
    """Equals `FEATURES.deserialize_example_np`, in a third of the time: every read passes here.

    Raises whatever damaged bytes make of it.
    """
    feature = tf_example_pb2.Example.FromString(data).features.feature
    example = {
        "annotation": feature["annotation"].bytes_list.value[0],
        "media": list(feature["media"].bytes_list.value),
        "frame_index": np.array(feature["frame_index"].int64_list.value, np.int32),
    }
    for name in ("boxes", "present"):
        shape = feature[f"{name}/shape"].int64_list.value
        dtype = FEATURES[name].np_dtype
        # No more than the shape says: a few bytes can inflate to gigabytes.
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if not 0 <= size <= _MAX_INFLATED:
            raise ValueError(f"{name} of shape {list(shape)}")
        inflate = zlib.decompressobj()
        values = inflate.decompress(feature[f"{name}/value"].bytes_list.value[0], size + 1)
        if not inflate.eof:
            raise ValueError(f"{name} are not of shape {list(shape)}")
        example[name] = np.frombuffer(values, dtype).reshape(shape)
    return example


def from_example(example: dict[str, Any]) -> Record:
    """Inverse of `to_example`, on what `parse_example` returns.

    Raises whatever content makes of it that no record of ours has.
    """
    annotation = json.loads(example["annotation"])
    instances = annotation["instances"]
    height, width = annotation["size"]
    record = Record(
        **{name: annotation[name] for name in _SCALARS},
        kind=Kind(annotation["kind"]),
        captions=tuple(annotation["captions"]),
        media_bytes=example["media"],
        frame_index=example["frame_index"],
        size=(height, width),
        instance_ids=tuple(i["id"] for i in instances),
        categories=tuple(i["category"] for i in instances),
        instance_captions=tuple(tuple(i["captions"]) for i in instances),
        boxes=example["boxes"],
        present=example["present"],
        extra=annotation["extra"],
        instance_extra=tuple(i["extra"] for i in instances),
        place=annotation.get("place", ""),
    )
    _check_content(record)
    return record


def _check_content(record: Record) -> None:
    """Raises ValueError where a field is not what it is used as: data may come from anywhere."""
    texts = (record.id, record.media, record.source, *record.captions, *record.instance_ids)
    texts += (*record.categories, *itertools.chain.from_iterable(record.instance_captions))
    sizes, index = record.size, record.frame_index
    if not all(isinstance(text, str) for text in (*texts, record.place)):
        raise ValueError("a text is none")
    if not all(isinstance(side, int) and 0 < side <= media.MAX_SIDE for side in sizes):
        raise ValueError(f"its frames are of size {sizes}")
    if len(index) and ((index < 0).any() or (np.diff(index) <= 0).any()):
        raise ValueError("its frames do not increase")
    if not all(isinstance(extra, dict) for extra in (record.extra, *record.instance_extra)):
        raise ValueError("a key's value is of the wrong type")
    if record.encoding not in ("jpeg", "mp4") or not isinstance(record.fps, int | float):
        raise ValueError("unknown encoding or rate")
    if not np.isfinite(record.boxes).all():
        raise ValueError("a box is not finite")


class RecordSource:
    """Random access to the packed samples of one split and one kind.

    Safe to pickle (a worker process opens the files again when it first reads) and to use from
    several threads. Indices run over [0, len); the order on disk is the seeded shuffle of `pack`.
    """

    def __init__(self, *, directory: str, split: str, kind: Kind, shards: list, pack: str | None):
        """Use `open_source`; `shards` are TFDS file instructions, `pack` as in the manifest."""
        self.directory, self.split, self.kind = directory, split, kind
        self._pack = pack
        self._files = [os.path.basename(shard.filename) for shard in shards]
        self._ends = list(itertools.accumulate(shard.examples_in_shard for shard in shards))
        self._length = self._ends[-1] if shards else 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        """Returns record `index`, media still encoded.

        Raises:
          CorruptRecordError: the bytes of this record (or of its whole shard) are damaged, or
            missing, or those of another record (see its subclasses).
          IndexError: `index` is not in [0, len).
          UserError: the process may open no more files, which says nothing about the record.
        """
        if not 0 <= index < self._length:
            raise IndexError(f"record {index} of {self._length} in {self!r}")
        shard = bisect.bisect_right(self._ends, index)
        position = index - (self._ends[shard - 1] if shard else 0)
        try:
            record = from_example(parse_example(self._read(shard, position)))
        except MissingRecordError as error:
            raise MissingRecordError(f"{self.record_name(index)}: {error}") from error
        except Exception as error:  # whatever the readers below us make of damaged bytes
            _check_limit(error, self.record_name(index))
            raise CorruptRecordError(f"{self.record_name(index)}: {error}") from error
        # Sets that were packed before records knew their place have no `pack` in the manifest.
        if self._pack is not None:
            expected = place_of(self._pack, f"{self.kind}/{self._files[shard]}", position)
            if record.place != expected:
                raise ForeignRecordError(
                    f"{self.record_name(index)}: it says {record.place!r}, not {expected!r}"
                )
        return record

    def _read(self, shard: int, position: int) -> bytes:
        try:
            return self._reader(shard).read([position])[0]
        except RuntimeError:
            # Once more from the start: a reader that has failed, be it that the storage did not
            # answer for a moment, fails for ever.
            self._readers.pop(shard, None)
            if not os.path.exists(self._path(shard)):
                raise MissingRecordError("its shard is missing") from None
            reader = self._reader(shard)
            count = reader.num_records()  # 0 of a file that is no whole ArrayRecord
            if 0 < count <= position:
                raise MissingRecordError(f"its shard holds {count} records only") from None
            return reader.read([position])[0]

    def _reader(self, shard: int) -> array_record_module.ArrayRecordReader:
        reader = self._readers.get(shard)
        if reader is None:
            reader = self._readers[shard] = array_record_module.ArrayRecordReader(
                self._path(shard), options="readahead_buffer_size:0", file_reader_buffer_size=32768
            )
        _drop_oldest(self, shard)
        return reader

    def _path(self, shard: int) -> str:
        return os.path.join(self.directory, self.kind, self._files[shard])

    def record_id(self, index: int) -> str:
        """Returns the sample's id, or the place of the record if it is damaged. Reads it all."""
        try:
            return self[index].id
        except CorruptRecordError:
            return self.record_name(index)

    def record_name(self, index: int) -> str:
        """Returns 'DIR/kind split record INDEX', known without reading the record."""
        return f"{os.path.join(self.directory, self.kind)} {self.split} record {index}"

    @functools.cached_property
    def _readers(self) -> dict[int, array_record_module.ArrayRecordReader]:
        return {}  # by shard; they read from several threads at once

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_readers"}

    def __repr__(self) -> str:
        # Stable from run to run: grain compares it when it restores a data position.
        return f"RecordSource({self.directory!r}, {self.split!r}, {self.kind.value!r})"


# (source, shard) of the open readers of all sources, the one used longest ago first.
_recent: collections.OrderedDict[tuple[weakref.ref, int], None] = collections.OrderedDict()
_recent_lock = threading.Lock()  # never held during input or output, which may hang


def _drop_oldest(source: RecordSource, shard: int) -> None:
    """Notes that a reader was used, and lets go of those used longest ago.

    They are not closed: the last reference does it, so that a thread which still reads can finish.
    """
    key = weakref.ref(source), shard
    dropped = []  # goes only after the lock
    with _recent_lock:
        _recent[key] = None
        _recent.move_to_end(key)
        while len(_recent) > _MAX_READERS:
            (reference, old), _ = _recent.popitem(last=False)
            owner = reference()
            dropped += [owner, None if owner is None else owner._readers.pop(old, None)]


def _check_limit(error: Exception, record: str) -> None:
    """Raises UserError if a read has failed because no more files may be open."""
    if os.strerror(errno.EMFILE) in str(error):
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise UserError(
            f"cannot read {record}: too many open files; this process may open {limit}: raise "
            "the limit with `ulimit -n`"
        ) from error


def open_source(
    directory: str, split: str, kind: Kind, *, max_missing: float = 0.0
) -> RecordSource:
    """Opens one split of what `instap pack --out=directory` wrote.

    Args:
      max_missing: share of the records whose shards may be missing; reading one of those raises
        `MissingRecordError`.

    Raises:
      UserError: no such directory, no samples of this kind, no such split, or more than
        `max_missing` of it is missing.
    """
    directory = os.fspath(directory)
    kinds = [k.value for k in Kind if _is_packed(directory, k)]
    if not kinds:
        why = "holds no packed data" if os.path.isdir(directory) else "does not exist"
        raise UserError(f"data directory {directory!r} {why}; make it with `instap pack`")
    if kind not in kinds:
        raise UserError(f"{directory!r} holds no {kind.value} samples, only {', '.join(kinds)}")
    path = os.path.join(directory, kind.value)
    try:
        splits = tfds.builder_from_directory(path).info.splits
    except Exception as error:
        kind = StorageError if passes(error) else UserError
        raise kind(f"cannot read the dataset description in {path!r}: {error}") from error
    if split not in splits:
        near = difflib.get_close_matches(split, splits, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"{path!r} has no split {split!r}: {hint}it has {', '.join(splits)}")
    shards = splits[split].file_instructions
    _check_shards(path, split, shards, max_missing)
    pack = _pack_of(directory)
    return RecordSource(directory=directory, split=split, kind=kind, shards=shards, pack=pack)


def _check_shards(path: str, split: str, shards: list, max_missing: float) -> None:
    there = set(os.listdir(path))  # one call: a file system may be slow to answer per file
    missing = [shard for shard in shards if shard.basename() not in there]
    lost = sum(shard.examples_in_shard for shard in missing)
    if lost > max_missing * sum(shard.examples_in_shard for shard in shards):
        raise UserError(
            f"{len(missing)} of {len(shards)} shards of {path!r} {split!r} are missing, first "
            f"{missing[0].basename()!r}; copy them again or pack again"
        )


def _pack_of(directory: str) -> str | None:
    """The manifest's `pack`; None of a set without a manifest, or with an older one."""
    path = os.path.join(directory, "manifest.json")
    try:
        with open(path, encoding="utf-8") as file:
            pack = json.load(file).get("pack")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise cannot(f"cannot read {path!r}", error) from error
    except (ValueError, AttributeError) as error:
        raise UserError(f"cannot read {path!r}: {error}; copy it again or pack again") from error
    return None if pack is None else str(pack)


def _is_packed(directory: str, kind: Kind) -> bool:
    try:
        os.stat(_info_file(directory, kind))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:  # says nothing about what is there
        raise cannot(f"cannot read {directory!r}", error) from error
    return True


def _info_file(directory: str, kind: Kind) -> str:
    return os.path.join(directory, kind.value, "dataset_info.json")
