"""torchcodec, where it is installed: the last decoder, for what PyAV's FFmpeg cannot decode.

It takes the FFmpeg that the system has, so a decoder that PyAV's lacks may be there. It needs torch, which is imported
here at its first use and not before, and reads all of a file before it decodes anything: no remote ones.

It scales bilinearly, so frames leave it as large as they are, in RGB, and PyAV scales them, as its own. Of the sharpest
pictures there are, they differ from PyAV's by a mean of 0.6 of 255 where chroma is whole, and of 4 where it is halved
(tests/pipelines/test_decode.py measures it).
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from typing import Any

import av
import numpy as np
from av.video.frame import VideoFrame

from pipelines.decoded import DecoderUnfit, Outcome, Source, clip_of, nothing_there, short_note
from pipelines.failure import DecodeFailure, FFmpegFailure
from pipelines.picture import Scaler, picture
from pipelines.probe import MAX_FRAME_PIXELS, VideoInfo, container_name, probe
from pipelines.schema import Status
from pipelines.storage.address import is_remote
from pipelines.timeline import instants
from pipelines.view import View

NAME = "torchcodec"

# Where it shows the frames that FFmpeg shows. In transport and program streams it shows others, silently: their packets
# do not all say when they are shown, and seeking in them is not exact.
_CONTAINERS = frozenset({"mov", "matroska", "avi", "flv", "asf", "mxf", "nut"})

# Decoded together, as large as they are.
_BATCH_BYTES = 32 << 20
# See `timeline.frames_at`.
_TOLERANCE_S = 1e-3
# What it is asked for stays so far inside of what it has: it compares times that it has rounded.
_MARGIN_S = 1e-4
# In place of a time: the last frame. Packets may not say how long that one is shown, and then no time is inside of it.
_LAST = float("inf")


@functools.cache
def is_found() -> bool:
    """Whether there is a torchcodec to try; imports nothing."""
    return importlib.util.find_spec(NAME) is not None


@functools.cache
def _loaded() -> type | str:
    """Its decoder, or why it cannot be had."""
    try:
        module = importlib.import_module(NAME)
    except (ImportError, OSError, RuntimeError) as error:
        return f"not installed: {str(error).strip().split(chr(10))[0][:120]}"
    if module.ffmpeg_major_version is None:
        return "not installed: it finds no libraries of FFmpeg"
    return module.decoders.VideoDecoder


def decode(source: Source, spans: Sequence[tuple[float, float]], view: View) -> list[Outcome]:
    """Decode spans of a file in one pass; every span gets its frames or the reason why not, in order.

    Args:
        source: The file.
        spans: Half-open (start_s, end_s) in seconds of presentation time.
        view: Frames and size wanted.

    Raises:
        DecoderUnfit: Not installed, or it cannot serve the file.
    """
    decoder = _open(source.path, source.container)
    zero_s, begin_s, end_s = _clock(decoder)
    times_ST = np.array([instants(*span, view.num_frames) for span in spans]) + zero_s + _TOLERANCE_S
    asked_ST = np.maximum(times_ST, begin_s + _MARGIN_S)
    is_last_ST = asked_ST > end_s - _MARGIN_S
    if is_last_ST.any():
        end_s = max(end_s, _last_end_s(decoder))
    asked_ST[is_last_ST] = _LAST
    shown_S = (times_ST < end_s + 2 * _TOLERANCE_S).sum(axis=1)
    asked_s = np.unique(np.concatenate([asked_T[:shown] for asked_T, shown in zip(asked_ST, shown_S, strict=True)]))
    pictures = dict(zip(asked_s.tolist(), _pictures(decoder, asked_s, view), strict=True))
    outcomes: list[Outcome] = []
    for span, asked_T, shown in zip(spans, asked_ST, shown_S, strict=True):
        found = [pictures[time_s] for time_s in asked_T[:shown].tolist()]
        outcomes.append(_assemble(found, view.num_frames) if found else nothing_there(span, end_s - zero_s))
    return outcomes


def _assemble(found: Sequence[np.ndarray | str], num_frames: int) -> Outcome:
    """A clip, if nothing is missing."""
    pictures = [one for one in found if not isinstance(one, str)]
    if len(pictures) < len(found):
        return DecodeFailure(Status.DECODE_ERROR, next(one for one in found if isinstance(one, str)))
    padded = pictures + pictures[-1:] * (num_frames - len(pictures))
    index_T = np.array([id(picture) for picture in padded])  # a frame on display for long is one picture
    return clip_of(np.stack(padded), index_T, NAME, short_note(len(pictures), num_frames))


def probe_by_any(path: str) -> VideoInfo:
    """As `probe`; what PyAV's FFmpeg cannot decode is looked at with torchcodec, where that is installed.

    Raises:
        DecodeFailure: As `probe`, with what torchcodec says.
    """
    try:
        return probe(path)
    except FFmpegFailure as failure:
        if not is_found() or is_remote(path):
            raise
        try:
            return dataclasses.replace(_describe(path), note=f"pyav: {failure}")
        except Exception as error:  # a damaged file can fail anywhere in the bindings
            raise FFmpegFailure(failure.status, f"{failure}; {NAME}: {_reason(error, path)}") from error


def _describe(path: str) -> VideoInfo:
    with av.open(path, metadata_errors="ignore") as container:
        name = container_name(container)
    decoder = _open(path, name)
    zero_s, _, end_s = _clock(decoder)
    height_px, width_px, _ = decoder.get_frame_at(0).data.shape
    return VideoInfo(
        duration_s=max(end_s, _last_end_s(decoder)) - zero_s,
        fps=float(decoder.metadata.average_fps or 0),
        width_px=width_px,
        height_px=height_px,
        container=name,
        codec=decoder.metadata.codec or "",
        note="",
    )


def _open(path: str, container: str) -> Any:
    """A decoder that has looked through the file.

    Raises:
        DecoderUnfit: Not installed, or it cannot serve the file.
    """
    if container not in _CONTAINERS:
        raise DecoderUnfit(f"{container} is left to PyAV")
    if is_remote(path):
        raise DecoderUnfit("a remote file would be read whole")
    decoder_type = _loaded()
    if isinstance(decoder_type, str):
        raise DecoderUnfit(decoder_type)
    try:
        decoder = decoder_type(path, dimension_order="NHWC", num_ffmpeg_threads=1, device="cpu", seek_mode="exact")
    except Exception as error:  # RuntimeError, ValueError and what torch raises
        raise DecoderUnfit(_reason(error, path)) from error
    width_px, height_px = decoder.metadata.width or 0, decoder.metadata.height or 0
    if width_px * height_px > MAX_FRAME_PIXELS:
        raise DecoderUnfit(f"frames of {width_px}x{height_px} exceed {MAX_FRAME_PIXELS} pixels")
    return decoder


def _clock(decoder: Any) -> tuple[float, float, float]:
    """In the stream's own seconds: the zero of ours, its first frame, the end of its last as packets have it."""
    found = decoder.metadata
    return float(found.begin_stream_seconds_from_header or 0), found.begin_stream_seconds, found.end_stream_seconds


