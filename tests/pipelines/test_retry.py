"""Retrying does the failed rows again and no others, and may be killed anywhere."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.annotate import Settings, write_annotations
from pipelines.archive import Video
from pipelines.commit import ANNOTATIONS_DIR, CommittedFiles, StagedFiles, write_remaining
from pipelines.ledger import audit
from pipelines.manifest import plan_video
from pipelines.planning import MANIFEST_DIR, write_manifest
from pipelines.predict import Annotator
from pipelines.retry import undo_failed
from pipelines.schema import MANIFEST
from pipelines.timeline import ClipPlan
from pipelines.tokenize import tokenize_table
from tests.media import indexed_frames, write_video

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("shared_ray")]

PLAN, SETTINGS = ClipPlan(span_s=1.0), Settings(capacity=0.4)
NUM_VIDEOS, UNREADABLE, GONE = 6, 1, 4


def rows(run: Path) -> dict[str, dict]:
    found = [row for path in (run / ANNOTATIONS_DIR).glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    return {row["clip_id"]: row for row in found}


def is_clean(run: Path) -> bool:
    return audit(run / MANIFEST_DIR, run / ANNOTATIONS_DIR).clean


def plan_by_hand(videos: list[Video], run: Path) -> pa.Table:
    """A manifest of several files."""
    (run / MANIFEST_DIR).mkdir(parents=True)
    planned = [[dataclasses.asdict(clip) for clip in plan_video(video, PLAN)] for video in videos]
    tables = [pa.Table.from_pylist(planned[i] + planned[i + 1], schema=MANIFEST) for i in range(0, NUM_VIDEOS, 2)]
    for number, table in enumerate(tables):
        pq.write_table(table, run / MANIFEST_DIR / f"{number}.parquet")
    return pa.concat_tables(tables)


@pytest.fixture
def run(tmp_path, checkpoint) -> Path:
    """A finished run of several files: one of two clips each was unreadable when it was planned, another one gone when
    it was to be decoded; by now both are there."""
    paths = [write_video(tmp_path / f"{n}.mp4", indexed_frames(20, first=20 * n)) for n in range(NUM_VIDEOS)]
    whole = paths[UNREADABLE].read_bytes()
    paths[UNREADABLE].write_bytes(whole[:50])
    folder = tmp_path / "run"
    manifest = plan_by_hand([Video(uri=str(path), label="left") for path in paths], folder)
    paths[GONE].rename(tmp_path / "elsewhere")
    annotated = Annotator(checkpoint, 0.4, 5)(tokenize_table(manifest, checkpoint.config)).sort_by("status")
    writer = CommittedFiles(folder)
    for task in range(3):  # failed rows come first; each of these files has a failed one and one that is ok
        writer.write([annotated.take([task, 10 - task])], SimpleNamespace(task_idx=task))
    writer.write([annotated.slice(3, 5)], SimpleNamespace(task_idx=3))
    assert is_clean(folder)
    assert sorted(row["status"] for row in rows(folder).values()) == ["decode_error", "missing", "missing", *["ok"] * 8]
    (tmp_path / "elsewhere").rename(paths[GONE])
    paths[UNREADABLE].write_bytes(whole)
    return folder


def retry(run: Path) -> int:
    """What comes before annotating where failed rows are to be done again."""
    count = undo_failed(run)
    plan_again(run)
    return count


def plan_again(run: Path) -> None:
    write_manifest([Video(uri=str(run.parent / f"{n}.mp4"), label="left") for n in range(NUM_VIDEOS)], PLAN, run)


def test_failed_rows_are_done_again_and_no_others(run, checkpoint):
    before = rows(run)
    assert retry(run) == 3
    assert not is_clean(run)
    write_annotations(run, checkpoint, SETTINGS)
    after = rows(run)
    assert is_clean(run) and len(after) == 2 * NUM_VIDEOS
    assert {row["status"] for row in after.values()} == {"ok"} and {row["true_label"] for row in after.values()} == {
        "left"
    }
    for id_, row in before.items():
        if row["status"] == "ok":
            assert after[id_] == row
    assert retry(run) == 0 and is_clean(run)


def test_what_fails_again_has_its_row_again(run, checkpoint):
    (run.parent / f"{UNREADABLE}.mp4").write_bytes(b"")
    (run.parent / f"{GONE}.mp4").unlink()
    assert retry(run) == 3
    write_annotations(run, checkpoint, SETTINGS)
    assert is_clean(run)
    assert sorted(row["status"] for row in rows(run).values()) == ["empty", "missing", "missing", *["ok"] * 8]


def test_a_run_without_rows_can_be_retried(run):
    shutil.rmtree(run / ANNOTATIONS_DIR)
    assert retry(run) == 0
    assert write_remaining(run, run / MANIFEST_DIR) == 2 * NUM_VIDEOS


def test_a_run_of_failures_alone_is_planned_anew(tmp_path, checkpoint):
    video, folder = Video(uri=str(tmp_path / "late.mp4")), tmp_path / "run"
    write_manifest([video], PLAN, folder)
    write_annotations(folder, checkpoint, SETTINGS)
    assert [row["status"] for row in rows(folder).values()] == ["missing"]
    write_video(tmp_path / "late.mp4", indexed_frames(20))
    assert undo_failed(folder) == 1
    write_manifest([video], PLAN, folder)
    write_annotations(folder, checkpoint, SETTINGS)
    assert is_clean(folder) and [row["status"] for row in rows(folder).values()] == ["ok", "ok"]


@pytest.mark.parametrize("num_commits", range(4))
def test_killed_between_any_two_files_no_clip_has_two_rows(run, monkeypatch, num_commits):
    """Three files of annotations lose a row, then one of the manifest."""
    commit, left = StagedFiles.commit, [None] * num_commits

    def dying(self, name, table, **options):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        commit(self, name, table, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(StagedFiles, "commit", dying)
        undo_failed(run)
    found = audit(run / MANIFEST_DIR, run / ANNOTATIONS_DIR)
    assert not found.doubled and not found.unknown and len(found.missing) == num_commits
    assert write_remaining(run, run / MANIFEST_DIR) == num_commits  # what the same run without a retry would do
    assert retry(run) == 3 - num_commits
    found = audit(run / MANIFEST_DIR, run / ANNOTATIONS_DIR)
    assert not found.doubled and not found.unknown and found.annotated == 8 and found.planned == 2 * NUM_VIDEOS


def test_killed_before_it_is_planned_again_a_run_without_a_retry_does_so(run):
    undo_failed(run)
    found = audit(run / MANIFEST_DIR, run / ANNOTATIONS_DIR)
    assert (found.planned, found.annotated, len(found.missing)) == (10, 8, 2)
    assert not found.doubled and not found.unknown
    plan_again(run)
    found = audit(run / MANIFEST_DIR, run / ANNOTATIONS_DIR)
    assert (found.planned, len(found.missing)) == (12, 4) and not found.doubled
