"""Structures that cross module borders, with their shapes. NumPy only: data workers import this.

Axis letters used throughout the project:
  g  data-parallel groups        b  samples of a group       n  instance budget of a group
  t  frames of a clip            h, w  frame height, width   s  text length in tokens
  k  instances of one sample     f  frames stored in a record
"""

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

IGNORED_TARGET = -100
"""Target of a text position that is not to be predicted (the convention of BERT code)."""

NO_LABEL = -1
"""`Batch.label` where the configuration names no classes."""


class Kind(enum.StrEnum):
    """What a sample is. An image is a one-frame video everywhere after packing."""

    IMAGE = "image"
    VIDEO = "video"


class Fault(enum.IntEnum):
    """Why a sample of a batch carries no data (`Batch.fault`); 0 means it does.

    Codes, not strings, because they travel in the batch and are counted per step.
    """

    NONE = 0
    CORRUPT_RECORD = 1
    UNDECODABLE_MEDIA = 2
    NO_FRAMES = 3
    EMPTY_CAPTION = 4
    WRONG_SHAPE = 5
    UNKNOWN_LABEL = 6
    TIMEOUT = 7  # reading it took longer than data.decode_timeout
    DECODER_CRASHED = 8  # reading it ended the worker process, twice
    MISSING_RECORD = 9  # its shard is gone, or holds fewer records than the set's description says
    FOREIGN_RECORD = 10  # the record in its place was packed for another place, or another set


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One annotated entity of a sample, as parsed from a line of an annotation file.

    Attributes:
      id: unique within its sample; kept as a string.
      category: free-form category name, may be empty.
      captions: one or more texts; each may hold several sentences.
      frames: int32 [m], strictly increasing frame indices of the listed boxes; [0] for an image.
      boxes: float32 [m, 4], x0 y0 x1 y1, in pixels or in [0, 1] as `Sample.unit_boxes` says.
      absent: closed frame intervals (a, b) in which the instance is not in the picture.
      extra: unknown keys of the JSON object, kept.
    """

    id: str
    category: str
    captions: tuple[str, ...]
    frames: np.ndarray
    boxes: np.ndarray
    absent: tuple[tuple[int, int], ...] = ()
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One parsed line of an annotation file.

    Attributes:
      media: path relative to the media root, already checked not to escape it.
      split: TFDS split name, `[a-z0-9_]+` (hyphens of the file become underscores).
      captions: the global caption(s); each may hold several sentences.
      unit_boxes: whether `Instance.boxes` are fractions of the frame rather than pixels.
      line: 1-based line number in the annotation file, for messages.
    """

    id: str
    media: str
    kind: Kind
    split: str
    source: str
    captions: tuple[str, ...]
    unit_boxes: bool
    instances: tuple[Instance, ...]
    line: int
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One packed sample, as read back from ArrayRecord; media still encoded.

    Attributes:
      encoding: 'jpeg' (`media_bytes` holds f JPEG files) or 'mp4' (it holds one H.264 file).
      frame_index: int32 [f], index in the original clip of every frame of the sampling grid.
        With 'mp4' these are the frames to decode from the file.
      fps: native frame rate of the original clip; 0 for an image.
      size: (height, width) in pixels of the frames as stored.
      instance_captions: per instance, its texts.
      boxes: float32 [k, f, 4], x0 y0 x1 y1 as fractions of the frame, on the sampling grid.
        Where `present` is False the nearest box is held.
      present: bool [k, f], whether the instance is in the picture.
      extra, instance_extra: unknown annotation keys, kept.
      place: set, shard and position that it was packed for; empty before it is in one.
    """

    id: str
    media: str
    kind: Kind
    source: str
    captions: tuple[str, ...]
    encoding: str
    media_bytes: Sequence[bytes]
    frame_index: np.ndarray
    fps: float
    size: tuple[int, int]
    instance_ids: tuple[str, ...]
    categories: tuple[str, ...]
    instance_captions: tuple[tuple[str, ...], ...]
    boxes: np.ndarray
    present: np.ndarray
    extra: Mapping[str, Any]
    instance_extra: tuple[Mapping[str, Any], ...]
    place: str = ""


class Batch(TypedDict):
    """A batch on its way to the device: a plain dict, so a pytree without registration.

    Every array has a leading group axis g that is sharded over all data axes of the mesh. Groups
    are independent of the number of hosts: a gather inside a group never crosses chips.

    Samples:
      frames: uint8 [g, b, t, h, w, 3]. The picture fills the top left `extent` of the canvas.
      extent: float32 [g, b, 2], (height, width) of the picture as fractions of the canvas.
      text: int32 [g, b, s], one sentence, token ids, padded with 0 ([PAD]).
      sample_valid: bool [g, b]; False marks a sample that could not be read: zeros, no loss.
      fault: int32 [g, b], `Fault` code.
      corpus: int32 [g, b], index of the corpus in the configuration.
      record: int32 [g, b], index of the record in its corpus. With `corpus`, names the sample.
      media_hash: int32 [g, b], hash of corpus and media path: equal means the same file.
      text_hash: int32 [g, b], hash of the token ids (without a tokenizer, of the sentence): equal
        means that the model reads the same text.
      keep_side: bool [g, b], the sentence (or one of the instances') names left or right: no flip.
      label: int32 [g, b], index of the sample's label in `config.classify.classes`; `NO_LABEL`
        where it has no class.
    Instances, packed flat over the samples of a group:
      boxes: float32 [g, n, t, 4], x0 y0 x1 y1 as fractions of the picture (not of the canvas).
      present: bool [g, n, t].
      instance_valid: bool [g, n]; False marks an unused slot of the budget.
      parent: int32 [g, n], the sample of the group that the instance belongs to; 0 where unused.
      instance_text: int32 [g, n, s].
      instance_text_hash: int32 [g, n].
      dropped: int32 [g], instances of the group that did not fit the budget.
    """

    frames: np.ndarray
    extent: np.ndarray
    text: np.ndarray
    sample_valid: np.ndarray
    fault: np.ndarray
    corpus: np.ndarray
    record: np.ndarray
    media_hash: np.ndarray
    text_hash: np.ndarray
    keep_side: np.ndarray
    label: np.ndarray
    boxes: np.ndarray
    present: np.ndarray
    instance_valid: np.ndarray
    parent: np.ndarray
    instance_text: np.ndarray
    instance_text_hash: np.ndarray
    dropped: np.ndarray
