"""Time within a video: which spans become clips, and which instants of a span a model sees. Pure arithmetic."""

from dataclasses import dataclass

import numpy as np

# A video's end is known to about a frame; a remainder shorter than this is not a clip of its own.
_SHORTEST_TAIL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipPlan:
    """How a video is cut into clips.

    Attributes:
        span_s: Length of a clip.
        stride_s: From one start to the next when the video is covered; 0 means span_s, side by side.
        clips_per_video: Spread this many clips evenly; 0 covers the whole video.
    """

    span_s: float
    stride_s: float = 0.0
    clips_per_video: int = 0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: A span that is not positive, or a negative stride or count.
        """
        if not 0 < self.span_s < float("inf"):
            raise ValueError(f"the span of a clip must be positive, got {self.span_s:g} s")
        if not 0 <= self.stride_s < float("inf") or self.clips_per_video < 0:
            raise ValueError(
                f"stride and clips per video must not be negative, got {self.stride_s:g} s and {self.clips_per_video}"
            )
        if self.stride_s and self.clips_per_video:
            raise ValueError("give a stride or a number of clips per video, not both")

    def spans(self, duration_s: float) -> list[tuple[float, float]]:
        """Half-open spans [start, end) of the clips, in order, all within [0, duration).

        A video shorter than a span is one clip. When a video is covered, the last clip is moved back so that it ends
        with the video and has full length.
        """
        if duration_s <= self.span_s + _SHORTEST_TAIL_S:
            return [(0.0, duration_s)]
        room_s = duration_s - self.span_s
        if self.clips_per_video:
            # Centres at (i + 1/2) / k of the video, as far as the clips fit.
            centres = (np.arange(self.clips_per_video) + 0.5) / self.clips_per_video * duration_s
            starts = np.clip(centres - self.span_s / 2, 0.0, room_s)
        else:
            stride_s = self.stride_s or self.span_s
            starts = np.arange(0.0, room_s, stride_s)
            if duration_s - (starts[-1] + self.span_s) > _SHORTEST_TAIL_S:
                starts = np.append(starts, room_s)
        starts = np.unique(starts.round(6))
        return [(float(start), float(start + self.span_s)) for start in starts]


def instants(start_s: float, end_s: float, num_frames: int) -> np.ndarray:
    """The instants that a clip shows, float64 [T]: centres of T equal parts of the span."""
    return start_s + (np.arange(num_frames) + 0.5) * (end_s - start_s) / num_frames


def frames_at(times_s: np.ndarray, frame_starts_s: np.ndarray) -> np.ndarray:
    """Index of the frame on display at each instant: the last that starts at or before it, int64 [T].

    Args:
        times_s: Instants, float64 [T].
        frame_starts_s: Presentation times of the frames, ascending. An instant before the first shows the first.
    """
    # Container time bases are coarse (1 ms in Matroska): an instant just before a frame's rounded time is that frame.
    return np.maximum(np.searchsorted(frame_starts_s, times_s + 1e-3, side="right") - 1, 0)
