"""Named retrieval protocols: what a suite must hold, and which of its captions are queries.

Sizes are the public ones: MSR-VTT 1k-A (JSFusion's 1,000 pairs), DiDeMo test (1,003 in UMT's
list, 1,004 in others), MSVD test (670 videos with all their captions), LSMDC test (1,000 clips) and
ActivityNet val1 (4,917 videos). InstVL's names say how many samples a suite has; how many instances
it has the paper does not say, so that is reported and not asserted.
"""

import dataclasses
import difflib
import enum
from collections.abc import Sequence
from pathlib import Path

from instap_jax.data.suite import Facts
from instap_jax.errors import UserError
from instap_jax.evaluation.features import whole_caption
from instap_jax.types import Kind

_SHOWN = 5  # ids in a message


class Captions(enum.StrEnum):
    """Which captions of a sample are texts of the suite; the value says so in a protocol line."""

    EACH = "each caption of a sample is a text of its own"
    JOINED = "the captions of a sample joined to one paragraph"
    FIRST = "the first caption of a sample"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrievalProtocol:
    """What is asserted of a suite, and how it is read.

    Attributes:
      name: '' for a suite of one's own, of which nothing is asserted.
      samples: numbers of samples (videos or images) that are right; empty: any.
      texts: the same for texts.
      kind: of the samples; None: either.
      frames: T of a clip; None: as many as the run was trained on.
      text_length: tokens that texts are cut to; None: as many as in training.
      instances: whether instances are measured too, where the run embeds them.
    """

    name: str
    captions: Captions
    samples: tuple[int, ...] = ()
    texts: tuple[int, ...] = ()
    kind: Kind | None = None
    frames: int | None = None
    text_length: int | None = None
    instances: bool = False

    def line(self, frames: int, text_length: int) -> str:
        """What a reader must know, for the notes of a measurement taken with these two."""
        parts = [f"preset {self.name}" if self.name else "", str(self.captions)]
        if self.frames not in (None, frames):
            parts.append(f"not the preset's {self.frames} frames")
        if self.text_length not in (None, text_length):
            parts.append(f"not the preset's {self.text_length} tokens of text")
        return "; ".join(part for part in parts if part)


def _video(
    name: str,
    captions: Captions,
    samples: tuple[int, ...],
    texts: tuple[int, ...],
    text_length: int | None = None,
):
    """A public benchmark at the paper's 16 frames (UMT fine-tunes and tests at 12)."""
    return RetrievalProtocol(
        name=name,
        captions=captions,
        samples=samples,
        texts=texts,
        kind=Kind.VIDEO,
        frames=16,
        text_length=text_length,
    )


def _instvl(name: str, samples: int, kind: Kind) -> RetrievalProtocol:
    return RetrievalProtocol(
        name=name,
        captions=Captions.JOINED,
        samples=(samples,),
        texts=(samples,),
        kind=kind,
        frames=16 if kind is Kind.VIDEO else 1,
        instances=True,
    )


OWN = RetrievalProtocol(name="", captions=Captions.JOINED, instances=True)

PRESETS = {
    preset.name: preset
    for preset in (
        _video("msrvtt-1k-a", Captions.EACH, (1000,), (1000,)),
        # Paragraphs: UMT's max_txt_l, in exp/zero_shot/ret_didemo/l16.py, finetuning/ret_anet.
        _video("didemo", Captions.JOINED, (1003, 1004), (1003, 1004), 64),
        _video("msvd", Captions.EACH, (670,), (27763,)),
        _video("lsmdc", Captions.EACH, (1000,), (1000,)),
        _video("activitynet", Captions.JOINED, (4917,), (4917,), 150),
        _instvl("instvl-1k-img", 1000, Kind.IMAGE),
        _instvl("instvl-10k-img", 10000, Kind.IMAGE),
        _instvl("instvl-1k-img-zero", 1000, Kind.IMAGE),
        _instvl("instvl-10k-img-zero", 10000, Kind.IMAGE),
        _instvl("instvl-1k-video", 1000, Kind.VIDEO),
    )
}


