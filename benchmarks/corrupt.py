"""A packed set with a tenth of its records spoilt, each in a known way: every fault is counted.

  python benchmarks/corrupt.py [--clips=400] [--workers=2]

Renders and packs clips of the embedded set, spoils a copy of it, and reads one epoch of both with
the real loader. Faults must be counted exactly, by reason, and everything else must be what it is
in the set that was left alone, bit for bit. Then it trains some steps on the spoilt set, and reads
files that ask for more than a machine has (`bombs.py`). Exit code 1 where anything is not as
expected.
"""

import argparse
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import bombs
import numpy as np
from absl import flags
from array_record.python import array_record_module

from instap_jax import main as instap
from instap_jax.config import default
from instap_jax.data import pipeline, records
from instap_jax.data.pipeline import FaultMonitor, make_loader
from instap_jax.errors import UserError
from instap_jax.types import Fault, Kind

SHARD = 8  # records
BATCH = 20
TIMEOUT = 2.0  # seconds
NAMES = ("frames", "text", "text_hash", "media_hash", "extent")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=400, help="a multiple of 80, from 400")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.clips % 80 or args.clips < 400:
        parser.error("--clips must be a multiple of 80, from 400")
    flags.FLAGS.mark_as_parsed()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        make_set(root, args.clips)
        shutil.copytree(root / "packed", root / "spoilt")
        spoilt = Spoiler(root / "spoilt", args.clips, args.seed).spoil()
        fine = check_loader(root, spoilt, args)
        fine &= check_training(root, spoilt)
        fine &= bombs.check(root / "bombs")
    print("\nall as expected" if fine else "\nNOT as expected")
    return 0 if fine else 1


def make_set(root: Path, clips: int) -> None:
    annotations = f"--annotations={root}/set/annotations.jsonl"
    for command in (
        ["synth", f"--out={root}/set", f"--train_videos={clips}", "--train_images=0",
         "--suite_size=0", "--val_size=0", "--width=96", "--height=64", "--frames=8"],
        ["pack", annotations, f"--media={root}/set/media", f"--out={root}/packed",
         "--short_side=32", "--rate=0", f"--shard_size={SHARD}"],
        ["tokenizer", annotations, f"--out={root}/tokenizer.model", "--vocab_size=512"],
    ):  # fmt: skip
        if instap.main(command):
            raise SystemExit(f"instap {command[0]} failed")


# --- what is spoilt -------------------------------------------------------------------------------


@dataclasses.dataclass
class Spoilt:
    """What to expect: way -> records (indices); way -> fault; records that hang or crash."""

    ways: dict[str, list[int]]
    faults: dict[str, Fault]
    hang: frozenset[int]
    crash: frozenset[int]

    def fault_of(self) -> dict[int, Fault]:
        return {index: self.faults[way] for way, found in self.ways.items() for index in found}


