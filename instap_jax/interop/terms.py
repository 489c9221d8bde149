"""How an exported model was trained: by which terms of stage 'align', on clips of how many frames.

A file of weights holds the head of every term, trained or not; evaluation asks the configuration
(`term_weights`) which of them it may use.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from instap_jax.config_check import CHOICES, flatten
from instap_jax.errors import UserError
from instap_jax.interop.reading import Weights, read_config
from instap_jax.train.objectives import term_weights
from instap_jax.train.objectives.align import TERMS

KEY = "trained.terms"  # of an export's description
OPTIONS = {
    "trained.frames": "data.frames",
    "trained.dtype": "compute.dtype",
    "trained.text": "tokenizer.text",
}


def recorded(weights: Weights, name: str) -> tuple[str, ...] | None:
    """The terms that the description `name` beside a weight file names; None where it does not.

    Raises:
      UserError: the description is damaged, or names what is no term.
    """
    terms = flatten(read_config(weights.path, name) or {}).get(KEY)
    if terms is None:
        return None
    if not isinstance(terms, list) or not terms or any(term not in TERMS for term in terms):
        raise UserError(
            f"{weights.path.parent}/{name}: {KEY} is {terms!r}, not a list of some of "
            f"{', '.join(TERMS)}; export the run again"
        )
    return tuple(terms)


def options(weights: Weights, name: str) -> dict[str, Any]:
    """Other fields of the configuration that the description `name` says, as far as it does.

    Raises:
      UserError: the description is damaged.
    """
    flat = flatten(read_config(weights.path, name) or {})
    found = {field: flat[key] for key, field in OPTIONS.items() if key in flat}
    frames, dtype = found.get("data.frames", 1), found.get("compute.dtype", "float32")
    if type(frames) is not int or frames < 1 or dtype not in CHOICES["compute.dtype"]:
        raise UserError(
            f"{weights.path.parent}/{name}: trained.frames is {frames!r}, trained.dtype {dtype!r}; "
            "export the run again"
        )
    return found


def zeros(trained: Collection[str] | None) -> dict[str, float]:
    """Configuration fields that give the terms that are not in `trained` no weight; none for None,
    which is not known."""
    if trained is None:
        return {}
    return {f"align.{term}": 0.0 for term in TERMS if term not in trained}


def check(config: ConfigDict, trained: Collection[str] | None, path: Path) -> None:
    """Refuses a configuration that gives weight to a term by which the file was not trained.

    Raises:
      UserError: it does.
    """
    if trained is None:
        return
    if untrained := [term for term in term_weights(config) if term not in trained]:
        flags = " ".join(f"--config.align.{term}=0" for term in untrained)
        raise UserError(
            f"{path} was not trained by {', '.join(untrained)}, to which the configuration gives "
            f"weight; add {flags}"
        )


def assumed(config: ConfigDict, trained: Collection[str] | None) -> tuple[str, ...]:
    """For the report: the terms that are taken to have trained a file that does not say."""
    if config.stage != "align" or trained is not None:
        return ()
    return (f"trained by {', '.join(term_weights(config))}: the file does not say by which terms",)
