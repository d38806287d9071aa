"""From a file and spans of it to frames: PyAV first for H.264, else decord; the other one where the first cannot.

Before both NVDEC has its turn, where a GPU is to decode and this process may use it (`pipelines.nvdec`). After both,
where it is installed, torchcodec has those clips that failed for what another build of FFmpeg may be able to decode
(`pipelines.torchcodec_decoder`).

Frames are scaled in the decoder (bicubic, short side to the model's size) and cropped at the centre, the usual test
view of video models. Neither decoder lives longer than one call: an idle decord reader decodes ahead without limit.

All turn frames as the file says and convert colours by its range and matrix. Pictures of
decord and PyAV differ by rounding (at most 2 of 255) where chroma is whole; where it is halved, by a mean of 2, and of
5 after a quarter turn, of the sharpest pictures there are (tests/pipelines/test_decode.py measures it).
"""

import importlib
import sys
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import av.error
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from pipelines import nvdec, torchcodec_decoder
from pipelines.decoded import Clip, DecoderUnfit, Outcome, Source, clip_of, nothing_there, short_note
from pipelines.failure import DecodeFailure, FFmpegFailure
from pipelines.limits import DecoderChoice
from pipelines.needed import CODECS, NotSure, can_skip, needed_frames
from pipelines.picture import Scaler, picture
from pipelines.probe import Damage, decode_frames, first_pts, open_video, tick_s
from pipelines.schema import Status
from pipelines.storage.address import is_remote
from pipelines.timeline import frames_at, instants
from pipelines.view import View


def _import_decord() -> ModuleType:
    """Import decord without the CUDA libraries.

    decord2 first loads whatever the nvidia wheels hold, globally: gigabytes of address space, and libnvblas among them,
    which takes over torch's sgemm and crashes it where there is no GPU. Its wheel on PyPI decodes on the CPU.
    """
    hidden = sys.modules.get("nvidia")
    sys.modules["nvidia"] = None  # pyright: ignore[reportArgumentType] - how Python marks a module as not there
    try:
        module = importlib.import_module("decord")
    finally:
        del sys.modules["nvidia"]
        if hidden is not None:
            sys.modules["nvidia"] = hidden
    module.logging.set_level(module.logging.QUIET)
    return module


decord = _import_decord()

# Where decord shows the frames that FFmpeg shows. In transport streams it loses the first ones; in MPEG-4 part 2, WMV
# and MXF it shows others than asked for, silently.
_DECORD_CONTAINERS = frozenset({"mov", "matroska"})
_DECORD_CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "ffv1", "mjpeg"})

# To open a file decord reads all of it, and it is opened anew for every few clips. 32 clips of 2 s of a video of ten
# hours (320x320 H.264, 2 GB) took 12 to 19 s and 546 MB, with PyAV 1.4 s and 216 MB (one core of two, 2026-11-26).
_DECORD_MAX_S = 300.0

# Frames that decord returns in one batch; bounds memory when many clips share a file.
_MAX_BATCH_FRAMES = 512


Decoder = Callable[[Source, Sequence[tuple[float, float]], View], list[Outcome]]


def decode_clips(
    source: Source,
    spans: Sequence[tuple[float, float]],
    view: View,
    decoders: Collection[str] = (),
) -> list[Outcome]:
    """Decode spans of one video; every span gets its frames or the reason why not, in order.

    Args:
        source: The file.
        spans: Half-open (start_s, end_s) in seconds of presentation time.
        view: Frames and size wanted.
        decoders: The chain, each taking over where the one before cannot serve the file; default `chain_of`.
    """
    names = list(decoders or chain_of(source))
    outcomes, context = _by_first_fit(source, spans, view, [name for name in names if name != TORCHCODEC])
    return _by_another_build(source, spans, view, outcomes, context) if TORCHCODEC in names else outcomes


def _by_first_fit(
    source: Source, spans: Sequence[tuple[float, float]], view: View, names: Sequence[str]
) -> tuple[list[Outcome], str]:
    """Outcomes of the first decoder that can serve the file, and what their failures are to be read after."""
    reasons: list[str] = []
    for name in names:
        try:
            outcomes = decoder_of(name)(source, spans, view)
        except DecoderUnfit as unfit:
            reasons.append(f"{name}: {unfit}")
        except DecodeFailure as failure:
            return [failure] * len(spans), "; ".join([*reasons, f"{name}: "])
        except MemoryError:
            return [DecodeFailure(Status.UNSUPPORTED, "not enough memory for its frames")] * len(spans), ""
        except Exception as error:  # a damaged file can fail anywhere in the bindings
            reasons.append(f"{name}: {type(error).__name__}: {error}")
        else:
            note = "; ".join(reasons)
            noted = [outcome.with_note(note) if isinstance(outcome, Clip) else outcome for outcome in outcomes]
            return noted, "; ".join([*reasons, f"{name}: "])
    return [FFmpegFailure(Status.DECODE_ERROR, "; ".join(reasons))] * len(spans), ""