class Spoiler:
    """Spoils a tenth of the records of a packed set: three shards and single records of others."""

    def __init__(self, packed: Path, clips: int, seed: int):
        self.directory = packed / "video"
        self.shards = sorted(self.directory.glob("*array_record*"))
        self.rng = np.random.default_rng(seed)
        self.clips = clips
        self.spoilt = Spoilt({}, {}, frozenset(), frozenset())

    def spoil(self) -> Spoilt:
        whole = self.rng.permutation(len(self.shards) - 1)[:4]  # the last one gets a wrong count
        cut, lost, swapped, other = (int(shard) for shard in whole)
        used = {cut, lost, swapped, other, len(self.shards) - 1}
        free = [i for i in range(self.clips) if i // SHARD not in used]
        # A tenth in all: three whole shards, and the rest as single records of other shards.
        single = iter(self.rng.permutation(free)[: self.clips // 10 - 3 * SHARD].tolist())
        self._spoil_single(single)
        path = self.shards[cut]
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        self._note("shard cut in half", Fault.CORRUPT_RECORD, self._records(cut))
        self.shards[lost].unlink()
        self._note("shard missing", Fault.MISSING_RECORD, self._records(lost))
        shutil.copyfile(self.shards[other], self.shards[swapped])
        self._note("shard replaced by another", Fault.FOREIGN_RECORD, self._records(swapped))
        self._raise_count(3)
        self._note(
            "records that only the description has",
            Fault.MISSING_RECORD,
            range(self.clips, self.clips + 3),
        )
        return self.spoilt

    def _records(self, shard: int) -> range:
        return range(shard * SHARD, (shard + 1) * SHARD)

    def _note(self, way: str, fault: Fault, found) -> None:
        self.spoilt.ways[way], self.spoilt.faults[way] = list(found), fault

    def _spoil_single(self, single) -> None:
        ways = {
            "media cut short": (Fault.UNDECODABLE_MEDIA, cut_media),
            "frames that are no picture": (Fault.UNDECODABLE_MEDIA, no_media),
            "pictures of another size": (Fault.WRONG_SHAPE, other_size),
            "boxes of another clip": (Fault.WRONG_SHAPE, other_boxes),
            "no frames": (Fault.NO_FRAMES, no_frames),
            "blank caption": (Fault.EMPTY_CAPTION, blank_caption),
            "a number for a caption": (Fault.CORRUPT_RECORD, odd_caption),
        }
        changes = {}
        for way, (fault, change) in ways.items():
            index = next(single)
            changes[index] = change
            self._note(way, fault, [index])
        neighbours = [next(single) for _ in range(2)]
        for index in neighbours:
            other = self._example(index // SHARD, (index + 1) % SHARD)
            changes[index] = functools.partial(of_another, other)
        self._note("another record in its place", Fault.FOREIGN_RECORD, neighbours)
        for index, change in changes.items():
            self._rewrite(index, change)
        hang, crash, flipped = [next(single)], [next(single)], list(single)
        for index in flipped:
            self._flip(index)
        self._note("a byte flipped", Fault.CORRUPT_RECORD, flipped)
        self._note("decoder that never returns", Fault.TIMEOUT, hang)
        self._note("decoder that kills its process", Fault.DECODER_CRASHED, crash)
        self.spoilt.hang, self.spoilt.crash = frozenset(hang), frozenset(crash)

    def _example(self, shard: int, position: int) -> bytes:
        reader = array_record_module.ArrayRecordReader(str(self.shards[shard]))
        return reader.read([position])[0]

    def _rewrite(self, index: int, change) -> None:
        """Writes the shard again with one record changed: whole, checksums and all."""
        path = str(self.shards[index // SHARD])
        reader = array_record_module.ArrayRecordReader(path)
        kept = [reader.read([position])[0] for position in range(reader.num_records())]
        kept[index % SHARD] = change(kept[index % SHARD])
        writer = array_record_module.ArrayRecordWriter(path, "group_size:1,uncompressed")
        for data in kept:
            writer.write(data)
        writer.close()

    def _flip(self, index: int) -> None:
        path = self.shards[index // SHARD]
        record = records.parse_example(self._example(index // SHARD, index % SHARD))
        data = bytearray(path.read_bytes())
        # A piece of one of its pictures that the shard holds once.
        pieces = (file[-90:-50] for file in record["media"])
        part = next(piece for piece in pieces if data.count(piece) == 1)
        data[data.index(part)] ^= 0x10
        path.write_bytes(data)

    def _raise_count(self, more: int) -> None:
        path = self.directory / "dataset_info.json"
        info = json.loads(path.read_text())
        lengths = info["splits"][0]["shardLengths"]
        lengths[-1] = str(int(lengths[-1]) + more)
        path.write_text(json.dumps(info))


def _changed(data: bytes, **changes) -> bytes:
    record = records.from_example(records.parse_example(data))
    return records.serialize(dataclasses.replace(record, **changes))


def _media(data: bytes) -> list[bytes]:
    return records.parse_example(data)["media"]


def cut_media(data: bytes) -> bytes:
    return _changed(data, media_bytes=[file[: len(file) // 2] for file in _media(data)])


def no_media(data: bytes) -> bytes:
    return _changed(data, media_bytes=[b"no picture" for _ in _media(data)])


def other_size(data: bytes) -> bytes:
    return _changed(data, size=(30, 50))


def other_boxes(data: bytes) -> bytes:
    boxes = records.parse_example(data)["boxes"]
    return _changed(data, boxes=boxes[:, 1:])


def no_frames(data: bytes) -> bytes:
    return _changed(data, media_bytes=[])


def blank_caption(data: bytes) -> bytes:
    return _changed(data, captions=(" ", "\n"))


def odd_caption(data: bytes) -> bytes:
    return _changed(data, captions=(7,))


def of_another(other: bytes, data: bytes) -> bytes:
    return other


# --- the loader -----------------------------------------------------------------------------------


class Hostile(records.RecordSource):
    """A source some of whose records never come back, or end the process that reads them."""

    hang: frozenset[int] = frozenset()
    crash: frozenset[int] = frozenset()

    def __getitem__(self, index: int):
        if index in self.hang:
            while True:  # holds Python's lock, as the worst of decoders
                pass
        if index in self.crash:
            os.abort()
        return super().__getitem__(index)


def check_loader(root: Path, spoilt: Spoilt, args: argparse.Namespace) -> bool:
    """One epoch, in order, of the set and of its spoilt copy."""
    total = args.clips + 3
    begun = time.perf_counter()
    expected = dict(read(root, "packed", args.clips, 0)[0])
    middle = time.perf_counter()
    open_source = pipeline.open_source
    pipeline.open_source = functools.partial(open_hostile, open_source, spoilt)
    try:
        found, monitor, replaced = read(root, "spoilt", total, args.workers)
    finally:
        pipeline.open_source = open_source
    fault_of = spoilt.fault_of()
    seconds = time.perf_counter() - middle, middle - begun
    print(f"\n{args.clips} records, {len(fault_of) - 3} of them spoilt; {args.workers} workers")
    print(f"{'what was done':40}{'fault':20}{'expected':>9}{'counted':>9}")
    fine = True
    for way, indices in spoilt.ways.items():
        fault = spoilt.faults[way]
        counted = sum(found[index]["fault"] == fault for index in indices)
        fine &= counted == len(indices)
        print(f"{way:40}{fault.name:20}{len(indices):>9}{counted:>9}")
    reasons = dict(Counter(fault.name for fault in fault_of.values()))
    fine &= monitor.counts() == reasons
    print(f"by reason, as the monitor counts: {monitor.counts()}")
    wrong = [i for i in expected if i not in fault_of and not same(found[i], expected[i])]
    masked = [i for i in fault_of if found[i]["frames"].any() or found[i]["sample_valid"]]
    print(
        f"of the other {args.clips - len(fault_of) + 3} samples {len(wrong)} differ from those of "
        f"the set left alone; {len(masked)} of the spoilt ones have pixels or weight; "
        f"{replaced} workers were replaced; {seconds[0]:.1f} s ({seconds[1]:.1f} s unspoilt)"
    )
    return fine and not wrong and not masked and replaced == 3


def open_hostile(open_source, spoilt: Spoilt, *arguments, **keywords):
    source = open_source(*arguments, **keywords)
    hostile = Hostile.__new__(Hostile)
    vars(hostile).update(vars(source), hang=spoilt.hang, crash=spoilt.crash)
    return hostile


def read(root: Path, name: str, count: int, workers: int):
    """({record: its arrays}, the monitor, workers replaced) of one epoch in order."""
    config = default()
    config.stage = "teacher"
    config.data.update(
        videos=f"{root}/{name}:train", frames=4, canvas=(32, 48), workers=workers, prefetch=2,
        shuffle=False, max_fault_rate=0.2, decode_timeout=TIMEOUT,
    )  # fmt: skip
    config.tokenizer.path = f"{root}/tokenizer.model"
    loader = make_loader(config, kind=Kind.VIDEO, groups=1, group_size=1, rows=[0])
    monitor, found = FaultMonitor(loader), {}
    for _ in range(count):
        batch = next(loader)
        monitor.update(batch)
        record = int(batch["record"][0, 0])
        kept = (*NAMES, "fault", "sample_valid")
        found[record] = {key: np.array(batch[key][0, 0]) for key in kept}
    replaced = loader.workers_replaced
    loader.close()
    return found, monitor, replaced


def same(one: dict, other: dict) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in NAMES)


# --- training -------------------------------------------------------------------------------------


def check_training(root: Path, spoilt: Spoilt) -> bool:
    """Some steps of the tiny configuration, and the same where fewer faults are allowed."""
    steps, ahead = 8, default().data.device_prefetch
    run = functools.partial(train, root, steps)
    code, _ = run("run", 0.5)
    last = json.loads((root / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    read_so_far = (steps + ahead) * BATCH
    # Files alone are spoilt here: nothing hangs or crashes.
    ways = [fault for way, fault in spoilt.fault_of().items() if way < read_so_far]
    reasons = Counter(f.name for f in ways if f not in (Fault.TIMEOUT, Fault.DECODER_CRASHED))
    counted = {
        name.removeprefix("faults/"): int(value)
        for name, value in last.items()
        if name.startswith("faults/") and value
    }
    print(f"\n{steps} steps of configs/tiny.py:teacher, {read_so_far} samples read: exit {code},")
    print(f"  loss {last['loss']:.3f}, expected {dict(reasons)}, counted {counted}")
    refused, text = run("refused", 0.05)
    print(f"with data.max_fault_rate=0.05: exit {refused}: {text.strip().splitlines()[-1][:240]}")
    fine = code == 0 and np.isfinite(last["loss"]) and counted == dict(reasons)
    return bool(fine and refused == 2 and "could not be read" in text)


def train(root: Path, steps: int, name: str, rate: float) -> tuple[int, str]:
    config = Path(__file__).parent.parent / "configs" / "tiny.py"
    changes = {
        "steps": steps, "optimizer.warmup_steps": 1, "log.every": 1, "log.tensorboard": False,
        "data.videos": f"{root}/spoilt:train", "data.images": "", "data.batch_size": BATCH,
        "data.max_fault_rate": rate, "data.shuffle": False, "data.canvas": "(32,48)",
        "tokenizer.path": f"{root}/tokenizer.model",
    }  # fmt: skip
    command = [sys.executable, "-m", "instap_jax", "train", f"--config={config}:teacher"]
    command += [f"--workdir={root}/{name}", *(f"--config.{k}={v}" for k, v in changes.items())]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode not in (0, 2):
        print(run.stderr, file=sys.stderr)
    return run.returncode, run.stderr


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(str(error))
