"""Three ways from planned clips to frames of a model's size, for comparison: ours, Ray's own, and decoders alone.

Each hands all frames to one consumer that drops them.
"""

import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.pool import Pool
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import ray.data

from mone.checkpoint import Checkpoint
from mone.config import ModelConfig
from pipelines import nvdec
from pipelines.annotate import model_stage
from pipelines.decode import chain_of, decode_clips
from pipelines.decoded import Clip, Source
from pipelines.heap import keep_memory
from pipelines.ingest import CLIPS_TOGETHER, tokenize_stage
from pipelines.limits import DecoderChoice
from pipelines.manifest import by_video, source_of
from pipelines.patches import view_of
from pipelines.placement import Placement
from pipelines.predict import Annotator
from pipelines.schema import MANIFEST, PlannedClip, Status
from pipelines.timeline import instants
from pipelines.view import WHOLE_CLIPS, View

# Clips of a file that a decoder alone is given at once; each time it looks for a key frame before them.
_CLIPS_AT_ONCE = CLIPS_TOGETHER


class Done(NamedTuple):
    """What came out of a side: frames of each clip, and clips that failed.

    Attributes:
        frames: By clip.
        failed: Clips.
        decoders: Clips by their decoder; where a side tells.
        model_s: Seconds of the model; where there is one.
        busy_s: Seconds of all processes in which they decoded; of decoders alone.
    """

    frames: Counter[str]
    failed: int
    decoders: Mapping[str, int] = MappingProxyType({})
    model_s: float = 0.0
    busy_s: float = 0.0


def ours(manifest: str, config: ModelConfig) -> Done:
    """The stage of the annotation graph that decodes, as it is."""
    decoded = _decoded(manifest, config)
    frames: Counter[str] = Counter()
    failed = 0
    clip_bytes = config.num_indices * config.num_tokens * config.patch_values
    table: Any
    for table in decoded.iter_batches(batch_size=None, batch_format="pyarrow"):
        for clip_id, patches in zip(table["clip_id"].to_pylist(), table["patches"], strict=True):
            size = 0 if (buffer := patches.as_buffer()) is None else len(buffer)
            frames[clip_id] += config.num_frames * size // clip_bytes
            failed += not size
    return Done(frames, failed)


def annotated(
    manifest: str,
    checkpoint: Checkpoint,
    capacity: float,
    *,
    decoder: DecoderChoice = "cpu",
    num_clips: int = 0,
    batch_size: int = 0,
    placement: Placement | None = None,
) -> Done:
    """The annotation graph up to its rows: decoding and the model; `num_clips` as if there were so many."""
    rows = model_stage(
        _decoded(manifest, checkpoint.config, decoder, num_clips),
        Annotator,
        (checkpoint, capacity, 5),
        batch_size=batch_size,
        placement=placement,
    )
    frames, decoders = Counter[str](), Counter[str]()
    failed, model_s = 0, 0.0
    table: Any
    for table in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
        for clip_id, status in zip(table["clip_id"].to_pylist(), table["status"].to_pylist(), strict=True):
            is_ok = status == Status.OK
            frames[clip_id] += checkpoint.config.num_frames * is_ok
            failed += not is_ok
        decoders.update(table["decoder"].to_pylist())
        model_s += sum(table["model_ms"].to_pylist()) / 1e3
    return Done(frames, failed, decoders, model_s)


def _decoded(
    manifest: str, config: ModelConfig, decoder: DecoderChoice = "cpu", num_clips: int = 0
) -> ray.data.Dataset:
    planned = ray.data.read_parquet(manifest, schema=MANIFEST)
    return tokenize_stage(planned, config, WHOLE_CLIPS, decoder=decoder, num_clips=num_clips or planned.count())


def read_videos(clips: Sequence[PlannedClip], view: View, *, resize_in_reader: bool) -> Done:
    """`ray.data.read_videos` as its documentation shows it: a row for each frame, of which some are taken.

    Frames of a clip are not put together again, which would take a shuffle.

    Args:
        clips: Of the manifest.
        view: Frames and size wanted.
        resize_in_reader: Whether the reader resizes, which is the fastest that it can do, or the stage after it.
    """
    spans: dict[str, list[tuple[str, np.ndarray]]] = {}
    for clip in clips:
        spans.setdefault(clip.video, []).append((clip.clip_id, instants(clip.start_s, clip.end_s, view.num_frames)))
    width_px, height_px = view.scaled_size(clips[0].width_px, clips[0].height_px)
    shown = ray.data.read_videos(
        list(spans),
        include_paths=True,
        include_timestamps=True,
        resize=(height_px, width_px) if resize_in_reader else None,
    ).map_batches(_Pick(spans, view, (width_px, height_px)), batch_size=32)
    frames: Counter[str] = Counter()
    batch: Any
    for batch in shown.iter_batches(batch_size=None):
        frames.update(batch["clip_id"].tolist() if len(batch["clip_id"]) else [])
    return Done(frames, sum(frames[clip.clip_id] == 0 for clip in clips))


