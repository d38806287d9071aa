"""What a video file says of itself: duration, size, codec. Reads headers, the last second and one frame."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import av
import av.error
from av import logging
from av.codec.hwaccel import HWAccel
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from pipelines.failure import DecodeFailure, FFmpegFailure
from pipelines.schema import Status
from pipelines.storage.address import is_remote
from pipelines.storage.ranged import RangedFile, fetch

# 8K x 8K. A few kilobytes on disk can hold a frame that takes gigabytes of memory.
MAX_FRAME_PIXELS = 8192 * 8192

_TS_PACKET_BYTES = (188, 192)  # the second in .m2ts

logging.set_level(logging.PANIC)  # failures become rows; FFmpeg's own lines would drown the progress


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInfo:
    """What the probe found.

    Attributes:
        duration_s: From the first frame's presentation to the end of the last frame that can be read.
        fps: Average frame rate; 0 where the file does not say.
        width_px, height_px: As displayed, after rotation.
        container, codec: FFmpeg's names.
        note: What is unusual, or "".
    """

    duration_s: float
    fps: float
    width_px: int
    height_px: int
    container: str
    codec: str
    note: str


def file_identity(path: str) -> tuple[int, str]:
    """Size in bytes and version of a file: its modification time in ns, or what its store calls a version.

    Raises:
        DecodeFailure: `missing`, or `empty` for zero bytes.
    """
    if is_remote(path):
        _, size_bytes, version = fetch(path, 0, 1)
    else:
        size_bytes, version = _local_identity(path)
    if size_bytes == 0:
        raise DecodeFailure(Status.EMPTY, "the file has 0 bytes")
    return size_bytes, version


def _local_identity(path: str) -> tuple[int, str]:
    try:
        stat = os.stat(path)  # noqa: PTH116 - a str keeps what the archive said
    except OSError as error:
        raise DecodeFailure(Status.MISSING, f"{error.strerror}") from error
    return stat.st_size, str(stat.st_mtime_ns)


def open_video(path: str, hwaccel: HWAccel | None = None) -> tuple[InputContainer, VideoStream]:
    """Open a file at its best video stream.

    Args:
        path: Of the file, or its address.
        hwaccel: What decodes; by default a CPU.

    Raises:
        DecodeFailure: Not a video, no video stream, or frames too large.
    """
    try:
        container = av.open(
            RangedFile(path) if is_remote(path) else path, "r", metadata_errors="ignore", hwaccel=hwaccel
        )
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise DecodeFailure(Status.DECODE_ERROR, f"cannot open: {_reason(error)}") from error
    try:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream):
            raise DecodeFailure(Status.UNSUPPORTED, "no video stream")
        if container.format.name.endswith("_pipe") or container.format.name == "image2":
            raise DecodeFailure(Status.UNSUPPORTED, f"a still picture ({container.format.name}), not a video")
        if stream.codec_context is None:
            raise FFmpegFailure(Status.UNSUPPORTED, "a codec that FFmpeg does not know")
        stream.codec_context.thread_count = 1  # by default one for each core, in each of the workers of a node
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
            return _describe(path, container, stream)
        except DecodeFailure:
            raise
        except Exception as error:
            raise FFmpegFailure(Status.DECODE_ERROR, f"no frame can be decoded: {_reason(error)}") from error


def _describe(path: str, container: InputContainer, stream: VideoStream) -> VideoInfo:
    damages: list[Damage] = []
    frame = next(decode_frames(container, stream, damages), None)
    if frame is None and damages:
        raise FFmpegFailure(Status.DECODE_ERROR, f"no frame can be decoded: {damages[0].reason}")
    if frame is None:
        raise DecodeFailure(Status.EMPTY, "no frame can be decoded")
    upright = frame.rotation % 180 == 0
    width_px, height_px = (frame.width, frame.height) if upright else (frame.height, frame.width)
    stated_s = _stated_duration_s(container, stream)
    readable_s = _readable_duration_s(path, container, stream, stated_s)
    return VideoInfo(
        duration_s=readable_s,
        fps=float(stream.average_rate or stream.guessed_rate or 0),
        width_px=width_px,
        height_px=height_px,
        container=container_name(container),
        codec=stream.codec_context.name,
        note=_oddity(container, stated_s, readable_s),
    )


def _oddity(container: InputContainer, stated_s: float, readable_s: float) -> str:
    if stated_s - readable_s > max(0.5, 0.02 * stated_s):
        return f"partial: the header says {stated_s:.2f} s, the video ends at {readable_s:.2f} s"
    if container_name(container) == "mpegts" and all(container.size % size for size in _TS_PACKET_BYTES):
        return "partial: the file ends inside a packet"
    return ""


def first_pts(stream: VideoStream) -> int:
    """Presentation time of the first frame in the stream's time base: the zero of our seconds."""
    return stream.start_time or 0