def find(name: str) -> RetrievalProtocol:
    """The protocol of `--protocol=NAME`; '' is a suite of one's own.

    Raises:
      UserError: no such preset.
    """
    if not name:
        return OWN
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"--protocol={name}: {hint}presets are {', '.join(PRESETS)}")
    return PRESETS[name]


def texts_of(protocol: RetrievalProtocol, facts: Sequence[Facts]) -> tuple[list[str], list[int]]:
    """The texts of a suite, and the sample that each belongs to: its one correct sample."""
    texts, owner = [], []
    for i, one in enumerate(facts):
        mine = {
            Captions.EACH: one.captions,
            Captions.JOINED: (whole_caption(one.captions),),
            Captions.FIRST: one.captions[:1],
        }[protocol.captions]
        texts += mine
        owner += [i] * len(mine)
    return texts, owner


def merge_equal(texts: Sequence[str], owner: Sequence[int]) -> tuple[list[str], list[list[int]]]:
    """The distinct texts, each with all the samples that have it: several videos a caption."""
    owners: dict[str, list[int]] = {}
    for text, sample in zip(texts, owner, strict=True):
        owners.setdefault(text, []).append(sample)
    return list(owners), list(owners.values())


def read_ids(path: str) -> list[str]:
    """The ids of a file, one a line.

    Raises:
      UserError: it cannot be read, is empty, or names an id twice.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"--expected_ids={path}: {reason}") from error
    ids = [line.strip() for line in lines if line.strip()]
    if not ids:
        raise UserError(f"--expected_ids={path}: no ids, one a line")
    if len(set(ids)) != len(ids):
        twice = next(one for one in ids if ids.count(one) > 1)
        raise UserError(f"--expected_ids={path}: {twice!r} is there more than once")
    return ids


def check_size(
    protocol: RetrievalProtocol, suite: str, kind: Kind, samples: int | None = None
) -> None:
    """Asserts what can be known of a suite before it is read; `samples` None: not their number.

    Raises:
      UserError: samples of another kind, or another number of them.
    """
    if protocol.kind not in (None, kind):
        name = _name(protocol, suite)
        raise UserError(f"{name}: it has {kind} samples, the protocol is of {protocol.kind}s")
    if samples is not None:
        _refuse(protocol, suite, _count_faults(protocol, samples), listed=False)


def check(
    protocol: RetrievalProtocol, suite: str, facts: Sequence[Facts], *, expected: Sequence[str] = ()
) -> None:
    """Asserts what the protocol says of a suite, and that it holds exactly the expected ids.

    Raises:
      UserError: one line with what is wrong: missing and unexpected ids, counts.
    """
    faults = _id_faults([one.id for one in facts], expected)
    faults += _count_faults(protocol, len(facts))
    texts = len(texts_of(protocol, facts)[0])
    if protocol.texts and texts not in protocol.texts:
        faults.append(f"{texts} texts instead of {_or(protocol.texts)} ({protocol.captions})")
    _refuse(protocol, suite, faults, listed=bool(expected))


def _refuse(protocol: RetrievalProtocol, suite: str, faults: list[str], *, listed: bool) -> None:
    if faults:
        hint = "" if listed else "; --expected_ids=FILE lists the ids that are missing"
        raise UserError(f"{_name(protocol, suite)}: {'; '.join(faults)}{hint}")


def _name(protocol: RetrievalProtocol, suite: str) -> str:
    return f"suite {suite}" + (f" under protocol {protocol.name}" if protocol.name else "")


def _count_faults(protocol: RetrievalProtocol, samples: int) -> list[str]:
    if not protocol.samples or samples in protocol.samples:
        return []
    return [f"{samples} samples instead of {_or(protocol.samples)}"]


def _id_faults(found: Sequence[str], expected: Sequence[str]) -> list[str]:
    if not expected:
        return []
    faults = []
    for label, odd in (
        ("missing", set(expected) - set(found)),
        ("not expected", set(found) - set(expected)),
    ):
        if odd:
            more = ", ..." if len(odd) > _SHOWN else ""
            faults.append(f"{len(odd)} ids {label}: {', '.join(sorted(odd)[:_SHOWN])}{more}")
    return faults


def _or(counts: Sequence[int]) -> str:
    return " or ".join(str(count) for count in counts)
