"""What `fuzz.py` feeds: valid inputs, how each is damaged, and what must hold for any input."""

import copy
import json
import math
import random
import string
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import flags

from instap_jax import config_check, main
from instap_jax.config import default
from instap_jax.data import captions, media, pipeline, records, schema
from instap_jax.data.groups import GroupBuilder, GroupRef, SampleRef, Use
from instap_jax.data.tokenizer import load_tokenizer, train_sentencepiece
from instap_jax.errors import UserError
from instap_jax.types import Fault, Kind, Record

# Inputs of each target in a whole run of a million, and roughly how many a core does in a second.
SHARES = {
    "annotation": 250_000,
    "boxes": 200_000,
    "captions": 200_000,
    "sentencepiece": 120_000,
    "wordpiece": 100_000,
    "corpora": 60_000,
    "record": 40_000,
    "run config": 14_000,
    "overrides": 15_000,
    "vocabulary": 1_000,
}
RATES = dict(zip(SHARES, (4000, 2000, 8000, 10000, 8000, 60000, 400, 200, 40, 100)))
# The faults that the targets document.
DOCUMENTED = (UserError, schema.SampleFault)

WORDS = (
    "null true NaN -Infinity 1e999 -0 0.5 1e-320 99999999999999999999999 -1 2147483648 [] {} [[]] "
    '"" "\\ud800" "\\u0000" "\xff" "../x" "/etc/passwd" "a\\u0000b" xyxy_unit xywh_pixels image '
    "video e.g. Mr. U.S. ... 。 ！ 3.5 [MASK] [SEP] \u202e \ufeff \u0301 \U0001f600 left right = : "
    ", config. --config --workdir none None () lambda __class__ gs:// %s {0} \t \n \r\n \x85 \u2028"
)
CAPTION = (
    "A man in a red shirt, Mr. Smith Jr., walks left at 3.5 m.p.h. He stops... then turns! "
    "\u4e00\u53ea\u732b\u5728\u5de6\u8fb9\u3002\u5b83\u8d70\u4e86\uff01 "
    "1. A dog. 2. The U.S. flag? (See fig. 3.)\nEnd"
)
SAMPLE = {
    "id": "clip-0001", "media": "videos/clip-0001.mp4", "kind": "video", "split": "img-1k",
    "source": "hdvila", "caption": ["Global caption. Several sentences.", "Another."],
    "box_format": "xyxy_pixels", "label": "walk", "other": {"a": [1, None, "x"]},
    "instances": [
        {"id": 0, "category": "person", "caption": "First sentence. Second.",
         "boxes": [[0, 12.0, 30.5, 80.0, 140.0], [5, 14.0, 30.0, 82.0, 141.0], [9, 0, 0, 90, 150]],
         "absent": [[2, 3]], "attributes": {"color": "red"}},
        {"id": "b", "caption": ["A dog."], "boxes": [[3, 1, 2, 3, 4]], "absent": []},
    ],
}  # fmt: skip
INFO = (media.MediaInfo(12, 8.0, 160, 100), media.MediaInfo(1, 0.0, 160, 100))
OVERRIDES = (
    "data.batch_size=8", "data.frames=2", "optimizer.learning_rate=1e-3", "vision.width=32",
    "data.canvas=(64,64)", "optimizer.betas=(0.9,0.95)", "stage=align", "stop_at=3", "seed=1",
    "tokenizer.path=x.model", "data.videos=a:train=2,b:val", "data.flip=false", "mesh.fsdp=-1",
    "evaluation.every=10", "contrastive.temperature_range=(0.01,0.5)", "classify.classes=('a','b')",
    "text.fusion_layers=1", "data.max_fault_rate=0.5", "align.crop_size=16", "log.every=2",
)  # fmt: skip
TINY = Path(__file__).parent.parent / "configs" / "tiny.py"

_scratch = Path()


