"""Frames of H.264 with little decoding: what no other frame is predicted from is skipped, unless it is asked for.

A decoder has to go through all frames from a key frame on, but not through those that nothing refers to: every second
one in usual files. Which of them are asked for is known before they are decoded, from the times of the packets. The
pixels are those of decoding everything; where that is not sure (damage, odd times), nothing is said, and the caller
decodes everything.
"""

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator

import av.error
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from pipelines.probe import container_name, first_pts, packets_of, tick_s

# Where packets say when they are shown, and an index says where key frames are.
_CONTAINERS = frozenset({"mov", "matroska"})
# Codecs of which FFmpeg skips exactly the frames that nothing refers to.
CODECS = frozenset({"h264"})
# A gap between instants that may be worth a seek.
_GAP_S = 0.5
# Container time bases are coarse; see `timeline.frames_at`.
_TOLERANCE_S = 1e-3


class NotSure(Exception):  # noqa: N818 - decode everything then
    """Frames that are needed did not come as their packets said."""


def can_skip(container: InputContainer, stream: VideoStream) -> bool:
    """Whether `needed_frames` may be tried."""
    return container_name(container) in _CONTAINERS and stream.codec_context.name in CODECS


def needed_frames(container: InputContainer, stream: VideoStream, times_s: np.ndarray) -> Iterator[VideoFrame]:
    """Frames in order, among them all that are on display at some instants.

    Args:
        container: Open.
        stream: One of which `can_skip` is true.
        times_s: Instants in seconds from the first frame, ascending.

    Raises:
        NotSure: After some of the frames, or none.
    """
    try:
        _seek(container, stream, times_s[0])  # now Matroska's index has been read, too
        for run_s in _runs(stream, times_s):
            yield from _run(container, stream, run_s)
    except av.error.FFmpegError as error:
        raise NotSure(str(error)) from error


def _seek(container: InputContainer, stream: VideoStream, time_s: float) -> None:
    container.seek(first_pts(stream) + int(time_s / tick_s(stream)), stream=stream)


def _runs(stream: VideoStream, times_s: np.ndarray) -> list[np.ndarray]:
    """Instants cut where there is a gap with a key frame in it: what lies before that need not be decoded."""
    index, tick, zero = stream.index_entries, tick_s(stream), first_pts(stream)
    cuts = []
    for place in np.flatnonzero(np.diff(times_s) > _GAP_S) + 1:
        key = index.search_timestamp(zero + int(times_s[place] / tick))
        if key >= 0 and (index[key].timestamp - zero) * tick > times_s[place - 1]:
            cuts.append(place)
    return np.split(times_s, cuts)


def _run(container: InputContainer, stream: VideoStream, times_s: np.ndarray) -> Iterator[VideoFrame]:
    """Frames from one seek on."""
    context = stream.codec_context
    missing: set[int | None] = set()
    _seek(container, stream, times_s[0])

    def decoded(packet: Packet | None) -> Iterator[VideoFrame]:
        for frame in context.decode(packet):
            missing.discard(frame.pts)
            frame.time_base = stream.time_base
            yield frame

    for packet, is_needed in _marked(packets_of(container, stream), stream, times_s):
        context.skip_frame = "DEFAULT" if is_needed else "NONREF"
        if is_needed:
            missing.add(packet.pts)
        yield from decoded(packet)
    yield from decoded(None)
    if missing:
        raise NotSure("frames that are needed did not come")


def _marked(packets: Iterable[Packet], stream: VideoStream, times_s: np.ndarray) -> Iterator[tuple[Packet, bool]]:
    """Packets up to the last that is needed, and for each whether its frame is."""
    shown = _Display(times_s, zero=first_pts(stream), tick=tick_s(stream))
    waiting: deque[tuple[Packet, int]] = deque()
    for packet in packets:
        if packet.size == 0 or shown.is_complete:  # the end of the file, or of what is needed
            break
        waiting.append((packet, shown.add(packet)))
        while shown.is_settled(waiting[0][1]):
            packet, pts = waiting.popleft()
            yield packet, shown.is_needed(pts)
            if not waiting:
                break
    marks = [shown.is_needed(pts) for _, pts in waiting]
    while marks and not marks[-1]:
        marks.pop()
    yield from zip((packet for packet, _ in waiting), marks, strict=False)


class _Display:
    """Which frames are on display at some instants, as packets come in the order of decoding.

    A frame is on display until the next one begins. Which that is, is known as soon as packets come that are decoded
    later than it is shown: no frame is shown before it is decoded.
    """

    def __init__(self, times_s: np.ndarray, *, zero: int, tick: float) -> None:
        self._limits_s = (times_s + _TOLERANCE_S).tolist()  # of when a frame begins that is on display
        self._zero, self._tick = zero, tick
        self._pts: list[int] = []
        self._horizon: int | None = None  # all frames that come are shown from then on

    def add(self, packet: Packet) -> int:
        """Its presentation time.

        Raises:
            NotSure: It has none of its own, or comes too late to be shown then.
        """
        pts = packet.pts
        if pts is None or packet.is_corrupt or (self._horizon is not None and pts < self._horizon):
            raise NotSure("packets without good times")
        place = bisect_left(self._pts, pts)
        if self._pts[place : place + 1] == [pts]:
            raise NotSure("two packets for one time")
        if not self._pts and not (packet.is_keyframe and (pts <= self._zero or self._time_s(pts) <= self._limits_s[0])):
            raise NotSure("the container does not seek to the key frame before")
        self._pts.insert(place, pts)
        if packet.dts is not None:
            self._horizon = packet.dts if self._horizon is None else max(packet.dts, self._horizon)
        return pts

    @property
    def is_complete(self) -> bool:
        """Whether the frame on display at the last instant is known."""
        return self._horizon is not None and self._time_s(self._horizon) > self._limits_s[-1]

    def is_settled(self, pts: int) -> bool:
        """Whether it is known when the frame makes room for the next one."""
        following = bisect_right(self._pts, pts)
        return self._horizon is not None and following < len(self._pts) and self._pts[following] <= self._horizon

    def is_needed(self, pts: int) -> bool:
        """Whether the frame is on display at any instant; what is not known yet is taken not to come."""
        following = bisect_right(self._pts, pts)
        first = bisect_left(self._limits_s, self._time_s(pts)) if following > 1 else 0
        until = bisect_left(self._limits_s, self._time_s(self._pts[following])) if following < len(self._pts) else None
        return first < (len(self._limits_s) if until is None else until)

    def _time_s(self, pts: int) -> float:
        return (pts - self._zero) * self._tick
