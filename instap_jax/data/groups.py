"""From packed records to the arrays of `types.Batch`: decode, choose frames, tokenize, pack.

Everything here runs in the input workers: NumPy only, no JAX. Every picture is written straight to
its place in the batch.
"""

import dataclasses
import enum
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from instap_jax.data import media
from instap_jax.data.captions import blank, hash32, names_side, sentence_for_epoch, text_hash
from instap_jax.data.records import CorruptRecordError, RecordSource
from instap_jax.data.sampling import choose_frames, choose_instances
from instap_jax.data.tokenizer import Tokenizer
from instap_jax.types import NO_LABEL, Batch, Fault, Record

# Tags that keep the random streams of one seed apart.
_FRAMES, _INSTANCES = 0, 1


class Use(enum.Enum):
    """What a batch is for.

    TRAIN: captions as `GroupBuilder.caption_sampling` says; instances that no chosen frame shows
    are left out; what does not fit the budget is drawn at random.
    EVALUATE: whole captions, every instance.
    """

    TRAIN = "train"
    EVALUATE = "evaluate"


class SampleRef(NamedTuple):
    """Which record a place of a batch shows, and when.

    Attributes:
      corpus: index of the corpus.
      record: index of the record in its corpus.
      epoch: how often the corpus was gone through before.
      turn: position in the corpus's own endless stream: one random draw each.
    """

    corpus: int
    record: int
    epoch: int
    turn: int


class GroupRef(NamedTuple):
    """One group: the number of its first sample in the mixed stream, and its samples (at most b).

    A group with fewer than b samples is padded with samples that are not valid, without a fault.
    """

    first: int
    samples: Sequence[SampleRef]


class _BadSample(Exception):
    def __init__(self, fault: Fault):
        super().__init__(fault)
        self.fault = fault


