"""Labelled videos as training clips in memory, uint8."""

import functools
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from mone.config import ModelConfig
from mone.training import MemoryClips
from mone.tubelets import to_patches
from pipelines.archive import Video
from pipelines.decode import Clip, decode_clips
from pipelines.manifest import plan_video, source_of
from pipelines.schema import Status
from pipelines.timeline import ClipPlan
from pipelines.tokenize import view_of


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
