"""Labelled videos as training clips, uint8: planned, and decoded as training goes on Ray Data.

Shapes: B clips, T frames of H x W pixels; S rows of a manifest.
"""

import functools
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ExecutionResources

from mone.clips import Batch
from pipelines.archive import Video
from pipelines.clip_cache import ClipCache, Places
from pipelines.clip_source import classes_of, clip_bytes, frames_like, name_of, read_ahead
from pipelines.decoded import Clip, Outcome
from pipelines.ingest import DECODE_MEMORY_BYTES, plan_stage
from pipelines.manifest import decode_planned
from pipelines.schema import MANIFEST, PlannedClip, Status
from pipelines.storage.signatures import UNSIGNED, Signatures
from pipelines.timeline import ClipPlan
from pipelines.view import View

# Frames of a task: seconds of decoding, against tens of milliseconds for a task.
_TASK_BYTES = 32 << 20
_MAX_CLIPS_PER_TASK = 16
# Frames that wait in the object store for one reader; several of them share a node.
_WAITING_BYTES = 1 << 30
# Tasks whose results are fetched to this node before they are asked for.
_TASKS_AHEAD = 2

_STREAMED = pa.schema(
    [
        ("sample", pa.int64()),
        ("frames", pa.large_binary()),  # uint8 [T, H, W, 3]; null after a failure
        ("reason", pa.string()),
    ]
)


class TrainingManifest(NamedTuple):
    """MANIFEST rows, one a training clip, and the reason for each video that cannot be read."""

    rows: pa.Table
    failures: dict[str, str]


def training_manifest(videos: Sequence[Video], labels: Sequence[str], plan: ClipPlan) -> TrainingManifest:
    """Plan the clips of labelled videos; needs Ray.

    Returns:
        Rows by video and start, whatever the order of the videos and of Ray.

    Raises:
        ValueError: A label that is none of `labels`.
    """
    tables = plan_stage(videos, plan).iter_batches(batch_size=None, batch_format="pyarrow") if videos else ()
    planned = pa.concat_tables([MANIFEST.empty_table(), *tables]).combine_chunks()
    planned = planned.sort_by([("video", "ascending"), ("start_s", "ascending")])
    classes_of(planned, labels)
    readable = np.array([status == Status.OK for status in planned["status"].to_pylist()], dtype=bool)
    failed = planned.filter(pa.array(~readable)).to_pylist()
    reasons = {row["video"]: f"{row['status']}: {row['error']}" for row in failed}
    return TrainingManifest(planned.filter(pa.array(readable)), reasons)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Origin:
    """What a task needs to know to read any row."""

    manifest: pa.Table
    signatures: Signatures
    view: View
    cache: ClipCache | None
    places: Places | None


