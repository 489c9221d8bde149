"""Task 'retrieval': whole samples against captions, instances against theirs."""

import numpy as np

from instap_jax.evaluation.context import Context, Suite
from instap_jax.evaluation.results import Measurement
from instap_jax.evaluation.retrieval import retrieval_metrics


def measure(context: Context) -> list[Measurement]:
    """Every clip of a suite against every caption; every instance against every sentence."""
    measured = []
    for suite in context.suites:
        found = context.features(suite)
        measured.append(
            _dual_encoder(
                context, suite, "global captions", found.text, found.video, shown="whole picture"
            )
        )
        if found.instance is not None and len(found.instance):
            measured.append(
                _dual_encoder(
                    context,
                    suite,
                    "instance captions",
                    found.instance_text,
                    found.instance,
                    shown=context.encoder.instances,
                )
            )
    return measured


def _dual_encoder(
    context: Context,
    suite: Suite,
    unit: str,
    text: np.ndarray,
    visual: np.ndarray,
    *,
    shown: str,
) -> Measurement:
    """Cosine of every row of `text` [N, p] with every row of `visual` [N, p]; row i fits row i."""
    length = context.encoder.config.tokenizer.length
    return Measurement(
        protocol=context.protocol(
            suite,
            unit=unit,
            scoring="dual encoder, cosine",
            frames=context.features(suite).frames,
            notes=f"caption cut to {length} tokens; {shown}; uniform frames",
        ),
        metrics=retrieval_metrics(text @ visual.T, np.eye(len(text), dtype=bool)),
        counts={"texts": len(text), "videos": len(visual)},
    )
