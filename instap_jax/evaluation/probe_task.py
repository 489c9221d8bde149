"""Task 'probe': attributes of single entities, read off frozen features."""

from collections.abc import Callable

import numpy as np

from instap_jax.data.pipeline import parse_corpora
from instap_jax.errors import UserError
from instap_jax.evaluation.context import Context, Suite
from instap_jax.evaluation.encoder import Encoder
from instap_jax.evaluation.features import SuiteFeatures
from instap_jax.evaluation.probe import ProbeResult, knn_accuracy, linear_probe
from instap_jax.evaluation.results import Measurement, Protocol
from instap_jax.types import Kind

# Attributes of the embedded set that one frame or trajectory shows; a label may be absent.
PROBED = ("shape", "colour", "texture", "size", "path", "direction", "speed", "inplace")

NEIGHBOURS = 20


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

    Raises:
      UserError: when the annotations carry no `attributes`.
    """
    probes: dict[str, Callable[..., ProbeResult]] = {
        f"{NEIGHBOURS}-NN": lambda *data: knn_accuracy(*data, k=NEIGHBOURS),
        "ridge": linear_probe,
    }
    names = [name for name in PROBED if _known(fit, name)[1] and _known(suite, name)[1]]
    if not names:
        raise UserError(f"{suite.name} and {fit.name}: their instances have no 'attributes'")
    measurements = []
    for scoring, probe in probes.items():
        metrics = {}
        for name in names:
            data = (*_known(fit, name), *_known(suite, name))
            # Nothing to learn from one class; nothing to name where no test class was seen.
            if len(set(data[1])) > 1 and set(data[1]) & set(data[3]):
                metrics[name] = probe(*data)
        measurements.append(
            Measurement(
                protocol=Protocol(
                    suite=suite.name,
                    unit="entity attributes",
                    scoring=scoring,
                    frames=suite.frames,
                    weights=encoder.weights,
                    step=encoder.step,
                    notes=f"mean of the last layer's tokens under the box; fitted on {fit.name}",
                ),
                metrics=metrics,
                counts={"entities": len(suite.entity), "fitted on": len(fit.entity)},
            )
        )
    return measurements


def _known(suite: SuiteFeatures, name: str) -> tuple[np.ndarray, list[str]]:
    """Features and labels of the entities that have this attribute."""
    rows = [i for i, label in enumerate(suite.labels) if label.get(name) is not None]
    return suite.entity[rows], [str(suite.labels[i][name]) for i in rows]
