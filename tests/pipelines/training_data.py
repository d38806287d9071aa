"""A small data set for tests of the training stream: lossless videos, one of which changes after it was planned."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from mone.clips import Batch
from pipelines.archive import Video
from pipelines.decoded import Clip
from pipelines.manifest import decode_planned, plan_video
from pipelines.schema import MANIFEST, PlannedClip
from pipelines.timeline import ClipPlan
from pipelines.view import View
from tests.media import indexed_frames, write_video

VIEW = View(num_frames=4, height_px=32, width_px=32)
PLAN = ClipPlan(span_s=1.0)
LABELS = ("left", "right")
NUM_CLIPS, CHANGED = 16, [8, 9, 10, 11]  # rows of the video that has changed


def write_videos(folder: Path) -> list[Video]:
    """Four videos of four clips."""
    return [
        Video(
            uri=str(write_video(folder / f"{number}.mkv", indexed_frames(40, 48, 32, first=40 * number))),
            label=LABELS[number % 2],
        )
        for number in range(4)
    ]


def planned(videos: Sequence[Video]) -> pa.Table:
    """The manifest of a loop."""
    rows = [dataclasses.asdict(clip) for video in videos for clip in plan_video(video, PLAN)]
    return pa.Table.from_pylist(rows, schema=MANIFEST)


def with_a_changed_video(folder: Path) -> pa.Table:
    """Rows of four videos, of which the third is another file by now."""
    manifest = planned(write_videos(folder))
    with (folder / "2.mkv").open("ab") as file:
        file.write(b"more")
    return manifest


def frames_of(manifest: pa.Table) -> list[np.ndarray | None]:
    """What a loop decodes, or None."""
    outcomes = decode_planned([PlannedClip(**row) for row in manifest.to_pylist()], VIEW)
    return [outcome.frames_THWC if isinstance(outcome, Clip) else None for outcome in outcomes]


def assert_batches(batches: list[Batch], plan: Sequence[np.ndarray], manifest: pa.Table) -> None:
    """The batches are what a loop over the plan gives."""
    frames, labels = frames_of(manifest), manifest["label"].to_pylist()
    assert len(batches) == len(plan)
    for batch, samples in zip(batches, plan, strict=True):
        readable = [sample for sample in samples.tolist() if frames[sample] is not None]
        assert batch.samples_B.tolist() == readable
        assert [LABELS[label] for label in batch.labels_B.tolist()] == [labels[sample] for sample in readable]
        assert batch.frames_BTHWC.shape == (len(readable), 4, 32, 32, 3)
        for found, sample in zip(batch.frames_BTHWC, readable, strict=True):
            np.testing.assert_array_equal(found.numpy(), frames[sample])
