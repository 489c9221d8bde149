"""What each stage trains: its model, its frozen model, and its loss. All else is shared."""

from ml_collections import ConfigDict

from instap_jax.train.objectives.align import ALIGN, term_weights
from instap_jax.train.objectives.base import LossResult, Objective, compute_options
from instap_jax.train.objectives.classify import CLASSIFY
from instap_jax.train.objectives.distill import DISTILL
from instap_jax.train.objectives.ground import GROUND, predict_boxes
from instap_jax.train.objectives.instances import see_instances, whole_view
from instap_jax.train.objectives.teacher import TEACHER, embed_frames
from instap_jax.train.objectives.views import choose_visible

__all__ = [
    "OBJECTIVES",
    "LossResult",
    "Objective",
    "choose_visible",
    "compute_options",
    "embed_frames",
    "objective",
    "predict_boxes",
    "see_instances",
    "term_weights",
    "whole_view",
]

OBJECTIVES = {
    "teacher": TEACHER,
    "distill": DISTILL,
    "align": ALIGN,
    "ground": GROUND,
    "classify": CLASSIFY,
}


def objective(config: ConfigDict) -> Objective:
    """The objective of `config.stage`."""
    return OBJECTIVES[config.stage]
