"""Validation during training, and the best checkpoint by a named metric.

It reads the parameters and nothing else: no random stream, no batch of the training data and no
counter is touched, so a run with it takes the steps of a run without it, bit for bit.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instap_jax.errors import UnreadableSample, UserError
from instap_jax.train import checkpoint
from instap_jax.train.metrics import EVAL
from instap_jax.train.program import Program

# (parameters, step) -> metrics by name, as 'val_video/instance/mean_recall', the same on all hosts.
Validate = Callable[[nnx.State, int], dict[str, float]]
# (config, mesh, structure of the model) -> Validate.
MakeValidate = Callable[[ConfigDict, Mesh, nnx.GraphDef], Validate]


class Selection:
    """What the loop asks: whether a validation is due, and to do it.

    Args:
      make_validate: see `MakeValidate`; called only where `config.evaluation.every` is set.

    Raises:
      ValueError: it is set, and there is no `make_validate`.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        program: Program,
        mesh: Mesh,
        make_validate: MakeValidate | None,
    ):
        self._every, self._metric = config.evaluation.every, config.evaluation.metric
        self._workdir, self._best = str(workdir), float("-inf")
        if self._every is None:
            return
        if make_validate is None:
            raise ValueError("config.evaluation.every is set: train() needs make_validate")
        self._validate = make_validate(config, mesh, program.graphdef)
        if self._metric and checkpoint.has_best(self._workdir):
            checkpoint.tidy_best(self._workdir)
            self._take_over(config)

    def _take_over(self, config: ConfigDict) -> None:
        """Takes the best so far for what is to be beaten, if it was measured as now."""
        step, meta = checkpoint.read_meta(self._workdir, which=checkpoint.BEST)
        before = _measured(meta["config"]) | {"metric": meta["selection"]["metric"]}
        differ = [name for name, value in _measured(config).items() if before[name] != value]
        if not differ:
            self._best = meta["selection"]["value"]
        elif jax.process_index() == 0:
            print(
                f"{self._workdir}: its best checkpoint, step {step}, was measured with another "
                f"config.evaluation.{differ[0]}: the next validation replaces it",
                file=sys.stderr,
            )

    def due(self, step: int) -> bool:
        """Whether the parameters after this step are to be measured."""
        return self._every is not None and step % self._every == 0

    def measure(self, params: nnx.State, step: int, meta: dict) -> dict[str, float]:
        """Measures the parameters and keeps them as `checkpoints-best` if none were better.

        Of equal ones the first stays. `meta`: of a checkpoint of this step. A sample that cannot
        be read costs this measurement, not the run: days of training outweigh it, and what fails
        to read is often the storage, for a moment.

        Returns:
          The metrics under `metrics.EVAL`, for the run's log; none where a sample was unreadable.

        Raises:
          UserError: the metric to choose by is none of them.
        """
        try:
            found = self._validate(params, step)
        except UnreadableSample as error:  # on every host alike
            if jax.process_index() == 0:
                print(f"step {step}: not validated, training goes on: {error}", file=sys.stderr)
            return {}
        if self._metric and self._metric not in found:
            raise UserError(
                f"config.evaluation.metric={self._metric!r} is none of what the suites gave: "
                f"{', '.join(found)}"
            )
        if self._metric:
            value = found[self._metric]
            if value > self._best:
                chosen = {"metric": self._metric, "value": value, "step": step}
                checkpoint.write_best(
                    self._workdir, params, step=step, meta=meta | {"selection": chosen}
                )
                self._best = value
            if jax.process_index() == 0:
                print(f"step {step}: {self._metric} {value:.2f}, best {self._best:.2f}")
        return {EVAL + name: value for name, value in found.items()}


def _measured(config: Mapping[str, Any]) -> dict[str, Any]:
    """What values of the metric depend on: two are compared only where all of it is the same."""
    evaluation = config["evaluation"]
    return {
        "metric": evaluation["metric"],
        "videos": evaluation["videos"],
        "images": evaluation["images"],
        "frames": evaluation["frames"] or config["data"]["frames"],
    }
