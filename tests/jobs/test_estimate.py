"""The cost of a manifest: counts exactly, compute by the formula, times as measured on the sample."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jobs.estimate
from jobs.estimate import Estimate, estimate
from mone.compute import clip_compute
from pipelines.archive import list_videos
from pipelines.manifest import plan_video
from pipelines.schema import MANIFEST
from pipelines.timeline import ClipPlan
from tests.conftest import NUM_CLIPS, NUM_VIDEOS, TINY


def manifest_of(folder: Path, videos, plan: ClipPlan = ClipPlan(span_s=1.0)) -> Path:  # noqa: B008 - frozen
    rows = [dataclasses.asdict(clip) for video in videos for clip in plan_video(video, plan)]
    (folder / "manifest").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=MANIFEST), folder / "manifest" / "rows.parquet")
    return folder / "manifest"


@pytest.mark.parametrize("capacity", [0.2, 1.0])
def test_counts_and_compute(tmp_path, archive, checkpoint, capacity):
    found = estimate(manifest_of(tmp_path, list_videos(str(archive))), checkpoint, capacity)
    assert (found.videos, found.clips, found.planned_failures) == (NUM_VIDEOS + 2, NUM_CLIPS, 2)
    assert found.hours == pytest.approx(2 * NUM_VIDEOS / 3600, rel=0.01)
    assert found.flops == 2 * NUM_VIDEOS * clip_compute(TINY, capacity).flops
    assert found.dense_flops == 2 * NUM_VIDEOS * clip_compute(TINY, 1.0).flops
    assert found.num_sampled == 16 and found.model_s > 0
    assert 0 <= found.decode_core_s[0] <= found.decode_core_s[1]
    text = str(found)
    assert f"{NUM_VIDEOS + 2} (2 cannot be read)" in text and f"{NUM_CLIPS}, " in text


def test_a_sample_is_scaled_up_with_its_interval(tmp_path, archive, checkpoint, monkeypatch):
    sampled = []

    def measure(sample, checkpoint, capacity, limits):
        sampled.extend(sample["start_s"].to_pylist())
        return np.linspace(0.1, 0.3, len(sample)), 0.5

    monkeypatch.setattr(jobs.estimate, "_measure", measure)
    plan = ClipPlan(span_s=0.2, stride_s=0.05)
    found = estimate(manifest_of(tmp_path, list(list_videos(str(archive)))[:1], plan), checkpoint, 0.4)
    assert len(sampled) == 16 and sampled[0] == 0 and sampled[-1] == pytest.approx(1.8, abs=0.01)
    assert sum(found.decode_core_s) / 2 == pytest.approx(0.2 * found.clips)
    margin = 1.96 * np.linspace(0.1, 0.3, 16).std(ddof=1) / 4
    assert np.diff(found.decode_core_s)[0] / 2 == pytest.approx(margin * found.clips)
    assert found.model_s == pytest.approx(0.5 * found.clips)


def test_nothing_that_can_be_read_costs_nothing(tmp_path, archive, checkpoint):
    found = estimate(manifest_of(tmp_path, list(list_videos(str(archive)))[-2:]), checkpoint, 0.4)
    assert (found.clips, found.planned_failures, found.flops, found.num_sampled) == (2, 2, 0, 0)
    assert found.decode_core_s == (0, 0) and found.model_s == 0 and "0.00 hours" in str(found)


def test_a_single_clip_has_no_interval(tmp_path, archive, checkpoint):
    plan = ClipPlan(span_s=1.0, clips_per_video=1)
    found = estimate(manifest_of(tmp_path, list(list_videos(str(archive)))[:1], plan), checkpoint, 0.4)
    assert found.num_sampled == 1 and found.decode_core_s[0] == found.decode_core_s[1] > 0


@pytest.mark.parametrize("seconds, text", [(0, "0.0 s"), (59, "59.0 s"), (60, "1.0 min"), (5400, "1.5 h")])
def test_times_are_for_people(seconds, text):
    zero = {field.name: 0 for field in dataclasses.fields(Estimate)} | {"decode_core_s": (0.0, 0.0)}
    assert f"model    {text} on one worker" in str(Estimate(**zero | {"model_s": seconds}))