class StreamedClips:
    """A `ClipSource` that reads clips as they are needed, on all CPUs of the cluster: from a cache, or their videos.

    It knows nothing of workers: each asks for its own rows, in the process that trains.
    """

    def __init__(
        self,
        manifest: pa.Table,
        labels: Sequence[str],
        view: View,
        cache_uri: str | None = None,
        signatures: Signatures = UNSIGNED,
    ) -> None:
        """Look up which clips are in the cache.

        Args:
            manifest: MANIFEST rows.
            labels: Name of each class.
            view: Frames and size.
            cache_uri: As `ClipCache.open`.
            signatures: What signed addresses are read with.

        Raises:
            CacheError: A cache that cannot be used.
            ValueError: A label that is none of `labels`.
        """
        self.manifest, self.view, self.classes_S = manifest, view, classes_of(manifest, labels)
        self.failures: dict[str, str] = {}
        cache = ClipCache.open(cache_uri, view) if cache_uri else None
        places = cache.find(manifest["clip_id"]) if cache else None
        self._origin = _Origin(manifest=manifest, signatures=signatures, view=view, cache=cache, places=places)

    def __len__(self) -> int:
        """Rows of the manifest."""
        return len(self.manifest)

    def batches(self, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        """A batch for each array of rows; needs Ray."""
        rows = _stream(self._origin, np.concatenate([np.empty(0, np.int64), *plan]))
        pool = ThreadPoolExecutor(1)  # rows come one after the other; what is read ahead is copied meanwhile
        try:
            yield from read_ahead(pool.submit(self._collate, rows, samples_B).result for samples_B in plan)
        finally:
            pool.shutdown(cancel_futures=True)
            rows.close()

    def _collate(self, rows: Iterator["_Row"], samples_B: np.ndarray) -> Batch:
        """The next rows, which are those of one batch."""
        frames_BTHWC = frames_like(self.view, len(samples_B))
        slots = iter(frames_BTHWC.numpy())
        readable: list[int] = []
        for planned in samples_B.tolist():
            sample, frames, reason = next(rows)
            assert sample == planned, f"row {sample} came where {planned} was asked for"
            if frames is None:
                self.failures[name_of(self.manifest, sample)] = reason
            else:
                slot_THWC = next(slots)
                slot_THWC[:] = np.frombuffer(frames, np.uint8).reshape(slot_THWC.shape)
                readable.append(sample)
        read_B = np.array(readable, dtype=np.int64)
        labels_B = torch.from_numpy(self.classes_S[read_B])
        return Batch(frames_BTHWC[: len(readable)], labels_B, torch.from_numpy(read_B))


class _Row(NamedTuple):
    sample: int
    frames: pa.Buffer | None
    reason: str


def _stream(origin: _Origin, samples: np.ndarray) -> Generator[_Row, None, None]:
    """Rows of the manifest with their frames, one for one, in the order asked for."""
    if not len(samples):
        return
    clips_per_task = max(1, min(_MAX_CLIPS_PER_TASK, _TASK_BYTES // clip_bytes(origin.view)))
    asked = ray.data.from_arrow(pa.table({"sample": samples}))
    options = asked.context.execution_options
    options.preserve_order = True
    options.resource_limits = ExecutionResources.for_limits(object_store_memory=_WAITING_BYTES)
    asked.context.enable_progress_bars = False  # the trainer has its own
    read = asked.repartition(target_num_rows_per_block=clips_per_task).map_batches(
        functools.partial(_read_rows, origin=ray.put(origin)),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=1,  # both decoders run on one thread
        memory=DECODE_MEMORY_BYTES,
    )
    for table in read.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=_TASKS_AHEAD):
        for sample, frames, reason in zip(*(table[name] for name in _STREAMED.names), strict=True):
            yield _Row(sample.as_py(), frames.as_buffer(), reason.as_py())


def _read_rows(asked: pa.Table, origin: ray.ObjectRef) -> pa.Table:
    """The rows of one task: those of one video share a pass over it, wherever they stand among the others."""
    samples, whole = asked["sample"].to_numpy(), ray.get(origin)
    distinct = np.unique(samples)  # by video and start, as the manifest is
    is_cached = whole.places.shard_S[distinct] >= 0 if whole.places else np.zeros(len(distinct), dtype=bool)
    clips = [PlannedClip(**row) for row in whole.manifest.take(distinct[~is_cached]).to_pylist()]
    decoded = decode_planned(clips, whole.view, signatures=whole.signatures)
    outcomes = dict(zip(distinct[~is_cached].tolist(), decoded, strict=True))

    # Pixels are written once, to where the table has them.
    pixels, end = np.empty((len(samples), clip_bytes(whole.view)), np.uint8), 0
    ends, reasons = [0], []
    for sample in samples.tolist():
        reason = _read_clip(pixels[end], outcomes.get(sample), sample, whole)
        end += not reason
        ends.append(end)
        reasons.append(reason)
    has_frames = pa.array([not reason for reason in reasons])
    offsets = np.array(ends, dtype=np.int64) * pixels.shape[1]
    buffers = [has_frames.buffers()[1], pa.py_buffer(offsets), pa.py_buffer(pixels)]
    frames = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(samples), buffers)
    return pa.table([samples, frames, pa.array(reasons, pa.string())], schema=_STREAMED)


def _read_clip(pixels: np.ndarray, outcome: Outcome | None, sample: int, origin: _Origin) -> str:
    """Put a clip where it is wanted, decoded or, without an outcome, from the cache; returns why it cannot be."""
    if isinstance(outcome, Clip):
        pixels[:] = outcome.frames_THWC.reshape(-1)
        return ""
    if outcome is not None:
        return f"{outcome.status}: {outcome}"
    assert origin.cache and origin.places
    if sample in origin.places.reasons:
        return origin.places.reasons[sample]
    origin.cache.read_into(pixels, *origin.places.of(sample))
    return ""
