"""Where the numbers of a run go: `metrics.jsonl`, TensorBoard, optionally W&B, and the screen."""

import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

from ml_collections import ConfigDict
from tensorboardX import SummaryWriter

from instap_jax.errors import UserError


class MetricWriter:
    """Appends scalars of a step to every destination of `config.log`.

    On resume the lines of steps that are about to be run again are taken out of `metrics.jsonl`,
    so that a step is there once.

    Args:
      workdir: of the run.
      config: the resolved configuration.
      resume_step: steps already done.
    """

    def __init__(self, workdir: Path, config: ConfigDict, *, resume_step: int):
        path = workdir / "metrics.jsonl"
        if path.exists():
            _truncate(path, resume_step)
        self._file: TextIO = path.open("a")
        self._board = None
        if config.log.tensorboard:
            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)
        self._wandb = _start_wandb(workdir, config)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        line = {"step": step, "time": round(time.time(), 3)} | scalars
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(scalars, step=step)

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; an incomplete last line (a crash) is left out."""
    lines = []
    for text in (workdir / "metrics.jsonl").read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _truncate(path: Path, step: int) -> None:
    kept = [line for line in read_metrics(path.parent) if line["step"] <= step]
    aside = path.with_suffix(".partial")
    aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(aside, path)


def _start_wandb(workdir: Path, config: ConfigDict):
    if not config.log.wandb_project:
        return None
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "config.log.wandb_project is set but wandb is not installed; "
            "pip install 'instap_jax[wandb]'"
        ) from error
    return wandb.init(
        project=config.log.wandb_project, dir=str(workdir), config=config.to_dict(), resume="allow"
    )
