"""Questions of task 'choice', and who answers them."""

import types

import numpy as np
import pytest

from instap_jax.data.synthetic.facts import Fact
from instap_jax.evaluation import choice_task
from instap_jax.evaluation.choice_task import WORDINGS, choose, questions_of

LABEL = {
    "facts": [
        ["look", ["small", None, "red", "ring"], None],
        ["motion", ["straight", "left", "slow", "none"], None],
        ["left_of", "the blue star", "2"],
        ["position", ["always", "upper left"], None],
        ["position", ["end", "middle"], None],
        ["inplace", "spin", None],
        ["larger", "the blue star", "2"],
        ["same_colour", "the star", "2"],
    ]
}


def test_questions_differ_in_one_fact_and_hold_the_true_one_once():
    found = {question.about: question for question in questions_of([{}, LABEL])}
    sizes = {about: len(question.facts) for about, question in found.items()}
    assert sizes == {
        "size": 3, "colour": 10, "shape": 10, "translation": 8, "speed": 2, "relation": 2,
        "position": 4, "in-place motion": 3, "relative size": 2,
    }  # fmt: skip
    assert all(question.row == 1 for question in found.values())
    for question in found.values():
        true = question.facts[question.answer]
        assert [true.kind, list(true.value) if isinstance(true.value, tuple) else true.value,
                true.other] in LABEL["facts"]  # fmt: skip
        assert len(set(question.facts)) == len(question.facts)
    directions = {fact.value[1] for fact in found["translation"].facts}
    assert len(directions) == 8
    assert {f.value[0::2] for f in found["translation"].facts} == {("straight", "slow")}


def test_no_question_without_alternatives():
    facts = [["motion", ["circling", "clockwise", None, "none"], None], ["behind", "it", "1"]]
    leaves = ["motion", ["straight", "left", None, "leaves"], None]
    assert list(questions_of([{"facts": facts}, {"facts": [leaves]}, {"shape": "ring"}])) == []


class _Words:
    """An encoder that sees of a text whether it holds a word."""

    def __init__(self, word):
        self.word = word

    def embed_texts(self, texts):
        return np.float32([[self.word in text, self.word not in text] for text in texts])


@pytest.mark.parametrize(("instance", "right"), [([1, 0], True), ([0, 1], False)])
def test_the_most_similar_sentences_are_chosen(instance, right):
    facts = tuple(Fact(kind, "the star", 1) for kind in ("larger", "smaller"))
    question = choice_task.Question(about="relative size", row=0, facts=facts, answer=0)
    relations = choose(_Words("no such word"), np.float32([instance]), [question] * 3)
    assert relations == [-1, -1, -1]  # all alike: no choice, not the first
    looks = tuple(Fact("look", (size, None, "red", "ring")) for size in ("small", "large"))
    question = choice_task.Question(about="size", row=0, facts=looks, answer=1)
    chosen = choose(_Words("large"), np.float32([instance]), [question] * 3)
    assert chosen == [1 if right else 0] * 3


def test_chance_is_the_mean_over_the_questions():
    result = choice_task._result([(True, 1 / 2), (False, 1 / 4)])
    assert (result.accuracy, result.chance, result.sentences) == (50, 37.5, 4)


def test_alternatives_have_the_same_wordings():
    texts = []
    encoder = types.SimpleNamespace(
        embed_texts=lambda asked: texts.extend(asked) or np.eye(len(asked))
    )
    looks = tuple(Fact("look", (size, None, "red", "ring")) for size in ("small", "large"))
    question = choice_task.Question(about="size", row=0, facts=looks, answer=1)
    choose(encoder, np.ones((1, 2 * WORDINGS)), [question])
    small, large = texts[:WORDINGS], texts[WORDINGS:]
    assert [text.replace("small", "large") for text in small] == large
    assert len(set(small)) > 1
