"""Decoding: the right frames, and every kind of damage as one kind of error."""

import re
import struct
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from media_files import brightness, make_image, make_video, truncate
from PIL import Image

from instap_jax.data import media
from instap_jax.data.media import MediaError, MediaInfo
from instap_jax.errors import UserError
from instap_jax.types import Kind


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_video(tmp_path_factory.mktemp("clip") / "ünï 猫.mp4", 20, (34, 46), 8)


def write_greys(path, codec, frames, *, times=None, clock=25, options=None, encoder=None, **kinds):
    """Writes frames of rising brightness at 25 frames/s, or at `times` of a clock of so many Hz."""
    with av.open(str(path), "w", options=options or {}, **kinds) as container:
        stream = container.add_stream(codec, rate=25, options=encoder or {})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, clock)
        for index in range(frames):
            grey = np.full((32, 48, 3), brightness(index), np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.time_base = Fraction(1, clock)
            frame.pts = index if times is None else int(times[index])
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def levels(frames):
    return [float(frame.mean()) for frame in frames]


def test_probe_and_verify_agree(clip, tmp_path):
    assert media.probe(clip, Kind.VIDEO) == MediaInfo(20, 8.0, 34, 46)
    assert media.verify(clip, Kind.VIDEO) == MediaInfo(20, 8.0, 34, 46)
    image = make_image(tmp_path / "a.jpg", (33, 47))
    assert media.probe(image, Kind.IMAGE) == MediaInfo(1, 0.0, 33, 47)
    assert media.verify(image, Kind.IMAGE) == MediaInfo(1, 0.0, 33, 47)


@pytest.mark.parametrize("indices", [[0], [19], [0, 0, 7, 7, 7, 19], list(range(20)), []])
def test_frames_are_the_ones_asked_for(clip, indices):
    for source in (clip, clip.read_bytes()):
        frames = media.read_frames(source, indices)
        assert [frame.shape for frame in frames] == [(34, 46, 3)] * len(indices)
        assert all(frame.dtype == np.uint8 for frame in frames)
        wanted = [brightness(index) for index in indices]
        np.testing.assert_allclose(levels(frames), wanted, atol=3)


def test_iterate_is_read_of_all(clip):
    for one, other in zip(
        media.iterate_frames(clip, 20), media.read_frames(clip, range(20), 20), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("indices", [[3, 2], [-1, 4]])
def test_indices_that_no_sequential_pass_can_serve(clip, indices):
    with pytest.raises(ValueError, match="not decrease"):
        media.read_frames(clip, indices)


def test_short_side_scales_down_only_and_keeps_aspect(clip, tmp_path):
    assert media.read_frames(clip, [0], 17)[0].shape == (17, 23, 3)
    assert media.read_frames(clip, [0], 400)[0].shape == (34, 46, 3)
    image = make_image(tmp_path / "a.jpg", (330, 470))
    small = media.read_image(image, 33)
    assert small.shape == (33, 47, 3)
    assert media.read_image(image, 1000).shape == (330, 470, 3)
    # The gradient is the same picture at any size.
    full = media.read_image(image).reshape(33, 10, 47, 10, 3).mean((1, 3))
    np.testing.assert_allclose(small, full, atol=8)


def test_one_frame_video_and_odd_sizes(tmp_path):
    one = make_video(tmp_path / "one.mp4", 1, (34, 46))
    assert media.verify(one, Kind.VIDEO).frames == 1
    assert len(media.read_frames(one, [0, 0])) == 2
    odd = make_image(tmp_path / "odd.jpg", (33, 47))
    assert media.read_image(odd).shape == (33, 47, 3)
    assert media.read_image(odd, 16).shape == (16, 23, 3)
    thin = make_image(tmp_path / "thin.jpg", (1, 200))
    assert media.read_image(thin, 224).shape == (1, 200, 3)


def cut_without_decoding(source, target, start, stop):
    """Cuts as `ffmpeg -ss -c copy` does: an edit list hides what lies before the start."""
    with av.open(str(source)) as inputs, av.open(str(target), "w") as outputs:
        stream = inputs.streams.video[0]
        copy = outputs.add_stream_from_template(stream)
        tick = round(1 / stream.average_rate / stream.time_base)
        for packet in inputs.demux(stream):
            if packet.size and packet.pts < stop * tick:
                packet.stream = copy
                packet.pts -= start * tick
                packet.dts -= start * tick
                outputs.mux(packet)
    return target


def test_frames_that_an_edit_list_hides_do_not_count(clip, tmp_path):
    cut = cut_without_decoding(clip, tmp_path / "cut.mp4", 5, 99)
    with av.open(str(cut)) as container:
        assert container.streams.video[0].frames == 20  # what the header alone would say
    assert media.verify(cut, Kind.VIDEO).frames == 15
    expected = [brightness(index) for index in (5, 9, 19)]
    np.testing.assert_allclose(levels(media.read_frames(cut, [0, 4, 14])), expected, atol=3)
    with pytest.raises(MediaError, match="frame 15 is past the end: the clip has 15"):
        media.read_frames(cut, [15, 20])


def test_rotation_and_exif_turn_the_picture_upright(tmp_path):
    target = str(tmp_path / "turned.mp4")
    array = np.zeros((32, 64, 3), np.uint8)
    array[:, 32:] = 255  # white on the right; a quarter turn counter-clockwise puts it on top
    with av.open(target, "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.set_display_rotation(90)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    path = tmp_path / "turned.mp4"
    assert media.probe(path, Kind.VIDEO) == MediaInfo(1, 8.0, 64, 32)
    frame = media.read_frames(path, [0], 16)[0]
    assert frame.shape == (32, 16, 3)
    assert frame[:12].mean() > 240
    assert frame[20:].mean() < 15
    image = make_image(tmp_path / "turned.jpg", (33, 47), exif_orientation=6)
    assert media.probe(image, Kind.IMAGE) == MediaInfo(1, 0.0, 47, 33)
    assert media.read_image(image).shape == (47, 33, 3)
    assert media.read_image(image, 22).shape == (31, 22, 3)


@pytest.mark.parametrize(
    ("matrix", "corners"),  # a, b, c, d of the track header; red, green / blue, white as stored
    [
        ((1, 0, 0, 1), "RG/BW"),
        ((0, 1, -1, 0), "BR/WG"),
        ((-1, 0, 0, -1), "WB/GR"),
        ((0, -1, 1, 0), "GW/RB"),
        ((-1, 0, 0, 1), "GR/WB"),
        ((1, 0, 0, -1), "BW/RG"),
        ((0, 1, 1, 0), "RB/GW"),
    ],
)
def test_a_clip_is_turned_and_mirrored_as_it_is_displayed(tmp_path, matrix, corners):
    array = np.zeros((32, 64, 3), np.uint8)
    array[:16, :32], array[:16, 32:] = (255, 0, 0), (0, 255, 0)
    array[16:, :32], array[16:, 32:] = (0, 0, 255), 255
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv444p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 20 + 16  # version 0: the matrix follows
    a, b, c, d = (x << 16 for x in matrix)
    struct.pack_into(">9i", data, at, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    (frame,) = media.read_frames(path, [0])
    info = media.probe(path, Kind.VIDEO)
    assert frame.shape[:2] == (info.height, info.width)
    names = {(1, 0, 0): "R", (0, 1, 0): "G", (0, 0, 1): "B", (1, 1, 1): "W"}
    height, width = frame.shape[:2]
    found = [
        names[tuple(int(v > 127) for v in frame[y * height // 4, x * width // 4])]
        for y in (1, 3)
        for x in (1, 3)
    ]
    assert "".join(found[:2]) + "/" + "".join(found[2:]) == corners


@pytest.mark.parametrize("suffix", ["webm", "mkv"])
def test_the_rate_of_a_recording_without_one_is_that_of_its_frames(tmp_path, suffix):
    """As browsers record: times in milliseconds, not quite even, and no duration of a frame."""
    path = tmp_path / f"a.{suffix}"
    even = np.arange(60) * 100 / 3
    times = np.round(even + np.random.default_rng(0).uniform(-8, 8, 60) - even[0]).astype(int)
    write_greys(path, "libvpx", 60, times=times - times[0], clock=1000)
    data = bytearray(path.read_bytes())
    at = data.index(b"\x23\xe3\x83")  # DefaultDuration: made a Void element of the same size
    length = 4 + (data[at + 3] & 0x7F)
    data[at : at + length] = bytes([0xEC, 0x80 | (length - 2), *[0] * (length - 2)])
    path.write_bytes(data)
    info = media.probe(path, Kind.VIDEO)
    assert info.frames == 60
    assert info.fps == pytest.approx(30, rel=0.02)


def test_a_clock_that_jumps_does_not_change_the_rate(tmp_path):
    """As files put together have it."""
    path = tmp_path / "a.mkv"
    times = np.arange(20) + 25_000 * (np.arange(20) >= 10)
    write_greys(path, "libx264", 20, times=times, encoder={"bf": "0"})
    assert media.probe(path, Kind.VIDEO).fps == 25


@pytest.mark.parametrize("orientation", [1, 6])
def test_what_is_transparent_is_white(tmp_path, orientation):
    logo = np.zeros((8, 12, 4), np.uint8)  # black throughout, to be seen at the top left only
    logo[:4, :6, 3] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    Image.fromarray(logo).save(path, exif=exif)
    array = media.read_image(path)
    expected = np.full((8, 12, 3), 255, np.uint8)
    expected[:4, :6] = 0
    np.testing.assert_array_equal(array, np.rot90(expected, 0 if orientation == 1 else -1))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_every_colour_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new("RGB", (9, 7), (255, 255, 255)).convert(mode).save(path)
    array = media.read_image(path)
    assert array.shape == (7, 9, 3)
    assert array.min() >= 250


@pytest.mark.parametrize("name, dtype", [("a.png", "<u2"), ("a.tiff", "<u2"), ("a.tiff", ">u2")])
def test_grey_of_16_bits_keeps_its_brightness(tmp_path, name, dtype):
    grey = np.linspace(0, 65535, 24 * 60).reshape(24, 60).astype(dtype)
    path = tmp_path / name
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    Image.fromarray(grey).save(path, exif=exif)
    array = media.read_image(path)
    expected = np.rot90(np.round(grey / 257), -1)
    np.testing.assert_array_equal(array, np.repeat(expected[..., None], 3, -1))
    assert media.probe(path, Kind.IMAGE) == MediaInfo(1, 0.0, 60, 24)
    assert media.read_image(path, 12).shape == (30, 12, 3)


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_pixels_without_a_known_range_are_refused(tmp_path, dtype):
    path = tmp_path / "a.tiff"
    Image.fromarray(np.ones((7, 9), dtype)).save(path)
    assert "32 bits" in reason(media.read_image, path)
    assert "32 bits" in reason(media.probe, path, Kind.IMAGE)


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
@pytest.mark.parametrize("orientation", [0, *range(1, 10), 255, 65535])
def test_the_size_is_that_of_the_decoded_picture_whatever_exif_says(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    grey = np.arange(7 * 9, dtype=np.uint8).reshape(7, 9)
    Image.fromarray(grey).save(tmp_path / name, exif=exif)
    upright = [grey, grey[:, ::-1], grey[::-1, ::-1], grey[::-1]]
    upright += [grey.T, np.rot90(grey, -1), grey[::-1, ::-1].T, np.rot90(grey)]
    expected = upright[orientation - 1] if 1 <= orientation <= 8 else grey
    np.testing.assert_array_equal(media.read_image(tmp_path / name)[..., 0], expected)
    info = media.probe(tmp_path / name, Kind.IMAGE)
    assert (info.height, info.width) == expected.shape


def test_jpeg_round_trip():
    frame = np.full((33, 47, 3), (200, 40, 90), np.uint8)
    data = media.encode_jpeg(frame)
    assert np.abs(media.decode_jpeg(data).astype(int) - frame).max() <= 4
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    assert len(media.encode_jpeg(noise, quality=20)) < len(media.encode_jpeg(noise, quality=95))


def reason(function, *arguments):
    with pytest.raises(MediaError) as caught:
        function(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 200
    return text


def test_truncated_mp4(tmp_path):
    path = truncate(make_video(tmp_path / "a.mp4", 24), 0.9)
    with av.open(str(path)) as container:
        header = container.streams.video[0].frames
    text = reason(media.probe, path, Kind.VIDEO)
    assert header == 24
    assert text.startswith("truncated: header says 24 frames, ")
    decoded = int(text.split()[5])
    assert 0 < decoded < 24
    for source in (path, path.read_bytes()):
        assert reason(media.read_frames, source, [0, 23]) == text
    assert len(media.read_frames(path, range(decoded))) == decoded  # what is there can be read
    assert reason(media.verify, path, Kind.VIDEO) == text


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mkv", "libx264", {}),
        ("a.webm", "libvpx", {}),
        ("a.avi", "mpeg4", {}),
        ("a.mp4", "libx264", {"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
    ],
)
def test_other_containers_cut_off(tmp_path, name, codec, options):
    path = tmp_path / name
    write_greys(path, codec, 40, options=options, encoder={"g": "8"})
    assert media.verify(path, Kind.VIDEO).frames == 40
    data = path.read_bytes()
    path.write_bytes(data + b"junk behind the end")
    assert media.verify(path, Kind.VIDEO).frames == 40
    for size in (len(data) // 2, len(data) * 3 // 4, len(data) - 9):
        path.write_bytes(data[:size])
        assert re.match(rf"truncated: {size} of \d+ bytes", reason(media.probe, path, Kind.VIDEO))


@pytest.mark.parametrize("more", [8, None])
def test_an_avi_whose_size_is_not_quite_right(tmp_path, more):
    """Encoders count the head of the file too, or never come back to write the size."""
    path = tmp_path / "a.avi"
    write_greys(path, "mpeg4", 10)
    data = bytearray(path.read_bytes())
    (size,) = struct.unpack_from("<I", data, 4)
    struct.pack_into("<I", data, 4, 0xFFFFFFFF if more is None else size + more)
    path.write_bytes(data)
    assert media.verify(path, Kind.VIDEO).frames == 10


def test_a_recording_that_was_never_finished_is_taken_as_it_is(tmp_path):
    """Written live, a Matroska segment has no size: nothing says that something is missing."""
    path = tmp_path / "a.mkv"
    write_greys(path, "libx264", 10, options={"live": "1"}, format="matroska")
    assert media.verify(path, Kind.VIDEO).frames == 10


def test_mp4_cut_between_two_frames_or_in_its_header(tmp_path):
    path = make_video(tmp_path / "a.mp4", 24)
    data = path.read_bytes()
    with av.open(str(path)) as container:
        ends = [packet.pos + packet.size for packet in container.demux(video=0) if packet.size]
    path.write_bytes(data[: ends[9]])
    expected = "truncated: header says 24 frames, 10 decode"
    assert reason(media.probe, path, Kind.VIDEO) == expected
    assert reason(media.read_frames, path, [20]) == expected
    path.write_bytes(data[:300])
    assert reason(media.probe, path, Kind.VIDEO) == "no decodable video stream"
    path.write_bytes(data[:30])
    assert reason(media.probe, path, Kind.VIDEO) == "not a video (or its header is damaged)"


def test_index_past_the_end(clip):
    text = reason(media.read_frames, clip, [3, 20])
    assert text == "frame 20 is past the end: the clip has 20 frames"


def test_truncated_jpeg(tmp_path):
    path = truncate(make_image(tmp_path / "a.jpg"))
    for read, source in (
        (media.read_image, path),
        (media.read_image, path.read_bytes()),
        (media.decode_jpeg, path.read_bytes()),
    ):
        assert reason(read, source).startswith("truncated: image file is truncated")


def test_missing_empty_and_foreign_files(clip, tmp_path):
    image, empty = make_image(tmp_path / "a.jpg"), tmp_path / "empty"
    empty.touch()
    for kind in Kind:
        assert reason(media.probe, tmp_path / "none", kind) == "no such file"
        assert reason(media.probe, tmp_path, kind) == "not a file"
    not_video, not_image = (f"not {a} (or its header is damaged)" for a in ("a video", "an image"))
    for file in (image, empty):
        assert reason(media.probe, file, Kind.VIDEO) == not_video
        assert reason(media.read_frames, file, [0]) == not_video
    for file in (clip, empty):
        assert reason(media.read_image, file) == not_image
    assert reason(media.decode_jpeg, b"") == not_image


def test_play_lists_and_addresses_are_not_followed(clip, tmp_path):
    play_list = tmp_path / "list.mp4"
    play_list.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{clip}\n#EXT-X-ENDLIST\n")
    assert "not a video" in reason(media.probe, play_list, Kind.VIDEO)
    play_list.write_text(f"ffconcat version 1.0\nfile '{clip}'\n")
    assert "not a video" in reason(media.probe, play_list, Kind.VIDEO)


def test_sound_without_picture(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert reason(media.probe, path, Kind.VIDEO) == "no decodable video stream"


def test_pictures_beyond_the_limits_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    bomb = tmp_path / "bomb.png"
    Image.new("1", (16_500, 100)).save(bomb)
    for function, arguments in ((media.probe, (bomb, Kind.IMAGE)), (media.read_image, (bomb,))):
        assert "frame size 16500x100 is beyond" in reason(function, *arguments)
    Image.new("1", (14_000, 14_000)).save(bomb)  # Pillow itself objects to this one
    assert "exceeds limit" in reason(media.read_image, bomb)
    monkeypatch.setattr(media, "MAX_FRAMES", 5)
    clip = make_video(tmp_path / "long.mp4", 6)
    assert "6 frames, more than 5" in reason(media.probe, clip, Kind.VIDEO)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_bytes_never_raise_anything_else(clip_and_image, data):
    video, image = clip_and_image
    original = data.draw(st.sampled_from([video, image]))
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        damaged[place] = data.draw(st.integers(0, 255))
    damaged = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    for function in (
        lambda: media.read_frames(damaged, [0, 5]),
        lambda: media.read_image(damaged, 16),
        lambda: media.decode_jpeg(damaged),
    ):
        try:
            function()
        except MediaError as error:
            assert str(error)


@pytest.fixture(scope="module")
def clip_and_image(clip, tmp_path_factory):
    image = make_image(tmp_path_factory.mktemp("image") / "a.jpg")
    return clip.read_bytes(), image.read_bytes()


def test_confined(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "a").mkdir(parents=True)
    outside.mkdir()
    (root / "inner").symlink_to(root / "a")
    (root / "link").symlink_to(outside)
    (root / "loop").symlink_to(root / "loop")
    assert media.confined(root, "a/b.mp4") == (root / "a" / "b.mp4").resolve()
    assert media.confined(root, "inner/../a/ü.mp4") == (root / "a" / "ü.mp4").resolve()
    for bad in ("/etc/passwd", "../outside/x", "a/../../outside/x", "link/x", str(root / "a")):
        with pytest.raises(UserError, match="leads out of the media root"):
            media.confined(root, bad)
    for bad in ("a\0b", "loop/x"):
        with pytest.raises(UserError, match="not usable"):
            media.confined(root, bad)


def test_data_modules_do_not_import_jax():
    code = (
        "import sys, instap_jax.data.preview, instap_jax.data.validation, "
        "instap_jax.data.converters; sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
