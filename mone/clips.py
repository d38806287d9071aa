"""Where training gets its clips from: one batch for each optimiser step, in an order that the trainer decides.

Shapes: B clips, T frames, H x W pixels, C = 3 channels, S samples of the data set.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor


class Batch(NamedTuple):
    """Some samples of a data set.

    Attributes:
        frames_BTHWC: uint8.
        labels_B: int64 classes.
        samples_B: int64 places in the data set, on the CPU; they key everything random about a clip.
    """

    frames_BTHWC: Tensor
    labels_B: Tensor
    samples_B: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Frames and labels on a device, from pinned memory without waiting for it; sample numbers key draws here."""
        frames_BTHWC, labels_B = (tensor.to(device, non_blocking=True) for tensor in self[:2])
        return Batch(frames_BTHWC, labels_B, self.samples_B)


class ClipSource(Protocol):
    """A data set of S clips.

    Attributes:
        failures: Why a clip could not be read, by its name; each once.
    """

    failures: dict[str, str]

    def __len__(self) -> int:
        """S."""
        ...

    def batches(self, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        """One batch for each array of sample numbers, in that order.

        A sample that cannot be read is left out, never replaced, so a batch can be smaller than planned, or empty.
        """
        ...


class MemoryClips:
    """Clips that lie in memory, of the training device where they fit.

    Attributes:
        frames_STHWC: uint8.
        labels_S: int64.
    """

    def __init__(self, frames_STHWC: Tensor, labels_S: Tensor) -> None:
        assert len(frames_STHWC) == len(labels_S)
        self.frames_STHWC, self.labels_S = frames_STHWC, labels_S
        self.failures: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.labels_S)

    def batches(self, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        """One batch for each array of sample numbers."""
        for samples in plan:
            chosen = torch.as_tensor(samples, dtype=torch.int64)
            there = sent(chosen, self.labels_S.device)
            yield Batch(self.frames_STHWC[there], self.labels_S[there], chosen)

    def to(self, device: torch.device | str) -> "MemoryClips":
        """The same clips on a device."""
        clips = MemoryClips(self.frames_STHWC.to(device), self.labels_S.to(device))
        clips.failures = self.failures
        return clips


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on a device, without waiting for the device: from pageable memory a copy waits for all its work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
