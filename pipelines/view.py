"""What a model gets to see of a span: how many frames, of what size, and which of their patches."""

from dataclasses import dataclass

import numpy as np

# Of what a span and a view give; to be raised whenever that changes, so that no cache mixes the two.
PIXELS_VERSION = 3  # PyAV's frames are scaled as BGR, which swscale rounds otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What a model wants to see of a span.

    Attributes:
        num_frames: T, at the centres of T equal parts of the span.
        height_px, width_px: Size of a frame.
        crops: Windows of that size along the longer side; 1 is the centre. With more, decoded frames hold them side by
            side, [H, V W, 3], and `windows` takes them apart: of one size, even where a stream changes its own.
    """

    num_frames: int
    height_px: int
    width_px: int
    crops: int = 1

    def scaled_size(self, width_px: int, height_px: int) -> tuple[int, int]:
        """Width and height that keep the aspect ratio and just cover the view."""
        scale = max(self.width_px / width_px, self.height_px / height_px)
        return max(self.width_px, round(width_px * scale)), max(self.height_px, round(height_px * scale))

    def crop(self, frames_THWC: np.ndarray) -> np.ndarray:
        """What is kept of scaled frames [..., H, W, 3]: the centre, or several windows side by side."""
        if self.crops == 1:
            return self._window(frames_THWC, 0.5)
        windows = [self._window(frames_THWC, place) for place in np.linspace(0, 1, self.crops)]
        return np.concatenate(windows, axis=-2)

    def windows(self, frames_THWC: np.ndarray) -> list[np.ndarray]:
        """Decoded frames in the size of the view, from one end of the longer side to the other."""
        return np.split(frames_THWC, self.crops, axis=-2)

    def _window(self, frames_THWC: np.ndarray, place: float) -> np.ndarray:
        top = int((frames_THWC.shape[-3] - self.height_px) * place)
        left = int((frames_THWC.shape[-2] - self.width_px) * place)
        return frames_THWC[..., top : top + self.height_px, left : left + self.width_px, :]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOptions:
    """What happens to a clip between its frames and its tokens.

    Attributes:
        views: Crops along the longer side of the video, whose probabilities are averaged; 1 is the centre, 3 the usual
            "x 3 crops" of video papers.
        drop_static: Drop patches that differ from the last kept one of their place by at most so many grey levels of
            255 on average (`mone.static`); None keeps all.
    """

    views: int = 1
    drop_static: float | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: Out of range, or both at once.
        """
        if self.views < 1:
            raise ValueError(f"views must be at least 1, got {self.views}")
        if self.drop_static is not None and not 0 <= self.drop_static <= 255:
            raise ValueError(f"drop_static is in grey levels from 0 to 255, got {self.drop_static:g}")
        if self.drop_static is not None and self.views > 1:
            raise ValueError("drop_static works on one view; leave out one of drop_static and views")


WHOLE_CLIPS = TokenOptions()
