"""What the probe says of real files: size, duration, codec, oddities, and why a file cannot be shown."""

import os

import numpy as np
import pytest
from PIL import Image

from pipelines import probe as probing
from pipelines.failure import DecodeFailure
from pipelines.probe import decode_frames, file_identity, open_video, probe
from pipelines.schema import Status
from tests.media import indexed_frames, write_audio, write_video


def failure(path) -> DecodeFailure:
    with pytest.raises(DecodeFailure) as caught:
        probe(str(path))
    assert str(caught.value) and "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("name, codec", [("a.mkv", "ffv1"), ("a.mp4", "h264"), ("a.mov", "h264")])
@pytest.mark.parametrize("width_px, height_px", [(64, 64), (67, 45), (32, 96)])
def test_size_duration_rate_and_codec(tmp_path, name, codec, width_px, height_px):
    info = probe(str(write_video(tmp_path / name, indexed_frames(12, width_px, height_px), fps=8)))
    assert (info.width_px, info.height_px, info.codec, info.note) == (width_px, height_px, codec, "")
    assert info.duration_s == pytest.approx(1.5, abs=2e-3) and info.fps == pytest.approx(8)


@pytest.mark.parametrize("rotation_deg, turned", [(0, False), (90, True), (180, False), (270, True), (-90, True)])
def test_the_size_is_as_displayed(tmp_path, rotation_deg, turned):
    info = probe(str(write_video(tmp_path / "a.mp4", indexed_frames(3, 80, 64), rotation_deg=rotation_deg)))
    assert (info.width_px, info.height_px) == ((64, 80) if turned else (80, 64))


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_one_frame_is_a_video(tmp_path, name):
    assert probe(str(write_video(tmp_path / name, indexed_frames(1), fps=10))).duration_s == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_a_variable_rate_ends_after_the_last_frame_began(tmp_path, name):
    info = probe(str(write_video(tmp_path / name, indexed_frames(4), times_ms=[0, 40, 700, 1300])))
    assert 1.3 < info.duration_s <= 1.3 + 0.6 and info.note == ""


@pytest.mark.parametrize(
    "name",
    [
        "a.mkv",
        "a.mp4",
    ],
)
def test_a_late_start_is_not_part_of_the_duration(tmp_path, name):
    times_ms = [5000 + 100 * index for index in range(20)]
    info = probe(str(write_video(tmp_path / name, indexed_frames(20), times_ms=times_ms)))
    assert info.duration_s == pytest.approx(2.0) and info.note == ""


@pytest.mark.parametrize(
    "name, options", [("a.mkv", {}), ("a.mp4", {"movflags": "faststart"})], ids=["mkv", "faststart mp4"]
)
def test_a_cut_file_is_partial_and_ends_where_its_bytes_end(tmp_path, name, options):
    whole = write_video(tmp_path / name, indexed_frames(40), container_options=options).read_bytes()
    cut = tmp_path / f"cut {name}"
    cut.write_bytes(whole[: len(whole) // 2])
    info = probe(str(cut))
    assert info.note.startswith("partial") and "4.00 s" in info.note
    assert 1.5 < info.duration_s < 2.5


def test_a_cut_transport_stream_is_partial(tmp_path):
    path = write_video(tmp_path / "a.ts", indexed_frames(30), codec="mpeg2video", fps=25)
    assert probe(str(path)).note == ""
    path.write_bytes(path.read_bytes()[:-100])
    assert probe(str(path)).note.startswith("partial")


def test_a_whole_m2ts_is_not_partial(tmp_path):
    path = write_video(tmp_path / "a.m2ts", indexed_frames(30), codec="mpeg2video", fps=25)
    assert path.stat().st_size % 192 == 0
    assert probe(str(path)).note == ""


def test_a_stream_that_appears_late_takes_nothing_with_it(tmp_path):
    path = write_video(tmp_path / "a.flv", indexed_frames(300), codec="libx264")
    sound = bytes([0x2E]) + bytes(200)
    size, time_ms = len(sound).to_bytes(3, "big"), (29_900).to_bytes(3, "big")
    tag = bytes([8]) + size + time_ms + bytes(4) + sound  # FLV's tag of a sound, and what it should end with
    path.write_bytes(path.read_bytes() + tag + len(tag).to_bytes(4, "big"))
    assert probe(str(path)).duration_s == pytest.approx(30)
    container, stream = open_video(str(path))
    with container:
        assert len(container.streams) == 1
        assert len(list(decode_frames(container, stream, damages := []))) == 300 and not damages


def test_a_raw_stream_has_frames(tmp_path):
    path = write_video(tmp_path / "a.h264", indexed_frames(30), codec="libx264", fps=25)
    assert probe(str(path)).duration_s == pytest.approx(1.2, abs=0.1)


@pytest.mark.parametrize(
    "content",
    [
        b"Not found\n",
        b"<!DOCTYPE html><html><head><title>404</title></head><body>Not found</body></html>",
        np.random.default_rng(0).bytes(20_000),
        b"\0" * 20_000,
    ],
    ids=["text", "html", "random", "zeros"],
)
def test_what_is_no_video_cannot_be_decoded(tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(content)
    assert failure(tmp_path / "a.mp4").status == Status.DECODE_ERROR


def test_an_mp4_without_its_index_cannot_be_decoded(tmp_path):
    path = write_video(tmp_path / "a.mp4", indexed_frames(20))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert failure(path).status == Status.DECODE_ERROR


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_audio_alone_is_unsupported(tmp_path, name):
    found = failure(write_audio(tmp_path / name))
    assert found.status == Status.UNSUPPORTED and "no video stream" in str(found)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_picture_is_unsupported(tmp_path, kind):
    Image.fromarray(indexed_frames(1)[0]).save(tmp_path / "a.mp4", kind)
    found = failure(tmp_path / "a.mp4")
    assert found.status == Status.UNSUPPORTED and "picture" in str(found)


def test_a_limit_on_pixels(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", indexed_frames(2, 80, 64))
    monkeypatch.setattr(probing, "MAX_FRAME_PIXELS", 80 * 64)
    assert probe(str(path)).width_px == 80
    monkeypatch.setattr(probing, "MAX_FRAME_PIXELS", 80 * 64 - 1)
    found = failure(path)
    assert found.status == Status.UNSUPPORTED and "80x64" in str(found)


def test_the_identity_is_size_and_modification_time(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"12345")
    os.utime(path, ns=(1, 1_700_000_000_123_456_789))
    assert file_identity(str(path)) == (5, "1700000000123456789")


@pytest.mark.parametrize("name, status", [("missing.mp4", Status.MISSING), ("zero.mp4", Status.EMPTY)])
def test_no_identity_without_content(tmp_path, name, status):
    (tmp_path / "zero.mp4").touch()
    with pytest.raises(DecodeFailure) as caught:
        file_identity(str(tmp_path / name))
    assert caught.value.status == status and str(caught.value)
