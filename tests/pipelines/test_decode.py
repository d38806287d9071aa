"""All decoders show exactly the frames that their indices say, upright, at every instant; damage is told."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import decode
from pipelines.decode import DECODERS, TORCHCODEC, decode_clips, decoder_of
from pipelines.decoded import Clip, DecoderUnfit, Outcome, Source
from pipelines.failure import DecodeFailure
from pipelines.probe import probe
from pipelines.schema import Status
from pipelines.timeline import instants
from pipelines.view import View
from tests.media import indexed_frames, read_index, write_coloured, write_video
from tests.optional import needs_torchcodec

oracle = settings(max_examples=100, deadline=None, derandomize=True)
every_decoder = pytest.mark.parametrize("decoder", [*DECODERS, pytest.param(TORCHCODEC, marks=needs_torchcodec)])
both_containers = pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
SPANS = [(0.0, 1.0), (1.3, 2.1), (0.4, 0.9), (2.05, 3.0)]


def view(width_px: int = 64, height_px: int = 64, num_frames: int = 8) -> View:
    return View(num_frames=num_frames, height_px=height_px, width_px=width_px)


def source(path: Path) -> Source:
    info = probe(str(path))
    return Source(
        path=str(path), width_px=info.width_px, height_px=info.height_px, container=info.container, codec=info.codec
    )


def outcomes(decoder: str, path: Path, spans, wanted: View) -> list[Outcome]:
    return decoder_of(decoder)(source(path), spans, wanted)


def on_display(starts_s, span: tuple[float, float], num_frames: int) -> list[int]:
    """Index of the last frame that has started, with a loop."""
    return [max(i for i, start_s in enumerate(starts_s) if start_s <= time_s) for time_s in instants(*span, num_frames)]


def numbers(outcome: Outcome) -> list[int]:
    assert isinstance(outcome, Clip), outcome
    return [read_index(frame) for frame in outcome.frames_THWC]


@every_decoder
@both_containers
@pytest.mark.parametrize("width_px, height_px", [(64, 64), (80, 64), (67, 65), (161, 91)])
def test_lossless_frames_are_exact(tmp_path, decoder, name, width_px, height_px):
    frames = indexed_frames(30, width_px, height_px)
    path = write_video(tmp_path / name, frames)
    found = outcomes(decoder, path, SPANS, view(width_px, height_px))
    for span, outcome in zip(SPANS, found, strict=True):
        assert isinstance(outcome, Clip) and (outcome.decoder, outcome.note) == (decoder, "")
        assert outcome.frames_THWC.dtype == np.uint8
        np.testing.assert_array_equal(outcome.frames_THWC, frames[on_display(np.arange(30) / 10, span, 8)])


@pytest.mark.parametrize("width_px", [32, 48, 96, 128])
def test_the_chain_is_exact_at_widths_that_decord_refuses(tmp_path, width_px):
    frames = indexed_frames(10, width_px, 64)
    path = write_video(tmp_path / "a.mkv", frames)
    (outcome,) = decode_clips(source(path), [(0.0, 1.0)], view(width_px, 64, 10))
    assert isinstance(outcome, Clip)
    np.testing.assert_array_equal(outcome.frames_THWC, frames)
    try:
        outcomes("decord", path, [(0.0, 1.0)], view(width_px, 64, 10))
    except DecoderUnfit as unfit:
        assert (outcome.decoder, outcome.note) == ("pyav", f"decord: {unfit}")
    else:
        assert (outcome.decoder, outcome.note) == ("decord", "")


@every_decoder
@both_containers
def test_a_variable_rate_shows_what_is_on_display(tmp_path, decoder, name):
    times_ms = [0, 40, 120, 500, 540, 900, 2900, 2950, 3600]
    frames = indexed_frames(len(times_ms))
    path = write_video(tmp_path / name, frames, times_ms=times_ms)
    spans = [(0.0, 1.0), (0.3, 0.9), (1.0, 3.0), (2.8, 3.62)]
    for span, outcome in zip(spans, outcomes(decoder, path, spans, view(num_frames=11)), strict=True):
        expected = on_display(np.array(times_ms) / 1000, span, 11)
        assert numbers(outcome) == expected
        np.testing.assert_array_equal(outcome.frames_THWC, frames[expected])


@every_decoder
@both_containers
def test_a_late_start_is_second_zero(tmp_path, decoder, name):
    times_ms = [5000 + 100 * index for index in range(20)]
    path = write_video(tmp_path / name, indexed_frames(20), times_ms=times_ms)
    first, second = outcomes(decoder, path, [(0.0, 1.0), (1.0, 2.0)], view(num_frames=10))
    assert numbers(first) + numbers(second) == list(range(20))


@every_decoder
@pytest.mark.parametrize("rotation_deg", [0, 90, 180, 270])
def test_frames_are_upright(tmp_path, decoder, rotation_deg):
    stored = indexed_frames(10, 80, 64)
    path = write_video(tmp_path / "a.mp4", stored, rotation_deg=rotation_deg)
    upright = np.rot90(stored, rotation_deg // 90, axes=(1, 2))
    (outcome,) = outcomes(decoder, path, [(0.0, 1.0)], view(upright.shape[2], upright.shape[1], 10))
    assert isinstance(outcome, Clip)
    np.testing.assert_array_equal(outcome.frames_THWC, upright)


@every_decoder
@pytest.mark.parametrize("width_px, height_px", [(160, 64), (64, 161), (79, 64)])
def test_the_view_is_the_centre(tmp_path, decoder, width_px, height_px):
    frames = indexed_frames(5, width_px, height_px)
    path = write_video(tmp_path / "a.mp4", frames)
    (outcome,) = outcomes(decoder, path, [(0.0, 0.5)], view(num_frames=5))
    assert isinstance(outcome, Clip)
    top, left = (height_px - 64) // 2, (width_px - 64) // 2
    np.testing.assert_array_equal(outcome.frames_THWC, frames[:, top : top + 64, left : left + 64])


@pytest.mark.parametrize("size", [(320, 180), (90, 160)])
@pytest.mark.parametrize("rotation_deg", [0, 90, 180, 270])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p"])
@pytest.mark.parametrize("other", ["decord", pytest.param(TORCHCODEC, marks=needs_torchcodec)])
def test_decoders_agree_on_scaled_lossy_video(tmp_path, size, rotation_deg, pix_fmt, other):
    """All scale bicubically; PyAV's pictures are turned afterwards, the others' before.

    Tolerances: rounding with full chroma; with halved chroma a mean of 2.5 of 255, and of 5 where a quarter turn swaps
    the directions in which chroma is interpolated. torchcodec converts colours before it scales, without smoothing of
    chroma: 10 at an edge and a mean of 0.6 with full chroma, a mean of 4 with halved. The blocks are as sharp and
    saturated as pictures get; another frame is a mean of 8 and more.
    """
    options = {"crf": "10", "preset": "ultrafast"}
    frames = indexed_frames(20, *size)
    path = write_video(
        tmp_path / "a.mp4", frames, codec="libx264", options=options, rotation_deg=rotation_deg, pix_fmt=pix_fmt
    )
    spans = [(0.0, 1.0), (1.0, 2.0)]
    for ours, theirs in zip(*(outcomes(name, path, spans, view()) for name in ("pyav", other)), strict=True):
        assert isinstance(ours, Clip) and isinstance(theirs, Clip)
        difference = np.abs(ours.frames_THWC.astype(int) - theirs.frames_THWC)
        means = difference.mean(axis=(1, 2, 3))
        if other == TORCHCODEC:
            assert means.max() < (1 if pix_fmt == "yuv444p" else 4.5)
        else:
            assert means.max() < (5 if rotation_deg % 180 else 2.5)
        if pix_fmt == "yuv444p":
            assert difference.max() <= (12 if other == TORCHCODEC else 2)


@every_decoder
@pytest.mark.parametrize("matrix", ["bt601", "bt709", "bt2020"])
@pytest.mark.parametrize("color_range", ["limited", "full"])
def test_colours_are_what_the_file_says(tmp_path, decoder, matrix, color_range):
    """The range and the matrix of the file decide, in all decoders: a mean error of 1 of 255, where one that is
    overlooked makes a mean of 8 and more."""
    patches = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    frames = np.repeat(np.kron(patches, np.ones((16, 16, 1), np.uint8))[None], 10, axis=0)
    path = write_coloured(tmp_path / "a.mp4", frames, matrix, color_range)
    (outcome,) = outcomes(decoder, path, [(0.0, 1.0)], view())
    assert isinstance(outcome, Clip)
    assert np.abs(outcome.frames_THWC.astype(int) - frames[0]).mean() < 1


@every_decoder
@both_containers
def test_steps_without_a_change_are_counted(tmp_path, decoder, name):
    frames = indexed_frames(20)
    frames[[3, 4, 12]] = frames[[2, 2, 11]]
    path = write_video(tmp_path / name, frames)
    spans = [(0.0, 0.8), (0.5, 1.0), (1.1, 1.3), (0.0, 2.0)]
    found = [outcome.repeated_share for outcome in outcomes(decoder, path, spans, view(num_frames=20))]
    assert found == pytest.approx([2 / 7, 0, 1, 3 / 19])


X264 = {"crf": "5", "g": "30", "bf": "2", "preset": "ultrafast"}
MPEG = {"g": "12", "bf": "2", "qscale": "1"}
CONTAINERS = {
    "a.mp4": ("libx264", X264),
    "a.mkv": ("libx264", X264),
    "a.flv": ("libx264", X264),
    "a.nut": ("libx264", X264),
    "b.avi": ("mjpeg", {}),
    "a.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    "a.ts": ("libx264", X264),
    "a.m2ts": ("mpeg2video", MPEG),
    "a.mpg": ("mpeg2video", MPEG),
    "a.mov": ("mpeg4", MPEG),
    "c.avi": ("mpeg4", {"g": "12", "qscale": "1"}),
    "a.wmv": ("wmv2", {}),
    "a.mxf": ("mpeg2video", MPEG),
}


@every_decoder
@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_shows_the_frames_asked_for(tmp_path, decoder, name):
    codec, options = CONTAINERS[name]
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = write_video(tmp_path / name, indexed_frames(100), codec=codec, options=options, fps=25, pix_fmt=pix_fmt)
    spans = [(0.0, 1.0), (1.2, 2.0), (2.4, 3.2)]
    try:
        found = outcomes(decoder, path, spans, view())
    except DecoderUnfit:
        assert decoder != "pyav"  # then it is another decoder's turn
        return
    assert [numbers(outcome) for outcome in found] == [on_display(np.arange(100) / 25, span, 8) for span in spans]


@every_decoder
@both_containers
def test_one_frame_fills_a_clip(tmp_path, decoder, name):
    frames = indexed_frames(1)
    path = write_video(tmp_path / name, frames)
    (outcome,) = outcomes(decoder, path, [(0.0, 0.8)], view())
    assert isinstance(outcome, Clip) and outcome.note == "partial: 1 of 8 frames, the last one repeated"
    np.testing.assert_array_equal(outcome.frames_THWC, np.repeat(frames, 8, axis=0))


@every_decoder
@both_containers
@pytest.mark.parametrize("shown", range(1, 9))
def test_instants_past_the_end_are_counted(tmp_path, decoder, name, shown):
    path = write_video(tmp_path / name, indexed_frames(20))
    start_s = 2.0 - 0.1 * shown
    (outcome,) = outcomes(decoder, path, [(start_s, start_s + 0.8)], view())
    assert numbers(outcome) == [*range(20 - shown, 20), *[19] * (8 - shown)]
    assert outcome.note == ("" if shown == 8 else f"partial: {shown} of 8 frames, the last one repeated")


@every_decoder
@both_containers
def test_a_span_past_the_end_fails_and_names_the_end(tmp_path, decoder, name):
    path = write_video(tmp_path / name, indexed_frames(20))
    inside, outside = outcomes(decoder, path, [(0.0, 0.8), (5.0, 6.0)], view())
    assert numbers(inside) == list(range(8))
    assert isinstance(outside, DecodeFailure) and outside.status == Status.DECODE_ERROR
    assert "2.00 s" in str(outside) and "[5.00, 6.00)" in str(outside)


def test_spans_past_the_end_alone_fail_and_name_the_end(tmp_path):
    path = write_video(tmp_path / "a.mkv", indexed_frames(20))
    for outcome in decode_clips(source(path), [(5.0, 6.0), (7.0, 8.0)], view()):
        assert isinstance(outcome, DecodeFailure) and "2.00 s" in str(outcome)


def test_the_end_of_a_transport_stream_is_named(tmp_path):
    path = write_video(tmp_path / "a.ts", indexed_frames(50), codec="mpeg2video", fps=25)
    (outcome,) = outcomes("pyav", path, [(5.0, 6.0)], view())
    assert isinstance(outcome, DecodeFailure) and "2.00 s" in str(outcome)


@pytest.mark.parametrize("name, options", [("a.mkv", {}), ("a.mp4", {"movflags": "faststart"})])
def test_a_cut_file_gives_what_is_there_and_says_so(tmp_path, name, options):
    frames = indexed_frames(40)
    path = write_video(tmp_path / name, frames, container_options=options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    end_s = probe(str(path)).duration_s
    spans = [(0.0, 0.8), (end_s - 0.4, end_s + 0.4), (3.0, 3.8)]
    early, across, late = decode_clips(source(path), spans, view())
    assert isinstance(early, Clip) and isinstance(across, Clip)
    np.testing.assert_array_equal(early.frames_THWC, frames[:8])
    assert "partial: " in across.note
    assert isinstance(late, DecodeFailure) and late.status == Status.DECODE_ERROR


def test_damage_inside_is_told(tmp_path):
    path = write_video(tmp_path / "a.mp4", indexed_frames(60))
    content = bytearray(path.read_bytes())
    middle, length = len(content) * 2 // 5, len(content) // 10
    content[middle : middle + length] = bytes(length)
    path.write_bytes(bytes(content))
    before, across, after = decode_clips(source(path), [(0.0, 1.0), (2.0, 3.0), (5.0, 6.0)], view(num_frames=10))
    assert numbers(before) == list(range(10)) and numbers(after) == list(range(50, 60))
    assert isinstance(across, Clip) and "partial: " in across.note


def test_no_decoder_for_rubbish(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"rubbish" * 100)
    source_ = Source(path=str(tmp_path / "a.mp4"), width_px=64, height_px=64, container="mov", codec="h264")
    (outcome,) = decode_clips(source_, [(0.0, 1.0)], view())
    assert isinstance(outcome, DecodeFailure) and outcome.status == Status.DECODE_ERROR


@every_decoder
@pytest.mark.parametrize("limit", [1, 8, 20, 512])
def test_clips_of_one_pass_equal_clips_alone(tmp_path, monkeypatch, decoder, limit):
    monkeypatch.setattr(decode, "_MAX_BATCH_FRAMES", limit)
    path = write_video(tmp_path / "a.mp4", indexed_frames(30))
    spans = [(1.0, 1.8), (9.0, 9.8), (0.0, 0.8), (0.3, 2.9), (2.6, 3.4), (1.0, 1.8), (8.0, 9.0)]
    together = outcomes(decoder, path, spans, view())
    for span, outcome in zip(spans, together, strict=True):
        if span[0] > 3:
            assert isinstance(outcome, DecodeFailure)
            continue
        (alone,) = outcomes(decoder, path, [span], view())
        assert isinstance(outcome, Clip) and isinstance(alone, Clip) and outcome.note == alone.note
        np.testing.assert_array_equal(outcome.frames_THWC, alone.frames_THWC)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize(
    "options", [{"bf": "0"}, {"bf": "3", "b-pyramid": "normal"}, {"bf": "3", "x264opts": "open-gop"}]
)
def test_skipping_what_nothing_refers_to_changes_no_pixel(tmp_path, monkeypatch, name, options):
    """Lossy and predicted from all sides, at odd times, with spans far apart, overlapping, and of one frame."""
    rng = np.random.default_rng(0)
    times_ms = np.cumsum(rng.integers(20, 90, 200)).tolist()
    options = {"g": "25", "crf": "30"} | options
    path = write_video(
        tmp_path / name, indexed_frames(200), times_ms=times_ms, codec="libx264", pix_fmt="yuv420p", options=options
    )
    end_s = times_ms[-1] / 1000
    spans = [(0.0, 1.0), (0.5, 1.2), (3.0, 3.4), (3.3, 3.301), (5.01, 7.7), (end_s - 0.4, end_s), (0.0, end_s)]
    assert decode._quick_pass(source(path), np.array([0.1, 3.3, end_s - 0.01]), view(), decode._Cpu()) is not None
    skipped = outcomes("pyav", path, spans, view())
    monkeypatch.setattr(decode, "_quick_pass", lambda *_: None)
    for ours, theirs in zip(skipped, outcomes("pyav", path, spans, view()), strict=True):
        assert isinstance(ours, Clip) and isinstance(theirs, Clip) and ours.note == theirs.note
        np.testing.assert_array_equal(ours.frames_THWC, theirs.frames_THWC)


def test_torch_works_after_the_decoders():
    """In a fresh process, as a Ray worker that decoded first and then became a model's actor."""
    script = "import pipelines.decode, torch; torch.nn.Linear(96, 32)(torch.rand(64, 96))"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
    assert ended.returncode == 0, ended.stderr.decode()[-500:]