class _Pick:
    """Takes the frames on display at the instants of the clips, in the size of the model."""

    def __init__(
        self, instants_of_clips: dict[str, list[tuple[str, np.ndarray]]], view: View, size_px: tuple[int, int]
    ) -> None:
        self.instants_of_clips, self.view, self.size_px = instants_of_clips, view, size_px

    def __call__(self, batch: Any) -> Any:
        """From rows of `read_videos` to a row for each frame of a clip; columns as arrays."""
        ids: list[str] = []
        frames: list[np.ndarray] = []
        for path, frame_HWC, (start_s, end_s) in zip(
            batch["path"], batch["frame"], batch["frame_timestamp"], strict=True
        ):
            for clip_id, times_s in self.instants_of_clips[path]:
                count = int(((times_s + 1e-3 >= start_s) & (times_s + 1e-3 < end_s)).sum())
                if count:
                    ids += [clip_id] * count
                    frames += [self._sized(frame_HWC)] * count
        shape = (0, self.view.height_px, self.view.width_px, 3)
        return {"clip_id": np.array(ids, dtype=object), "frame": np.stack(frames) if frames else np.empty(shape, "u1")}

    def _sized(self, frame_HWC: np.ndarray) -> np.ndarray:
        if frame_HWC.shape[:2] != self.size_px[::-1]:
            from PIL import Image

            frame_HWC = np.asarray(Image.fromarray(frame_HWC).resize(self.size_px, Image.Resampling.BICUBIC))
        return self.view.crop(frame_HWC)


class Decoders:
    """The limit: processes that decode and drop, as many as cores, with neither Ray nor tokens nor a consumer."""

    def __init__(self, count: int, choice: DecoderChoice = "cpu") -> None:
        """Start them."""
        self._choice: DecoderChoice = choice
        self._pool: Pool = multiprocessing.get_context("spawn").Pool(count, _start, (choice,))
        self._pool.map(_warm_up, range(count), chunksize=1)

    def decode(self, clips: Sequence[PlannedClip], config: ModelConfig) -> Done:
        """Decode all clips; a process that has done its part takes the next."""
        view, frames, failed, busy_s = view_of(config), Counter(), 0, 0.0
        work: list[_Work] = [(source, ids, spans, view, self._choice) for source, ids, spans in _requests(clips)]
        for shown, seconds in self._pool.imap_unordered(_decode, work, chunksize=1):
            frames.update(shown)
            failed += sum(count == 0 for count in shown.values())
            busy_s += seconds
        return Done(frames, failed, busy_s=busy_s)

    def close(self) -> None:
        """End the processes."""
        self._pool.terminate()
        self._pool.join()


def _requests(clips: Sequence[PlannedClip]) -> Iterator[tuple[Source, list[str], list[tuple[float, float]]]]:
    for of_video in by_video(clips):
        for start in range(0, len(of_video), _CLIPS_AT_ONCE):
            part = of_video[start : start + _CLIPS_AT_ONCE]
            ids, spans = [clip.clip_id for clip in part], [(clip.start_s, clip.end_s) for clip in part]
            yield source_of(of_video[0]), ids, spans


_Work = tuple[Source, list[str], list[tuple[float, float]], View, DecoderChoice]


def _decode(work: _Work) -> tuple[dict[str, int], float]:
    """Frames of each clip, and the seconds that took."""
    source, ids, spans, view, choice = work
    started_s = time.perf_counter()
    outcomes = decode_clips(source, spans, view, chain_of(source, choice))
    seconds = time.perf_counter() - started_s
    frames = [len(outcome.frames_THWC) if isinstance(outcome, Clip) else 0 for outcome in outcomes]
    return dict(zip(ids, frames, strict=True)), seconds


def _start(choice: DecoderChoice) -> None:
    """As processes of the pipeline that decode."""
    keep_memory()
    if choice != "cpu":
        nvdec.prepare()


def _warm_up(_: int) -> None:
    """Importing this module has imported the decoders."""
