"""Labelled videos as training clips, uint8: planned, decoded as training goes on Ray Data, or all in memory.

Shapes: B clips, T frames of H x W pixels; S rows of a manifest; F temporal indices, N tokens each, P values per patch.
"""

import functools
import multiprocessing
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ExecutionResources
from tqdm import tqdm

from mone.config import ModelConfig
from mone.training import MemoryClips
from mone.tubelets import to_patches
from pipelines.annotate import DECODE_MEMORY_BYTES, plan_stage
from pipelines.archive import Video
from pipelines.clip_cache import ClipCache, Places
from pipelines.clip_source import Batch, classes_of, clip_bytes, frames_like, name_of, read_ahead
from pipelines.decode import Clip, Outcome, decode_clips
from pipelines.manifest import decode_planned, plan_video, source_of
from pipelines.schema import MANIFEST, PlannedClip, Status
from pipelines.timeline import ClipPlan
from pipelines.tokenize import view_of
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
    view: View
    cache: ClipCache | None
    places: Places | None


class StreamedClips:
    """A `ClipSource` that reads clips as they are needed, on all CPUs of the cluster: from a cache, or their videos.

    It knows nothing of workers: each asks for its own rows, in the process that trains.
    """

    def __init__(self, manifest: pa.Table, labels: Sequence[str], view: View, cache_uri: str | None = None) -> None:
        """Look up which clips are in the cache.

        Raises:
            CacheError: A cache that cannot be used.
            ValueError: A label that is none of `labels`.
        """
        self.manifest, self.view, self.classes_S = manifest, view, classes_of(manifest, labels)
        self.failures: dict[str, str] = {}
        cache = ClipCache.open(cache_uri, view) if cache_uri else None
        places = cache.find(manifest["clip_id"]) if cache else None
        self._origin = _Origin(manifest=manifest, view=view, cache=cache, places=places)

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
    outcomes = dict(zip(distinct[~is_cached].tolist(), decode_planned(clips, whole.view), strict=True))

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


class Example(NamedTuple):
    """One training clip: uint8 patches [F, N, P] and its class."""

    patches_FNP: np.ndarray
    label: int


class LabelledClips(NamedTuple):
    """Clips, and the reason for each video or clip that could not be read, by name."""

    clips: MemoryClips
    failures: dict[str, str]


def labelled(
    videos: Sequence[Video],
    labels: Sequence[str],
    plan: ClipPlan,
    config: ModelConfig,
    *,
    num_workers: int | None = None,
) -> LabelledClips:
    """Decode the clips of labelled videos, in as many processes as there are cores.

    Returns:
        The clips, in the order of the videos; what cannot be read is left out, never replaced.
    """
    failures: dict[str, str] = {}

    def readable(outcomes: Iterable[tuple[list[Example], dict[str, str]]]) -> Iterator[Example]:
        for examples, reasons in outcomes:
            failures.update(reasons)
            yield from examples

    with _pool(num_workers) as pool:
        read = functools.partial(_read, labels=tuple(labels), plan=plan, config=config)
        outcomes = tqdm(pool.imap(read, videos, chunksize=4), "decode", len(videos), unit="video", mininterval=2)
        return LabelledClips(_collect(readable(outcomes), config), failures)


def _read(
    video: Video, labels: tuple[str, ...], plan: ClipPlan, config: ModelConfig
) -> tuple[list[Example], dict[str, str]]:
    clips = plan_video(video, plan)
    if clips[0].status != Status.OK:
        return [], {video.uri: f"{clips[0].status}: {clips[0].error}"}
    outcomes = decode_clips(source_of(clips[0]), [(clip.start_s, clip.end_s) for clip in clips], view_of(config))
    examples, reasons = [], {}
    for clip, outcome in zip(clips, outcomes, strict=True):
        if isinstance(outcome, Clip):
            examples.append(Example(to_patches(outcome.frames_THWC, config), labels.index(video.label)))
        else:
            reasons[f"{video.uri} [{clip.start_s:.2f}, {clip.end_s:.2f})"] = f"{outcome.status}: {outcome}"
    return examples, reasons


def _pool(num_workers: int | None):
    # Not fork: the parent has torch's threads.
    return multiprocessing.get_context("spawn").Pool(num_workers)


def _collect(examples: Iterable[Example], config: ModelConfig) -> MemoryClips:
    patches, labels = [], []
    for example in examples:
        patches.append(torch.from_numpy(np.ascontiguousarray(example.patches_FNP)))
        labels.append(example.label)
    shape = (0, config.num_indices, config.num_tokens, config.patch_values)
    stacked = torch.stack(patches) if patches else torch.empty(shape, dtype=torch.uint8)
    return MemoryClips(stacked, torch.tensor(labels, dtype=torch.int64))
