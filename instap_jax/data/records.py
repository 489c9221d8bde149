"""Packed samples: their TFDS features, and random access to them. NumPy only, no JAX.

`instap pack` writes one TFDS directory per kind (`OUT/video`, `OUT/image`), because a batch is of
one kind and a loader never has to filter. `open_source` reads one split of one of them.
"""

import difflib
import functools
import itertools
import json
import os
import zlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.proto import tf_example_pb2

from instap_jax.data import media
from instap_jax.errors import UserError
from instap_jax.types import Kind, Record

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

_SERIALIZER = ExampleSerializer(FEATURES.get_serialized_info())

# The textual fields of a Record, in the order they are written.
_SCALARS = ("id", "media", "source", "encoding", "fps")


class CorruptRecordError(Exception):
    """One record cannot be read back; its neighbours can. The message names it."""


def to_example(record: Record) -> dict[str, Any]:
    """Returns the TFDS example of a record, as `FEATURES` describes it."""
    annotation = {name: getattr(record, name) for name in _SCALARS}
    annotation |= {
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
        values = zlib.decompress(feature[f"{name}/value"].bytes_list.value[0])
        shape = feature[f"{name}/shape"].int64_list.value
        example[name] = np.frombuffer(values, FEATURES[name].np_dtype).reshape(shape)
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
    )
    _check_content(record)
    return record


def _check_content(record: Record) -> None:
    """Raises ValueError where a field is not what it is used as: data may come from anywhere."""
    texts = (record.id, record.media, record.source, *record.captions, *record.instance_ids)
    texts += (*record.categories, *itertools.chain.from_iterable(record.instance_captions))
    sizes, index = record.size, record.frame_index
    if not all(isinstance(text, str) for text in texts):
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

    def __init__(self, *, directory: str, split: str, kind: Kind, shards: list):
        """Use `open_source`; `shards` are TFDS file instructions."""
        self.directory, self.split, self.kind = directory, split, kind
        self._shards = shards
        self._length = sum(shard.examples_in_shard for shard in shards)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        """Returns record `index`, media still encoded.

        Raises:
          CorruptRecordError: the bytes of this record (or of its whole shard) are damaged.
          IndexError: `index` is not in [0, len).
        """
        if not 0 <= index < self._length:
            raise IndexError(f"record {index} of {self._length} in {self!r}")
        try:
            return from_example(parse_example(self._data[index]))
        except Exception as error:  # whatever the readers below us make of damaged bytes
            raise CorruptRecordError(f"{self.record_name(index)}: {error}") from error

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
    def _data(self) -> ArrayRecordDataSource:
        return ArrayRecordDataSource(self._shards)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_data"}

    def __repr__(self) -> str:
        # Stable from run to run: grain compares it when it restores a data position.
        return f"RecordSource({self.directory!r}, {self.split!r}, {self.kind.value!r})"


def open_source(directory: str, split: str, kind: Kind) -> RecordSource:
    """Opens one split of what `instap pack --out=directory` wrote.

    Raises:
      UserError: no such directory, no samples of this kind, or no such split.
    """
    directory = os.fspath(directory)
    kinds = [k.value for k in Kind if os.path.isfile(_info_file(directory, k))]
    if not kinds:
        why = "holds no packed data" if os.path.isdir(directory) else "does not exist"
        raise UserError(f"data directory {directory!r} {why}; make it with `instap pack`")
    if kind not in kinds:
        raise UserError(f"{directory!r} holds no {kind.value} samples, only {', '.join(kinds)}")
    path = os.path.join(directory, kind.value)
    try:
        splits = tfds.builder_from_directory(path).info.splits
    except Exception as error:
        raise UserError(f"cannot read the dataset description in {path!r}: {error}") from error
    if split not in splits:
        near = difflib.get_close_matches(split, splits, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"{path!r} has no split {split!r}: {hint}it has {', '.join(splits)}")
    shards = splits[split].file_instructions
    there = set(os.listdir(path))  # one call: a file system may be slow to answer per file
    missing = [name for name in (s.basename() for s in shards) if name not in there]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(shards)} shards of {path!r} {split!r} are missing, first "
            f"{missing[0]!r}; copy them again or pack again"
        )
    return RecordSource(directory=directory, split=split, kind=kind, shards=shards)


def _info_file(directory: str, kind: Kind) -> str:
    return os.path.join(directory, kind.value, "dataset_info.json")
