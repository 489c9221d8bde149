"""Caption sub-sampling: sentences of a caption, and which of them an epoch uses.

Captions come from people, web pages and language models, in several languages, so the splitter
relies on punctuation and a short list of abbreviations, and on no model.
"""

import functools
import hashlib
import re
from collections.abc import Sequence

# An end of sentence: terminators, then closing quotes and brackets. The full-width ones need no
# space after them; the others do (so 3.5, example.com and 10:30 stay whole).
_END = re.compile(
    r"(?P<wide>[。！？｡]+[」』”’）)\]»]*)"
    r"|(?P<narrow>[.!?…؟।॥։።]+[\"'”’»)\]}]*)(?=\s|$)"
    r"|(?P<line>[\r\n\u2028\u2029]+)"
)
_HAS_WORD = re.compile(r"[^\W_]")
_OPENERS = "\"'“‘«([{„-–—"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# A full stop after these never ends a sentence: something has to follow them.
_TITLES = _words(
    "mr mrs ms dr prof rev hon gen col capt lt sgt cmdr gov st mt messrs mme mlle vs e.g i.e cf "
    "viz eds sra srta"
)
# After these it does not when a number follows.
_NUMBERED = _words("no nos fig figs vol pp eq ca approx")
# After these it does when the next word is capitalised. Words that are also plain English
# ('sat', 'sun', 'in') are left out: many captions have no capitals.
_SHORT_FORMS = _words(
    "etc jr sr inc ltd corp bros dept ave blvd a.m p.m u.s u.k u.s.a d.c b.c a.d ph.d m.d b.a m.a "
    "jan feb aug sept oct nov approx hrs ft lb lbs oz"
)
_WINDOW = 64  # characters looked at on either side of a full stop

# The forms a flip would make wrong. 'leftover', 'bright' and 'copyright' are other words.
_SIDE = re.compile(r"\b(?:left|right)(?:s|most|wards?|ies|y|hand(?:ed)?)?\b")


def split_sentences(text: str) -> list[str]:
    """Splits a caption into its sentences, in order, stripped, none empty.

    A line break ends a sentence. A text without punctuation is one sentence; a text without any
    letter or digit is one sentence too, unless it is blank: then there is none.
    """
    pieces, start = [], 0
    for match in _END.finditer(text):
        if match.lastgroup == "narrow" and not _ends_sentence(text, start, match):
            continue
        pieces.append(text[start : match.end()].strip())
        start = match.end()
    pieces.append(text[start:].strip())
    sentences = [piece for piece in pieces if _HAS_WORD.search(piece)]
    return sentences or [whole for whole in [text.strip()] if whole]


def sentence_for_epoch(captions: Sequence[str], epoch: int) -> str:
    """Returns the one sentence of the caption(s) that `epoch` uses; '' where there is none.

    The paper's "caption sub-sampling": one sentence each epoch, cycling, so that n epochs in a row
    show each of the n sentences exactly once. Each caption starts the cycle at a place of its own,
    given by its text: captions are written to a pattern (the look first, then what it does), and
    were all to turn to their second sentence with the epoch, training would lose what it learned
    of the first.
    """
    sentences, start = _sentences(tuple(captions))
    return sentences[(start + epoch) % len(sentences)] if sentences else ""


def names_side(text: str) -> bool:
    """Whether the text says left or right, as words: a flipped picture would make it wrong.

    Every sense counts ("the right answer" too): losing a flip costs less than a false caption.
    """
    return _SIDE.search(text.lower()) is not None


def blank(text: str) -> bool:
    """Whether a text says nothing: no character of it can be seen. Zero-width ones cannot."""
    return not any(char.isprintable() and not char.isspace() for char in text)


def text_hash(text: str) -> int:
    """Returns the `hash32` of a text."""
    return hash32(text.encode("utf-8", "surrogatepass"))


def hash32(data: bytes) -> int:
    """Returns a hash as a signed 32-bit integer, the same on every machine (BLAKE2)."""
    digest = hashlib.blake2b(data, digest_size=4).digest()
    return int.from_bytes(digest, "little", signed=True)


# The captions of a sample come by once an epoch, but those of its instances with them, and small
# corpora repeat fast: splitting is the costliest text step.
@functools.lru_cache(maxsize=65536)
def _sentences(captions: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
    """All sentences, and the place in the cycle that they start at."""
    sentences = tuple(sentence for text in captions for sentence in split_sentences(text))
    return sentences, text_hash("\n".join(captions))


def _ends_sentence(text: str, start: int, match: re.Match) -> bool:
    """Whether the terminator found by `_END` ends the sentence that began at `start`."""
    mark = match["narrow"].rstrip("\"'”’»)]}")
    following = text[match.end() : match.end() + _WINDOW].lstrip()[:2].lstrip(_OPENERS)
    if not following:
        return True
    capital, number = following[0].isupper(), following[0].isdigit()
    if mark == "…" or mark.startswith(".."):
        return capital or number  # "a dog ... and a cat" goes on
    if mark != ".":
        return True
    words = text[max(start, match.start() - _WINDOW) : match.start()].split()
    if not words:
        return False
    word = words[-1].lstrip(_OPENERS)
    if word.lower() in _TITLES or (word.lower() in _NUMBERED and number):
        return False
    if word.lower() in _SHORT_FORMS:
        return capital
    first = len(words) == 1
    if word.isdigit() and first:
        return False  # the number of a list: "1. A dog."
    if len(word) == 1 and word.isupper() and capital:  # an initial, after a name or at the start
        return not (first or words[-2].lstrip(_OPENERS)[:1].isupper())
    return True
