"""Retrieval metrics of a matrix of scores, through the ranking that evaluation uses."""

import jax
import numpy as np

from instap_jax import sharding
from instap_jax.config import default
from instap_jax.evaluation.ranking import rank_queries
from instap_jax.evaluation.retrieval import Positives, metrics_of_ranks


def mesh_of(devices: int):
    return sharding.make_mesh(default().mesh, jax.devices()[:devices])


def retrieval_metrics(scores, videos_of_text, *, devices: int = 8) -> dict:
    """Scores [q, v], finite: products with one-hot candidates are these scores, exactly."""
    scores = np.asarray(scores, np.float32)
    positives = Positives.of(videos_of_text, scores.shape[1])
    mesh = mesh_of(devices)
    t2v = rank_queries(scores, np.eye(scores.shape[1]), positives, mesh=mesh)
    v2t = rank_queries(scores.T, np.eye(len(scores)), positives.reversed(), mesh=mesh)
    return metrics_of_ranks(t2v.rank, v2t.rank, positives)
