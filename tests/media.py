"""Real video files for tests, written with PyAV: lossless, of frames whose pixels say which frame they are."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

# RGB kept bit for bit: codec, its pixel format and options, and the container in which both readers have its times.
LOSSLESS = {
    "ffv1": (".mkv", "bgr0", {}),
    "libx264rgb": (".mp4", "rgb24", {"crf": "0", "preset": "ultrafast"}),
}
_CODE_ROWS, _CODE_COLUMNS = 2, 4


def indexed_frames(count: int, width_px: int = 64, height_px: int = 64, first: int = 0) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] numbered from `first`, below 256, all different and without any symmetry.

    Green holds the number as 2 x 4 blocks, one bit each, over the central square; red grows to the right and blue
    downwards.
    """
    side = min(width_px, height_px)
    top, left = (height_px - side) // 2, (width_px - side) // 2
    frames_THWC = np.zeros((count, height_px, width_px, 3), dtype=np.uint8)
    frames_THWC[..., 0] = np.linspace(20, 230, width_px)
    frames_THWC[..., 2] = np.linspace(20, 230, height_px)[:, None]
    for frame_HWC, index in zip(frames_THWC, range(first, first + count), strict=True):
        bits = np.array([index >> bit & 1 for bit in range(8)]).reshape(_CODE_ROWS, _CODE_COLUMNS)
        rows = np.arange(side) * _CODE_ROWS // side
        columns = np.arange(side) * _CODE_COLUMNS // side
        frame_HWC[top : top + side, left : left + side, 1] = 30 + 195 * bits[np.ix_(rows, columns)]
    return frames_THWC


def read_index(frame_HWC: np.ndarray) -> int:
    """The number that a frame shows, also after scaling, a centre crop and lossy coding."""
    height_px, width_px = frame_HWC.shape[:2]
    side = min(width_px, height_px)
    top, left = (height_px - side) // 2, (width_px - side) // 2
    index = 0
    for bit in range(8):
        row = top + (2 * (bit // _CODE_COLUMNS) + 1) * side // (2 * _CODE_ROWS)
        column = left + (2 * (bit % _CODE_COLUMNS) + 1) * side // (2 * _CODE_COLUMNS)
        index |= int(frame_HWC[row, column, 1] > 127) << bit
    return index


def write_video(
    path: Path,
    frames_THWC: np.ndarray,
    *,
    fps: int = 10,
    times_ms: Sequence[int] | None = None,
    codec: str | None = None,
    pix_fmt: str | None = None,
    options: dict[str, str] | None = None,
    rotation_deg: int = 0,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Write frames uint8 [T, H, W, 3]; lossless RGB unless a codec with another pixel format is named.

    Args:
        path: Its extension names the container.
        frames_THWC: What the file stores, before any rotation.
        fps: Frame rate, where no times are given.
        times_ms: Presentation time of each frame; makes the rate variable.
        codec: By default the lossless one for this container.
        pix_fmt: Of the file; by default the lossless one.
        options: Of the codec.
        rotation_deg: Counter-clockwise turn that a player has to apply, as metadata.
        container_options: Of the muxer, such as movflags.
    """
    if codec is None:
        codec = "ffv1" if path.suffix == ".mkv" else "libx264rgb"
    _, lossless_format, lossless_options = LOSSLESS.get(codec, ("", "yuv420p", {}))
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=lossless_options | (options or {}))
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = pix_fmt or lossless_format
        tick = Fraction(1, fps) if times_ms is None else Fraction(1, 1000)
        stream.codec_context.time_base = stream.time_base = tick
        if rotation_deg:
            stream.set_display_rotation(rotation_deg)
        for frame_HWC, pts in zip(frames_THWC, times_ms or range(len(frames_THWC)), strict=True):
            frame = av.VideoFrame.from_ndarray(frame_HWC, "rgb24")
            frame.pts, frame.time_base = pts, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


# Numbers of ITU-T H.273, which FFmpeg and files use, and swscale's own.
_MATRICES = {"bt709": (1, 1), "bt601": (6, 5), "bt2020": (9, 9)}
_RANGES = {"limited": 1, "full": 2}


def write_coloured(path: Path, frames_THWC: np.ndarray, matrix: str, color_range: str) -> Path:
    """Write frames uint8 [T, H, W, 3] as YUV of full chroma, by a matrix and a range that the file names."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1", "preset": "ultrafast"})
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "yuv444p"
        stream.codec_context.colorspace, swscale = _MATRICES[matrix]
        stream.codec_context.color_range = _RANGES[color_range]
        for number, frame_HWC in enumerate(frames_THWC):
            rgb = av.VideoFrame.from_ndarray(frame_HWC, "rgb24")
            frame = rgb.reformat(
                format="yuv444p", dst_colorspace=swscale, dst_color_range=stream.codec_context.color_range
            )
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_audio(path: Path) -> Path:
    """One second of silence, and no video stream."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), dtype=np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
