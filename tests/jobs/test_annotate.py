"""Annotating from the command line: a run and its continuations, as a person or a scheduler starts them."""

import contextlib
import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

import jobs.annotate
import jobs.audit
import jobs.report
from mone.compute import clip_compute
from pipelines.commit import ANNOTATIONS_DIR
from pipelines.ledger import audit
from pipelines.limits import Limits
from pipelines.planning import MANIFEST_DIR
from tests.conftest import NUM_CLIPS, NUM_VIDEOS, TINY, command_of, complaints, run_job

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("annotate") / "new" / "run"


@pytest.fixture(scope="module")
def first(archive, model_folder, run_folder) -> subprocess.CompletedProcess[str]:
    """The first run; none of its clips may fail, but two do."""
    return run_job("annotate", archive, "--output", run_folder, "--model", model_folder, "--max-failed-share", 0)


@pytest.fixture(scope="module")
def after_first(first, run_folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run_folder.rglob("*.parquet")}


@pytest.fixture(scope="module")
def second(archive, model_folder, run_folder, after_first) -> subprocess.CompletedProcess[str]:
    """The same command again, which may fail on half of the clips."""
    return run_job("annotate", archive, "--output", run_folder, "--model", model_folder)


@pytest.fixture
def finished(second, run_folder, tmp_path) -> Path:
    """A copy of the run's folder to break."""
    return Path(shutil.copytree(run_folder, tmp_path / "copy"))


def test_more_failures_than_allowed_are_status_1_and_all_rows_are_there(first, run_folder):
    assert first.returncode == 1, first.stderr
    assert complaints(first.stderr, "annotate") == [
        "python -m jobs.annotate: 2 of 18 clips failed, more than --max-failed-share allows"
    ]
    assert "Traceback" not in first.stderr
    found = audit(run_folder / MANIFEST_DIR, run_folder / ANNOTATIONS_DIR)
    assert found.clean and found.annotated == NUM_CLIPS


def test_a_second_run_does_nothing_more_and_is_done(second, run_folder, after_first):
    assert second.returncode == 0, second.stderr
    assert {str(path): path.read_bytes() for path in run_folder.rglob("*.parquet")} == after_first


@pytest.mark.parametrize("run", ["first", "second"])
def test_stdout_is_the_summary(request, run, run_folder):
    lines = request.getfixturevalue(run).stdout.splitlines()
    assert re.fullmatch(rf"clips +{NUM_CLIPS} \(0\.00 hours\), 2 failed", lines[0])
    compute = clip_compute(TINY, 0.4)
    assert f"{1 - compute.flops / compute.dense_flops:.1%} saved" in lines[1]
    assert re.search(rf"of {2 * NUM_VIDEOS} clips with a known label", lines[2])
    assert sorted(line.split()[2] for line in lines if line.startswith("failed")) == ["decode_error:", "empty:"]
    assert lines[-1].split() == ["rows", str(run_folder / ANNOTATIONS_DIR)]


def test_the_record_says_what_was_run_with_what_and_what_came_of_it(second, run_folder, archive, model_folder):
    record = json.loads((run_folder / "run.json").read_text())
    assert record["config"]["archive"] == str(archive) and record["config"]["model"] == str(model_folder)
    assert record["config"]["capacity"] == 0.4 and record["config"]["max_failed_share"] == 0.5
    assert {"python", "ray", "torch", "pyarrow", "av", "decord2"} <= record["versions"].keys()
    assert "unknown" not in record["versions"].values()
    totals, compute = record["totals"], clip_compute(TINY, 0.4)
    assert totals["clips"] == NUM_CLIPS
    assert totals["hours"] == pytest.approx(2 * NUM_VIDEOS / 3600, rel=0.01)
    assert totals["flops"] == 2 * NUM_VIDEOS * compute.flops
    assert totals["dense_flops"] == 2 * NUM_VIDEOS * compute.dense_flops
    assert {status: sum(reasons.values()) for status, reasons in totals["failures"].items()} == {
        "empty": 1,
        "decode_error": 1,
    }
    assert len(record["sessions"]) == 2
    assert totals["wall_s"] == pytest.approx(sum(session["wall_s"] for session in record["sessions"]))
    assert totals["device_s"]["decode"] > 0 and totals["device_s"]["model"] > 0


def test_the_audit_is_clean(finished, capsys):
    assert jobs.audit.main([str(finished)]) == 0
    assert capsys.readouterr().out == f"clean: {NUM_CLIPS} planned clips, each with exactly one row\n"


def edit(folder: Path, rows: pa.Table, name: str = "edited.parquet") -> None:
    """Put rows in place of all annotations."""
    for path in (folder / ANNOTATIONS_DIR).glob("*.parquet"):
        path.unlink()
    pq.write_table(rows, folder / ANNOTATIONS_DIR / name)


@pytest.mark.parametrize("damage", ["removed", "doubled", "doubled in another file", "unknown", "all"])
def test_the_audit_names_each_row_that_is_not_right(finished, capsys, damage):
    rows = pa.concat_tables(pq.read_table(path) for path in sorted((finished / ANNOTATIONS_DIR).glob("*.parquet")))
    ids = rows["clip_id"].to_pylist()
    if damage == "removed":
        edit(finished, rows.slice(1))
        expected = [f"missing {ids[0]}"]
    elif damage == "doubled":
        edit(finished, pa.concat_tables([rows, rows.slice(3, 1)]))
        expected = [f"doubled {ids[3]}"]
    elif damage == "doubled in another file":
        pq.write_table(rows.slice(5, 2), finished / ANNOTATIONS_DIR / "again.parquet")
        expected = [f"doubled {id_}" for id_ in sorted(ids[5:7])]
    elif damage == "unknown":
        renamed = pa.array([*ids, "0" * 20])
        edit(finished, pa.concat_tables([rows, rows.slice(0, 1)]).set_column(0, rows.schema.field(0), renamed))
        expected = [f"unknown {'0' * 20}"]
    else:
        shutil.rmtree(finished / ANNOTATIONS_DIR)
        expected = [f"missing {id_}" for id_ in sorted(ids)]
    assert jobs.audit.main([str(finished)]) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines() == expected
    assert len(printed.err.splitlines()) == 1 and f"{NUM_CLIPS} planned" in printed.err