sizes_px = st.integers(1, 4000)


@oracle
@given(sizes_px, sizes_px, st.integers(16, 512), st.integers(16, 512))
def test_the_scaled_size_covers_the_view_and_keeps_the_aspect(width_px, height_px, view_width_px, view_height_px):
    scaled = view(view_width_px, view_height_px).scaled_size(width_px, height_px)
    assert scaled[0] >= view_width_px and scaled[1] >= view_height_px
    assert scaled[0] == view_width_px or scaled[1] == view_height_px
    scale = max(view_width_px / width_px, view_height_px / height_px)
    assert abs(scaled[0] - width_px * scale) <= 0.5 + 1e-6 and abs(scaled[1] - height_px * scale) <= 0.5 + 1e-6


@oracle
@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 6), st.integers(1, 6))
def test_the_crop_leaves_equal_margins(extra_rows, extra_columns, height_px, width_px):
    frames = np.zeros((2, height_px + extra_rows, width_px + extra_columns, 3), dtype=np.int64)
    frames[..., 0], frames[..., 1] = np.indices(frames.shape[1:3])
    cropped = view(width_px, height_px).crop(frames)
    assert cropped.shape == (2, height_px, width_px, 3)
    assert cropped[0, 0, 0, 0] == extra_rows // 2 and cropped[0, 0, 0, 1] == extra_columns // 2
