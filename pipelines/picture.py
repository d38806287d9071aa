"""A frame of FFmpeg as the model sees it: upright, scaled and cropped."""

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from pipelines.view import View


class Scaler:
    """Frames as RGB in another size; prepares itself once for frames that are alike.

    swscale makes BGR twice as fast as RGB, and nearer to what exact arithmetic gives (a mean of 0.6 of 255 off, not
    1.1). To turn that round takes a tenth of the time.
    """

    def __init__(self) -> None:
        """Prepare for any frames."""
        self._to_bgr, self._to_rgb = VideoReformatter(), VideoReformatter()

    def scale(self, frame: VideoFrame, width_px: int, height_px: int) -> np.ndarray:
        """uint8 RGB [height_px, width_px, 3], where FFmpeg has put it."""
        size = {"width": width_px, "height": height_px}
        bgr = self._to_bgr.reformat(frame, **size, format="bgr24", interpolation="BICUBIC", threads=1)
        (plane,) = self._to_rgb.reformat(bgr, format="rgb24", threads=1).planes
        lines_HL = np.frombuffer(memoryview(plane), np.uint8).reshape(height_px, plane.line_size)
        return lines_HL[:, : 3 * width_px].reshape(height_px, width_px, 3)


def picture(frame: VideoFrame, view: View, scaler: Scaler | None = None) -> np.ndarray:
    """A frame as the model sees it: uint8 RGB [H, W, 3], upright, scaled and cropped."""
    turns = frame.rotation // 90
    upright = (frame.width, frame.height) if turns % 2 == 0 else (frame.height, frame.width)
    width_px, height_px = view.scaled_size(*upright)
    if turns % 2:
        width_px, height_px = height_px, width_px
    scaled_HW3 = (scaler or Scaler()).scale(frame, width_px, height_px)
    return np.ascontiguousarray(view.crop(np.rot90(scaled_HW3, turns)))  # what is cut off goes
