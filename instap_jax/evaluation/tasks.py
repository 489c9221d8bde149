"""The tasks of `instap evaluate`: from suites of a trained model to measurements."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from instap_jax import sharding
from instap_jax.config import default
from instap_jax.data.pipeline import Corpus, parse_corpora
from instap_jax.errors import UserError
from instap_jax.evaluation.features import Encoder, SuiteFeatures, embed_suite, load_encoder
from instap_jax.evaluation.probe import ProbeResult, knn_accuracy, linear_probe
from instap_jax.evaluation.results import Measurement, Protocol, format_table, write_result
from instap_jax.evaluation.retrieval import retrieval_metrics
from instap_jax.types import Kind

# Attributes of the embedded set that one frame or trajectory shows; a label may be absent.
PROBED = ("shape", "colour", "texture", "size", "path", "direction", "speed", "inplace")

NEIGHBOURS = 20


def evaluate(
    workdir: Path,
    tasks: Sequence[str],
    *,
    suites: dict[Kind, str],
    probe_fit: dict[Kind, str],
    batch_size: int,
    frames: int | None,
) -> None:
    """Runs the tasks on every suite, prints their tables, writes `workdir/eval/TASK.json`.

    Args:
      workdir: of a trained run.
      tasks: names in `TASKS`.
      suites: 'DIR:SPLIT,...' for each kind.
      probe_fit: 'DIR:SPLIT' on which the probes of that kind are fitted; never a suite itself.
      batch_size: records a step, over all devices.
      frames: T of a clip; None: as many as the run was trained on.

    Raises:
      UserError: unknown task, no suite, or a suite that cannot be measured whole.
    """
    unknown = sorted(set(tasks) - TASKS.keys())
    if unknown or not tasks:
        raise UserError(f"--task={','.join(tasks)}: tasks are {', '.join(TASKS)}")
    mesh = sharding.make_mesh(default().mesh)
    if batch_size % sharding.data_shards(mesh):
        raise UserError(f"--batch_size must be a multiple of {sharding.data_shards(mesh)} devices")
    wanted = [(kind, corpus) for kind in Kind for corpus in parse_corpora(suites[kind])]
    if not wanted:
        raise UserError("no suite: give --videos=DIR:SPLIT or --images=DIR:SPLIT")
    with jax.set_mesh(mesh):
        encoder = load_encoder(workdir, mesh)
        session = Session(encoder, probe_fit, batch_size=batch_size, frames=frames)
        measured: dict[str, list[Measurement]] = {task: [] for task in tasks}
        for kind, corpus in wanted:
            suite = session.read(corpus, kind)
            for task in tasks:
                measured[task] += TASKS[task](session, suite, kind)
    for task, measurements in measured.items():
        print(format_table(task, measurements), end="\n\n")
        write_result(workdir, task, measurements, config=encoder.config.to_dict())


class Session:
    """One encoder and what it has embedded so far: each split once, however many tasks want it."""

    def __init__(self, encoder: Encoder, probe_fit: dict[Kind, str], **reading):
        self.encoder, self.probe_fit = encoder, probe_fit
        self._reading = reading  # batch_size and frames of `embed_suite`
        self._done: dict[tuple[Corpus, Kind], SuiteFeatures] = {}

    def read(self, corpus: Corpus, kind: Kind) -> SuiteFeatures:
        key = corpus, kind
        if key not in self._done:
            self._done[key] = embed_suite(
                self.encoder, corpus.directory, corpus.split, kind, **self._reading
            )
        return self._done[key]


def measure_retrieval(encoder: Encoder, suite: SuiteFeatures) -> Measurement:
    """Every clip against every global caption, by the dual encoder."""
    return _dual_encoder(
        encoder, suite, "global captions", suite.text, suite.video, shown="whole picture"
    )


def measure_instance_retrieval(encoder: Encoder, suite: SuiteFeatures) -> Measurement:
    """Every instance of the suite against every instance caption, by the dual encoder."""
    return _dual_encoder(
        encoder,
        suite,
        "instance captions",
        suite.instance_text,
        suite.instance,
        shown=encoder.instances,
    )


def _dual_encoder(
    encoder: Encoder,
    suite: SuiteFeatures,
    unit: str,
    text: np.ndarray,
    visual: np.ndarray,
    *,
    shown: str,
) -> Measurement:
    """Cosine of every row of `text` [N, p] with every row of `visual` [N, p]; row i fits row i."""
    return Measurement(
        protocol=Protocol(
            suite=suite.name,
            unit=unit,
            scoring="dual encoder, cosine",
            frames=suite.frames,
            weights=encoder.weights,
            step=encoder.step,
            notes=f"caption cut to {encoder.config.tokenizer.length} tokens; {shown}; "
            "uniform frames",
        ),
        metrics=retrieval_metrics(text @ visual.T, np.eye(len(text), dtype=bool)),
        counts={"texts": len(text), "videos": len(visual)},
    )


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


def _retrieval_task(session: Session, suite: SuiteFeatures, kind: Kind) -> list[Measurement]:
    del kind
    measured = [measure_retrieval(session.encoder, suite)]
    if suite.instance is not None and len(suite.instance):
        measured.append(measure_instance_retrieval(session.encoder, suite))
    return measured


def _probe_task(session: Session, suite: SuiteFeatures, kind: Kind) -> list[Measurement]:
    fit = parse_corpora(session.probe_fit[kind])
    if len(fit) != 1 or fit[0].split == suite.name:
        raise UserError(
            f"task probe needs --probe_{kind}s=DIR:SPLIT to fit on, one split other than the "
            f"suite {suite.name}"
        )
    return measure_probes(session.encoder, suite, session.read(fit[0], kind))


TASKS: dict[str, Callable[[Session, SuiteFeatures, Kind], list[Measurement]]] = {
    "retrieval": _retrieval_task,
    "probe": _probe_task,
}
