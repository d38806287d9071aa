"""A manifest follows its archive: what is new is added, what changed is replaced, a killed run continues."""

import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import pipelines.planning
from pipelines.archive import Video, list_videos
from pipelines.commit import STAGING_DIR, StagedFiles
from pipelines.known_videos import KnownVideos
from pipelines.limits import DEFAULT_LIMITS
from pipelines.manifest import plan_video
from pipelines.planning import MANIFEST_DIR, PARTIAL_DIR, plan_chunk, write_manifest
from pipelines.timeline import ClipPlan
from tests.media import indexed_frames, write_video

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("shared_ray", "_small_tasks")]

PLAN = ClipPlan(span_s=1.0)


@pytest.fixture
def _small_tasks(monkeypatch):
    monkeypatch.setattr(pipelines.planning, "_VIDEOS_PER_TASK", 2)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five videos of two clips each."""
    (tmp_path / "videos").mkdir()
    for name in "abcde":
        write_video(tmp_path / "videos" / f"{name}.mp4", indexed_frames(20))
    return tmp_path / "videos"


def plan(archive: Path | str | list[Video], output: Path) -> int:
    """Plan; returns how many videos were looked at."""
    counts = []
    videos = archive if isinstance(archive, list) else list_videos(str(archive))
    write_manifest(videos, PLAN, output, on_videos=counts.append)
    assert not (output / PARTIAL_DIR).exists() and not list(output.glob(f"{STAGING_DIR}*"))
    return sum(counts)


def planned(output: Path, folder: str = MANIFEST_DIR) -> list[tuple[str, str]]:
    rows = [row for path in (output / folder).glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    return sorted((row["video"], row["clip_id"]) for row in rows)


def by_hand(archive: Path | str) -> list[tuple[str, str]]:
    clips = [clip for video in list_videos(str(archive)) for clip in plan_video(video, PLAN)]
    return sorted((clip.video, clip.clip_id) for clip in clips)


def files(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / MANIFEST_DIR).iterdir()}


def test_a_second_time_changes_nothing(folder, tmp_path):
    assert plan(folder, tmp_path) == 5
    before = files(tmp_path)
    assert len(before) == 3 and planned(tmp_path) == by_hand(folder)
    assert plan(folder, tmp_path) == 5
    assert files(tmp_path) == before


def test_what_is_known_is_not_probed_again(folder, tmp_path, monkeypatch):
    files_ = StagedFiles(tmp_path, MANIFEST_DIR)
    videos = list(list_videos(str(folder)))
    hashes = plan_chunk(videos[:3], PLAN, DEFAULT_LIMITS, files_, 0, KnownVideos.of(()))
    probed = []
    monkeypatch.setattr(pipelines.planning, "plan_video", lambda video, plan, limits: probed.append(video.uri) or [])
    known = KnownVideos.of(filter(None, hashes))
    assert plan_chunk(videos, PLAN, DEFAULT_LIMITS, files_, 1, known)[:3] == hashes
    assert probed == [video.uri for video in videos[3:]]


def test_a_grown_archive_keeps_its_clips_and_adds_the_new(folder, tmp_path):
    plan(folder, tmp_path)
    before = files(tmp_path)
    write_video(folder / "ab.mp4", indexed_frames(30))
    plan(folder, tmp_path)
    assert planned(tmp_path) == by_hand(folder)
    assert before.items() < files(tmp_path).items()


def test_a_changed_file_is_cut_again_and_only_that(folder, tmp_path):
    plan(folder, tmp_path)
    before = planned(tmp_path)
    write_video(folder / "b.mp4", indexed_frames(30))
    os.utime(folder / "d.mp4", ns=(1, 1))
    plan(folder, tmp_path)
    after = planned(tmp_path)
    assert after == by_hand(folder)
    kept = {Path(video).name for video, id_ in set(before) & set(after)}
    assert kept == {"a.mp4", "c.mp4", "e.mp4"}


def test_a_video_that_is_gone_or_cannot_be_reached_keeps_its_clips(folder, tmp_path):
    videos = list(list_videos(str(folder)))
    plan(videos, tmp_path)
    before = files(tmp_path)
    (folder / "b.mp4").unlink()
    plan(videos, tmp_path)
    plan(videos[3:], tmp_path)
    assert files(tmp_path) == before


def test_a_video_that_was_missing_is_planned_when_it_is_there(folder, tmp_path):
    late = Video(uri=str(folder / "late.mp4"))
    plan([late], tmp_path)
    ((_, missing),) = planned(tmp_path)
    plan([late], tmp_path)
    assert planned(tmp_path) == [(late.uri, missing)]
    write_video(folder / "late.mp4", indexed_frames(20))
    plan([late], tmp_path)
    assert len(planned(tmp_path)) == 2 and missing not in dict(planned(tmp_path)).values()


def test_a_listing_that_breaks_off_leaves_pieces_that_the_next_run_takes_over(folder, tmp_path):
    def broken():
        yield from list(list_videos(str(folder)))[:4]
        raise OSError("the store hangs up")

    with pytest.raises(OSError, match="hangs up"):
        write_manifest(broken(), PLAN, tmp_path)
    assert not (tmp_path / MANIFEST_DIR).exists()
    pieces = {path.name: path.stat().st_mtime_ns for path in (tmp_path / PARTIAL_DIR).iterdir()}
    plan(folder, tmp_path)
    assert planned(tmp_path) == by_hand(folder)
    left = {name: (tmp_path / MANIFEST_DIR / name).stat().st_mtime_ns for name in pieces}
    assert left == pieces


def test_a_run_killed_between_new_clips_and_old_ones_going_ends_as_one_that_was_not(folder, tmp_path, monkeypatch):
    plan(folder, tmp_path)
    write_video(folder / "b.mp4", indexed_frames(30))

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pipelines.planning, "_drop_outdated", killed)
        with pytest.raises(KeyboardInterrupt):
            write_manifest(list_videos(str(folder)), PLAN, tmp_path)
    assert len(planned(tmp_path)) == 13
    plan(folder, tmp_path)
    assert planned(tmp_path) == by_hand(folder) and len(planned(tmp_path)) == 11


def test_the_listing_is_not_taken_ahead_of_the_work(folder, tmp_path, monkeypatch):
    """What is held is a few tasks: while a million videos are listed, memory stays flat."""
    taken, looked_at, ahead = [], [], []

    def listing():
        for number in range(60):
            taken.append(number)
            ahead.append(len(taken) - sum(looked_at))
            yield Video(uri=str(folder / f"missing-{number}.mp4"))

    write_manifest(listing(), PLAN, tmp_path, on_videos=looked_at.append)
    assert sum(looked_at) == 60 and max(ahead) <= 2 * (2 * 2 + 1)


def test_a_bucket_is_planned_from_its_listing(bucket, folder, tmp_path):
    for path in folder.iterdir():
        bucket.put(f"videos/deep/{path.name}", path.read_bytes())
    bucket.put("videos/notes.txt", b"x")
    archive = f"s3://{bucket.name}/videos"
    plan(archive, tmp_path)
    assert planned(tmp_path) == by_hand(archive) and len(planned(tmp_path)) == 10
    bucket.app.requests.clear()
    plan(archive, tmp_path)
    assert len(bucket.app.requests) == 1  # the listing tells that nothing has changed
    bucket.put("videos/deep/a.mp4", (folder / "b.mp4").read_bytes() + b"\0")
    plan(archive, tmp_path)
    assert planned(tmp_path) == by_hand(archive) and len(planned(tmp_path)) == 10