def _by_another_build(
    source: Source, spans: Sequence[tuple[float, float]], view: View, outcomes: list[Outcome], context: str
) -> list[Outcome]:
    """The outcomes, and torchcodec's in place of failures that another build of FFmpeg may not share."""
    again = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, FFmpegFailure)]
    if not again:
        return outcomes
    others: Sequence[Clip | Exception]
    try:
        others = torchcodec_decoder.decode(source, [spans[number] for number in again], view)
    except Exception as error:
        others = [error] * len(again)
    settled = list(outcomes)
    for number, other in zip(again, others, strict=True):
        failure = outcomes[number]
        assert isinstance(failure, FFmpegFailure)
        if isinstance(other, Clip):
            settled[number] = other.with_note(f"{context}{failure}")
        else:
            reason = str(other) or type(other).__name__
            settled[number] = DecodeFailure(
                failure.status, "; ".join(filter(None, (str(failure), f"{TORCHCODEC}: {reason}")))
            )
    return settled


def _decode_decord(source: Source, spans: Sequence[tuple[float, float]], view: View) -> list[Outcome]:
    if source.container not in _DECORD_CONTAINERS or source.codec not in _DECORD_CODECS:
        raise DecoderUnfit(f"{source.codec} in {source.container} is left to PyAV")
    if is_remote(source.path):
        raise DecoderUnfit("a remote file is left to PyAV, which reads only what a clip needs")
    if source.duration_s > _DECORD_MAX_S:
        raise DecoderUnfit("a long file is left to PyAV, which need not read all of it")
    width_px, height_px = view.scaled_size(source.width_px, source.height_px)
    try:
        # More than one frame that it would show in place of a damaged one, and it is PyAV's turn, which tells of them.
        reader = decord.VideoReader(source.path, width=width_px, height=height_px, num_threads=1, fault_tol=1)
        starts_s, ends_s = np.asarray(reader.get_frame_timestamp(range(len(reader))), dtype=np.float64).T
    except Exception as error:  # decord raises its own, RuntimeError and more
        raise DecoderUnfit(_decord_reason(error)) from error
    # Edit lists and missing times give clocks that do not start at 0 or run backwards; PyAV follows those.
    if (
        len(starts_s) == 0
        or not np.isfinite(starts_s).all()
        or abs(starts_s[0]) > 1e-3
        or (np.diff(starts_s) < 0).any()
    ):
        raise DecoderUnfit("its frame times are not a clock")

    def frames_of(indices: np.ndarray) -> np.ndarray:
        try:
            return view.crop(reader.get_batch(indices).asnumpy())
        except Exception as error:
            raise DecoderUnfit(_decord_reason(error)) from error

    chosen: list[np.ndarray | DecodeFailure] = []
    notes: list[str] = []
    for span in spans:
        times_s = instants(*span, view.num_frames)
        shown = int((times_s < ends_s[-1] + 1e-3).sum())
        chosen.append(frames_at(times_s, starts_s) if shown else nothing_there(span, ends_s[-1]))
        notes.append(short_note(shown, len(times_s)))
    return [
        index_T if isinstance(index_T, DecodeFailure) else clip_of(frames, index_T, "decord", note)
        for index_T, frames, note in zip(chosen, _fetch(chosen, frames_of), notes, strict=True)
    ]


def _fetch(
    chosen: Sequence[np.ndarray | DecodeFailure], frames_of: Callable[[np.ndarray], np.ndarray]
) -> list[np.ndarray]:
    """Frames of each clip, decoding every frame once per batch of clips however many clips show it."""
    fetched: list[np.ndarray] = []
    batch: list[np.ndarray] = []

    def flush() -> None:
        if batch:
            unique, inverse = np.unique(np.concatenate(batch), return_inverse=True)
            frames = frames_of(unique)
            fetched.extend(frames[part] for part in np.split(inverse, np.cumsum([len(part) for part in batch])[:-1]))
            batch.clear()

    for index_T in chosen:
        batch.append(np.empty(0, dtype=np.int64) if isinstance(index_T, DecodeFailure) else index_T)
        if sum(map(len, batch)) >= _MAX_BATCH_FRAMES:
            flush()
    flush()
    return fetched


class _Painter(Protocol):
    """Makes pictures of frames."""

    def paint(self, frame: VideoFrame) -> int:
        """Take a frame; returns the number of its picture."""
        ...

    def pictures(self) -> Sequence[np.ndarray]:
        """All pictures by number, uint8 RGB [H, W, 3]."""
        ...


