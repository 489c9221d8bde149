"""Crops against a float64 definition, Pillow and jax.image; the distribution of random views."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.lax import Precision
from PIL import Image
from products import precisions

from instap_jax import config as configuration
from instap_jax.models import preprocess

HEIGHT, WIDTH, SIZE = 24, 40, 8

crop = jax.jit(preprocess.crop_and_resize, static_argnames="size")


def random_frames(*lead, seed=0):
    shape = (*lead, HEIGHT, WIDTH, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def axis_reference(low, high, pixels, size):
    """Weights [size, pixels] in float64, straight from the definition of the filter."""
    weights = np.zeros((size, pixels))
    scale = (high - low) / size
    radius = max(scale, 1.0)
    for out in range(size):
        centre = low + (out + 0.5) * scale
        for i in range(pixels):
            weights[out, i] = max(0.0, 1.0 - abs(i + 0.5 - centre) / radius)
        weights[out] /= weights[out].sum()
    return weights


def crop_reference(frame, box, extent, size):
    rows, columns = (max(1, round(e * n)) for e, n in zip(extent, frame.shape))
    x0, y0, x1, y1 = np.clip(np.asarray(box, np.float64), 0, 1)
    down = axis_reference(y0 * rows, y1 * rows, rows, size)
    across = axis_reference(x0 * columns, x1 * columns, columns, size)
    return np.einsum("yh,hwc,xw->yxc", down, frame[:rows, :columns].astype(np.float64), across)


BOXES = np.array(
    [
        [0.0, 0.0, 1.0, 1.0],
        [0.13, 0.21, 0.87, 0.95],  # downsampling
        [0.4, 0.3, 0.5, 0.45],  # upsampling
        [-0.3, 0.6, 0.4, 1.7],  # reaches out of the picture
    ],
    np.float32,
)


@pytest.mark.parametrize("extent", [(1.0, 1.0), (20 / 24, 33 / 40)])
def test_crops_match_the_definition(extent):
    frames = random_frames(2, len(BOXES))
    boxes = np.stack([BOXES, BOXES[::-1]])
    extents = np.tile(np.float32(extent), (2, 1))
    out = crop(frames, boxes, extents, SIZE)
    assert out.dtype == jnp.float32
    for b in range(2):
        for t in range(len(BOXES)):
            expected = crop_reference(frames[b, t], boxes[b, t], extent, SIZE)
            np.testing.assert_allclose(out[b, t], expected, atol=2e-3, rtol=0)


def test_crops_match_pillow():
    frames = random_frames(1, len(BOXES) - 1)
    out = crop(frames, BOXES[None, :-1], np.ones((1, 2), np.float32), SIZE)
    for t, box in enumerate(BOXES[:-1] * [WIDTH, HEIGHT, WIDTH, HEIGHT]):
        for c in range(3):
            channel = Image.fromarray(frames[0, t, :, :, c].astype(np.float32))
            expected = channel.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=tuple(box))
            np.testing.assert_allclose(out[0, t, :, :, c], expected, atol=2e-3, rtol=0)


def test_crops_match_jax_image():
    frame, box = random_frames(1, 1), BOXES[1]
    x0, y0, x1, y1 = box * [WIDTH, HEIGHT, WIDTH, HEIGHT]
    scale = jnp.array([SIZE / (y1 - y0), SIZE / (x1 - x0)])
    expected = jax.image.scale_and_translate(
        frame[0, 0].astype(np.float32),
        (SIZE, SIZE, 3),
        (0, 1),
        scale,
        -jnp.array([y0, x0]) * scale,
        method="linear",
    )
    out = crop(frame, box[None, None], np.ones((1, 2), np.float32), SIZE)
    np.testing.assert_allclose(out[0, 0], expected, atol=2e-3, rtol=0)


def test_crops_are_products_in_full_precision():
    def cut(frames):
        return preprocess.crop_and_resize(frames, BOXES[None], np.ones((1, 2), np.float32), SIZE)

    assert precisions(cut, random_frames(1, len(BOXES))) == {Precision.HIGHEST}


unit = st.floats(-0.5, 1.5, width=32)


@settings(max_examples=40, deadline=None)
@given(st.tuples(unit, unit, unit, unit), st.integers(1, HEIGHT), st.integers(1, WIDTH))
def test_no_crop_reads_outside_the_picture(corners, rows, columns):
    x, y = sorted(corners[:2]), sorted(corners[2:])
    box = np.array([[[x[0], y[0], x[1], y[1]]]], np.float32)
    frame = np.full((1, 1, HEIGHT, WIDTH, 3), 255, np.uint8)
    frame[:, :, :rows, :columns] = 100
    extent = np.array([[rows / HEIGHT, columns / WIDTH]], np.float32)
    np.testing.assert_allclose(crop(frame, box, extent, SIZE), 100, atol=1e-3)


def test_a_sample_without_a_picture_gives_zeros():
    frame, box = np.zeros((1, 1, HEIGHT, WIDTH, 3), np.uint8), np.zeros((1, 1, 4), np.float32)
    np.testing.assert_array_equal(crop(frame, box, np.zeros((1, 2), np.float32), SIZE), 0)


def test_flip_mirrors_only_the_chosen_clips_and_lead_axes_are_free():
    frames = random_frames(2, 3, 2)
    boxes = np.broadcast_to(BOXES[1], (2, 3, 2, 4))
    extent = np.random.default_rng(1).uniform(0.5, 1, (2, 3, 2)).astype(np.float32)
    flip = np.array([[True, False, True], [False, False, True]])
    plain = np.asarray(crop(frames, boxes, extent, SIZE))
    flipped = crop(frames, boxes, extent, SIZE, flip=flip)
    expected = np.where(flip[..., None, None, None, None], plain[..., ::-1, :], plain)
    np.testing.assert_allclose(flipped, expected, atol=1e-3)
    flat = crop(
        frames.reshape(6, 2, HEIGHT, WIDTH, 3), boxes.reshape(6, 2, 4), extent.reshape(6, 2), SIZE
    )
    np.testing.assert_allclose(plain.reshape(flat.shape), flat, atol=1e-3)


def data_config(**changes):
    c = configuration.default().data
    c.update(canvas=(100, 200), **changes)
    return c.copy_and_resolve_references()


def draw(count=4000, extent=(1.0, 1.0), keep=False, seed=0, **changes):
    extents = np.tile(np.float32(extent), (count, 1))
    config = data_config(**changes)
    run = jax.jit(lambda key, e, k: preprocess.random_views(key, e, k, config))
    boxes, flip = run(jax.random.key(seed), extents, np.full(count, keep))
    return np.asarray(boxes), np.asarray(flip)


def test_random_views_follow_area_and_aspect():
    boxes, flip = draw(extent=(1.0, 0.5))  # a square picture
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, aspect = width * height, width / height
    assert boxes.min() >= 0
    assert boxes.max() <= 1 + 1e-6
    assert 0.5 - 1e-4 <= area.min() < 0.51
    assert 0.95 < area.max() <= 1 + 1e-6
    assert 0.75 - 1e-4 <= aspect.min() < 0.77
    assert 1.31 < aspect.max() <= 1.3334
    assert abs(np.log(aspect).mean()) < 0.01
    # Places are uniform over what the size leaves free.
    free = width < 0.99
    place = boxes[free, 0] / (1 - width[free])
    assert abs(place.mean() - 0.5) < 0.02
    assert abs(place.std() - 12**-0.5) < 0.02
    assert abs(flip.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(flip, area)[0, 1]) < 0.05


def test_random_views_measure_aspect_in_pixels():
    boxes, _ = draw(extent=(1.0, 0.75))  # 100 x 150 pixels
    aspect = (boxes[:, 2] - boxes[:, 0]) * 150 / ((boxes[:, 3] - boxes[:, 1]) * 100)
    assert aspect.min() >= 0.75 - 1e-4
    assert aspect.max() <= 1.3334


@pytest.mark.parametrize(
    "extent, expected",
    [((0.4, 1.0), [0.3667, 0.0, 0.6333, 1.0]), ((1.0, 0.2), [0.0, 0.2333, 1.0, 0.7667])],
)
def test_a_picture_that_no_draw_fits_is_cut_at_its_centre(extent, expected):
    # 40 x 200 pixels: the widest allowed is 53 x 40. 100 x 40: the tallest 40 x 53.
    boxes, _ = draw(count=20, extent=extent, view_area=(0.9, 1.0))
    np.testing.assert_allclose(boxes, np.tile(expected, (20, 1)), atol=1e-3)


def test_flip_spares_captions_that_name_a_side_and_can_be_turned_off():
    assert not draw(count=100, keep=True)[1].any()
    assert not draw(count=100, flip=False)[1].any()
    assert draw(count=100)[1].any()


def test_views_are_deterministic_in_the_key():
    np.testing.assert_array_equal(draw(count=10)[0], draw(count=10)[0])
    assert np.abs(draw(count=10)[0] - draw(count=10, seed=1)[0]).max() > 0.01


def test_the_evaluation_view_squashes_the_whole_picture():
    frame = random_frames(1, 1)
    extent = np.array([[20 / 24, 33 / 40]], np.float32)
    box = preprocess.center_view(extent)
    assert box.shape == (1, 4)
    out = crop(frame, np.asarray(box)[:, None], extent, SIZE)
    picture = Image.fromarray(frame[0, 0, :20, :33])
    expected = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    assert np.abs(out[0, 0] - expected).max() <= 1.0  # Pillow rounds to uint8, twice


def test_normalise():
    x = np.array([[0.0, 127.5, 255.0]], np.float32)
    expected = [[-0.485 / 0.229, (0.5 - 0.456) / 0.224, (1 - 0.406) / 0.225]]
    np.testing.assert_allclose(preprocess.normalise(x, preprocess.IMAGENET), expected, rtol=1e-5)
    assert preprocess.normalise(x.astype(np.uint8), preprocess.CLIP).dtype == jnp.float32
