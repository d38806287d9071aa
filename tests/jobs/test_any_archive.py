"""Archives elsewhere, from the command line: signed addresses leave no trace, and only what changed is done."""

import contextlib
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import jobs.annotate
import jobs.evaluate
import jobs.plan
import jobs.report
from mone.checkpoint import read_checkpoint, save_checkpoint
from pipelines.commit import ANNOTATIONS_DIR
from pipelines.ledger import audit
from pipelines.planning import MANIFEST_DIR
from tests.conftest import write_labels
from tests.media import indexed_frames, write_video

pytestmark = pytest.mark.ray


@pytest.fixture(autouse=True)
def _in_the_sessions_ray(shared_ray, monkeypatch):
    for job in (jobs.annotate, jobs.evaluate, jobs.plan):
        monkeypatch.setattr(job, "connected", lambda address: contextlib.nullcontext())


def rows(run: Path, folder: str = ANNOTATIONS_DIR) -> list[dict]:
    return [row for path in sorted((run / folder).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def content(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / ANNOTATIONS_DIR).iterdir()}


def is_clean(run: Path) -> bool:
    return audit(run / MANIFEST_DIR, run / ANNOTATIONS_DIR).clean


def annotate(archive: object, run: Path, model: Path, *options: str) -> int:
    return jobs.annotate.main([str(archive), "--output", str(run), "--model", str(model), *options])


def sign(web, table: Path, names: str, signature: str) -> Path:
    """A list of signed addresses, which are the only ones that the server answers from now on."""
    web.query = f"X-Amz-Signature={signature}&X-Amz-Expires=60"
    return write_labels(table, [(f"{web.url}/{name}.mp4?{web.query}", "left", "") for name in names])


def test_signed_addresses_work_and_leave_no_trace_and_a_new_signature_changes_nothing(
    web, tmp_path, model_folder, capfd
):
    for name in "abc":
        write_video(web.folder / f"{name}.mp4", indexed_frames(20))
    run, table = tmp_path / "run", sign(web, tmp_path / "list.csv", "abx", "first5ecret")
    assert jobs.plan.main([str(table), "--output", str(run), "--model", str(model_folder)]) == 0
    assert annotate(table, run, model_folder, "--max-failed-share", "0.1") == 1
    assert is_clean(run)
    found = {row["video"]: row["status"] for row in rows(run)}
    assert found == {
        f"{web.url}/{name}.mp4": status for name, status in zip("abx", ["ok", "ok", "missing"], strict=True)
    }
    before = content(run)

    sign(web, table, "cbax", "second5ecret")
    assert annotate(table, run, model_folder) == 0
    assert is_clean(run) and len(rows(run)) == 7
    assert before.items() < content(run).items()
    assert jobs.report.main([str(run)]) == 0

    printed = capfd.readouterr()
    assert "5ecret" not in printed.out + printed.err
    assert "5ecret" not in str(rows(run)) + str(rows(run, MANIFEST_DIR))
    written = [path for path in run.rglob("*") if path.is_file()]
    assert not [path for path in written if b"5ecret" in path.read_bytes() or b"X-Amz" in path.read_bytes()]
    assert "data:image/jpeg" in (run / "report.html").read_text()


def test_a_single_signed_address_is_an_archive(web, tmp_path, model_folder, capfd):
    write_video(web.folder / "a.mp4", indexed_frames(20))
    web.query = "sig=5ecret"
    for _ in range(2):
        assert annotate(f"{web.url}/a.mp4?{web.query}", tmp_path / "run", model_folder) == 0
    assert [row["status"] for row in rows(tmp_path / "run")] == ["ok", "ok"]
    printed = capfd.readouterr()
    written = "".join(path.read_text() for path in (tmp_path / "run").glob("*.json"))
    assert "5ecret" not in printed.out + printed.err + written
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["archive"] == f"{web.url}/a.mp4"


def test_signed_videos_are_evaluated(web, tmp_path, model_folder, capfd):
    for name in "ab":
        write_video(web.folder / f"{name}.mp4", indexed_frames(20))
    table = sign(web, tmp_path / "list.csv", "ab", "5ecret")
    assert jobs.evaluate.main(["--model", str(model_folder), "--data", str(table), "--capacity", "0.4"]) == 0
    printed = capfd.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert result["failures"] == {} and result["videos"] == 2
    assert "5ecret" not in printed.out + printed.err


def test_a_bucket_grows_and_changes_and_only_that_is_done(bucket, tmp_path, model_folder):
    videos = {name: write_video(tmp_path / f"{name}.mp4", indexed_frames(20)).read_bytes() for name in "ab"}
    for name, video in videos.items():
        bucket.put(f"v/{name}.mp4", video)
    archive, run = f"s3://{bucket.name}/v/", tmp_path / "run"
    assert annotate(archive, run, model_folder) == 0
    assert is_clean(run) and [row["status"] for row in rows(run)] == ["ok"] * 4
    assert all("secret" not in str(row) for row in rows(run))
    before = {row["clip_id"]: row for row in rows(run)}
    longer = write_video(tmp_path / "b.mp4", indexed_frames(30)).read_bytes()
    bucket.put("v/b.mp4", longer)
    bucket.put("v/c.mp4", longer)
    assert annotate(archive, run, model_folder) == 0
    assert is_clean(run)
    after = {row["clip_id"]: row for row in rows(run)}
    assert [len([row for row in after.values() if row["video"].endswith(f"{name}.mp4")]) for name in "abc"] == [2, 3, 3]
    assert {id_: after[id_] for id_ in before.keys() & after.keys()} == {
        id_: row for id_, row in before.items() if row["video"].endswith("a.mp4")
    }


def test_another_model_is_refused_or_does_its_clips_again(archive, tmp_path, model_folder, capsys):
    run, model = tmp_path / "run", tmp_path / "model"
    checkpoint = read_checkpoint(model_folder)
    save_checkpoint(checkpoint.build(), checkpoint.labels, model)
    assert annotate(archive, run, model) == 0
    before = content(run)
    changed = checkpoint.build()
    changed.head.bias.data += 1.0
    save_checkpoint(changed, checkpoint.labels, model)
    capsys.readouterr()
    assert annotate(archive, run, model) == 2
    assert "--update" in capsys.readouterr().err and content(run) == before
    manifest = {path: path.read_bytes() for path in (run / MANIFEST_DIR).iterdir()}
    assert annotate(archive, run, model, "--update") == 0
    assert is_clean(run) and {row["model_id"] for row in rows(run)} == {read_checkpoint(model).model_id}
    assert not before.items() & content(run).items()
    assert {path: path.read_bytes() for path in (run / MANIFEST_DIR).iterdir()} == manifest
    assert annotate(archive, run, model) == 0


@pytest.mark.parametrize("archive", ["s3://no-such-bucket/v/", "s3://id:5ecret@bucket/v/", "https://h/list.csv?5ecret"])
def test_what_cannot_be_listed_is_said_in_one_line(s3_server, tmp_path, model_folder, capsys, monkeypatch, archive):
    monkeypatch.setattr("pipelines.patience._FIRST_WAIT_S", 0.0)
    assert annotate(archive.replace("h/", "127.0.0.1:9/"), tmp_path / "run", model_folder) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1 and "5ecret" not in printed.err
    assert not (tmp_path / "run").exists()