@pytest.mark.parametrize(
    "option, named",
    [
        (["--capacity", "0.6"], "capacity"),
        (["--top-k", "2"], "top_k"),
        (["--span", "0.5"], "span_s"),
        (["--clips-per-video", "1"], "clips_per_video"),
    ],
)
def test_another_way_of_annotating_needs_another_folder(
    finished, archive, model_folder, capsys, monkeypatch, option, named
):
    monkeypatch.setattr(ray, "init", lambda *args, **kwargs: pytest.fail("Ray was started"))
    before = (finished / "run.json").read_text()
    assert jobs.annotate.main([str(archive), "--output", str(finished), "--model", str(model_folder), *option]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert named in printed.err and str(finished) in printed.err
    assert (finished / "run.json").read_text() == before


def test_another_archive_needs_another_folder(finished, archive, model_folder, capsys):
    arguments = [str(archive.parent), "--output", str(finished), "--model", str(model_folder)]
    assert jobs.annotate.main(arguments) == 2
    assert "archive" in capsys.readouterr().err


@pytest.mark.usefixtures("shared_ray")
def test_retrying_does_the_failed_rows_and_no_others(finished, archive, model_folder, monkeypatch, capsys):
    monkeypatch.setattr(jobs.annotate, "connected", lambda address: contextlib.nullcontext())
    undone, planned, done = [], [], []
    monkeypatch.setattr(jobs.annotate, "undo_failed", lambda output: undone.append(output) or 2)
    monkeypatch.setattr(jobs.annotate, "write_manifest", lambda *arguments: planned.append(arguments))
    monkeypatch.setattr(jobs.annotate, "write_annotations", lambda *arguments: done.append(arguments))
    arguments = [str(archive), "--output", str(finished), "--model", str(model_folder)]
    limits = ["--timeout-s", "7", "--memory-gb", "0.5"]
    assert jobs.annotate.main([*arguments, *limits]) == 0 and not undone
    assert jobs.annotate.main([*arguments, "--retry-failed", *limits]) == 0
    expected = Limits(timeout_s=7, memory_bytes=2**29)
    assert undone == [finished]
    assert [limits for _, _, _, limits, _ in planned] == [expected] * 2
    assert [settings.limits for _, _, settings, *_ in done] == [expected] * 2
    assert "retry     2 clips" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, named",
    [(["--retry-failed"], "nothing to retry"), (["--timeout-s", "0"], "time"), (["--memory-gb", "-1"], "memory")],
)
def test_what_cannot_be_is_said_before_any_work(archive, model_folder, tmp_path, capsys, options, named):
    arguments = [str(archive), "--output", str(tmp_path / "new"), "--model", str(model_folder), *options]
    assert jobs.annotate.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1 and named in printed.err
    assert not (tmp_path / "new").exists()


def test_the_report_is_one_page_that_loads_nothing(finished, capsys):
    assert jobs.report.main([str(finished), "--clips", "2"]) == 0
    assert capsys.readouterr().out == f"{finished / 'report.html'}\n"
    page = (finished / "report.html").read_text()
    assert not re.findall(r"https?://|//cdn|<script|<link|@import|url\(", page)
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 2 * 2 * 4 and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "the file has 0 bytes" in page and f"each of {NUM_CLIPS} planned clips" in page
    assert not list(finished.glob("*.partial"))


def test_stopped_by_a_scheduler_it_ends_by_itself_and_the_same_command_completes(archive, model_folder, tmp_path):
    # Short overlapping clips one at a time: seconds of work from eight small files.
    options = ["--model", model_folder, "--span", 0.2, "--stride", 0.05, "--batch-size", 1]
    command = ["annotate", archive, "--output", tmp_path / "run", *options]
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(**command_of(*command), stdout=log, stderr=log)
        try:
            deadline_s = time.monotonic() + 120
            while job.poll() is None and not any((tmp_path / "run" / ANNOTATIONS_DIR).glob("*.parquet")):
                assert time.monotonic() < deadline_s, (tmp_path / "log").read_text()
                time.sleep(0.02)
            job.send_signal(signal.SIGTERM)
            status = job.wait(timeout=30)
        finally:
            job.kill()
    said = (tmp_path / "log").read_text()
    assert status == 130, said
    assert complaints(said, "annotate") == [
        "python -m jobs.annotate: stopped; what was committed stays, the same command continues"
    ]
    assert "Traceback" not in said
    left = audit(tmp_path / "run" / MANIFEST_DIR, tmp_path / "run" / ANNOTATIONS_DIR)
    assert left.planned > 200 and left.missing

    completed = run_job(*command)
    assert completed.returncode == 0, completed.stderr
    found = audit(tmp_path / "run" / MANIFEST_DIR, tmp_path / "run" / ANNOTATIONS_DIR)
    assert found.clean and found.annotated == left.planned
