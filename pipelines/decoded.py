"""What decoders take and give: a file, frames of its spans, and what is said of them."""

import dataclasses
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from pipelines.failure import DecodeFailure
from pipelines.schema import Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A file and what the probe says of it: size as displayed, FFmpeg's names of container and codec, length."""

    path: str = field(repr=False)  # it may be signed
    width_px: int
    height_px: int
    container: str
    codec: str
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """How a span was decoded.

    Attributes:
        decoder: "decord", "pyav", "nvdec" or "torchcodec".
        note: What was unusual: why a decoder was passed over, damaged packets, instants past the last frame.
        repeated_share: Of the steps from one frame of the file to another, those at which no pixel changes: the scene
            stands still, or the decoder repeats a frame for one that it cannot decode.
    """

    decoder: str
    note: str = ""
    repeated_share: float = 0.0

    def with_note(self, note: str) -> Self:
        """The same with a note before its own."""
        return dataclasses.replace(self, note="; ".join(filter(None, (note, self.note))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip(Served):
    """Decoded frames of one span.

    Attributes:
        frames_THWC: uint8 RGB [T, H, W, 3].
    """

    frames_THWC: np.ndarray = field(repr=False)


class DecoderUnfit(Exception):  # noqa: N818 - the next decoder's turn
    """This decoder cannot serve this file."""


Outcome = Clip | DecodeFailure


def clip_of(frames_THWC: np.ndarray, index_T: np.ndarray, decoder: str, note: str) -> Clip:
    """A clip of frames that are known by a number each."""
    coarse = frames_THWC[:, ::16, ::16]
    is_step = np.diff(index_T) != 0
    maybe_same = np.flatnonzero(is_step & (coarse[1:] == coarse[:-1]).all(axis=(1, 2, 3)))
    num_same = sum(np.array_equal(frames_THWC[step], frames_THWC[step + 1]) for step in maybe_same)
    repeated_share = num_same / max(1, int(is_step.sum()))
    return Clip(frames_THWC=frames_THWC, decoder=decoder, note=note, repeated_share=repeated_share)


def nothing_there(span: tuple[float, float], end_s: float) -> DecodeFailure:
    """Of a span that starts after the video has ended."""
    return DecodeFailure(
        Status.DECODE_ERROR, f"nothing to show in [{span[0]:.2f}, {span[1]:.2f}) s: the video ends at {end_s:.2f} s"
    )


def short_note(shown: int, wanted: int) -> str:
    """Instants past the end repeat the last frame, and the row says how many."""
    return "" if shown == wanted else f"partial: {shown} of {wanted} frames, the last one repeated"