def tick_s(stream: VideoStream) -> float:
    """Seconds of one unit of the stream's presentation times."""
    return float(stream.time_base or 1)


class Damage(NamedTuple):
    """A packet that could not be decoded: when it would have been shown, in the stream's own seconds, and why."""

    time_s: float
    reason: str


def packets_of(container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    """Read a stream's packets from where the container stands, and at the end the empty one that flushes its decoder.

    A stream that appears while the file is read makes PyAV 18.1 look for it in a list where it is not, past the last
    packet of those that were there.
    """
    with contextlib.suppress(IndexError):
        yield from container.demux(stream)


def decode_frames(container: InputContainer, stream: VideoStream, damages: list[Damage]) -> Iterator[VideoFrame]:
    """Decode from where the container stands to its end, going on after damaged packets.

    Args:
        container: Open and positioned.
        stream: Which stream.
        damages: Gets an entry for every packet that could not be decoded.

    Yields:
        Frames with a presentation time, in that order. Frames of a raw stream, which has no times, are given those of
        its frame rate.
    """
    time_s, untimed = 0.0, 0
    try:
        for packet in packets_of(container, stream):
            time_s = float(packet.pts) * tick_s(stream) if packet.pts is not None else time_s
            try:
                for frame in packet.decode():
                    if frame.pts is None:
                        frame.pts, frame.time_base = _raw_pts(stream, untimed), stream.time_base
                        untimed += 1
                    yield frame
            except av.error.FFmpegError as error:
                damages.append(Damage(time_s, _reason(error)))
    except av.error.FFmpegError as error:
        damages.append(Damage(time_s, _reason(error)))


def _raw_pts(stream: VideoStream, index: int) -> int:
    """Presentation time of the index-th frame of a stream without times."""
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    return round(index / rate / tick_s(stream))


def _stated_duration_s(container: InputContainer, stream: VideoStream) -> float:
    if stream.duration:
        return stream.duration * tick_s(stream)
    if not container.duration:
        return 0.0
    # Matroska states when the file ends, the others how long it is.
    start_s = first_pts(stream) * tick_s(stream) if container_name(container) == "matroska" else 0.0
    return container.duration / av.time_base - start_s


def container_name(container: InputContainer) -> str:
    """FFmpeg's first name of the container format: "mov" for MP4 and its kin, "matroska" for WebM too."""
    return container.format.name.split(",")[0]


def _readable_duration_s(path: str, container: InputContainer, stream: VideoStream, stated_s: float) -> float:
    """Trust the header, but look: demux the last second; where nothing is there, demux everything."""
    end_s = 0.0
    if stated_s:
        near_end = first_pts(stream) + int(max(stated_s - 1.0, 0.0) / tick_s(stream))
        end_s = _last_end_s(container, stream, near_end)
    if not stated_s or end_s < stated_s - 1.0:
        end_s = max(end_s, _last_end_s(container, stream, first_pts(stream)))
    return end_s or _untimed_duration_s(path)


def _last_end_s(container: InputContainer, stream: VideoStream, from_pts: int) -> float:
    """End of the last packet from a place on, 0 where there is none."""
    end = 0
    with contextlib.suppress(av.error.FFmpegError):  # the end of what can be read
        container.seek(from_pts, stream=stream)
        for packet in packets_of(container, stream):
            if packet.pts is not None:
                end = max(end, packet.pts + (packet.duration or 0) - first_pts(stream))
    return end * tick_s(stream)


def _untimed_duration_s(path: str) -> float:
    """Length of a raw stream, which states no times and cannot be sought: its packets, at its frame rate."""
    container, stream = open_video(path)
    with container:
        packets = sum(packet.size > 0 for packet in packets_of(container, stream))
        if not packets:
            raise DecodeFailure(Status.EMPTY, "the video stream has no frames")
        return _raw_pts(stream, packets) * tick_s(stream)


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
