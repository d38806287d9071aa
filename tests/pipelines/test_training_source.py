"""Both sources of training clips against a loop that decodes: order, empty parts, failures, bounded reading ahead."""

import dataclasses
import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import pipelines.fill_cache
import pipelines.manifest
import pipelines.training_stream
from mone.clips import ClipSource
from mone.order import EpochOrder
from pipelines.archive import Video
from pipelines.clip_cache import CachedClips, ClipCache
from pipelines.clip_source import BATCHES_AHEAD, clip_bytes, read_ahead
from pipelines.fill_cache import cached_rows, fill
from pipelines.schema import MANIFEST
from pipelines.storage.signatures import Signatures
from pipelines.training_memory import in_memory
from pipelines.training_stream import StreamedClips, training_manifest
from tests.pipelines.training_data import (
    CHANGED,
    LABELS,
    NUM_CLIPS,
    PLAN,
    VIEW,
    assert_batches,
    planned,
    with_a_changed_video,
    write_videos,
)

NOTHING = np.empty(0, dtype=np.int64)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> pa.Table:
    return with_a_changed_video(tmp_path_factory.mktemp("videos"))


@pytest.fixture
def two_per_task(monkeypatch) -> None:
    monkeypatch.setattr(pipelines.training_stream, "_MAX_CLIPS_PER_TASK", 2)


def plan_with_empty_parts() -> list[np.ndarray]:
    """An epoch in random order, with steps of no rows, of failures alone, and of one row several times."""
    steps = EpochOrder(NUM_CLIPS, seed=1).steps(0, 5, rank=0, world=1)
    return [NOTHING, *steps[:2], np.array(CHANGED[:2]), NOTHING, *steps[2:], np.array([3, 3, 0, 3]), NOTHING]


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray", "two_per_task")
def test_each_source_gives_what_a_loop_gives(tmp_path, manifest):
    half, whole = str(tmp_path / "half"), str(tmp_path / "whole")
    fill(manifest, VIEW, half, 10 * clip_bytes(VIEW))  # with two of the four failures
    fill(manifest, VIEW, whole, 1 << 40)
    sources: list[ClipSource] = [
        StreamedClips(manifest, LABELS, VIEW),
        StreamedClips(manifest, LABELS, VIEW, half),
        StreamedClips(manifest, LABELS, VIEW, str(tmp_path / "nothing yet")),
        CachedClips(whole, manifest, LABELS, VIEW),
    ]
    plan = plan_with_empty_parts()
    for source in sources:
        assert len(source) == NUM_CLIPS and source.failures == {}
        for _ in range(2):  # epochs; a failure is told once
            assert_batches(list(source.batches(plan)), plan, manifest)
            assert len(source.failures) == len(CHANGED)
        assert source.failures == sources[0].failures
        assert list(source.batches([])) == []
        assert [len(batch.samples_B) for batch in source.batches([NOTHING, NOTHING])] == [0, 0]
    name = f"{manifest['video'][CHANGED[0]]} [0.00, 1.00)"
    assert sources[0].failures[name] == "missing: the file has changed since it was planned; plan again"


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_signed_addresses_are_read_by_every_source_and_kept_by_none(web, tmp_path):
    local = write_videos(web.folder)
    web.query = "X-Amz-Signature=5ecret"
    videos = [
        dataclasses.replace(video, uri=f"{web.url}/{Path(video.uri).name}?{web.query}")
        for video in [*local, Video(uri="gone.mkv", label=LABELS[0])]
    ]
    signatures, planned_here = Signatures.of(video.uri for video in videos), planned(local)
    manifest, failures = training_manifest(videos, LABELS, PLAN)
    fill(manifest, VIEW, str(tmp_path / "cache"), 1 << 40, signatures)
    in_turn = [np.arange(NUM_CLIPS)]
    for source in (
        in_memory(videos, LABELS, PLAN, VIEW),
        StreamedClips(manifest, LABELS, VIEW, None, signatures),
        CachedClips(str(tmp_path / "cache"), manifest, LABELS, VIEW),
    ):
        assert_batches(list(source.batches(in_turn)), in_turn, planned_here)
        failures |= source.failures
    assert list(failures) == [f"{web.url}/gone.mkv"]
    assert "5ecret" not in str(failures) + str(manifest.to_pylist())
    assert not [path for path in (tmp_path / "cache").rglob("*.parquet") if b"5ecret" in path.read_bytes()]


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray", "two_per_task")
def test_a_stream_reads_ahead_only_so_far_and_can_be_left(tmp_path, manifest, monkeypatch):
    read_rows, log = pipelines.training_stream._read_rows, tmp_path / "log"
    log.mkdir()

    def counted(asked, origin):  # in another process
        (log / f"{time.time_ns()}-{id(asked)}").touch()
        table = read_rows(asked, origin)
        filler = pa.array([bytes(1 << 20)] * len(table), pa.large_binary())  # clips of a megabyte
        return table.append_column("filler", filler)

    monkeypatch.setattr(pipelines.training_stream, "_read_rows", counted)
    monkeypatch.setattr(pipelines.training_stream, "_WAITING_BYTES", 16 << 20)
    source = StreamedClips(manifest, LABELS, VIEW)
    batches = source.batches([np.array([step % 8, step % 8 + 1]) for step in range(60)])
    for _ in itertools.islice(batches, 3):
        most = quiet_count(log)
        assert most <= 20
    batches.close()
    done = quiet_count(log)
    assert done < 30
    (batch,) = source.batches([np.array([5])])
    assert batch.samples_B.tolist() == [5]


