"""What is committed is whole and there once; a run that has been taken over can commit nothing more."""

import dataclasses
import pickle
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

import pipelines.clip_ids
import pipelines.commit
from pipelines.annotate import Settings, write_annotations
from pipelines.archive import list_videos
from pipelines.commit import (
    ANNOTATIONS_DIR,
    REMAINING_DIR,
    STAGING_DIR,
    CommittedFiles,
    fence,
    withdraw,
    write_remaining,
)
from pipelines.ledger import audit
from pipelines.manifest import plan_video
from pipelines.planning import MANIFEST_DIR
from pipelines.predict import Annotator
from pipelines.row_files import LedgerError
from pipelines.schema import ANNOTATIONS, MANIFEST
from pipelines.timeline import ClipPlan
from pipelines.tokenize import tokenize_table
from tests.conftest import NUM_CLIPS


def rows(ids: str, schema: pa.Schema = ANNOTATIONS) -> pa.Table:
    return pa.Table.from_pylist([{"clip_id": id_, "status": "ok"} for id_ in ids], schema=schema)


def write(writer: CommittedFiles, ids: str, task: int = 0) -> None:
    writer.write([rows(ids)], SimpleNamespace(task_idx=task))


def files(output: Path) -> list[Path]:
    return sorted((output / ANNOTATIONS_DIR).iterdir())


def committed_ids(output: Path) -> set[str]:
    return {id_ for path in files(output) for id_ in pq.read_table(path)["clip_id"].to_pylist()}


def hidden(output: Path) -> list[str]:
    return [path.name for path in output.iterdir() if path.name.startswith(".")]


def test_each_task_commits_a_file_of_the_schema(tmp_path):
    writer = CommittedFiles(tmp_path)
    write(writer, "ab", task=0)
    write(writer, "c", task=1)
    assert sorted(len(pq.read_table(path)) for path in files(tmp_path)) == [1, 2]
    assert all(path.suffix == ".parquet" and pq.read_schema(path).equals(ANNOTATIONS) for path in files(tmp_path))
    assert committed_ids(tmp_path) == set("abc")


def test_a_task_has_the_rows_of_all_its_blocks_and_blocks_without_rows_may_lack_columns(tmp_path):
    writer = CommittedFiles(tmp_path)
    writer.write([pa.table({}), rows("a"), rows(""), rows("bc")], SimpleNamespace(task_idx=0))
    assert pq.read_table(files(tmp_path)[0])["clip_id"].to_pylist() == ["a", "b", "c"]


@pytest.mark.ray
def test_a_long_run_leaves_few_files_with_all_rows(shared_ray, tmp_path):
    for num_clips, least in ((0, 1), (999, 1), (1_000_000, 1000), (10**9, 4096)):
        assert CommittedFiles(tmp_path, num_clips=num_clips).min_rows_per_write == least
    writer = CommittedFiles(tmp_path, num_clips=4000)
    ray.data.from_arrow([rows(letter) for letter in "abcdefgh"]).write_datasink(writer)
    assert committed_ids(tmp_path) == set("abcdefgh") and len(files(tmp_path)) == 2


@pytest.mark.parametrize("blocks", [[], [rows("")], [pa.table({})]], ids=["no block", "no rows", "no columns"])
def test_a_task_without_rows_leaves_no_file(tmp_path, blocks):
    CommittedFiles(tmp_path).write(blocks, SimpleNamespace(task_idx=0))
    assert files(tmp_path) == [] and committed_ids(tmp_path) == set()


def test_a_task_that_is_run_again_replaces_its_own_file(tmp_path):
    writer = CommittedFiles(tmp_path)
    write(writer, "xy", task=1)
    write(writer, "ab", task=2)
    write(pickle.loads(pickle.dumps(writer)), "ab", task=2)  # as Ray ships it to another worker
    assert len(files(tmp_path)) == 2
    assert committed_ids(tmp_path) == set("abxy")


