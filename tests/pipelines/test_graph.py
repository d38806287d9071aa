"""The graphs of Ray Data against plain loops over the same functions; exactly one row a clip, however often killed."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import pipelines.ingest
import pipelines.planning
from mone.checkpoint import Checkpoint
from pipelines.annotate import Settings, write_annotations
from pipelines.archive import Video, list_videos
from pipelines.commit import ANNOTATIONS_DIR
from pipelines.evaluate import score_videos
from pipelines.ledger import audit
from pipelines.limits import Limits
from pipelines.manifest import plan_video
from pipelines.planning import MANIFEST_DIR, write_manifest
from pipelines.predict import Annotator
from pipelines.schema import ANNOTATIONS, MANIFEST
from pipelines.timeline import ClipPlan
from pipelines.tokenize import tokenize_table
from tests.conftest import NUM_CLIPS
from tests.media import write_video

pytestmark = pytest.mark.ray

PLAN = ClipPlan(span_s=1.0)
SETTINGS = Settings(capacity=0.4, top_k=3)
TIMES = ["decode_ms", "model_ms"]


@pytest.fixture
def videos(archive) -> list[Video]:
    return list(list_videos(str(archive)))


@pytest.fixture
def many_tasks(monkeypatch) -> None:
    """Tasks so small that every stage has several, and one of them has nothing but failures."""
    monkeypatch.setattr(pipelines.planning, "_VIDEOS_PER_TASK", 3)
    monkeypatch.setattr(pipelines.ingest, "MOST_CLIPS_PER_TASK", 1)


def manifest_by_hand(videos: list[Video], plan: ClipPlan = PLAN) -> pa.Table:
    rows = [dataclasses.asdict(clip) for video in videos for clip in plan_video(video, plan)]
    return pa.Table.from_pylist(rows, schema=MANIFEST)


def annotations_by_hand(videos: list[Video], checkpoint: Checkpoint, settings: Settings) -> pa.Table:
    annotator = Annotator(checkpoint, settings.capacity, settings.top_k)
    rows = manifest_by_hand(videos)
    one_by_one = [annotator(tokenize_table(rows.slice(number, 1), checkpoint.config)) for number in range(len(rows))]
    return pa.concat_tables(one_by_one)


def read(folder: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("*.parquet")))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_annotations(found: pa.Table, expected: pa.Table) -> None:
    """All columns but times; scores as far as the size of a batch may change them."""
    assert found.schema.equals(expected.schema)
    found, expected = (table.drop_columns(TIMES).sort_by("clip_id").to_pylist() for table in (found, expected))
    for row, wanted in zip(found, expected, strict=True):
        for name in ("score", "scores"):
            assert (row[name] is None) == (wanted[name] is None)
            np.testing.assert_allclose(row.pop(name) or [], wanted.pop(name) or [], rtol=1e-4, atol=1e-6)
        assert row == wanted


@pytest.fixture
def planned(tmp_path, videos) -> Path:
    """A run folder with a manifest as the graph would write it."""
    (tmp_path / "run" / MANIFEST_DIR).mkdir(parents=True)
    pq.write_table(manifest_by_hand(videos), tmp_path / "run" / MANIFEST_DIR / "rows.parquet")
    return tmp_path / "run"


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("num_videos", [1, 10])
def test_the_manifest_is_that_of_a_loop(tmp_path, videos, many_tasks, num_videos):
    write_manifest(videos[-num_videos:], PLAN, tmp_path)
    files = list((tmp_path / MANIFEST_DIR).glob("*.parquet"))
    assert all(pq.read_schema(path).equals(MANIFEST) for path in files)
    assert len(files) == -(-num_videos // 3)
    found, expected = read(tmp_path / MANIFEST_DIR), manifest_by_hand(videos[-num_videos:])
    assert found.sort_by("clip_id").to_pylist() == expected.sort_by("clip_id").to_pylist()


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("batch_size", [0, 3])
def test_annotations_are_those_of_a_loop_and_a_second_run_adds_nothing(
    planned, videos, checkpoint, many_tasks, batch_size
):
    settings = dataclasses.replace(SETTINGS, batch_size=batch_size)
    write_annotations(planned, checkpoint, settings)
    expected = annotations_by_hand(videos, checkpoint, settings)
    assert len(set(expected["label"].to_pylist())) > 3  # answers that differ, or equality would prove little
    assert set(expected["status"].to_pylist()) == {"ok", "empty", "decode_error"}
    assert_same_annotations(read(planned / ANNOTATIONS_DIR), expected)
    for path in (planned / ANNOTATIONS_DIR).iterdir():
        assert pq.read_schema(path).equals(ANNOTATIONS), path
    found = audit(planned / MANIFEST_DIR, planned / ANNOTATIONS_DIR)
    assert found.clean and found.planned == found.annotated == NUM_CLIPS

    before = content(planned / ANNOTATIONS_DIR)
    write_annotations(planned, checkpoint, settings)
    assert content(planned / ANNOTATIONS_DIR) == before


@pytest.mark.usefixtures("shared_ray")
def test_an_archive_of_failures_alone_has_its_rows_too(tmp_path, videos, checkpoint):
    write_manifest(videos[-2:], PLAN, tmp_path)
    write_annotations(tmp_path, checkpoint, SETTINGS)
    assert_same_annotations(read(tmp_path / ANNOTATIONS_DIR), annotations_by_hand(videos[-2:], checkpoint, SETTINGS))


@pytest.mark.usefixtures("shared_ray")
def test_a_video_that_takes_too_long_is_a_row_and_its_neighbours_are_fine(tmp_path, videos, checkpoint):
    """A hundred large frames in a tenth of a second of video, which is also about the time that they get."""
    noise = np.random.default_rng(0).integers(0, 256, (1, 720, 1280, 3), dtype=np.uint8)
    path = write_video(tmp_path / "slow.mkv", np.repeat(noise, 100, axis=0), fps=1000, codec="ffv1", pix_fmt="bgr0")
    around = [*videos[:2], Video(uri=str(path)), *videos[2:4]]
    (tmp_path / MANIFEST_DIR).mkdir()
    pq.write_table(manifest_by_hand(around), tmp_path / MANIFEST_DIR / "rows.parquet")
    write_annotations(tmp_path, checkpoint, dataclasses.replace(SETTINGS, limits=Limits(timeout_s=0.01)))
    assert audit(tmp_path / MANIFEST_DIR, tmp_path / ANNOTATIONS_DIR).clean
    found = read(tmp_path / ANNOTATIONS_DIR)
    is_slow = pc.field("video") == str(path)
    (slow,) = found.filter(is_slow).to_pylist()
    assert slow["status"] == "timeout" and "no answer after 0.11 s" in slow["error"]
    expected = annotations_by_hand(videos[:4], checkpoint, SETTINGS)
    assert_same_annotations(found.filter(~is_slow), expected)


@pytest.mark.usefixtures("shared_ray")
def test_after_annotating_the_same_process_can_score(tmp_path, videos, checkpoint):
    write_manifest(videos[:2], PLAN, tmp_path)
    write_annotations(tmp_path, checkpoint, SETTINGS)
    assert len(list(score_videos(videos[:3], PLAN, checkpoint, (0.4,)))) == 6
    write_manifest(videos[:3], PLAN, tmp_path / "other")
    assert len(read(tmp_path / "other" / MANIFEST_DIR)) == 6


# A driver of its own whose model takes a little while over each clip, so that a signal comes in the midst of it.
_SLOW_RUN = """
import sys, time
from pathlib import Path
import pipelines.annotate as graph
import pipelines.ingest
from jobs.cluster import connected
from mone.checkpoint import read_checkpoint
from pipelines.predict import Annotator

