"""Who reads a video, and what that may take: time that grows with the work, and memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipelines.view import View

if TYPE_CHECKING:  # the command line knows limits, and no decoder
    from pipelines.decoded import Source

# "auto": a GPU decodes beside CPUs, where there is one. "nvdec": it decodes what it can, CPUs the rest.
DecoderChoice = Literal["auto", "cpu", "nvdec"]

# What a slow disk reads in a second: a file without an index is read to its end.
_BYTES_PER_S = 20 << 20
# 1920 x 1080: a core decodes some hundred of such frames in a second, and is given a second for 30 of them.
_REFERENCE_PIXELS = 1920 * 1080
# Share of the memory that the frames of one call may take: decoders hold them twice, and more.
_FRAMES_SHARE = 1 / 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one file may take.

    Attributes:
        timeout_s: Wall-clock seconds that are always given; more is given for more work, see below.
        memory_bytes: What probing or decoding may allocate.
    """

    timeout_s: float = 30.0
    memory_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: Not positive.
        """
        if not 0 < self.timeout_s < float("inf"):
            raise ValueError(f"a limit on time must be positive, got {self.timeout_s:g} s")
        if self.memory_bytes <= 0:
            raise ValueError(f"a limit on memory must be positive, got {self.memory_bytes} bytes")

    def probe_s(self, size_bytes: int) -> float:
        """Seconds for probing a file: timeout_s, and one for every 20 MiB."""
        return self.timeout_s + size_bytes / _BYTES_PER_S

    def decode_s(self, source: "Source", spans: Sequence[tuple[float, float]]) -> float:
        """Seconds for one pass over spans: timeout_s, and one for every second of video from the first to the last.

        Of frames that are larger than 1920 x 1080, as many times as much.
        """
        video_s = max(end_s for _, end_s in spans) - min(start_s for start_s, _ in spans)
        return self.timeout_s + video_s * max(1.0, source.width_px * source.height_px / _REFERENCE_PIXELS)

    def clips_at_once(self, view: View) -> int:
        """Clips of one call, whose frames must fit into the memory several times."""
        clip_bytes = view.num_frames * view.height_px * view.width_px * view.crops * 3
        return max(1, int(self.memory_bytes * _FRAMES_SHARE) // clip_bytes)


DEFAULT_LIMITS = Limits()
