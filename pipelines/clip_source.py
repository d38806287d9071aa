"""What the sources of training clips share: reading ahead, classes, names and sizes.

Shapes: B clips, T frames of H x W pixels; S rows of the manifest.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipelines.view import View

T = TypeVar("T")

# Batches that are being read while one is used: one to hand over, one for a slow file.
BATCHES_AHEAD = 2


def read_ahead(started: Iterable[Callable[[], T]], depth: int = BATCHES_AHEAD) -> Iterator[T]:
    """Results of work that starts when it is taken from `started`: up to `depth` more than what was asked for.

    Args:
        started: Each item waits for its work to end and returns the result.
        depth: Bounds the work in flight, and so the memory.
    """
    waiting: deque[Callable[[], T]] = deque()
    for finish in started:
        waiting.append(finish)
        if len(waiting) > depth:
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()


def classes_of(manifest: pa.Table, labels: Sequence[str]) -> np.ndarray:
    """The class of each row, int64 [S].

    Raises:
        ValueError: A label that is none of `labels`.
    """
    number = {label: index for index, label in enumerate(labels)}
    unknown = set(manifest["label"].unique().to_pylist()) - number.keys()
    if unknown:
        raise ValueError(f"labels that the model does not know: {', '.join(sorted(map(repr, unknown))[:5])}")
    return np.array([number[label] for label in manifest["label"].to_pylist()], dtype=np.int64)


def name_of(manifest: pa.Table, sample: int) -> str:
    """A row's name for a person."""
    video, start_s, end_s = (manifest[name][sample].as_py() for name in ("video", "start_s", "end_s"))
    return f"{video} [{start_s:.2f}, {end_s:.2f})"


def clip_bytes(view: View) -> int:
    """Bytes of a clip's frames."""
    return view.num_frames * view.height_px * view.width_px * 3


def frames_like(view: View, num_clips: int) -> Tensor:
    """Room for the frames of a batch, uint8 [B, T, H, W, 3]."""
    shape = (num_clips, view.num_frames, view.height_px, view.width_px, 3)
    return torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
