"""Protocols: what a suite must hold, and which of its captions are queries."""

import pytest

from instap_jax.data.suite import Facts
from instap_jax.errors import UserError
from instap_jax.evaluation import protocols
from instap_jax.types import Kind

PUBLIC = {
    "msrvtt-1k-a": ("each", 1000, 1000),
    "didemo": ("joined", 1003, 1003),
    "msvd": ("each", 670, 27763),
    "lsmdc": ("each", 1000, 1000),
    "activitynet": ("joined", 4917, 4917),
    "instvl-1k-img": ("joined", 1000, 1000),
    "instvl-10k-img": ("joined", 10000, 10000),
    "instvl-1k-img-zero": ("joined", 1000, 1000),
    "instvl-10k-img-zero": ("joined", 10000, 10000),
    "instvl-1k-video": ("joined", 1000, 1000),
}


def suite_of(samples, texts, captions=None):
    """Facts of so many samples that have so many captions together, as evenly as it goes."""
    counts = [texts // samples + (i < texts % samples) for i in range(samples)]
    return [
        Facts(id=f"v{i}", captions=captions or tuple(f"v{i} c{j}." for j in range(n)), instances=())
        for i, n in enumerate(counts)
    ]


@pytest.mark.parametrize("name", PUBLIC)
def test_presets_assert_the_public_counts_and_take_captions_as_they_say(name):
    how, samples, texts = PUBLIC[name]
    preset = protocols.find(name)
    kind = preset.kind
    # Paragraph retrieval: several sentences a video, one text.
    facts = suite_of(samples, texts if how == "each" else 3 * samples)
    found, owner = protocols.texts_of(preset, facts)
    assert len(found) == len(owner) == texts
    if how == "joined":
        assert found[5] == "v5 c0. v5 c1. v5 c2." and owner[5] == 5
    protocols.check(preset, "suite", facts)
    with pytest.raises(UserError, match=f"under protocol {name}: {samples - 1} samples instead of"):
        protocols.check(preset, "suite", facts[:-1])
    assert preset.instances == name.startswith("instvl")
    protocols.check_size(preset, "suite", kind, samples)
    with pytest.raises(UserError, match=f"{samples + 7} samples instead of"):
        protocols.check_size(preset, "suite", kind, samples + 7)
    other = Kind.IMAGE if kind is Kind.VIDEO else Kind.VIDEO
    with pytest.raises(UserError, match=f"the protocol is of {kind}s"):
        protocols.check_size(preset, "suite", other)


def test_msvd_counts_captions_not_videos():
    facts = suite_of(670, 670)  # one caption each, as if they were paragraphs
    with pytest.raises(UserError, match=r"670 texts instead of 27763 .*each caption"):
        protocols.check(protocols.find("msvd"), "test", facts)


def test_missing_and_unexpected_ids_are_listed(tmp_path):
    path = tmp_path / "ids.txt"
    path.write_text("".join(f"v{i}\n" for i in range(1, 11)))
    expected = protocols.read_ids(str(path))
    facts = suite_of(4, 4)
    with pytest.raises(UserError) as fault:
        protocols.check(protocols.OWN, "mine", facts, expected=expected)
    assert "7 ids missing: v10, v4, v5, v6, v7, ..." in str(fault.value)
    assert "1 ids not expected: v0" in str(fault.value)
    same = [f"v{i}" for i in range(4)]
    protocols.check(protocols.OWN, "mine", facts, expected=same)


def test_faults_of_flags_and_id_files(tmp_path):
    with pytest.raises(UserError, match="did you mean 'msrvtt-1k-a'"):
        protocols.find("msrvtt-1ka")
    with pytest.raises(UserError, match="No such file"):
        protocols.read_ids(str(tmp_path / "none"))
    path = tmp_path / "ids"
    path.write_text("\n")
    with pytest.raises(UserError, match="no ids"):
        protocols.read_ids(str(path))
    path.write_text("a\nb\na\n")
    with pytest.raises(UserError, match="'a' is there more than once"):
        protocols.read_ids(str(path))


def test_several_videos_a_caption():
    texts, samples = protocols.merge_equal(["run", "jump", "run"], [0, 1, 2])
    assert texts == ["run", "jump"] and samples == [[0, 2], [1]]


def test_a_protocol_says_when_its_frames_or_length_are_not_used():
    preset = protocols.find("instvl-1k-video")
    assert "not the preset's 16 frames" in preset.line(4, 32)
    assert "not the preset's" not in preset.line(16, 32)
    paragraphs = protocols.find("didemo")
    assert "not the preset's 64 tokens of text" in paragraphs.line(16, 32)
    assert "not the preset's" not in paragraphs.line(16, 64)
