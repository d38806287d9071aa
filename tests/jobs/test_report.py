"""The page about a run, from rows made by hand: pictures or the reason why there are none; no script gets through."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jobs.report
from jobs.session import efficiency
from pipelines.archive import Video, list_videos
from pipelines.commit import ANNOTATIONS_DIR
from pipelines.ledger import Totals
from pipelines.manifest import plan_video
from pipelines.planning import MANIFEST_DIR
from pipelines.predict import Annotator
from pipelines.schema import MANIFEST
from pipelines.timeline import ClipPlan
from pipelines.tokenize import tokenize_table


@pytest.fixture(scope="module")
def run(tmp_path_factory, archive, checkpoint, model_folder) -> Path:
    """A run folder as the annotate job would leave it, made without Ray, with a model of its own."""
    folder = tmp_path_factory.mktemp("report") / "run"
    model = shutil.copytree(model_folder, folder.parent / "model")
    shutil.copytree(archive.parent, folder.parent / "videos")
    videos = list(list_videos(str(folder.parent / "videos" / archive.name)))
    videos.append(Video(uri=str(folder.parent / "<script>alert(1)</script>.mp4")))
    rows = [dataclasses.asdict(clip) for video in videos for clip in plan_video(video, ClipPlan(span_s=1.0))]
    manifest = pa.Table.from_pylist(rows, schema=MANIFEST)
    annotations = Annotator(checkpoint, 0.4, 3)(tokenize_table(manifest, checkpoint.config))
    for name, table in ((MANIFEST_DIR, manifest), (ANNOTATIONS_DIR, annotations)):
        (folder / name).mkdir(parents=True)
        pq.write_table(table, folder / name / "rows.parquet")
    record = {
        "config": {"model": str(model)},
        "identity": {"archive": "<b>archive</b>", "model_id": checkpoint.model_id, "capacity": 0.4},
        "labels": list(checkpoint.labels),
        "num_experts": 4,
        "versions": {"python": "3"},
        "totals": {},
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def page_of(folder: Path, *options: str) -> str:
    assert jobs.report.main([str(folder), *options]) == 0
    return (folder / "report.html").read_text()


@pytest.mark.parametrize("clips, shown", [(0, 0), (1, 1), (100, 16)])
def test_as_many_clips_are_shown_as_were_asked_for(copy, clips, shown):
    page = page_of(copy, "--clips", str(clips))
    assert page.count('<section class="clip">') == shown
    assert page.count("data:image/jpeg;base64,") == 8 * shown
    assert ("none were asked for" in page) == (clips == 0)


def test_the_page_loads_nothing_and_runs_nothing(copy):
    assert not re.search(r"https?://|<link|@import|url\(", page_of(copy, "--clips", "1"))


def test_names_of_files_and_labels_are_text_and_not_markup(copy):
    page = page_of(copy, "--clips", "0")
    assert "&lt;b&gt;archive&lt;/b&gt;" in page
    assert "<b>archive" not in page and "<script" not in page


@pytest.mark.parametrize(("gpu_s", "per", "shown"), [(0.0, "CPU", "21.6"), (50.0, "GPU", "43.2")])
def test_how_well_the_cluster_was_used_is_said_where_it_was_measured(copy, gpu_s, per, shown):
    assert "time of the cluster" not in page_of(copy, "--clips", "0")
    record = json.loads((copy / "run.json").read_text())
    sessions = [{"wall_s": 50.0, "cpu_s": 100.0, "gpu_s": gpu_s, "cost": 1.5}]
    record["totals"] = efficiency(Totals(hours=0.025, decode_s=31.0, model_s=11.0), sessions)
    (copy / "run.json").write_text(json.dumps(record))
    page = " ".join(page_of(copy, "--clips", "0").split())
    for name, value in {
        f"video hours a day per {per}": shown,
        "CPU time of the cluster spent decoding": "31.0 %",
        f"{per} time of the cluster spent in the model": "22.0 %" if gpu_s else "11.0 %",
        "cost": "1.50",
    }.items():
        assert re.search(rf"<th>{name}</th> ?<td>{value}</td>", page), name


def test_rows_that_are_missing_are_said(copy):
    path = copy / ANNOTATIONS_DIR / "rows.parquet"
    pq.write_table(pq.read_table(path).slice(2), path)
    assert "Audit not clean: 2 missing" in page_of(copy, "--clips", "0")


def test_without_the_model_there_is_a_page_without_pictures(copy, tmp_path):
    record = json.loads((copy / "run.json").read_text())
    record["config"]["model"] = str(tmp_path / "moved-away")
    (copy / "run.json").write_text(json.dumps(record))
    page = page_of(copy)
    assert "moved-away" in page and "data:image" not in page


def test_with_another_model_there_are_no_pictures(copy):
    record = json.loads((copy / "run.json").read_text())
    record["identity"]["model_id"] = "0" * 16
    (copy / "run.json").write_text(json.dumps(record))
    assert "holds another model now" in page_of(copy)


def test_without_the_videos_there_are_no_pictures(copy, run):
    videos = run.parent / "videos"
    videos.rename(run.parent / "moved")
    try:
        assert "no clip could be decoded" in page_of(copy)
    finally:
        (run.parent / "moved").rename(videos)


def test_a_run_of_failures_alone_has_a_page(copy):
    path = copy / ANNOTATIONS_DIR / "rows.parquet"
    rows = pq.read_table(path)
    failed = rows.filter(pa.array(status != "ok" for status in rows["status"].to_pylist()))
    pq.write_table(failed, path)
    page = page_of(copy)
    assert "no clip could be decoded" in page and "the file has 0 bytes" in page


def test_a_report_is_written_again(copy):
    (copy / "report.html").write_text("old")
    assert page_of(copy) != "old"
    assert not list(copy.glob("*.partial"))