def test_a_file_appears_with_all_its_rows_or_not_at_all(tmp_path, monkeypatch):
    seen = []

    def write_half(table, file):
        file.write(b"PAR1 and a little")
        seen.append(files(tmp_path))
        raise OSError("no space left on device")

    writer = CommittedFiles(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(pipelines.commit.pq, "write_table", write_half)
        with pytest.raises(OSError, match="no space"):
            write(writer, "ab")
    assert seen == [[]] and files(tmp_path) == []
    write(writer, "ab")
    assert committed_ids(tmp_path) == set("ab")


def test_an_orphan_cannot_commit_once_another_run_has_begun(tmp_path):
    orphan = CommittedFiles(tmp_path)
    write(orphan, "a", task=0)
    fence(tmp_path)
    heir = CommittedFiles(tmp_path)
    with pytest.raises(FileNotFoundError):
        write(orphan, "b", task=1)
    write(heir, "b", task=1)
    assert committed_ids(tmp_path) == set("ab") and len(files(tmp_path)) == 2


def test_an_orphan_cannot_commit_a_file_that_it_had_written_before_the_fence(tmp_path, monkeypatch):
    orphan = CommittedFiles(tmp_path)

    def fenced_meanwhile(descriptor):
        fence(tmp_path)
        CommittedFiles(tmp_path)

    with monkeypatch.context() as patched:
        patched.setattr(pipelines.commit.os, "fsync", fenced_meanwhile)
        with pytest.raises(FileNotFoundError):
            write(orphan, "b")
    assert files(tmp_path) == []


def test_files_of_an_earlier_run_and_of_this_one_have_different_names(tmp_path):
    write(CommittedFiles(tmp_path), "a")
    fence(tmp_path)
    write(CommittedFiles(tmp_path), "b")
    assert committed_ids(tmp_path) == set("ab")


def test_a_fence_takes_away_what_earlier_ones_could_not(tmp_path):
    for name in (STAGING_DIR, f"{STAGING_DIR}-of-a-run-killed-in-its-fence"):
        (tmp_path / name / "run").mkdir(parents=True)
        (tmp_path / name / "run" / "half.parquet").write_bytes(b"PAR1")
    (tmp_path / MANIFEST_DIR).mkdir()
    fence(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_DIR]
    fence(tmp_path)  # with nothing to do


def test_a_committed_file_that_cannot_be_read_is_named(tmp_path):
    write(CommittedFiles(tmp_path), "a")
    (tmp_path / ANNOTATIONS_DIR / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / MANIFEST_DIR).mkdir()
    pq.write_table(rows("ab", MANIFEST), tmp_path / MANIFEST_DIR / "rows.parquet")
    for ask in (write_remaining, lambda *folders: withdraw(*folders, "")):
        with pytest.raises(LedgerError, match=r"broken\.parquet"):
            ask(tmp_path, tmp_path / MANIFEST_DIR)


@pytest.mark.parametrize("rows_per_file, ids_per_part", [(1, 100), (2, 3), (100, 1)])
def test_what_remains_is_the_manifest_without_what_is_committed(tmp_path, monkeypatch, rows_per_file, ids_per_part):
    monkeypatch.setattr(pipelines.commit, "_ROWS_PER_FILE", rows_per_file)
    monkeypatch.setattr(pipelines.clip_ids, "_IDS_PER_PART", ids_per_part)
    (tmp_path / MANIFEST_DIR).mkdir()
    for name, ids in (("first", "abc"), ("second", "defg")):
        pq.write_table(rows(ids, MANIFEST), tmp_path / MANIFEST_DIR / f"{name}.parquet")
    writer = CommittedFiles(tmp_path)
    for task, (done, left) in enumerate([("", "abcdefg"), ("bf", "acdeg"), ("ac", "deg"), ("deg", "")]):
        write(writer, done, task)
        assert write_remaining(tmp_path, tmp_path / MANIFEST_DIR) == len(left)
        parts = [pq.read_table(path) for path in (tmp_path / REMAINING_DIR).glob("*.parquet")]
        assert sorted(id_ for part in parts for id_ in part["clip_id"].to_pylist()) == list(left)
        assert all(len(part) <= rows_per_file and part.schema.equals(MANIFEST) for part in parts)


def test_rows_that_are_planned_no_more_or_of_another_model_are_withdrawn(tmp_path):
    (tmp_path / MANIFEST_DIR).mkdir()
    pq.write_table(rows("abcdef", MANIFEST), tmp_path / MANIFEST_DIR / "rows.parquet")
    writer = CommittedFiles(tmp_path)
    for task, (ids, model) in enumerate([("ab", "new"), ("cx", "new"), ("de", "old"), ("yz", "new"), ("f", None)]):
        table = pa.Table.from_pylist([{"clip_id": id_, "model_id": model} for id_ in ids], schema=ANNOTATIONS)
        writer.write([table], SimpleNamespace(task_idx=task))
    untouched = files(tmp_path)[0].read_bytes()
    withdraw(tmp_path, tmp_path / MANIFEST_DIR, "new")
    assert committed_ids(tmp_path) == set("abc") and len(files(tmp_path)) == 2
    assert files(tmp_path)[0].read_bytes() == untouched
    assert all(pq.read_schema(path).equals(ANNOTATIONS) for path in files(tmp_path))


@pytest.mark.ray
def test_a_file_deleted_by_hand_is_done_again_and_leftovers_go(shared_ray, tmp_path, archive, checkpoint):
    videos, plan = list_videos(str(archive)), ClipPlan(span_s=1.0)
    planned = [dataclasses.asdict(clip) for video in videos for clip in plan_video(video, plan)]
    (tmp_path / MANIFEST_DIR).mkdir()
    manifest = pa.Table.from_pylist(planned, schema=MANIFEST)
    pq.write_table(manifest, tmp_path / MANIFEST_DIR / "rows.parquet")
    writer, annotator = CommittedFiles(tmp_path), Annotator(checkpoint, 0.4, 5)
    for task in range(3):
        rows_of_task = annotator(tokenize_table(manifest.slice(6 * task, 6), checkpoint.config))
        writer.write([rows_of_task], SimpleNamespace(task_idx=task))
    assert audit(tmp_path / MANIFEST_DIR, tmp_path / ANNOTATIONS_DIR).clean

    deleted, *kept = files(tmp_path)
    lost = set(pq.read_table(deleted)["clip_id"].to_pylist())
    deleted.unlink()
    before = {path: path.read_bytes() for path in kept}
    for name in (f"{STAGING_DIR}/killed", f"{STAGING_DIR}-fenced", REMAINING_DIR):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "half.parquet").write_bytes(b"PAR1")
    assert sorted(audit(tmp_path / MANIFEST_DIR, tmp_path / ANNOTATIONS_DIR).missing) == sorted(lost)

    write_annotations(tmp_path, checkpoint, Settings(capacity=0.4))
    found = audit(tmp_path / MANIFEST_DIR, tmp_path / ANNOTATIONS_DIR)
    assert found.clean and found.annotated == NUM_CLIPS
    assert {path: path.read_bytes() for path in kept} == before
    again = [pq.read_table(path)["clip_id"].to_pylist() for path in files(tmp_path) if path not in before]
    assert {id_ for ids in again for id_ in ids} == lost
    assert hidden(tmp_path) == []