class _Read(NamedTuple):
    """A sample whose pictures are in place. `candidates`: instances that may be used."""

    record: Record
    chosen: np.ndarray
    epoch: int
    text: str
    label: int
    extent: tuple[float, float]
    candidates: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupBuilder:
    """Builds batches of groups from references to records. Pickles to worker processes.

    Attributes:
      sources: one per corpus.
      tokenizer: None leaves all texts [PAD] (stages that use no text).
      group_size: samples of a group b.
      frames: T of a sample.
      sampling: 'random' or 'uniform', see `choose_frames`.
      canvas: (height, width) in pixels.
      length: tokens of a text s.
      budget: instance slots of a group n; None: as many as the fullest group has, at least 1.
      caption_sampling: of training, 'epoch': one sentence of each caption, the next one each epoch;
        'first': the caption from its start, as much as fits the length.
      classes: names of labels, in the order of `Batch.label`; (): samples need no label.
    """

    sources: Sequence[RecordSource]
    tokenizer: Tokenizer | None
    use: Use
    group_size: int
    frames: int
    sampling: str
    canvas: tuple[int, int]
    length: int
    budget: int | None
    caption_sampling: str
    classes: tuple[str, ...]
    seed: int

    def shapes(self, groups: int) -> dict[str, tuple[tuple[int, ...], type]]:
        """Returns shape and dtype of every array of a `types.Batch` of so many groups."""
        return self._sample_shapes(groups) | self._instance_shapes(groups, self.budget or 1)

    def _sample_shapes(self, groups: int) -> dict[str, tuple[tuple[int, ...], type]]:
        b, t, s = self.group_size, self.frames, self.length
        sample = {
            "frames": ((b, t, *self.canvas, 3), np.uint8),
            "extent": ((b, 2), np.float32),
            "text": ((b, s), np.int32),
            "sample_valid": ((b,), np.bool_),
            "fault": ((b,), np.int32),
            "corpus": ((b,), np.int32),
            "record": ((b,), np.int32),
            "media_hash": ((b,), np.int32),
            "text_hash": ((b,), np.int32),
            "keep_side": ((b,), np.bool_),
            "label": ((b,), np.int32),
        }
        return {name: ((groups, *shape), dtype) for name, (shape, dtype) in sample.items()}

    def _instance_shapes(self, groups: int, n: int) -> dict[str, tuple[tuple[int, ...], type]]:
        t, s = self.frames, self.length
        instance = {
            "boxes": ((n, t, 4), np.float32),
            "present": ((n, t), np.bool_),
            "instance_valid": ((n,), np.bool_),
            "parent": ((n,), np.int32),
            "instance_text": ((n, s), np.int32),
            "instance_text_hash": ((n,), np.int32),
            "dropped": ((), np.int32),
        }
        return {name: ((groups, *shape), dtype) for name, (shape, dtype) in instance.items()}

    def build(
        self, groups: Sequence[GroupRef], frames: np.ndarray, begin: Callable[[int], Fault]
    ) -> Batch:
        """Returns a batch [len(groups), ...]; an unreadable sample is zeros, with a fault.

        Args:
          frames: where the pixels go, whatever is in it; it becomes the batch's.
          begin: called before each sample with its number in the batch, group by group. A fault
            that it returns stands for the sample, which is then left alone.
        """
        return self.build_with_records(groups, frames, begin)[0]

    def build_with_records(
        self, groups: Sequence[GroupRef], frames: np.ndarray, begin: Callable[[int], Fault]
    ) -> tuple[Batch, list[Record]]:
        """Returns also the records of the valid samples, in order, without their media."""
        specs = self._sample_shapes(len(groups))
        # The pixels are not zeroed: every picture writes its own place and the rest of its canvas.
        if frames.shape != specs.pop("frames")[0]:
            raise ValueError(f"frames of shape {frames.shape} for {len(groups)} groups")
        batch = {"frames": frames} | {name: np.zeros(*spec) for name, spec in specs.items()}
        reads = [
            self._fill(_of_group(batch, i), group, i * self.group_size, begin)
            for i, group in enumerate(groups)
        ]
        counts = [sum(len(read.candidates) for read in group if read) for group in reads]
        budget = self.budget or max(1, *counts)
        shapes = self._instance_shapes(len(groups), budget)
        batch |= {name: np.zeros(*spec) for name, spec in shapes.items()}
        for i, group in enumerate(groups):
            rng = np.random.default_rng([self.seed, _INSTANCES, group.first])
            self._pack(_of_group(batch, i), reads[i], budget, rng)
        return batch, [read.record for group in reads for read in group if read]

    def _fill(
        self,
        out: dict[str, np.ndarray],
        group: GroupRef,
        first: int,
        begin: Callable[[int], Fault],
    ) -> list[_Read | None]:
        """Reads the samples of a group, from number `first`; None: it could not be read."""
        reads: list[_Read | None] = []
        out["frames"][len(group.samples) :] = 0
        out["label"][...] = NO_LABEL
        for i, ref in enumerate(group.samples):
            out["corpus"][i], out["record"][i] = ref.corpus, ref.record
            try:
                if fault := begin(first + i):
                    raise _BadSample(fault)
                read = self._read(ref, out["frames"][i])
            except _BadSample as bad:
                out["fault"][i] = bad.fault
                out["frames"][i] = 0
                reads.append(None)
                continue
            reads.append(read)
            out["sample_valid"][i] = True
            out["extent"][i] = read.extent
            # The file, not the sample's id: lists with one caption a line repeat a file.
            out["media_hash"][i] = text_hash(f"{ref.corpus}/{read.record.media}")
            out["keep_side"][i] = names_side(read.text)
            out["label"][i] = read.label
            out["text_hash"][i] = self._tokenize(out["text"][i], read.text)
        return reads

    def _pack(
        self, out: dict, reads: Sequence[_Read | None], budget: int, rng: np.random.Generator
    ) -> None:
        """Packs the instances of a group flat into its budget."""
        counts = [0 if read is None else len(read.candidates) for read in reads]
        slot = 0
        for parent, picked in enumerate(choose_instances(counts, budget, rng)):
            for k in reads[parent].candidates[picked] if len(picked) else ():
                self._put_instance(out, slot, parent, reads[parent], int(k))
                slot += 1
        out["dropped"][...] = sum(counts) - slot

    def _put_instance(self, out: dict, slot: int, parent: int, read: _Read, k: int) -> None:
        text = self._caption(read.record.instance_captions[k], read.epoch)
        present = read.record.present[k, read.chosen]
        if not present.any():
            present = self._nearest_presence(read.record.present[k], read.chosen)
        out["boxes"][slot] = read.record.boxes[k, read.chosen]
        out["present"][slot] = present
        out["instance_valid"][slot] = True
        out["parent"][slot] = parent
        out["keep_side"][parent] |= names_side(text)
        out["instance_text_hash"][slot] = self._tokenize(out["instance_text"][slot], text)

    def _nearest_presence(self, present: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Marks, for an instance that no chosen frame shows, the one nearest to its appearance.

        Only in evaluation: there every instance stays a query, whatever T is, and needs one frame.
        """
        seen = np.flatnonzero(present)
        if not len(seen):
            seen = np.arange(len(present))
        distance = np.abs(chosen[:, None] - seen[None]).min(axis=1)
        return np.arange(len(chosen)) == distance.argmin()

    def _read(self, ref: SampleRef, canvas: np.ndarray) -> _Read:
        """Reads one sample and decodes its chosen frames into `canvas` [t, H, W, 3].

        Raises:
          _BadSample: with the reason, whatever is wrong with the record or its media.
        """
        try:
            record = self.sources[ref.corpus][ref.record]
        except CorruptRecordError as error:
            raise _BadSample(error.fault) from error
        stored = len(record.frame_index)
        if not stored or not len(record.media_bytes):
            raise _BadSample(Fault.NO_FRAMES)
        _check_shapes(record)
        text = self._caption(record.captions, ref.epoch)
        if self.tokenizer is not None and blank(text):
            raise _BadSample(Fault.EMPTY_CAPTION)
        rng = np.random.default_rng([self.seed, _FRAMES, ref.corpus, ref.turn])
        chosen = choose_frames(stored, self.frames, self.sampling, rng)
        height, width = _decode_into(canvas, record, chosen)
        return _Read(
            # Without its media: the next sample is then read into the same, still cached memory.
            record=dataclasses.replace(record, media_bytes=()),
            chosen=chosen,
            epoch=ref.epoch,
            text=text,
            label=self._label(record),
            extent=(height / self.canvas[0], width / self.canvas[1]),
            candidates=self._candidates(record, chosen, ref.epoch),
        )

    def _candidates(self, record: Record, chosen: np.ndarray, epoch: int) -> np.ndarray:
        count = len(record.instance_ids)
        if self.use is Use.EVALUATE or not count:
            return np.arange(count)
        seen = np.flatnonzero(record.present[:, chosen].any(axis=1))
        named = [not blank(self._caption(record.instance_captions[k], epoch)) for k in seen]
        return seen[np.array(named, bool)]

    def _label(self, record: Record) -> int:
        if not self.classes:
            return NO_LABEL
        try:
            return self.classes.index(record.extra.get("label"))
        except ValueError as error:
            raise _BadSample(Fault.UNKNOWN_LABEL) from error

    def _caption(self, captions: Sequence[str], epoch: int) -> str:
        if self.use is Use.TRAIN and self.caption_sampling == "epoch":
            return sentence_for_epoch(captions, epoch)
        return " ".join(caption.strip() for caption in captions)

    def _tokenize(self, out: np.ndarray, text: str) -> int:
        """Writes the tokens of a text, and returns the hash of what the model reads of it.

        Texts that differ in capitals alone, or beyond the length, are one text to the model.
        """
        if self.tokenizer is None:
            return text_hash(text)
        out[...] = self.tokenizer.encode(text, self.length)
        return hash32(out.tobytes())


def _of_group(batch: Batch, index: int) -> dict[str, np.ndarray]:
    """Views of the arrays of one group."""
    return {name: array[index, ...] for name, array in batch.items()}


def fitting_size(height: int, width: int, canvas: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a picture scaled down, aspect kept, to fit the canvas; never enlarged.

    A picture so thin that its short side would vanish keeps one pixel there, and does not fit.
    """
    if height <= canvas[0] and width <= canvas[1]:
        return height, width
    short = _fitting_short_side(height, width, canvas)
    scale = short / min(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _fitting_short_side(height: int, width: int, canvas: tuple[int, int]) -> int:
    # Rounded down: the long side, which follows by rounding, then stays on the canvas too.
    if height <= width:
        return max(1, min(canvas[0], canvas[1] * height // width))
    return max(1, min(canvas[1], canvas[0] * width // height))


def _check_shapes(record: Record) -> None:
    stored, count = len(record.frame_index), len(record.instance_ids)
    media_files = 1 if record.encoding == "mp4" else stored
    if (
        len(record.media_bytes) != media_files
        or np.shape(record.boxes) != (count, stored, 4)
        or np.shape(record.present) != (count, stored)
    ):
        raise _BadSample(Fault.WRONG_SHAPE)


def _decode_into(canvas: np.ndarray, record: Record, chosen: np.ndarray) -> tuple[int, int]:
    """Decodes the chosen frames to the top left of `canvas` [t, H, W, 3], zeros around them.

    Returns:
      (height, width) of the pictures in pixels.
    """
    height, width = fitting_size(*record.size, canvas.shape[1:3])
    if height > canvas.shape[1] or width > canvas.shape[2]:
        raise _BadSample(Fault.WRONG_SHAPE)
    try:
        for t, picture in enumerate(read_pictures(record, chosen, (height, width))):
            if picture.shape != (height, width, 3):
                raise _BadSample(Fault.WRONG_SHAPE)
            canvas[t, :height, :width] = picture
            canvas[t, :height, width:] = 0  # here, while these lines of memory are at hand
            canvas[t, height:] = 0
    except media.MediaError as error:
        raise _BadSample(Fault.UNDECODABLE_MEDIA) from error
    return height, width


def read_pictures(
    record: Record, chosen: np.ndarray, size: tuple[int, int]
) -> Iterator[np.ndarray]:
    """Yields the chosen frames, uint8 [height, width, 3], scaled down if `size` asks for it."""
    short_side = None if size == record.size else min(size)
    if record.encoding == "mp4":
        frames = record.frame_index[chosen]
        yield from media.read_frames(record.media_bytes[0], frames, short_side)
        return
    picture, last = None, -1
    for index in chosen:
        if index != last:  # a clip with fewer frames than T repeats them
            data = record.media_bytes[index]
            if short_side is None:
                picture = media.decode_jpeg(data)
            else:
                picture = media.read_image(data, short_side)
        last = index
        yield picture
