"""torchcodec has its turn after the others, for what another FFmpeg may decode; it is imported for nothing else.

What its pictures are, tests/pipelines/test_decode.py says for all decoders.
"""

import subprocess
import sys

import numpy as np
import pytest

from pipelines import decode, torchcodec_decoder
from pipelines import probe as probing
from pipelines.decode import TORCHCODEC, cpu_decoders, decode_clips
from pipelines.decoded import Clip, DecoderUnfit, Source
from pipelines.failure import DecodeFailure, FFmpegFailure
from pipelines.guarded import Request, decode_guarded, probe_guarded
from pipelines.probe import probe
from pipelines.schema import Status
from pipelines.torchcodec_decoder import probe_by_any
from pipelines.view import View
from tests.media import indexed_frames, read_index, write_video
from tests.optional import needs_torchcodec

VIEW = View(num_frames=10, height_px=64, width_px=64)
SPANS = [(0.0, 1.0), (1.0, 2.0), (7.0, 8.0)]


def source_of(path) -> Source:
    info = probe(str(path))
    return Source(path=str(path), width_px=64, height_px=64, container=info.container, codec=info.codec)


def numbers(outcome) -> list[int]:
    assert isinstance(outcome, Clip), outcome
    return [read_index(frame) for frame in outcome.frames_THWC]


def without_data(path):
    """A file with headers and no data of its frames."""
    content = path.read_bytes()
    start, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    path.write_bytes(content[:start] + bytes(end - start) + content[end:])
    return path


@pytest.fixture
def not_loading(tmp_path, monkeypatch):
    """A torchcodec that is installed and cannot be loaded, as where libraries are missing."""
    package = tmp_path / "site" / TORCHCODEC
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise OSError('libavutil.so.60: no such file\\nand more')")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.delitem(sys.modules, TORCHCODEC, raising=False)
    caches = (torchcodec_decoder.is_found, torchcodec_decoder._loaded)
    for cache in caches:
        cache.cache_clear()
    yield package
    for cache in caches:
        cache.cache_clear()


@needs_torchcodec
def test_it_decodes_what_the_others_cannot(tmp_path):
    path = write_video(tmp_path / "a.avi", indexed_frames(20), codec="mjpeg", pix_fmt="yuvj420p")
    first, second, past = decode_clips(source_of(path), SPANS, VIEW, ["decord", TORCHCODEC])
    assert numbers(first) + numbers(second) == list(range(20))
    assert (first.decoder, first.note) == (TORCHCODEC, "decord: mjpeg in avi is left to PyAV")
    assert isinstance(past, DecodeFailure) and "the video ends at 2.00 s" in str(past)


@needs_torchcodec
@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_a_decoder_that_pyav_lacks_is_planned_and_decoded(tmp_path, monkeypatch, name):
    """The two builds of FFmpeg that meet here decode the same codecs, so PyAV is made to lack one."""
    frames = indexed_frames(20)
    path = write_video(tmp_path / name, frames)
    expected = probe(str(path))

    def lacking(path):
        raise FFmpegFailure(Status.UNSUPPORTED, "a codec that FFmpeg does not know")

    monkeypatch.setattr(probing, "open_video", lacking)
    monkeypatch.setattr(decode, "open_video", lacking)
    info = probe_by_any(str(path))
    assert info.note == "pyav: a codec that FFmpeg does not know" and info.container == expected.container
    assert (info.width_px, info.height_px, info.fps) == (64, 64, pytest.approx(10))
    assert info.duration_s == pytest.approx(2.0) and info.codec == {"a.mkv": "ffv1", "a.mp4": "h264"}[name]
    source = Source(path=str(path), width_px=64, height_px=64, container=info.container, codec=info.codec)
    first, second, past = decode_clips(source, SPANS, VIEW, ["pyav", TORCHCODEC])
    assert (first.decoder, first.note) == (TORCHCODEC, "pyav: a codec that FFmpeg does not know")
    np.testing.assert_array_equal(np.concatenate([first.frames_THWC, second.frames_THWC]), frames)
    assert isinstance(past, DecodeFailure) and "7.00" in str(past)


