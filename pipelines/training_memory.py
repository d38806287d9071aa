"""Labelled videos as training clips in memory, decoded once, in up to as many processes as there are cores; no Ray."""

import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from mone.clips import MemoryClips
from pipelines.archive import Video
from pipelines.child import num_children
from pipelines.decoded import Clip
from pipelines.manifest import decode_planned, plan_video
from pipelines.schema import Status
from pipelines.storage.signatures import Signatures
from pipelines.timeline import ClipPlan
from pipelines.view import View


class _Read(NamedTuple):
    """What became of one video: frames [T, H, W, 3] of its clips, and reasons by name."""

    clips: list[np.ndarray]
    failures: dict[str, str]


def in_memory(
    videos: Sequence[Video], labels: Sequence[str], plan: ClipPlan, view: View, *, num_workers: int | None = None
) -> MemoryClips:
    """Decode the clips of labelled videos, in the order of the videos.

    What cannot be read is left out, never replaced; `failures` of the result says why.
    """
    frames: list[torch.Tensor] = []
    classes: list[int] = []
    failures: dict[str, str] = {}
    index_of = {label: index for index, label in enumerate(labels)}
    num_workers = num_workers or num_children(len(videos), os.cpu_count() or 1)
    with ThreadPoolExecutor(num_workers) as pool:  # each thread has a process that decodes
        read = functools.partial(_read, plan=plan, view=view)
        outcomes = tqdm(pool.map(read, videos), "decode", len(videos), unit="video", mininterval=2)
        for video, outcome in zip(videos, outcomes, strict=True):
            failures |= outcome.failures
            frames += [torch.from_numpy(clip) for clip in outcome.clips]
            classes += [index_of[video.label]] * len(outcome.clips)
    shape = (0, view.num_frames, view.height_px, view.width_px, 3)
    clips = MemoryClips(
        torch.stack(frames) if frames else torch.empty(shape, dtype=torch.uint8),
        torch.tensor(classes, dtype=torch.int64),
    )
    clips.failures = failures
    return clips


def _read(video: Video, plan: ClipPlan, view: View) -> _Read:
    planned = plan_video(video, plan)
    if planned[0].status != Status.OK:
        return _Read([], {video.address: f"{planned[0].status}: {planned[0].error}"})
    outcomes = decode_planned(planned, view, signatures=Signatures.of([video.uri]))
    failures = {
        f"{video.address} [{clip.start_s:.2f}, {clip.end_s:.2f})": f"{outcome.status}: {outcome}"
        for clip, outcome in zip(planned, outcomes, strict=True)
        if not isinstance(outcome, Clip)
    }
    return _Read([outcome.frames_THWC for outcome in outcomes if isinstance(outcome, Clip)], failures)
