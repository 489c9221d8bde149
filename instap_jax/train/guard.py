"""Numbers that cannot be right: what the loop makes of a step's metrics.

The step itself refuses an update that is not finite (`train/step.py`), so the metrics may be read
late. Here it is told, counted, and decided whether the run goes on.
"""

import collections
import dataclasses
import math
import statistics
from typing import Any

from ml_collections import ConfigDict

from instap_jax.errors import UserError
from instap_jax.train.step import MUST_BE_FINITE, refusals_allowed
from instap_jax.types import Kind

# Metrics of a step that are no term of its loss.
_NO_TERMS = ("learning_rate", "param_norm", "refused")
# A spread below this share of the median is taken for this share: a loss that hardly moves does
# not make every small rise an alarm.
_LEAST_SPREAD = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alarm:
    """Something wrong with the numbers of a step.

    Attributes:
      what: in words, without the step.
      stop: whether the run ends here.
      refused: whether the step's update was refused, so that the state before it is at hand.
    """

    what: str
    stop: bool
    refused: bool


class Guard:
    """Judges the metrics of every step, in order.

    Args:
      kept: of an earlier `state()`; None at the start of a run.

    Raises:
      UserError: the run has skipped more updates than it now may: the step would refuse all others.
    """

    def __init__(self, config: ConfigDict, kept: dict[str, Any] | None):
        self._config = config.guard
        self._allowed = refusals_allowed(config)
        kept = kept or {"refused": 0, "spikes": 0, "losses": {}}
        self._refused, self._spikes = kept["refused"], kept["spikes"]
        if self._refused > self._allowed:
            raise UserError(
                f"this run has skipped {self._refused} updates that were not finite, "
                f"and may now skip {self._allowed}: go on with config.guard.non_finite=skip and "
                f"config.guard.max_skipped={self._refused} or more"
            )
        self._losses = {
            kind: collections.deque(kept["losses"].get(kind, ()), config.guard.spike_window)
            for kind in map(str, Kind)
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-able: a resumed run alarms as the uninterrupted one."""
        losses = {kind: list(losses) for kind, losses in self._losses.items() if losses}
        return {"refused": self._refused, "spikes": self._spikes, "losses": losses}

    def counts(self) -> dict[str, float]:
        """For the log, as far as there is something to count."""
        counts = {"guard/skipped": self._refused, "guard/spikes": self._spikes}
        return {name: float(count) for name, count in counts.items() if count}

    def judge(self, kind: Kind, scalars: dict[str, float]) -> Alarm | None:
        """What is wrong with a step of a kind, by its metrics; None: nothing."""
        if int(scalars["refused"]) > self._refused:
            self._refused = int(scalars["refused"])
            stop = self._refused > self._allowed
            return Alarm(what=self._not_finite(scalars, stop), stop=stop, refused=True)
        losses = self._losses[str(kind)]
        spike = self._spike(scalars["loss"], losses)
        losses.append(scalars["loss"])
        return spike

    def _not_finite(self, scalars: dict[str, float], stop: bool) -> str:
        bad = next(name for name in MUST_BE_FINITE if not math.isfinite(scalars[name]))
        terms = ", ".join(
            f"{name} {value:.4g}" for name, value in scalars.items() if name not in _NO_TERMS
        )
        count = f"update {self._refused} of {self._allowed} that may be skipped; "
        if stop and self._allowed:
            count = f"more than config.guard.max_skipped={self._allowed} updates were skipped; "
        return f"{bad} is {scalars[bad]} ({count if self._allowed else ''}{terms})"

    def _spike(self, loss: float, losses: collections.deque) -> Alarm | None:
        """The documented rule: loss > median + spike * MAD of a full window."""
        if not self._config.spike or len(losses) < losses.maxlen:
            return None
        median = statistics.median(losses)
        spread = statistics.median(abs(one - median) for one in losses)
        spread = max(spread, _LEAST_SPREAD * abs(median))
        if loss <= median + self._config.spike * spread:
            return None
        self._spikes += 1
        what = (
            f"loss {loss:.4g} is {(loss - median) / spread:.0f} times the usual spread "
            f"({spread:.2g}) above the median ({median:.4g}) of the last {len(losses)} such steps"
        )
        return Alarm(what=what, stop=self._config.spike_stop, refused=False)