def _last_end_s(decoder: Any) -> float:
    """The end of the last frame, by its duration or else the rate, in the stream's own seconds; 0 if it is lost."""
    with contextlib.suppress(Exception):
        last = decoder.get_frame_at(len(decoder) - 1)
        rate = decoder.metadata.average_fps_from_header or decoder.metadata.average_fps
        return last.pts_seconds + (last.duration_seconds or 1 / rate)
    return 0.0


def _pictures(decoder: Any, asked_s: np.ndarray, view: View) -> Iterator[np.ndarray | str]:
    """For each time, ascending, the picture on display or why there is none; frames that are one are one array."""
    frame_bytes = max(1, (decoder.metadata.width or 0) * (decoder.metadata.height or 0) * 3)
    step = max(1, _BATCH_BYTES // frame_bytes)
    scaler, shown_s, shown = Scaler(), None, np.empty(0)
    for at in range(0, len(asked_s), step):
        for found in _frames(decoder, asked_s[at : at + step].tolist()):
            if isinstance(found, str):
                yield found
                continue
            pts_s, frame_HWC = found
            if pts_s != shown_s:
                shown_s, shown = pts_s, picture(VideoFrame.from_ndarray(frame_HWC, format="rgb24"), view, scaler)
            yield shown


def _frames(decoder: Any, asked_s: list[float]) -> list[tuple[float, np.ndarray] | str]:
    """Time and frame, or why there is none, of each time; one that fails takes no other with it.

    Raises:
        DecoderUnfit: It shows a frame before its time.
    """
    try:
        if asked_s == [_LAST]:
            frame = decoder.get_frame_at(len(decoder) - 1)
            return [(frame.pts_seconds, frame.data.numpy())]
        if asked_s[-1] == _LAST:
            return _frames(decoder, asked_s[:-1]) + _frames(decoder, [_LAST])
        batch = decoder.get_frames_played_at(asked_s)
    except DecoderUnfit:
        raise
    except Exception as error:
        if len(asked_s) == 1:
            return [_reason(error)]
        return [found for time_s in asked_s for found in _frames(decoder, [time_s])]
    shown_s = batch.pts_seconds.tolist()
    if any(pts_s > time_s + _MARGIN_S for pts_s, time_s in zip(shown_s, asked_s, strict=True)):
        raise DecoderUnfit("its frames are not where their packets say")
    return list(zip(shown_s, batch.data.numpy(), strict=True))


def _reason(error: BaseException, path: str = "") -> str:
    """Its messages say where they come from, and name the file; the gist is the rest of the first line."""
    first = str(error).strip().split("\n")[0]
    if path:
        first = first.replace(path, "")
    return " ".join(re.split(r"\.\w+:\d+, ", first)[-1].split())[:120] or type(error).__name__