def quiet_count(folder: Path) -> int:
    """How many files there are once no more of them come."""
    count, since_s = -1, time.monotonic()
    while time.monotonic() - since_s < 0.7:
        found = len(list(folder.iterdir()))
        if found != count:
            count, since_s = found, time.monotonic()
        time.sleep(0.02)
    return count


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_the_training_manifest_is_that_of_a_loop_and_names_unreadable_videos(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.ingest._VIDEOS_PER_TASK", 1)
    videos = write_videos(tmp_path)
    expected = planned(videos)
    for name, content in (("damaged.mp4", b""), ("text.mp4", b"this is no video\n" * 100)):
        (tmp_path / name).write_bytes(content)
        videos.append(Video(uri=str(tmp_path / name), label="left"))
    found = training_manifest(videos[::-1], LABELS, PLAN)
    assert found.rows.equals(expected) and found.rows.schema.equals(MANIFEST)
    assert {Path(name).name: reason.split(":")[0] for name, reason in found.failures.items()} == {
        "damaged.mp4": "empty",
        "text.mp4": "decode_error",
    }


def test_without_videos_there_are_no_rows():
    found = training_manifest([], LABELS, PLAN)
    assert len(found.rows) == 0 and found.rows.schema.equals(MANIFEST) and not found.failures


def test_labels_that_the_model_does_not_know_are_named(tmp_path, manifest):
    with pytest.raises(ValueError, match="does not know: 'right'"):
        StreamedClips(manifest, ("left",), VIEW)
    with pytest.raises(ValueError, match="does not know: 'right'"):
        CachedClips(str(tmp_path), manifest, ("left",), VIEW)


def test_rows_of_one_video_share_a_pass_wherever_they_stand(manifest, monkeypatch):
    decode, passes = pipelines.manifest.decode_guarded, []

    def counted(requests, *rest):
        passes.extend(len(request.spans) for request in requests)
        return decode(requests, *rest)

    monkeypatch.setattr(pipelines.manifest, "decode_guarded", counted)
    monkeypatch.setattr(pipelines.training_stream.ray, "get", lambda origin: origin)
    origin = StreamedClips(manifest, LABELS, VIEW)._origin
    asked = pa.table({"sample": [7, 0, 9, 5, 0, 2]})
    rows = pipelines.training_stream._read_rows(asked, origin)
    assert rows["sample"].to_pylist() == asked["sample"].to_pylist()
    assert [frames is None for frames in rows["frames"].to_pylist()] == [False, False, True, False, False, False]
    assert passes == [2, 2]


def test_a_cache_is_read_ahead_only_so_far_and_can_be_left(tmp_path, manifest, monkeypatch):
    write = pipelines.fill_cache._committing
    cache = ClipCache.open(str(tmp_path), VIEW)
    with write(cache) as commit:
        commit("all.parquet", cached_rows(manifest, VIEW))
    read_into, reads, lock = ClipCache.read_into, [], threading.Lock()

    def counted(self, *arguments):
        with lock:
            reads.append(arguments)
        read_into(self, *arguments)

    monkeypatch.setattr(ClipCache, "read_into", counted)
    plan = [np.array([step % 8, (step + 1) % 8]) for step in range(50)]
    batches = CachedClips(str(tmp_path), manifest, LABELS, VIEW).batches(plan)
    for step in range(5):
        next(batches)
        assert len(reads) <= 2 * (step + 1 + BATCHES_AHEAD)
    batches.close()
    assert len(reads) <= 2 * (5 + BATCHES_AHEAD)
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name and thread.is_alive()]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_work_starts_when_it_is_within_reach(depth):
    started = []

    def start(number: int):
        started.append(number)
        return lambda: number * 10

    for step, result in enumerate(read_ahead((start(number) for number in range(8)), depth)):
        assert result == step * 10
        assert started == list(range(min(8, step + 1 + depth)))
    assert list(read_ahead([], depth)) == []
