"""Each video becomes its clips, or one row with the reason; ids follow the file and the span."""

import hashlib
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines import decode
from pipelines.archive import Video
from pipelines.decoded import Clip
from pipelines.manifest import clip_id, decode_planned, plan_video
from pipelines.probe import decode_frames
from pipelines.timeline import ClipPlan
from pipelines.view import View
from tests.media import indexed_frames, read_index, write_audio, write_video

oracle = settings(max_examples=60, deadline=None, derandomize=True)
IDENTITY = ("/videos/a.mp4", 1000, "1700000000000000000", 0.0, 2.56)


def test_an_id_is_the_same_every_time():
    """Also in another process and another release: rows of earlier runs are recognised by it."""
    identity = b"/videos/a.mp4\x001000\x001700000000000000000\x000.000000\x002.560000"
    assert clip_id(*IDENTITY) == hashlib.sha256(identity).hexdigest()[:20]


@pytest.mark.parametrize(
    "place, other", [(0, "/videos/b.mp4"), (1, 1001), (2, "1700000000000000001"), (3, 0.00001), (4, 2.56001)]
)
def test_every_part_of_the_identity_counts(place, other):
    changed = list(IDENTITY)
    changed[place] = other
    assert clip_id(*changed) != clip_id(*IDENTITY)


identities = st.tuples(
    st.sampled_from(["a", "a\n", "a1", "1", "é"]),
    st.sampled_from([1, 11, 111]),
    st.sampled_from(["", "1", "11"]),
    st.sampled_from([0.0, 1.0, 1.000001]),
    st.sampled_from([2.0, 12.0]),
)


@oracle
@given(st.sets(identities, min_size=2, max_size=60))
def test_ids_are_unique(some):
    assert len({clip_id(*identity) for identity in some}) == len(some)


def test_a_video_becomes_its_clips(tmp_path):
    path = write_video(tmp_path / "a.mp4", indexed_frames(35, 80, 64), fps=10)
    plan = ClipPlan(span_s=1.0)
    clips = plan_video(Video(uri=str(path), label="wave"), plan)
    assert [(clip.start_s, clip.end_s) for clip in clips] == plan.spans(3.5)
    assert len({clip.clip_id for clip in clips}) == len(clips) == 4
    for clip in clips:
        assert (clip.video, clip.label, clip.status, clip.error, clip.note) == (str(path), "wave", "ok", "", "")
        assert (clip.width_px, clip.height_px, clip.codec, clip.fps) == (80, 64, "h264", pytest.approx(10))
        assert clip.duration_s == pytest.approx(3.5)
        assert (clip.size_bytes, clip.version) == (path.stat().st_size, str(path.stat().st_mtime_ns))


def test_planning_again_gives_the_same_rows(tmp_path):
    video = Video(uri=str(write_video(tmp_path / "a.mkv", indexed_frames(25))))
    plan = ClipPlan(span_s=0.7, stride_s=0.3)
    assert plan_video(video, plan) == plan_video(video, plan)


def test_a_changed_file_gets_other_ids(tmp_path):
    video = Video(uri=str(write_video(tmp_path / "a.mp4", indexed_frames(20))))
    plan = ClipPlan(span_s=1.0)
    seen = {clip.clip_id for clip in plan_video(video, plan)}
    os.utime(video.uri, ns=(0, 1))
    touched = {clip.clip_id for clip in plan_video(video, plan)}
    write_video(tmp_path / "a.mp4", indexed_frames(20, first=50))
    os.utime(video.uri, ns=(0, 1))
    rewritten = {clip.clip_id for clip in plan_video(video, plan)}
    assert len(seen | touched | rewritten) == 6


def test_the_probe_of_an_odd_file_is_noted_in_each_row(tmp_path):
    path = write_video(tmp_path / "a.mkv", indexed_frames(60))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    clips = plan_video(Video(uri=str(path)), ClipPlan(span_s=1.0))
    assert len(clips) > 1 and all(clip.note.startswith("partial") and clip.status == "ok" for clip in clips)


def make(kind: str, path) -> None:
    match kind:
        case "zero bytes":
            path.touch()
        case "text":
            path.write_text("hello")
        case "html":
            path.write_text("<html><body>403</body></html>")
        case "audio":
            write_audio(path)
        case "picture":
            Image.fromarray(indexed_frames(1)[0]).save(path, "JPEG")
        case "folder":
            path.mkdir()
        case "cut":
            write_video(path, indexed_frames(20))
            path.write_bytes(path.read_bytes()[:1500])


@pytest.mark.parametrize(
    "kind, status",
    [
        ("missing", "missing"),
        ("zero bytes", "empty"),
        ("text", "decode_error"),
        ("html", "decode_error"),
        ("cut", "decode_error"),
        ("folder", "decode_error"),
        ("audio", "unsupported"),
        ("picture", "unsupported"),
    ],
)
def test_a_video_that_cannot_be_shown_is_one_row_with_its_reason(tmp_path, kind, status):
    make(kind, tmp_path / "a.mp4")
    video = Video(uri=str(tmp_path / "a.mp4"), label="wave")
    (clip,) = plan_video(video, ClipPlan(span_s=1.0, clips_per_video=5))
    assert (clip.status, clip.label, clip.video) == (status, "wave", video.uri)
    assert clip.error and "\n" not in clip.error
    assert (clip.start_s, clip.end_s, clip.duration_s) == (0.0, 0.0, 0.0)


def test_failures_have_unique_ids(tmp_path):
    clips = [plan_video(Video(uri=str(tmp_path / f"{i}.mp4")), ClipPlan(span_s=1.0))[0] for i in range(10)]
    assert len({clip.clip_id for clip in clips}) == 10


def test_hundreds_of_clips_of_one_long_file_are_decoded_once_each(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", np.concatenate([indexed_frames(200)] * 3), fps=1, options={"g": "4"})
    clips = plan_video(Video(uri=str(path)), ClipPlan(span_s=1.0))
    assert len(clips) == 600
    decoded = []

    def counting(*arguments):
        for frame in decode_frames(*arguments):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(decode, "decode_frames", counting)
    view = View(num_frames=1, height_px=64, width_px=64)
    outcomes = [clip for start in range(0, 600, 32) for clip in decode_planned(clips[start : start + 32], view)]
    shown = [read_index(clip.frames_THWC[0]) for clip in outcomes if isinstance(clip, Clip)]
    assert shown == [*range(200)] * 3
    assert {clip.decoder for clip in outcomes if isinstance(clip, Clip)} == {"pyav"}
    assert len(decoded) < 1.3 * 600  # a task begins at a key frame and ends a frame late
