"""Packing: records, shards, restart, rejects."""

import pickle

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from instap_jax.data import records
from instap_jax.types import Kind, Record

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
EXTRA = st.dictionaries(st.text(), JSON, max_size=2)
TEXTS = st.lists(st.text(), max_size=3).map(tuple)


@st.composite
def any_record(draw) -> Record:
    frames, instances = draw(st.integers(0, 4)), draw(st.integers(0, 3))

    def per_instance(strategy):
        return draw(st.lists(strategy, min_size=instances, max_size=instances).map(tuple))

    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return Record(
        id=draw(st.text()),
        media=draw(st.text()),
        kind=draw(st.sampled_from(Kind)),
        source=draw(st.text()),
        captions=draw(TEXTS),
        encoding=draw(st.sampled_from(["jpeg", "mp4"])),
        media_bytes=draw(st.lists(st.binary(), max_size=3)),
        frame_index=rng.integers(0, 2**31, frames).astype(np.int32),
        fps=draw(st.floats(0, 240)),
        size=(draw(st.integers(1, 4000)), draw(st.integers(1, 4000))),
        instance_ids=per_instance(st.text()),
        categories=per_instance(st.text()),
        instance_captions=per_instance(TEXTS),
        boxes=rng.random((instances, frames, 4)).astype(np.float32),
        present=rng.random((instances, frames)) < 0.5,
        extra=draw(EXTRA),
        instance_extra=per_instance(EXTRA),
    )


def assert_same(one: Record, other: Record) -> None:
    for name in Record.__slots__:
        a, b = getattr(one, name), getattr(other, name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype and a.shape == b.shape, name
            np.testing.assert_array_equal(a, b, err_msg=name)
        else:
            assert (a, type(a)) == (b, type(b)), name


@settings(max_examples=60, deadline=None)
@given(any_record())
def test_record_round_trip_is_exact(record):
    example = records.FEATURES.deserialize_example_np(records.serialize(record))
    back = records.from_example(example)
    assert_same(record, back)
    assert_same(record, pickle.loads(pickle.dumps(back)))