class _Means(Protocol):
    """What FFmpeg decodes with."""

    def open(self, path: str) -> tuple[InputContainer, VideoStream]:
        """As `open_video`."""
        ...

    def frames(self, stream: VideoStream, frames: Iterable[VideoFrame]) -> Iterable[VideoFrame]:
        """Frames of a stream as they are."""
        ...

    def painter(self, view: View, codec: str) -> _Painter:
        """For a video of a codec."""
        ...


class _CpuPainter:
    def __init__(self, view: View) -> None:
        self._view, self._pictures = view, list[np.ndarray]()
        self._scaler = Scaler()

    def paint(self, frame: VideoFrame) -> int:
        self._pictures.append(picture(frame, self._view, self._scaler))
        return len(self._pictures) - 1

    def pictures(self) -> Sequence[np.ndarray]:
        return self._pictures


class _Cpu:
    def open(self, path: str) -> tuple[InputContainer, VideoStream]:
        return open_video(path)

    def frames(self, stream: VideoStream, frames: Iterable[VideoFrame]) -> Iterable[VideoFrame]:
        return frames

    def painter(self, view: View, codec: str) -> _Painter:
        return _CpuPainter(view)


def _decode_pyav(source: Source, spans: Sequence[tuple[float, float]], view: View) -> list[Outcome]:
    return _decode_av(source, spans, view, _Cpu(), "pyav")


def _decode_nvdec(source: Source, spans: Sequence[tuple[float, float]], view: View) -> list[Outcome]:
    try:
        return _decode_av(source, spans, view, nvdec.hardware(), NVDEC)
    except (nvdec.Unfit, DecodeFailure, MemoryError) as error:  # a CPU may do better, and knows better why not
        raise DecoderUnfit(str(error)) from error


