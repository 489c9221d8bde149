"""What `chaos.py` lets run and kills: tiny trainings that write down what they do.

A training is `instap train`; around it are only observers: a line for every batch that a step
takes, the phase it is in, and at the end a digest of its state.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

STEPS, EVERY = 24, 4
MODEL = (
    "vision.width=32", "vision.depth=2", "vision.heads=2", "vision.patch=4",
    "vision.image_size=16", "vision.mlp_ratio=2.0", "teacher.width=32", "teacher.depth=2",
    "teacher.heads=2", "teacher.patch=3", "teacher.image_size=12", "teacher.projection=16",
    "teacher.mlp_ratio=2.0", "text.vocab_size=320", "text.width=32", "text.heads=2",
    "text.max_length=32", "text.mlp_ratio=2.0", "data.batch_size=8", "data.group_size=4",
    "data.canvas=(24,32)", "data.frames=2", "tokenizer.length=8", "optimizer.warmup_steps=2",
    "log.every=1", "log.tensorboard=False",
)  # fmt: skip
STAGES = ("distill", "align")


def arguments(stage: str, made: Path, workdir: Path, **changes) -> list[str]:
    """The command line of a training; `changes` with '__' for '.' in the key."""
    values = [*MODEL, f"steps={STEPS}", f"checkpoint.every={EVERY}"]
    part = {"teacher": "teacher", "distill": "stage1", "align": "stage2"}[stage]
    if stage != "teacher":
        values.append(f"data.videos={made}/packed:train")
    if stage != "distill":
        values += [f"data.images={made}/packed:train", f"tokenizer.path={made}/tokenizer.model"]
    if stage == "teacher":
        values += ["text.depth=1", "data.frames=1", "steps=4"]
    if stage == "distill":
        values.append(f"teacher.checkpoint={made}/teacher")
    if stage == "align":
        values += [
            "text.depth=2", "align.crop_size=8", "align.projection=16",
            "align.cross_attention_heads=2", "evaluation.every=6", "evaluation.batch_size=4",
            f"evaluation.videos={made}/packed:val_video", "evaluation.frames=2",
            "evaluation.metric=val_video/global/mean_recall",
        ]  # fmt: skip
    given = {key.replace("__", "."): value for key, value in changes.items()}
    values = [text for text in values if text.split("=")[0] not in given]
    values += [f"{key}={value}" for key, value in given.items() if value is not None]
    config = Path(__file__).resolve().parent.parent / "configs" / "tiny.py"
    flags = [f"--config.{value}" for value in values]
    return ["train", f"--config={config}:{part}", f"--workdir={workdir}", *flags]


def prepare(made: Path) -> None:
    """The data, tokenizer and teacher that all trainings read."""
    annotations = f"--annotations={made}/set/annotations.jsonl"
    for command in (
        ["synth", f"--out={made}/set", "--train_videos=24", "--train_images=24", "--suite_size=8",
         "--val_size=12", "--width=64", "--height=48", "--frames=8", "--processes=1"],
        ["pack", annotations, f"--media={made}/set/media", f"--out={made}/packed",
         "--short_side=24", "--processes=1"],
        ["tokenizer", annotations, f"--out={made}/tokenizer.model", "--vocab_size=320"],
        arguments("teacher", made, made / "teacher"),
    ):  # fmt: skip
        _instap(command)


def train(command: list[str], notes: Path, attempt: int, environment: dict[str, str]) -> None:
    """Runs a training in this process, which it ends; `notes` is the directory to write to."""
    import jax

    os.environ.update(environment)
    # Not by the environment: JAX has been imported before this process was forked.
    jax.config.update("jax_num_cpu_devices", int(environment.get("CHAOS_DEVICES", 1)))
    notes.mkdir(parents=True, exist_ok=True)
    log = os.open(notes / "output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _observe(notes, attempt)
    sys.exit(_instap(command))


def _instap(command: list[str]) -> int:
    from instap_jax import main

    code = main.main(command)
    if code == 2:
        print(f"failed: instap {' '.join(command)}", file=sys.stderr)
    return code


def _observe(notes: Path, attempt: int) -> None:
    """Wraps the parts of a training; nothing of what they do is changed."""
    import jax

    from instap_jax.train import loop

    name = os.environ.get("JAX_PROCESS_ID", "0")
    batches = os.open(notes / f"batches-{name}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    phase = os.open(notes / f"phase-{name}", os.O_WRONLY | os.O_CREAT)

    def enter(text: str) -> None:
        os.pwrite(phase, text.ljust(24).encode(), 0)

    def during(text: str, owner, method: str, after: str | None = None) -> None:
        plain = getattr(owner, method)

        def observed(*args, **kwargs):
            enter(text)
            result = plain(*args, **kwargs)
            if after:
                enter(after)
            return result

        setattr(owner, method, observed)

    enter("start")
    during("restore", loop.Checkpointer, "restore", "first step")
    during("save", loop.Checkpointer, "save", "steps")
    during("validate", loop.Selection, "measure", "steps")
    start, following, training = loop.Feed.__init__, loop.Feed.__next__, loop.train

    def started(self, config, mesh, *, start_step, state):
        self.chaos_step = start_step
        enter("first step")
        start(self, config, mesh, start_step=start_step, state=state)

    def fed(self):
        result = following(self)
        self.chaos_step += 1
        line = {"attempt": attempt, "step": self.chaos_step, "ids": result.places.tolist()}
        os.write(batches, (json.dumps(line) + "\n").encode())
        if line["step"] > 1:
            enter("steps")
        if self.chaos_step % 50 == 0:
            _measure(notes, self.chaos_step)
        return result

    def trained(*args, **kwargs):
        state = training(*args, **kwargs)
        enter("end")
        (notes / f"final-{jax.process_index()}").write_text(digest(state))
        return state

    loop.Feed.__init__, loop.Feed.__next__, loop.train = started, fed, trained


def _measure(notes: Path, step: int) -> None:
    """Resident memory and open files, for the long run."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    line = {
        "step": step,
        "megabytes": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }
    with (notes / "memory.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def digest(state) -> str:
    """SHA-256 of this process's part of every array of a training state."""
    import jax
    import numpy as np

    total = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            total.update(np.ascontiguousarray(shard.data).tobytes())
    return total.hexdigest()
