"""Training clips in memory, uint8, from generated motions or from labelled videos."""

import functools
import multiprocessing
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mone.config import ModelConfig
from mone.training import Batch
from mone.tubelets import to_patches
from pipelines.synthetic import MOTIONS, render, split_seeds


class MemoryClips:
    """Clips that fit in memory, kept on the training device: a `mone.training.ClipSource`.

    Attributes:
        patches_SFNP: uint8 patches of all clips.
        labels_S: int64 classes.
    """

    def __init__(self, patches_SFNP: Tensor, labels_S: Tensor) -> None:
        assert len(patches_SFNP) == len(labels_S)
        self.patches_SFNP, self.labels_S = patches_SFNP, labels_S

    def __len__(self) -> int:
        return len(self.labels_S)

    def batches(self, batch_size: int, generator: torch.Generator | None) -> Iterator[Batch]:
        """One epoch; every clip once."""
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for chosen in order.to(self.labels_S.device).split(batch_size):
            yield Batch(self.patches_SFNP[chosen], self.labels_S[chosen])

    def to(self, device: torch.device) -> "MemoryClips":
        """The same clips on a device."""
        return MemoryClips(self.patches_SFNP.to(device), self.labels_S.to(device))


def collect(clips: Iterable[tuple[np.ndarray, int]], count: int, config: ModelConfig, what: str) -> MemoryClips:
    """Gather (patches uint8 [F, N, P], class) pairs into one tensor, with a progress bar."""
    shape = (config.num_indices, config.num_tokens, config.patch_values)
    patches_SFNP = torch.empty((count, *shape), dtype=torch.uint8)
    labels_S = torch.empty(count, dtype=torch.int64)
    for index, (patches_FNP, label) in enumerate(tqdm(clips, what, count, unit="clip", mininterval=2)):
        patches_SFNP[index] = torch.from_numpy(patches_FNP)
        labels_S[index] = label
    return MemoryClips(patches_SFNP, labels_S)


def motions(split: str, count: int, config: ModelConfig, *, num_workers: int | None = None) -> MemoryClips:
    """Render `count` motions of a split, in as many processes as there are cores."""
    with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
        rendered = pool.imap(functools.partial(_render, config=config), split_seeds(split, count), chunksize=16)
        return collect(rendered, count, config, f"render {split}")


def _render(seed: int, config: ModelConfig) -> tuple[np.ndarray[Any, Any], int]:
    clip = render(seed, num_frames=config.num_frames, size_px=config.height_px)
    return to_patches(clip.frames, config), MOTIONS.index(clip.label)