def _decode_av(
    source: Source, spans: Sequence[tuple[float, float]], view: View, means: _Means, name: str
) -> list[Outcome]:
    """One pass over the file for all spans, from the first of them on."""
    times_s = np.concatenate([instants(*span, view.num_frames) for span in spans])
    order = np.argsort(times_s, kind="stable")
    try:
        passed = _quick_pass(source, times_s[order], view, means)
        if passed is None:
            passed = _pass(source, times_s[order], view, means, seek_s=min(start_s for start_s, _ in spans))
        if passed.late:  # the container cannot seek exactly
            passed = _pass(source, times_s[order], view, means, seek_s=0.0)
    except (av.error.FFmpegError, ValueError) as error:
        raise FFmpegFailure(Status.DECODE_ERROR, str(error)) from error
    if passed.damages and name == NVDEC:  # which says nothing of damages inside a frame
        raise DecoderUnfit("what is damaged is left to CPUs")
    pictures = dict(zip(order.tolist(), passed.pictures, strict=False))
    passed.pictures.clear()  # they go as their clips come
    clips = range(0, len(times_s), view.num_frames)
    return [
        _assemble(span, [pictures.pop(first + i, None) for i in range(view.num_frames)], passed, name)
        for span, first in zip(spans, clips, strict=True)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """What one pass gave: a picture for each instant before end_s, in order, and what was damaged on the way."""

    pictures: list[np.ndarray]
    end_s: float
    damages: list[Damage]
    key_times_s: list[float]  # of the key frames, where decoding recovers from a damage
    late: bool  # after a seek, the first frame came after the first instant


def _quick_pass(source: Source, times_s: np.ndarray, view: View, means: _Means) -> _Pass | None:
    """The pass with what is needed for it alone; None where that cannot be told."""
    container, stream = means.open(source.path)
    with container:
        if not can_skip(container, stream):
            return None
        painter, needed = (
            means.painter(view, source.codec),
            means.frames(stream, needed_frames(container, stream, times_s)),
        )
        frames = _timed(needed, first_pts(stream), tick_s(stream), [])
        try:
            pictures, _, end_s = _pick(frames, times_s, painter)
        except NotSure:
            return None
    return _Pass(pictures=pictures, end_s=end_s, damages=[], key_times_s=[], late=False)


def _pass(source: Source, times_s: np.ndarray, view: View, means: _Means, *, seek_s: float) -> _Pass:
    container, stream = means.open(source.path)
    with container:
        zero, tick = first_pts(stream), tick_s(stream)
        if seek_s > 0:
            container.seek(zero + int(seek_s / tick), stream=stream)
        damages: list[Damage] = []
        key_times_s: list[float] = []
        frames = _timed(means.frames(stream, decode_frames(container, stream, damages)), zero, tick, key_times_s)
        pictures, first_s, end_s = _pick(frames, times_s, means.painter(view, source.codec))
        late = seek_s > 0 and (first_s is None or first_s > times_s[0] + 1e-3)
        return _Pass(
            pictures=pictures,
            end_s=end_s,
            damages=[Damage(time_s=(d.time_s - zero * tick), reason=d.reason) for d in damages],
            key_times_s=key_times_s,
            late=late,
        )


def _timed(
    frames: Iterable[VideoFrame], zero: int, tick: float, key_times_s: list[float]
) -> Iterator[tuple[float, VideoFrame]]:
    for frame in frames:
        assert frame.pts is not None
        time_s = (frame.pts - zero) * tick
        if frame.key_frame:
            key_times_s.append(time_s)
        yield time_s, frame


def _pick(
    frames: Iterable[tuple[float, VideoFrame]], times_s: np.ndarray, painter: _Painter
) -> tuple[list[np.ndarray], float | None, float]:
    """The picture on display at each instant, as far as the frames go; time of the first frame; end of the last.

    Holds one frame at a time; only those on display become pictures. An instant before the first frame shows the first.
    """
    limits_s = (times_s + 1e-3).tolist()
    shown: list[int] = []  # numbers of pictures
    current: VideoFrame | None = None
    first_s, end_s = None, 0.0
    for time_s, frame in frames:
        first_s = time_s if first_s is None else first_s
        until = bisect_left(limits_s, time_s)
        if current is not None:
            _show(current, until - len(shown), shown, painter)
        current = frame
        end_s = max(end_s, time_s + float((frame.duration or 0) * (frame.time_base or 0)))
        if until == len(times_s) == len(shown):
            break
    if current is not None:
        _show(current, int((times_s < end_s + 1e-3).sum()) - len(shown), shown, painter)
    pictures = painter.pictures()
    return [pictures[number] for number in shown], first_s, end_s


def _show(frame: VideoFrame, times: int, shown: list[int], painter: _Painter) -> None:
    """Append a frame's picture as often as it is on display."""
    if times > 0:
        shown.extend([painter.paint(frame)] * times)


def _assemble(span: tuple[float, float], pictures: list[np.ndarray | None], passed: _Pass, decoder: str) -> Outcome:
    shown = [picture for picture in pictures if picture is not None]
    # A lost packet spoils every frame that is predicted from it, up to the next key frame.
    clean_s = max((time_s for time_s in passed.key_times_s if time_s <= span[0]), default=0.0)
    damages = [damage for damage in passed.damages if clean_s <= damage.time_s < span[1]]
    if not shown:
        inside = [damage for damage in damages if damage.time_s >= span[0]]
        return FFmpegFailure(Status.DECODE_ERROR, inside[0].reason) if inside else nothing_there(span, passed.end_s)
    notes = [short_note(len(shown), len(pictures))]
    if damages:
        notes.append(f"partial: {len(damages)} damaged packets skipped ({damages[0].reason})")
    padded = shown + [shown[-1]] * (len(pictures) - len(shown))
    index_T = np.array([id(picture) for picture in padded])  # a frame on display for long is one picture
    return clip_of(np.stack(padded), index_T, decoder, "; ".join(filter(None, notes)))


def _decord_reason(error: BaseException) -> str:
    """Decord's messages carry source lines and stack traces; the gist is the end of the first line."""
    first = str(error).strip().split("\n")[0]
    return first.rsplit("] ", 1)[-1].split(": ", 1)[-1][:120] or type(error).__name__


# On CPUs, one of which can serve what PyAV's FFmpeg can decode.
DECODERS: dict[str, Decoder] = {"decord": _decode_decord, "pyav": _decode_pyav}
NVDEC, TORCHCODEC = "nvdec", torchcodec_decoder.NAME


def decoder_of(name: str) -> Decoder:
    """A decoder by its name."""
    others: dict[str, Decoder] = {NVDEC: _decode_nvdec, TORCHCODEC: torchcodec_decoder.decode}
    return DECODERS.get(name) or others[name]


def chain_of(source: Source, choice: DecoderChoice = "cpu") -> list[str]:
    """Decoders in the order in which they have their turn: first PyAV where it decodes only what is needed."""
    names = cpu_decoders(source)
    if choice == "nvdec" or (choice == "auto" and nvdec.is_ready()):
        names.insert(0, NVDEC)
    return [*names, TORCHCODEC] if torchcodec_decoder.is_found() else names


def cpu_decoders(source: Source) -> list[str]:
    """Those of `DECODERS`, in the order of `chain_of`."""
    names = list(DECODERS)
    if source.container in _DECORD_CONTAINERS and source.codec in CODECS:
        names.reverse()
    return names
