"""Sentences, their rotation over the epochs, and the words that forbid a flip."""

import collections
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instap_jax.data.captions import names_side, sentence_for_epoch, split_sentences, text_hash


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("A dog runs. It jumps! Why? Because...", 4),
        ("Mr. Smith and Dr. J. R. Doe talk, e.g. about U.S. politics. Then they leave.", 2),
        ("They meet at 5 p.m. They talk.", 2),
        ("It weighs 3.5 kg. See example.com at 10:30.", 2),
        ("He waits... and waits. Then… Nothing.", 3),
        ("a man walks. he sits down. the cat sat. it purrs", 4),
        ("The No. 5 car is red. She says no. He leaves.", 3),
        ('She said "Stop." He left (slowly.) Nobody saw.', 3),
        ("1. A dog. 2. A cat.", 2),
        ("Line one\nLine two\r\n\n- a bullet", 3),
        ("一只狗在跑。它跳过栅栏！为什么？", 3),
        ("यह एक कुत्ता है। वह दौड़ता है।", 2),
        ("¿Qué pasa? ¡Nada! Über die Straße läuft ein Hund.", 3),
        ("no punctuation at all", 1),
        ("!!!", 1),
        ("   ", 0),
        ("", 0),
    ],
)
def test_number_of_sentences(text, sentences):
    found = split_sentences(text)
    assert len(found) == sentences, found
    assert all(s == s.strip() and s for s in found)


def test_the_words_stay_as_they_are():
    assert split_sentences(" A red (small) car. It turns  left, e.g. here. ") == [
        "A red (small) car.",
        "It turns  left, e.g. here.",
    ]


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_text_keeps_its_letters_in_order(text):
    found = split_sentences(text)
    assert all(found) and (bool(found) == bool(text.strip()))
    keep = [c for c in text if c.isalnum()]
    assert [c for s in found for c in s if c.isalnum()] == keep


@pytest.mark.parametrize("unit", ["e.g. ", "a. ", "A. ", "...", '."', "\n ", "x", "1. "])
def test_hostile_texts_take_linear_time(unit):
    start = time.process_time()
    split_sentences(unit * (100_000 // len(unit)))
    assert time.process_time() - start < 2.0  # a quadratic splitter takes minutes


@given(
    st.lists(st.sampled_from(["One. Two. Three.", "Four", "", "Five! Six?"]), max_size=4),
    st.integers(0, 1000),
)
@settings(max_examples=50, deadline=None)
def test_n_epochs_in_a_row_show_each_sentence_once(captions, first):
    sentences = [s for text in captions for s in split_sentences(text)]
    window = range(first, first + len(sentences))
    shown = [sentence_for_epoch(captions, epoch) for epoch in window]
    assert collections.Counter(shown) == collections.Counter(sentences)
    if not sentences:
        assert sentence_for_epoch(captions, first) == ""


def test_epochs_cycle_in_order():
    captions = ["One. Two.", "Three."]
    shown = [sentence_for_epoch(captions, epoch) for epoch in range(5)]
    start = ["One.", "Two.", "Three."].index(shown[0])
    cycle = ["One.", "Two.", "Three."] * 3
    assert shown == cycle[start : start + 5]


def test_captions_of_one_pattern_start_at_different_sentences():
    """In any epoch about a third show each of three sentences: no epoch changes the subject."""
    for epoch in (0, 1, 5):
        shown = [sentence_for_epoch([f"A {k}. B {k}. C {k}."], epoch)[0] for k in range(300)]
        assert all(80 < count < 120 for count in collections.Counter(shown).values())


@pytest.mark.parametrize(
    "text",
    [
        "A man on the left.",
        "RIGHT now",
        "a left-handed man",
        "the leftmost dog",
        "moves rightwards",
    ],
)
def test_sides_are_found(text):
    assert names_side(text)


@pytest.mark.parametrize(
    "text", ["a bright light", "copyright 2020", "a leftover pizza", "upright"]
)
def test_other_words_are_no_sides(text):
    assert not names_side(text)


def test_hash_is_the_same_in_every_process_and_fits_int32():
    texts = ["A dog.", "一只狗", "", "\ud800"]
    code = (
        "from instap_jax.data.captions import text_hash\n"
        "print([text_hash(t) for t in ['A dog.', '一只狗', '', '\\ud800']])"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    hashes = [text_hash(t) for t in texts]
    assert other.stdout.strip() == str(hashes)
    assert all(-(2**31) <= h < 2**31 for h in hashes) and len(set(hashes)) == 4
