"""The short way of decoding a JPEG against Pillow's own, on sound, unusual and damaged files."""

import io

import numpy as np
import pytest
from PIL import Image

from instap_jax.data import media


def reference(data: bytes) -> np.ndarray | None:
    try:
        return np.array(Image.open(io.BytesIO(data), formats=("JPEG",)).convert("RGB"))
    except Exception:  # Pillow raises nearly every type on damaged bytes
        return None


def decoded(data: bytes) -> np.ndarray | None:
    try:
        return media.decode_jpeg(data)
    except media.MediaError:
        return None


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
@pytest.mark.parametrize("size", [(64, 48), (33, 47), (1, 1), (8, 200)])
def test_equals_pillow(mode, options, size):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80, comment=b"text", **options)
    data = buffer.getvalue()
    np.testing.assert_array_equal(media.decode_jpeg(data), reference(data), strict=True)
    for _ in range(40):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 3):
            damaged[place] = rng.integers(256)
        cut = bytes(damaged[: rng.integers(len(data))]) if rng.random() < 0.5 else bytes(damaged)
        one, other = decoded(cut), reference(cut)
        if other is not None and max(other.shape) > media.MAX_SIDE:
            assert one is None
        else:
            np.testing.assert_array_equal(one, other)


def test_usual_files_go_the_short_way(monkeypatch):
    data = media.encode_jpeg(np.zeros((20, 30, 3), np.uint8))
    monkeypatch.setattr(media, "_open_still", None)
    assert media.decode_jpeg(data).shape == (20, 30, 3)


def test_a_picture_beyond_the_limits_is_refused_before_it_is_allocated():
    data = bytearray(media.encode_jpeg(np.zeros((20, 30, 3), np.uint8)))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    with pytest.raises(media.MediaError, match="exceeds limit"):
        media.decode_jpeg(bytes(data))
