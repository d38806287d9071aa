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

    Clips lie where Ray has them, each by itself. Put together in fresh memory and copied from there, a batch would cost
    ten times what the GPU needs for it.
    """

    def __init__(self, device: torch.device) -> None:
        """For a CUDA device."""
        self._device, self._slots = device, [_slot(0), _slot(0)]

    def to_device(
        self, clips: Sequence[np.ndarray], kept_BK: np.ndarray | None, count: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Clips of one shape as a batch on the device; this does not wait until they are there.

        Args:
            clips: uint8 [V, ...] each, `count` or fewer.
            kept_BK: int64 [B, K] of each clip, or nothing.
            count: Clips of the batch; if there are fewer, the last ones are anything.

        Returns:
            uint8 [count, V, ...], and int64 [count, K].
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
        if kept_BK is None:
            return batch, None
        filled_BK = np.resize(kept_BK, (count, kept_BK.shape[1]))  # the first ones again
        return batch, torch.from_numpy(filled_BK).to(self._device)


def _slot(num_bytes: int) -> _Slot:
    return _Slot(torch.empty(num_bytes, dtype=torch.uint8, pin_memory=num_bytes > 0), torch.cuda.Event())
