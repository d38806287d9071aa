"""What a run trains on: labelled videos or generated motions, in memory or as streams."""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.cli import UserError
from mone.clips import MemoryClips
from pipelines.kept_clips import kept
from pipelines.synthetic import MOTIONS
from pipelines.synthetic_stream import motions
from pipelines.train_loop import Sources, TrainJob
from pipelines.view import View

MOTIONS_DATA = "motions"
SPLITS = ("train", "val", "test")
_MOTIONS_HELD_OUT = 1200


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Names of the classes, and the videos of each split; None where clips are generated."""

    labels: tuple[str, ...]
    videos: dict[str, list[Any]] | None = None


def training_data(data: str, split_column: str) -> TrainingData:
    """What there is; the test split trains and chooses nothing, and rows without a split are for training.

    Raises:
        ArchiveError: Data that cannot be listed.
        UserError: No training videos.
    """
    if data == MOTIONS_DATA:
        return TrainingData(MOTIONS)
    # Here, so that a machine which only renders needs no decoder.
    from pipelines.archive import list_labelled

    videos = list(list_labelled(data, split_column=split_column))
    parts = {split: [video for video in videos if (video.split or "train") == split] for split in SPLITS}
    if not parts["train"]:
        raise UserError(f"{data} has no rows with {split_column} 'train'")
    return TrainingData(tuple(sorted({video.label for video in videos})), parts)


def load_in_memory(data: TrainingData, job: TrainJob, num_clips: int, cache: str = "") -> list[MemoryClips]:
    """Clips of each split.

    Args:
        data: Videos, or none.
        job: Sizes and views.
        num_clips: Per training video; of generated data, training clips in all.
        cache: Folder where they are kept for the next time; "" is none.
    """
    views = _views(job)
    if data.videos is None:
        held_out = min(num_clips, _MOTIONS_HELD_OUT)
        counts = {"train": num_clips, "val": held_out, "test": held_out}
        loads = {split: functools.partial(motions, split, counts[split], views["test"]) for split in SPLITS}
    else:
        from pipelines.training_memory import in_memory

        loads = {
            split: functools.partial(
                in_memory, data.videos[split], job.labels, _plan(job, split, num_clips), views[split]
            )
            for split in SPLITS
        }
    return [kept(load, cache) if cache else load() for load in loads.values()]


def worker_sources(
    data: TrainingData, job: TrainJob, num_clips: int, cache: str, cache_bytes: int
) -> Callable[[], Sources]:
    """What a worker calls to get its clips. Videos are probed here, and decoded into the cache if there is one.

    Raises:
        CacheError: A cache that cannot be used.
        UserError: Nothing to train on.
    """
    if data.videos is None:
        return functools.partial(_generated, data, job, num_clips)
    from pipelines.storage.signatures import Signatures
    from pipelines.training_sources import count_clips, fill_cache, open_sources, prepare

    views, manifests = _views(job), {}
    for split in SPLITS:
        path = Path(job.output) / "data" / f"{split}.parquet"
        failures = prepare(data.videos[split], job.labels, _plan(job, split, num_clips), path)
        for name, reason in failures.items():
            print(f"left out {name}: {reason}", file=sys.stderr)
        manifests[split] = str(path)
    if not count_clips(manifests["train"]):
        raise UserError("no clip of the training split can be read")
    signatures = Signatures.of(video.uri for videos in data.videos.values() for video in videos)
    cached = fill_cache(manifests, views, cache, cache_bytes, signatures) if cache else {}
    return functools.partial(open_sources, manifests, job.labels, views, cache, cached, signatures)


def _generated(data: TrainingData, job: TrainJob, num_clips: int) -> Sources:
    return Sources(*load_in_memory(data, job, num_clips))


def _plan(job: TrainJob, split: str, clips_per_video: int):
    from pipelines.timeline import ClipPlan

    frames = job.model.num_frames + (job.train.num_spare_frames if split == "train" else 0)
    span_s = job.model.span_s * frames / job.model.num_frames
    return ClipPlan(span_s=span_s, clips_per_video=clips_per_video if split == "train" else 1)


def _views(job: TrainJob) -> dict[str, View]:
    """What is decoded: of training clips more than the model sees, with room for crops and jitter."""
    sizes, margin = job.model, job.train.frame_margin
    whole = View(num_frames=sizes.num_frames, height_px=sizes.height_px, width_px=sizes.width_px)
    roomy = View(
        num_frames=sizes.num_frames + job.train.num_spare_frames,
        height_px=round(sizes.height_px * margin),
        width_px=round(sizes.width_px * margin),
    )
    return {"train": roomy, "val": whole, "test": whole}