@needs_torchcodec
def test_where_it_fails_too_both_reasons_are_told(tmp_path):
    path = write_video(tmp_path / "a.mp4", indexed_frames(20), codec="mpeg4")
    source = source_of(path)
    without_data(path)
    with pytest.raises(DecodeFailure, match=r"no frame can be decoded: .*; torchcodec: ") as failed:
        probe_guarded(str(path), path.stat().st_size)
    ((outcomes, _),) = decode_guarded([Request(source, SPANS[:2])], VIEW)
    assert failed.value.status == Status.DECODE_ERROR
    for outcome in outcomes:
        assert isinstance(outcome, DecodeFailure) and outcome.status == Status.DECODE_ERROR
        assert "; torchcodec: " in str(outcome) and str(path) not in str(outcome)


@needs_torchcodec
def test_a_codec_that_no_build_knows_is_told_by_both(tmp_path):
    path = write_video(tmp_path / "a.avi", indexed_frames(5), codec="mjpeg", pix_fmt="yuvj420p")
    path.write_bytes(path.read_bytes().replace(b"MJPG", b"ZZZZ"))
    with pytest.raises(FFmpegFailure, match="a codec that FFmpeg does not know; torchcodec: ") as failed:
        probe_by_any(str(path))
    assert failed.value.status == Status.UNSUPPORTED


@needs_torchcodec
@pytest.mark.parametrize("name", ["a.ts", "a.mpg"])
def test_containers_in_which_it_shows_other_frames_are_left_to_pyav(tmp_path, name):
    path = write_video(tmp_path / name, indexed_frames(20), codec="mpeg2video", fps=25)
    with pytest.raises(DecoderUnfit, match="is left to PyAV"):
        torchcodec_decoder.decode(source_of(path), SPANS, VIEW)


@needs_torchcodec
def test_clips_with_frames_that_are_lost_fail_alone(tmp_path):
    path = write_video(tmp_path / "a.mp4", indexed_frames(40), codec="mjpeg", pix_fmt="yuvj420p")
    content, source = bytearray(path.read_bytes()), source_of(path)
    at, length = len(content) * 2 // 5, len(content) // 10
    content[at : at + length] = bytes(length)
    path.write_bytes(bytes(content))
    first, inside, last = torchcodec_decoder.decode(source, [(0.0, 1.0), (1.5, 2.5), (3.0, 4.0)], VIEW)
    assert numbers(first) == list(range(10)) and numbers(last) == list(range(30, 40))
    assert isinstance(inside, DecodeFailure) and inside.status == Status.DECODE_ERROR
    assert "Invalid data" in str(inside) and ".cpp" not in str(inside)


def test_it_is_no_resort_for_what_was_ended(tmp_path, not_loading):
    source = source_of(write_video(tmp_path / "a.mp4", indexed_frames(2)))
    assert torchcodec_decoder.is_found() and TORCHCODEC not in cpu_decoders(source)


def test_one_that_cannot_be_loaded_says_why_and_is_not_tried_again(tmp_path, not_loading):
    path = write_video(tmp_path / "a.mp4", indexed_frames(20), codec="mpeg4")
    source = source_of(path)
    without_data(path)
    for _ in range(2):
        for outcome in decode_clips(source, SPANS[:2], VIEW):
            assert isinstance(outcome, DecodeFailure) and outcome.status == Status.DECODE_ERROR
            assert str(outcome).endswith("; torchcodec: not installed: libavutil.so.60: no such file")
        (not_loading / "__init__.py").write_text("raise AssertionError('imported twice')")
    with pytest.raises(DecodeFailure, match=r"no frame can be decoded: .*; torchcodec: not installed: libavutil"):
        probe_by_any(str(path))


def test_what_pyav_decodes_needs_no_torch(tmp_path):
    path = write_video(tmp_path / "a.mp4", indexed_frames(20))
    script = f"""
import sys
from pipelines.decode import decode_clips
from pipelines.decoded import Clip, Source
from pipelines.torchcodec_decoder import probe_by_any
from pipelines.view import View
probe_by_any({str(path)!r})
source = Source(path={str(path)!r}, width_px=64, height_px=64, container="mov", codec="h264")
first, past = decode_clips(source, [(0.0, 1.0), (7.0, 8.0)], View(num_frames=8, height_px=64, width_px=64))
assert isinstance(first, Clip) and not isinstance(past, Clip)
assert not sys.modules.keys() & {{"torch", "torchcodec"}}
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-500:]
