"""The way of clips from the host's memory to a GPU."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch


class _Slot(NamedTuple):
    host: torch.Tensor
    has_left: torch.cuda.Event


class Staging:
    """Memory of the host that a GPU reads by itself: one batch is put there while another one is on its way.

    Clips lie where Ray has them, each by itself. To put a batch together in fresh memory and copy it from there takes
    three times as long as the base model itself, on an H100.
    """

    def __init__(self, device: torch.device) -> None:
        """For a CUDA device."""
        self._device, self._slots = device, [_slot(0), _slot(0)]

    def to_device(self, clips: Sequence[np.ndarray], count: int) -> torch.Tensor:
        """Clips of one shape as a batch on the device; this does not wait until they are there.

        Args:
            clips: uint8 [V, ...] each, `count` or fewer.
            count: Clips of the batch; if there are fewer, the last ones are anything.

        Returns:
            uint8 [count, V, ...].
        """
        self._slots.reverse()
        num_bytes = count * clips[0].nbytes
        if self._slots[0].host.nbytes < num_bytes:
            self._slots[0] = _slot(num_bytes)
        slot = self._slots[0]
        slot.has_left.synchronize()
        host = slot.host[:num_bytes].view(count, *clips[0].shape)
        for place, clip in zip(host.numpy(), clips, strict=False):
            np.copyto(place, clip)
        batch = host.to(self._device, non_blocking=True)
        slot.has_left.record()
        return batch


def _slot(num_bytes: int) -> _Slot:
    return _Slot(torch.empty(num_bytes, dtype=torch.uint8, pin_memory=num_bytes > 0), torch.cuda.Event())
