"""Retrieval during training: the dual encoder on the validation splits of `config.evaluation`."""

from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instap_jax import sharding
from instap_jax.evaluation.context import parse_suites
from instap_jax.evaluation.encoder import make_encoder
from instap_jax.evaluation.features import embed_suite, open_suite
from instap_jax.evaluation.protocols import OWN
from instap_jax.evaluation.ranking import rank_queries
from instap_jax.evaluation.retrieval import RECALL_AT, metrics_of_ranks
from instap_jax.evaluation.retrieval_task import INSTANCES, SAMPLES, units_of
from instap_jax.train.selection import Validate

_NAMES = {SAMPLES: "global", INSTANCES: "instance"}


def make_validate(config: ConfigDict, mesh: Mesh, graphdef: nnx.GraphDef) -> Validate:
    """What measures parameters of the run's model: SPLIT/UNIT/METRIC -> percent or rank.

    Media are read by one thread: the workers' memory is the training data's.

    Raises:
      UserError: a suite cannot be opened; in stage 'distill', no teacher to embed texts with, or
        one that embeds none.
    """
    wanted = config.evaluation
    suites = parse_suites(wanted.videos, wanted.images)
    for suite in suites:
        open_suite(suite.directory, suite.split, suite.kind)  # now, not when the first is due
    shards = sharding.data_shards(mesh)
    batch_size = -(-wanted.batch_size // shards) * shards
    encoder = make_encoder(config, mesh, graphdef, None, step=0)
    encoder.require_texts()

    def validate(params: nnx.State, step: int) -> dict[str, float]:
        now, found = encoder.with_params(params, step), {}
        for suite in suites:
            features = embed_suite(
                now,
                suite.directory,
                suite.split,
                suite.kind,
                batch_size=batch_size,
                frames=wanted.frames,
                workers=0,
            )
            for unit in units_of(now, OWN, features):
                positives = unit.positives
                t2v = rank_queries(unit.text, unit.visual, positives, mesh=mesh)
                v2t = rank_queries(unit.visual, unit.text, positives.reversed(), mesh=mesh)
                metrics = metrics_of_ranks(t2v.rank, v2t.rank, positives)
                found |= _named(f"{suite.split}/{_NAMES[unit.name]}", metrics)
        return found

    return validate


def _named(prefix: str, metrics: dict) -> dict[str, float]:
    named = {f"{prefix}/mean_recall": metrics["mean_recall"]}
    for direction in ("t2v", "v2t"):
        for name in (*(f"R@{k}" for k in RECALL_AT), "median_rank"):
            named[f"{prefix}/{direction}/{name}"] = metrics[direction][name]
    return named