def prepare(scratch: str) -> None:
    """Once in every process: a directory of its own, and what the targets share."""
    global _scratch
    _scratch = Path(scratch)
    flags.FLAGS.mark_as_parsed()
    (_scratch / "t.model").write_bytes(train_sentencepiece([CAPTION] * 4, 400))
    pieces = ["[PAD]", *map(str, range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [*string.ascii_lowercase, *(f"##{c}" for c in string.ascii_lowercase), *"\u4e00.,!"]
    (_scratch / "vocab.txt").write_text("\n".join(pieces + letters), encoding="utf-8")


def make(name: str) -> "Target":
    return globals()["Target" + "".join(map(str.capitalize, name.split()))]()


# --- damage ---------------------------------------------------------------------------------------


def damage_bytes(rng: random.Random, data: bytes, words: list[bytes]) -> bytes:
    """One to eight small damages: bits, bytes, pieces left out, doubled, moved, words put in."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(out) + 1)
        end = min(len(out), at + rng.choice((1, 1, 2, 4, 16, 100)))
        match rng.randrange(7):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at:at] = rng.randbytes(rng.choice((1, 1, 3, 9)))
            case 2:
                del out[at:end]
            case 3:
                out[at:at] = out[at:end] * rng.choice((1, 1, 2, 50))
            case 4:
                piece = out[at:end]
                del out[at:end]
                to = rng.randrange(len(out) + 1)
                out[to:to] = piece
            case 5:
                out[at : rng.choice((at, end))] = rng.choice(words)
            case 6 if rng.random() < 0.1:
                del out[at:]
    return bytes(out)


ENCODED = [word.encode("utf-8", "surrogatepass") for word in WORDS.split(" ")]
ODD = (
    None, True, False, 0, -1, 1.5, -0.0, 1e308, -1e308, 1e-45, float("nan"), float("inf"),
    2**31, -(2**31), 10**30, 10**400, "", " ", "\ud800", "\0", "a" * 3000, "x y " * 1500, "../a",
    "/a", "C:\\a", "..", [], {}, [[]], [None], [[0, 1, 2, 3, 4]], [[1, 1]], [3, 2], {"id": 1},
    "xyxy_unit", "image",
)  # fmt: skip


def damage_json(rng: random.Random, value):
    """One to five changes of the tree: odd values, keys and items lost, doubled or swapped."""
    box = [value]
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        places = []
        _places(box, places)
        holder, key = rng.choice(places)
        match rng.randrange(6):
            case 0 | 1:
                holder[key] = copy.deepcopy(rng.choice(ODD))
            case 2 if isinstance(holder[key], int | float):
                holder[key] = _number(rng, holder[key])
            case 3 if holder is not box:
                del holder[key]
            case 4 if isinstance(holder, list) and holder is not box:
                holder.insert(key, holder[key])
            case 5:
                other, at = rng.choice(places)
                if _depth(holder[key]) < 20:
                    other[at] = json.loads(json.dumps(holder[key]))
    return box[0]


def _places(node, out: list) -> None:
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        out.append((node, key))
        if isinstance(value, dict | list):
            _places(value, out)


def _depth(node) -> int:
    if not isinstance(node, dict | list) or not node:
        return 0
    return 1 + max(map(_depth, node.values() if isinstance(node, dict) else node))


def _number(rng: random.Random, number: float) -> float:
    step = rng.choice((1, -1, 0.5, -3, 1000, 2**31, 1e30, 1e-9))
    if not abs(number) < 1e300:  # too large to calculate with, or NaN
        return step
    return rng.choice((-number, number + step, number * 2, min(number, 1e300) * 1.0))


# --- targets --------------------------------------------------------------------------------------


class Target:
    """`draw` makes an input, `run` raises on it only what is documented, and AssertionError."""

    seeds: tuple[bytes, ...] = ()
    words = ENCODED

    def draw(self, rng: random.Random) -> bytes:
        return damage_bytes(rng, rng.choice(self.seeds), self.words)

    run: Callable[[bytes], None]


class TargetAnnotation(Target):
    """A line of an annotation file, damaged as bytes or as a tree; checked as `validate` does."""

    def __init__(self):
        self.seeds = (json.dumps(SAMPLE).encode(), json.dumps(SAMPLE, ensure_ascii=False).encode())

    def draw(self, rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return super().draw(rng)
        return _json_bytes(damage_json(rng, json.loads(self.seeds[0])))

    def run(self, data: bytes) -> None:
        sample = schema.parse_line(data, "file:1", 1)
        faults = schema.check_sample(sample, INFO[sample.kind is Kind.IMAGE])
        assert all(isinstance(fault, str) and fault for fault in faults)
        again = json.dumps(schema.sample_to_json(sample)).encode()
        assert schema.parse_line(again, "file:1", 1).id == sample.id


class TargetBoxes(Target):
    """Boxes, intervals and frame numbers alone; good ones must lie on the grid, finite, inside."""

    def draw(self, rng: random.Random) -> bytes:
        count, length = rng.choice((1, 1, 2, 5)), rng.randrange(1, 14)
        instances = [self._instance(rng, k, length) for k in range(count)]
        if rng.random() < 0.7:
            instances = damage_json(rng, instances)
        form = rng.choice(schema.BOX_FORMATS)
        line = {"id": 1, "media": "a", "kind": "video", "caption": "A.", "box_format": form}
        return _json_bytes(line | {"instances": instances, "length": length})

    def _instance(self, rng: random.Random, key: int, length: int) -> dict:
        frames = sorted(rng.sample(range(length), rng.randrange(1, length + 1)))
        scale = rng.choice((1, 1, 100))
        boxes = []
        for frame in frames:
            x, y = sorted(rng.random() * scale for _ in "ab"), sorted(rng.random() for _ in "ab")
            boxes.append([frame, x[0], y[0] * scale, x[1], y[1] * scale])
        ends = [sorted((rng.randrange(length), rng.randrange(length))) for _ in range(3)]
        absent = rng.sample(ends, rng.randrange(3))
        return {"id": key, "caption": "A thing.", "boxes": boxes, "absent": absent}

    def run(self, data: bytes) -> None:
        sample = schema.parse_line(data, "file:1", 1)
        length = sample.extra.get("length")
        length = length if isinstance(length, int) and 0 < length < 100 else 12
        info = media.MediaInfo(length, 8.0, 100, 100)
        faults = schema.check_sample(sample, info)
        grid = np.arange(0, length, 2, dtype=np.int32)
        boxes, present = schema.boxes_on_grid(sample, grid, info)
        assert boxes.shape == (*present.shape, 4) == (len(sample.instances), len(grid), 4)
        if not faults:
            assert np.isfinite(boxes).all() and (boxes >= 0).all() and (boxes <= 1).all()
            assert (boxes[..., 2:] >= boxes[..., :2]).all()


class TargetCaptions(Target):
    """Sentences: none empty, in order, nothing lost but space; every epoch shows one of them."""

    seeds = (CAPTION.encode(), b"One. Two! Three?", "“Quoted.” … 3.5 e.g. x".encode())

    def run(self, data: bytes) -> None:
        text = data.decode("utf-8", "surrogateescape" if len(data) % 2 else "replace")
        sentences = captions.split_sentences(text)
        assert all(s == s.strip() and s for s in sentences)
        assert bool(sentences) == bool(text.strip())
        at = 0
        for sentence in sentences:
            at = text.index(sentence, at) + len(sentence)
        for epoch in (0, 1, 10**12):
            assert captions.sentence_for_epoch((text,), epoch) in (*sentences, "")
        assert -(2**31) <= captions.text_hash(text) < 2**31
        captions.names_side(text)


class _TargetTokens(Target):
    seeds = TargetCaptions.seeds
    length = 12
    kind: str
    file: str

    def __init__(self):
        config = default().tokenizer
        config.update(kind=self.kind, path=str(_scratch / self.file))
        self.tokenizer = load_tokenizer(config)

    def run(self, data: bytes) -> None:
        tokens, model = data.decode("utf-8", "surrogateescape"), self.tokenizer
        ids = model.encode(tokens, self.length)
        assert ids.shape == (self.length,) and ids.dtype == np.int32 and ids[0] == model.cls_id
        end = int(np.flatnonzero(ids == model.sep_id)[0])
        assert (ids[end + 1 :] == model.pad_id).all()
        inner = ids[1:end]
        assert ((inner >= 0) & (inner < model.vocab_size)).all()
        special = set(model.special_ids) - {model.unk_id}
        assert not special & set(inner.tolist())


class TargetSentencepiece(_TargetTokens):
    kind, file = "sentencepiece", "t.model"


class TargetWordpiece(_TargetTokens):
    kind, file = "wordpiece", "vocab.txt"


class TargetVocabulary(Target):
    """The files of the tokenizers themselves."""

    def __init__(self):
        self.seeds = tuple((_scratch / name).read_bytes() for name in ("t.model", "vocab.txt"))

    def run(self, data: bytes) -> None:
        path = _scratch / "damaged"
        path.write_bytes(data)
        config = default().tokenizer
        kind = "wordpiece" if data.startswith(b"[PAD") else "sentencepiece"
        config.update(path=str(path), kind=kind)
        model = load_tokenizer(config)
        assert model.encode(CAPTION, 12).shape == (12,)


class TargetCorpora(Target):
    """`config.data.videos`."""

    seeds = (b"a/b:train=2.5 , gs://bucket/d:img-1k", b"x:val", b"a:b=1,c:d=2,e:f")

    def run(self, data: bytes) -> None:
        for corpus in pipeline.parse_corpora(data.decode("utf-8", "surrogateescape")):
            assert corpus.directory and corpus.split and 0 < corpus.weight < math.inf


class OneRecord(records.RecordSource):
    data: bytes

    def _read(self, shard: int, position: int) -> bytes:
        return self.data


class TargetRecord(Target):
    """A packed record: the sample is there or it is a fault; the batch has its shape."""

    def __init__(self):
        frame = np.full((24, 32, 3), 90, np.uint8)
        frames = [media.encode_jpeg(frame + 20 * i) for i in range(3)]
        self.record = Record(
            id="a", media="a.mp4", kind=Kind.VIDEO, source="", captions=(CAPTION, "B."),
            encoding="jpeg", media_bytes=frames, frame_index=np.arange(3, dtype=np.int32), fps=8.0,
            size=(24, 32), instance_ids=("0", "1"), categories=("x", ""),
            instance_captions=(("One. Two.",), ("Left thing.",)),
            boxes=np.full((2, 3, 4), 0.5, np.float32), present=np.ones((2, 3), bool),
            extra={"label": "walk"}, instance_extra=({}, {"attributes": {}}),
        )  # fmt: skip
        self.seeds = (records.serialize(self.record),)
        config = default().tokenizer
        config.path = str(_scratch / "t.model")
        self.builders = [self._builder(config, use) for use in Use]

    def _builder(self, config, use: Use) -> GroupBuilder:
        source = OneRecord(directory="", split="", kind=Kind.VIDEO, shards=[], pack=None)
        source._ends, source._length = [1], 1
        return GroupBuilder(
            sources=[source], tokenizer=load_tokenizer(config), use=use, group_size=1, frames=2,
            sampling="uniform", canvas=(32, 32), length=8, caption_sampling="epoch",
            budget=4 if use is Use.TRAIN else None, classes=("walk",), seed=0,
        )  # fmt: skip

    def draw(self, rng: random.Random) -> bytes:
        if rng.random() < 0.3:
            return super().draw(rng)
        example = records.tf_example_pb2.Example.FromString(self.seeds[0])
        feature = example.features.feature
        annotation = feature["annotation"].bytes_list
        name = rng.choice(["annotation"] * 3 + sorted(feature))
        if name == "annotation":
            annotation.value[0] = _json_bytes(damage_json(rng, json.loads(annotation.value[0])))
        elif name == "media":
            at = rng.randrange(3)
            data = feature["media"].bytes_list.value
            data[at] = damage_bytes(rng, data[at], ENCODED)
            if rng.random() < 0.2:
                del data[at]
        elif feature[name].int64_list.value:
            numbers = feature[name].int64_list.value
            numbers[rng.randrange(len(numbers))] = rng.choice((0, -1, 1, 2, 3, 99, 2**31, 2**62))
        else:
            data = feature[name].bytes_list.value
            data[0] = damage_bytes(rng, data[0], ENCODED)
        return example.SerializeToString(deterministic=True)

    def run(self, data: bytes) -> None:
        group = GroupRef(0, [SampleRef(corpus=0, record=0, epoch=3, turn=3)])
        for builder in self.builders:
            builder.sources[0].data = data
            frames = np.full((1, 1, 2, 32, 32, 3), 7, np.uint8)
            batch = builder.build([group], frames, lambda sample: Fault.NONE)
            valid = batch["sample_valid"] == (batch["fault"] == 0)
            assert valid.all() and batch["frames"].shape == (1, 1, 2, 32, 32, 3)
            assert batch["sample_valid"].all() or not batch["frames"].any()
            assert np.isfinite(batch["boxes"]).all() and np.isfinite(batch["extent"]).all()


class TargetRunConfig(Target):
    """`config.json` of a run."""

    def __init__(self):
        config = json.loads(json.dumps(default().to_dict()))
        content = {"file": "x", "overrides": [], "changed": {}, "config": config}
        self.seeds = (json.dumps(content).encode(),)

    def draw(self, rng: random.Random) -> bytes:
        if rng.random() < 0.3:
            return super().draw(rng)
        return _json_bytes(damage_json(rng, json.loads(self.seeds[0])))

    def run(self, data: bytes) -> None:
        (_scratch / "config.json").write_bytes(data)
        config_check.read(_scratch)


class TargetOverrides(Target):
    """`--config.key=value` on the command line; an input is its arguments, a line each."""

    def draw(self, rng: random.Random) -> bytes:
        chosen = rng.sample(OVERRIDES, rng.choice((1, 1, 2, 3)))
        lines = [f"--config.{one}".encode() for one in chosen]
        at = rng.randrange(len(lines))
        lines[at] = damage_bytes(rng, lines[at], self.words).replace(b"\n", b" ")
        return b"\n".join(lines)

    def run(self, data: bytes) -> None:
        # NUL cannot be in an argument.
        lines = data.decode("utf-8", "surrogateescape").replace("\0", "").split("\n")
        values = flags.FlagValues()
        sys.argv = ["instap train", f"--config={TINY}:teacher", *lines]
        config_check.define_flag(values)
        main.parse_flags(values)
        config_check.load(values)


def _json_bytes(value) -> bytes:
    """JSON as a careless writer makes it: NaN and lone surrogates go in."""
    return json.dumps(value).encode("utf-8", "surrogatepass")
