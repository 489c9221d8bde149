"""`instap train` and `instap evaluate` as fast as their flags are read: what a study runs in tests.

Flags, configuration and files are the real ones; nothing is learned. `$FAKE_LOG` gets a line for
every call, `$FAKE_LOG.tunables` its GLIBC_TUNABLES; `$FAKE_FAIL` names a workdir whose training
fails, `$FAKE_WAIT` one that is at work until it is stopped.
"""

import json
import os
import sys
import time
from pathlib import Path

from absl import flags

from instap_jax import config_check, main
from instap_jax.commands import evaluate, train
from instap_jax.errors import UserError
from instap_jax.evaluation.results import Measurement, Protocol, write_result
from instap_jax.train.kinds import kind_of_step
from instap_jax.train.stop import StopRequest
from instap_jax.types import Kind


def run_train(values: flags.FlagValues) -> None:
    loaded = config_check.load(values)
    workdir = config_check.local_workdir(values["workdir"].value)
    config_check.record(loaded, workdir)
    log("train", workdir)
    if os.environ.get("FAKE_FAIL", "nowhere") in str(workdir):
        raise UserError("the data are gone")
    config = loaded.config
    last = min(config.steps, config.stop_at or config.steps)
    with StopRequest() as stop, (workdir / "metrics.jsonl").open("w") as metrics:
        for step in range(1, last + 1):
            # Twice the time with instances; an image step costs half of a video step.
            kind = kind_of_step(config, step - 1)
            seconds = 0.4 if config.align.instance else 0.2
            seconds *= 0.5 if kind is Kind.IMAGE else 1
            seconds = 9.0 if step <= 4 else seconds  # compiling
            line = {"step": step, f"kind_{kind}": 1.0, "step_seconds": seconds}
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
            while os.environ.get("FAKE_WAIT", "nowhere") in str(workdir) and not stop:
                time.sleep(0.02)
            if stop:
                (workdir / "checkpoints" / str(step)).mkdir(parents=True)
                raise KeyboardInterrupt
    (workdir / "checkpoints" / str(last)).mkdir(parents=True)


def run_evaluate(values: flags.FlagValues) -> None:
    workdir = Path(values["workdir"].value)
    log("evaluate", workdir)
    config = config_check.read(workdir)
    step = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    ways = [
        ("global captions", "dual encoder, cosine", 1),
        ("instance captions", "dual encoder, cosine", 20),
    ]
    if config.align.instance:  # else nothing is trained that re-ranks instances
        ways.append(("instance captions", "re-ranked", 30))
    measurements = []
    for suite in f"{values['videos'].value},{values['images'].value}".strip(",").split(","):
        for unit, scoring, gain in ways:
            metrics = {
                "mean_recall": 30.0 + gain * bool(config.align.instance) + 7 * config.seed,
                "t2v": {"R@1": 10.0},
            }
            protocol = Protocol(
                suite=suite.split(":")[-1], unit=unit, scoring=scoring, frames=1,
                weights="aligned", step=step,
            )  # fmt: skip
            counts = {"texts": 12, "videos": 12}
            measurements.append(Measurement(protocol=protocol, metrics=metrics, counts=counts))
    write_result(workdir, "retrieval", measurements, config=config.to_dict())


def log(verb: str, workdir: Path) -> None:
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    place = "/".join(workdir.parts[-2:])
    with open(os.environ["FAKE_LOG"], "a") as file:
        file.write(f"{verb} {place} {cores}\n")
    Path(os.environ["FAKE_LOG"] + ".tunables").write_text(os.environ.get("GLIBC_TUNABLES", ""))


if __name__ == "__main__":
    train.run, evaluate.run = run_train, run_evaluate
    sys.exit(main.main())
