"""Task 'probe': attributes of single entities, read off frozen features."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from instap_jax.data.pipeline import parse_corpora
from instap_jax.data.synthetic.facts import SIDES
from instap_jax.errors import UserError
from instap_jax.evaluation.context import Context, Suite
from instap_jax.evaluation.encoder import Encoder
from instap_jax.evaluation.features import SuiteFeatures
from instap_jax.evaluation.probe import ProbeResult, knn_accuracy, linear_probe
from instap_jax.evaluation.results import Measurement, Protocol
from instap_jax.types import Kind

# Attributes of the embedded set; a label may be absent.
PROBED = (
    "shape", "colour", "texture", "size", "path", "direction", "speed", "inplace", "position",
    "side",
)  # fmt: skip

NEIGHBOURS = 20
# Of an attribute, so that its neighbours are more than a draw from most of what there is.
LEAST_EXAMPLES = 30


def measure(context: Context) -> list[Measurement]:
    """Probes of every suite, fitted on `--probe_videos` and `--probe_images`."""
    options, measured = context.options, []
    for suite in context.suites:
        text = options.probe_videos if suite.kind is Kind.VIDEO else options.probe_images
        fit = parse_corpora(text)
        if len(fit) != 1 or fit[0].split == suite.split:
            raise UserError(
                f"task probe needs --probe_{suite.kind}s=DIR:SPLIT to fit on, one split other than "
                f"the suite {suite.split}"
            )
        fit_suite = Suite(directory=fit[0].directory, split=fit[0].split, kind=suite.kind)
        found = context.features(suite), context.features(fit_suite)
        measured += measure_probes(context.encoder, *found)
    return measured


def measure_probes(encoder: Encoder, suite: SuiteFeatures, fit: SuiteFeatures) -> list[Measurement]:
    """Attributes of the entities of `suite`, read off their features by probes fitted on `fit`.

    The features are the scene's tokens under an entity's boxes; of aligned models also, by itself,
    the instance's embedding, which has looked at the scene.

    Raises:
      UserError: when the annotations carry no `attributes`, or too few to fit any probe on.
    """
    known = {name: len(_known(fit, name)[0]) for name in PROBED if _known(suite, name)[0]}
    names = [name for name, count in known.items() if count >= LEAST_EXAMPLES]
    if not any(known.values()):
        raise UserError(f"{suite.name} and {fit.name}: their instances have no 'attributes'")
    if not names:
        most = max(known.values())
        raise UserError(f"{fit.name}: {most} entities are too few to fit probes on")
    few = [f"{name} ({count})" for name, count in known.items() if 0 < count < LEAST_EXAMPLES]
    read = [("entity attributes", "mean of the last layer's tokens under the box", "entity")]
    if suite.instance is not None:
        read.append(("instance attributes", "embeddings of the instances", "instance"))
    measurements = []
    for unit, what, name in read:
        for scoring, probe in _PROBES.items():
            protocol = Protocol(
                suite=suite.name,
                unit=unit,
                scoring=scoring,
                frames=suite.frames,
                weights=encoder.weights,
                step=encoder.step,
                notes=f"{what}; fitted on {fit.name}",
            )
            features = getattr(fit, name), getattr(suite, name)
            measurements.append(
                Measurement(
                    protocol=protocol,
                    metrics=_accuracies(probe, names, (fit, suite), features),
                    counts={"entities": len(suite.entity), "fitted on": len(fit.entity)},
                    remarks=[f"too few in {fit.name} to fit on: {', '.join(few)}"] if few else [],
                )
            )
    return measurements


_PROBES: dict[str, Callable[..., ProbeResult]] = {
    f"{NEIGHBOURS}-NN": functools.partial(knn_accuracy, k=NEIGHBOURS),
    "ridge": linear_probe,
}


def _accuracies(
    probe: Callable[..., ProbeResult],
    names: Sequence[str],
    suites: tuple[SuiteFeatures, SuiteFeatures],
    features: tuple[np.ndarray, np.ndarray],
) -> dict[str, ProbeResult]:
    """By attribute; the suites and their features are those fitted on, then those tested."""
    found = {}
    for name in names:
        (fit_rows, fit_labels), (rows, labels) = (_known(suite, name) for suite in suites)
        # Nothing to learn from one class; nothing to name where no test class was seen.
        if len(set(fit_labels)) > 1 and set(fit_labels) & set(labels):
            found[name] = probe(features[0][fit_rows], fit_labels, features[1][rows], labels)
    return found


def _known(suite: SuiteFeatures, name: str) -> tuple[list[int], list[str]]:
    """Rows and labels of the entities that have this attribute."""
    labels = {row: _label(attributes, name) for row, attributes in enumerate(suite.labels)}
    known = {row: str(label) for row, label in labels.items() if label is not None}
    return list(known), list(known.values())


def _label(attributes: dict[str, Any], name: str) -> Any:
    """An attribute; 'position' where it holds all the time, 'side': of the first other entity that
    the caption says it is beside, above or below of."""
    if name == "side":
        kinds = (kind for kind, *_ in attributes.get("facts", ()))
        return next((kind for kind in kinds if kind in SIDES), None)
    if name == "position" and attributes.get("position_when") != "always":
        return None
    return attributes.get(name)
