"""What a video file says of itself: duration, size, codec. Reads headers, the last second and one frame."""

import os
from dataclasses import dataclass

import av
import av.container
import av.error
from av import logging
from av.video.stream import VideoStream

from pipelines.schema import Status

# 8K x 8K. A few kilobytes on disk can hold a frame that takes gigabytes of memory.
MAX_FRAME_PIXELS = 8192 * 8192

_TS_PACKET_BYTES = 188

logging.set_level(logging.PANIC)  # failures become rows; FFmpeg's own lines would drown the progress


class DecodeFailure(Exception):  # noqa: N818 - becomes a row
    """A video, or a clip of it, that cannot be shown.

    Attributes:
        status: The row's status.
    """

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(" ".join(message.split()))
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInfo:
    """What the probe found.

    Attributes:
        duration_s: From the first frame's presentation to the end of the last frame that can be read.
        fps: Average frame rate; 0 where the file does not say.
        width_px, height_px: As displayed, after rotation.
        codec: FFmpeg's name.
        note: What is unusual, or "".
    """

    duration_s: float
    fps: float
    width_px: int
    height_px: int
    codec: str
    note: str


def file_identity(path: str) -> tuple[int, str]:
    """Size in bytes and version (modification time in ns) of a file.

    Raises:
        DecodeFailure: `missing`, or `empty` for zero bytes.
    """
    try:
        stat = os.stat(path)  # noqa: PTH116 - a str keeps what the archive said
    except OSError as error:
        raise DecodeFailure(Status.MISSING, f"{error.strerror}") from error
    if stat.st_size == 0:
        raise DecodeFailure(Status.EMPTY, "the file has 0 bytes")
    return stat.st_size, str(stat.st_mtime_ns)


def open_video(path: str) -> tuple[av.container.InputContainer, VideoStream]:
    """Open a file at its best video stream.

    Raises:
        DecodeFailure: Not a video, no video stream, or frames too large.
    """
    try:
        container = av.open(path, metadata_errors="ignore")
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise DecodeFailure(Status.DECODE_ERROR, f"cannot open: {_reason(error)}") from error
    try:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream):
            raise DecodeFailure(Status.UNSUPPORTED, "no video stream")
        if container.format.name.endswith("_pipe") or container.format.name == "image2":
            raise DecodeFailure(Status.UNSUPPORTED, f"a still picture ({container.format.name}), not a video")
        if stream.codec_context is None:
            raise DecodeFailure(Status.UNSUPPORTED, "a codec that FFmpeg does not know")
        if stream.codec_context.width * stream.codec_context.height > MAX_FRAME_PIXELS:
            size = f"{stream.codec_context.width}x{stream.codec_context.height}"
            raise DecodeFailure(Status.UNSUPPORTED, f"frames of {size} exceed {MAX_FRAME_PIXELS} pixels")
    except DecodeFailure:
        container.close()
        raise
    except Exception as error:  # a malformed header can fail anywhere in the bindings
        container.close()
        raise DecodeFailure(Status.DECODE_ERROR, f"cannot read the header: {_reason(error)}") from error
    return container, stream


def probe(path: str) -> VideoInfo:
    """Look at a video file.

    Raises:
        DecodeFailure: A file without a frame that can be shown, with its status.
    """
    container, stream = open_video(path)
    with container:
        try:
            return _describe(container, stream)
        except DecodeFailure:
            raise
        except Exception as error:
            raise DecodeFailure(Status.DECODE_ERROR, f"no frame can be decoded: {_reason(error)}") from error


def _describe(container: av.container.InputContainer, stream: VideoStream) -> VideoInfo:
    damaged: list[str] = []
    frame = next(decode_frames(container, stream, damaged), None)
    if frame is None:
        status = Status.DECODE_ERROR if damaged else Status.EMPTY
        raise DecodeFailure(status, f"no frame can be decoded{': ' if damaged else ''}{''.join(damaged[:1])}")
    upright = frame.rotation % 180 == 0
    width_px, height_px = (frame.width, frame.height) if upright else (frame.height, frame.width)
    stated_s = _stated_duration_s(container, stream)
    readable_s = _readable_duration_s(container, stream, stated_s)
    return VideoInfo(
        duration_s=readable_s,
        fps=float(stream.average_rate or stream.guessed_rate or 0),
        width_px=width_px,
        height_px=height_px,
        codec=stream.codec_context.name,
        note=_oddity(container, stated_s, readable_s),
    )


def _oddity(container: av.container.InputContainer, stated_s: float, readable_s: float) -> str:
    if stated_s - readable_s > max(0.5, 0.02 * stated_s):
        return f"partial: the header says {stated_s:.2f} s, the video ends at {readable_s:.2f} s"
    if container.format.name == "mpegts" and container.size % _TS_PACKET_BYTES:
        return "partial: the file ends inside a packet"
    return ""


def first_pts(stream: VideoStream) -> int:
    """Presentation time of the first frame in the stream's time base: the zero of our seconds."""
    return stream.start_time or 0


def tick_s(stream: VideoStream) -> float:
    """Seconds of one unit of the stream's presentation times."""
    return float(stream.time_base or 1)


def decode_frames(container, stream: VideoStream, damaged: list[str]):
    """Decode from where the container stands to its end, going on after damaged packets.

    Args:
        container: Open and positioned.
        stream: Which stream.
        damaged: Gets a reason for every packet that could not be decoded.

    Yields:
        Frames with a presentation time, in that order.
    """
    try:
        for packet in container.demux(stream):
            try:
                yield from (frame for frame in packet.decode() if frame.pts is not None)
            except av.error.FFmpegError as error:
                damaged.append(_reason(error))
    except av.error.FFmpegError as error:
        damaged.append(_reason(error))


def _stated_duration_s(container: av.container.InputContainer, stream: VideoStream) -> float:
    if stream.duration:
        return stream.duration * tick_s(stream)
    return container.duration / av.time_base if container.duration else 0.0


def _readable_duration_s(container: av.container.InputContainer, stream: VideoStream, stated_s: float) -> float:
    """Trust the header, but look: demux the last second; where nothing is there, demux everything."""
    end_s = 0.0
    if stated_s:
        near_end = first_pts(stream) + int(max(stated_s - 1.0, 0.0) / tick_s(stream))
        end_s = _last_end_s(container, stream, near_end)
    if not stated_s or end_s < stated_s - 1.0:
        end_s = max(end_s, _last_end_s(container, stream, first_pts(stream)))
    if not end_s:
        raise DecodeFailure(Status.EMPTY, "the video stream has no frames with a time")
    return end_s


def _last_end_s(container: av.container.InputContainer, stream: VideoStream, from_pts: int) -> float:
    end = 0
    try:
        container.seek(from_pts, stream=stream)
        for packet in container.demux(stream):
            if packet.pts is not None:
                end = max(end, packet.pts + (packet.duration or 0) - first_pts(stream))
    except av.error.FFmpegError:
        pass  # the end of what can be read
    return end * tick_s(stream)


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