class Slow(Annotator):
    def __call__(self, batch):
        time.sleep(0.1)
        return super().__call__(batch)

graph.Annotator, pipelines.ingest.MOST_CLIPS_PER_TASK = Slow, 1
settings = graph.Settings(capacity=0.4, top_k=3, batch_size=1)
with connected(""):
    graph.write_annotations(Path(sys.argv[1]), read_checkpoint(sys.argv[2]), settings)
"""


def kill_midway(run: Path, model_folder: Path, delay_s: float, log: Path) -> None:
    """Annotate in another process and kill it `delay_s` after its first file."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with log.open("w") as output:
        command = [sys.executable, "-c", _SLOW_RUN, str(run), str(model_folder)]
        driver = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            deadline_s = time.monotonic() + 90
            while driver.poll() is None and not any((run / ANNOTATIONS_DIR).glob("*.parquet")):
                assert time.monotonic() < deadline_s, log.read_text()
                time.sleep(0.02)
            time.sleep(delay_s)
        finally:
            driver.send_signal(signal.SIGKILL)
            driver.wait()


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize(
    "attempts", [1, pytest.param(2, marks=pytest.mark.slow), *[pytest.param(1, marks=pytest.mark.slow)] * 4]
)
def test_killed_at_any_moment_it_continues_without_loss_or_double(
    tmp_path, planned, videos, checkpoint, model_folder, attempts
):
    for attempt in range(attempts):
        kill_midway(planned, model_folder, random.uniform(0, 1.0 / attempts), tmp_path / f"log{attempt}")
        left = audit(planned / MANIFEST_DIR, planned / ANNOTATIONS_DIR)
        assert left.annotated and left.missing, (tmp_path / f"log{attempt}").read_text()
    write_annotations(planned, checkpoint, SETTINGS)
    assert audit(planned / MANIFEST_DIR, planned / ANNOTATIONS_DIR).clean
    assert_same_annotations(read(planned / ANNOTATIONS_DIR), annotations_by_hand(videos, checkpoint, SETTINGS))
