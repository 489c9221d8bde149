"""Task 'choice': which of several sentences, alike but for one fact, fits an instance.

"It is slowly moving up", "... down", "... to the left" and so on: the one whose embedding is most
similar to the instance's is its choice. Nothing is fitted, all sentences
are equally likely by their wording, and chance is one in their number, so this measures what an
instance's embedding holds of each kind of fact in the very space that retrieval ranks in. Facts
come from the embedded set's ground truth (`attributes.facts`), sentences from its language.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from instap_jax.data.synthetic.facts import Fact
from instap_jax.data.synthetic.language import say
from instap_jax.data.synthetic.scene import COLOURS, DIRECTIONS, INPLACE, SHAPES, SIZES, TEXTURES
from instap_jax.errors import UserError
from instap_jax.evaluation.context import Context, Suite
from instap_jax.evaluation.encoder import Encoder
from instap_jax.evaluation.probe import wilson
from instap_jax.evaluation.results import Measurement

# Wordings of every sentence, their embeddings averaged: less depends on the choice of words.
WORDINGS = 4

_CORNERS = ("upper left", "upper right", "lower left", "lower right")
_OPPOSITE = (_CORNERS, ("left", "right"), ("top", "bottom"))
# What lies to the left may lie a little higher too: only the opposite side is plainly false.
_OPPOSITE_RELATIONS = (
    ("relation", ("left_of", "right_of")),
    ("relation", ("above", "below")),
    ("relative size", ("larger", "smaller")),
)
_LOOK = {
    "size": (0, tuple(SIZES)),
    "texture": (1, tuple(name for name in TEXTURES if name != "plain")),
    "colour": (2, tuple(COLOURS)),
    "shape": (3, tuple(SHAPES)),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One choice.

    Attributes:
      about: kind of fact. row: of the instance in its suite.
      facts: what the sentences say; `answer` is the index of the true one.
    """

    about: str
    row: int
    facts: tuple[Fact, ...]
    answer: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceResult:
    """Attributes:
    accuracy: percent of questions answered rightly. low, high: 95 % Wilson interval, which takes
      them as independent; those of one scene are not quite.
    chance: percent, by guessing. sentences: the most in one question.
    """

    accuracy: float
    low: float
    high: float
    chance: float
    sentences: int
    questions: int


def measure(context: Context) -> list[Measurement]:
    """Accuracy for every kind of fact, on every suite.

    Raises:
      UserError: the run embeds no instances, or the annotations state no facts.
    """
    return [_measure_suite(context, suite) for suite in context.suites]


def _measure_suite(context: Context, suite: Suite) -> Measurement:
    encoder, features = context.encoder, context.features(suite)
    if features.instance is None:
        raise UserError(f"{context.workdir}: task choice needs a run that embeds instances")
    questions = list(questions_of(features.labels))
    if not questions:
        raise UserError(f"{suite.split}: its instances have no 'attributes' with 'facts'")
    chosen = choose(encoder, features.instance, questions)
    hits = defaultdict(list)
    for question, choice in zip(questions, chosen):
        hits[question.about].append((choice == question.answer, 1 / len(question.facts)))
    metrics = {about: _result(answers) for about, answers in sorted(hits.items())}
    return Measurement(
        protocol=context.protocol(
            suite,
            unit="facts of instances",
            scoring="most similar of sentences that differ in one fact",
            frames=features.frames,
            notes=f"mean of {WORDINGS} wordings; regions of the instances",
        ),
        metrics=metrics,
        counts={"instances": len(features.instance), "questions": len(questions)},
        remarks=[f"instances: {encoder.instances}"],
    )


def questions_of(labels: Sequence[dict[str, Any]]) -> Iterator[Question]:
    """Every question that the stated facts of the instances allow, in order.

    Args:
      labels: `attributes` of every instance.
    """
    for row, label in enumerate(labels):
        for kind, value, other in label.get("facts", ()):
            value = tuple(value) if isinstance(value, list) else value
            fact = Fact(kind, value, other)
            for about, facts in _alternatives(fact):
                yield Question(about=about, row=row, facts=facts, answer=facts.index(fact))


def choose(encoder: Encoder, instances: np.ndarray, questions: Sequence[Question]) -> list[int]:
    """Index of the chosen fact of every question; of equal ones none, -1."""
    texts, ends = [], [0]
    for number, question in enumerate(questions):
        for fact in question.facts:
            # The same wordings for every alternative.
            rng = np.random.default_rng([question.row, number])
            texts += [say(rng, fact, "it") for _ in range(WORDINGS)]
        ends.append(len(texts))
    embedded = encoder.embed_texts(texts)
    chosen = []
    for question, start, end in zip(questions, ends, ends[1:]):
        scores = embedded[start:end] @ instances[question.row]
        scores = scores.reshape(-1, WORDINGS).mean(axis=1)
        best = np.flatnonzero(scores == scores.max())
        chosen.append(int(best[0]) if len(best) == 1 else -1)
    return chosen


def _alternatives(fact: Fact) -> Iterator[tuple[str, tuple[Fact, ...]]]:
    """(kind of fact, the fact among its alternatives), for every part of it that has some."""

    def facts(values) -> tuple[Fact, ...]:
        return tuple(dataclasses.replace(fact, value=value) for value in values)

    if fact.kind == "look":
        for about, (place, names) in _LOOK.items():
            if fact.value[place] in names:
                changed = [(*fact.value[:place], n, *fact.value[place + 1 :]) for n in names]
                yield about, facts(changed)
    elif fact.kind == "motion":
        path, direction, speed, event = fact.value
        if direction in DIRECTIONS and event == "none":
            yield "translation", facts([(path, way, speed, event) for way in DIRECTIONS])
        if speed:
            yield "speed", facts([(path, direction, pace, event) for pace in ("slow", "fast")])
    elif fact.kind == "inplace":
        yield "in-place motion", facts(INPLACE)
    elif fact.kind == "position":
        when, zone = fact.value
        for zones in _OPPOSITE:
            if zone in zones:
                yield "position", facts([(when, name) for name in zones])
    for about, kinds in _OPPOSITE_RELATIONS:
        if fact.kind in kinds:
            yield about, tuple(dataclasses.replace(fact, kind=kind) for kind in kinds)


def _result(answers: list[tuple[bool, float]]) -> ChoiceResult:
    hits, total = sum(hit for hit, _ in answers), len(answers)
    low, high = wilson(hits, total)
    chances = [chance for _, chance in answers]
    return ChoiceResult(
        accuracy=100 * hits / total,
        low=low,
        high=high,
        chance=100 * sum(chances) / total,
        sentences=round(1 / min(chances)),
        questions=total,
    )
