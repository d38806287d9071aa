"""From a file and spans of it to frames: decord first, PyAV where decord cannot, timestamps in both.

Frames are scaled in the decoder (bicubic, short side to the model's size) and cropped at the centre, the usual test
view of video models. Neither decoder lives longer than one call: an idle decord reader decodes ahead without limit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import av.error
import decord
import numpy as np
from av.video.frame import VideoFrame

from pipelines.probe import DecodeFailure, decode_frames, first_pts, open_video, tick_s
from pipelines.schema import Status
from pipelines.timeline import frames_at, instants

decord.logging.set_level(decord.logging.QUIET)

# Frames that decord returns in one batch; bounds memory when many clips share a file.
_MAX_BATCH_FRAMES = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What a model wants to see of a span.

    Attributes:
        num_frames: T, at the centres of T equal parts of the span.
        height_px, width_px: Size of a frame.
    """

    num_frames: int
    height_px: int
    width_px: int

    def scaled_size(self, width_px: int, height_px: int) -> tuple[int, int]:
        """Width and height that keep the aspect ratio and just cover the view."""
        scale = max(self.width_px / width_px, self.height_px / height_px)
        return max(self.width_px, round(width_px * scale)), max(self.height_px, round(height_px * scale))

    def crop(self, frames_THWC: np.ndarray) -> np.ndarray:
        """The centre of scaled frames [..., H, W, 3]."""
        top = (frames_THWC.shape[-3] - self.height_px) // 2
        left = (frames_THWC.shape[-2] - self.width_px) // 2
        return frames_THWC[..., top : top + self.height_px, left : left + self.width_px, :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A file and its size as displayed, from the probe."""

    path: str
    width_px: int
    height_px: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """Decoded frames of one span.

    Attributes:
        frames_THWC: uint8 RGB [T, H, W, 3].
        decoder: "decord" or "pyav".
        note: What was unusual: why decord was passed over, damaged packets, instants past the last frame.
    """

    frames_THWC: np.ndarray = field(repr=False)
    decoder: str
    note: str = ""


class DecoderUnfit(Exception):  # noqa: N818 - the next decoder's turn
    """This decoder cannot serve this file."""


Outcome = Clip | DecodeFailure
Decoder = Callable[[Source, Sequence[tuple[float, float]], View], list[Outcome]]


def decode_clips(source: Source, spans: Sequence[tuple[float, float]], view: View) -> list[Outcome]:
    """Decode spans of one video; every span gets its frames or the reason why not, in order.

    Args:
        source: The file.
        spans: Half-open (start_s, end_s) in seconds of presentation time.
        view: Frames and size wanted.
    """
    reasons: list[str] = []
    for name, decoder in DECODERS.items():
        try:
            outcomes = decoder(source, spans, view)
        except DecoderUnfit as unfit:
            reasons.append(f"{name}: {unfit}")
        except DecodeFailure as failure:
            return [failure] * len(spans)
        except MemoryError:
            return [DecodeFailure(Status.UNSUPPORTED, "not enough memory for its frames")] * len(spans)
        else:
            return [_with_note(outcome, reasons) for outcome in outcomes]
    return [DecodeFailure(Status.DECODE_ERROR, "; ".join(reasons))] * len(spans)


def _with_note(outcome: Outcome, reasons: list[str]) -> Outcome:
    if isinstance(outcome, DecodeFailure) or not reasons:
        return outcome
    note = "; ".join([*reasons, outcome.note] if outcome.note else reasons)
    return Clip(frames_THWC=outcome.frames_THWC, decoder=outcome.decoder, note=note)


def _decode_decord(source: Source, spans: Sequence[tuple[float, float]], view: View) -> list[Outcome]:
    width_px, height_px = view.scaled_size(source.width_px, source.height_px)
    try:
        reader = decord.VideoReader(source.path, width=width_px, height=height_px, num_threads=1)
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
        chosen.append(frames_at(times_s, starts_s) if shown else _nothing_there(span, ends_s[-1]))
        notes.append(_short_note(shown, len(times_s)))
    return [
        index_T if isinstance(index_T, DecodeFailure) else Clip(frames_THWC=frames, decoder="decord", note=note)
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


def _decode_pyav(source: Source, spans: Sequence[tuple[float, float]], view: View) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for span in spans:
        try:
            outcomes.append(_decode_span_pyav(source, span, view))
        except DecodeFailure as failure:
            outcomes.append(failure)
    return outcomes


def _decode_span_pyav(source: Source, span: tuple[float, float], view: View) -> Clip:
    container, stream = open_video(source.path)
    with container:
        times_s = instants(*span, view.num_frames)
        zero, tick = first_pts(stream), tick_s(stream)
        damaged: list[str] = []
        try:
            if span[0] > 0:
                container.seek(zero + int(span[0] / tick), stream=stream)
            frames, shown, end_s = _pick(
                decode_frames(container, stream, damaged), times_s, lambda frame: (frame.pts - zero) * tick
            )
            if not frames:
                raise DecodeFailure(Status.DECODE_ERROR, damaged[0]) if damaged else _nothing_there(span, end_s)
            pixels_THWC = _render(frames, view)
        except (av.error.FFmpegError, ValueError) as error:
            raise DecodeFailure(Status.DECODE_ERROR, str(error)) from error
    notes = [_short_note(shown, len(times_s))]
    if damaged:
        notes.append(f"partial: {len(damaged)} damaged packets skipped ({damaged[0]})")
    return Clip(frames_THWC=pixels_THWC, decoder="pyav", note="; ".join(filter(None, notes)))


def _pick(frames, times_s: np.ndarray, time_of) -> tuple[list[VideoFrame], int, float]:
    """The frame on display at each instant, how many instants lie before the end, and the end.

    Holds one frame of the stream at a time beside the chosen ones. An instant before the first decoded frame shows the
    first, as does one after a loss.
    """
    picked: list[VideoFrame] = []
    current: VideoFrame | None = None
    end_s = 0.0
    for frame in frames:
        time_s = time_of(frame)
        while current is not None and len(picked) < len(times_s) and times_s[len(picked)] + 1e-3 < time_s:
            picked.append(current)
        current = frame
        end_s = max(end_s, time_s + float((frame.duration or 0) * (frame.time_base or 0)))
        if len(picked) == len(times_s):
            return picked, len(picked), end_s
    shown = len(picked) + int((times_s[len(picked) :] < end_s + 1e-3).sum())
    if current is None or shown == 0:
        return [], 0, end_s
    return picked + [current] * (len(times_s) - len(picked)), shown, end_s


def _render(frames: list[VideoFrame], view: View) -> np.ndarray:
    """uint8 RGB [T, H, W, 3], upright; a frame shown twice is converted once."""
    rendered: dict[int, np.ndarray] = {}
    for frame in frames:
        if id(frame) not in rendered:
            turns = frame.rotation // 90
            upright = (frame.width, frame.height) if turns % 2 == 0 else (frame.height, frame.width)
            width_px, height_px = view.scaled_size(*upright)
            if turns % 2:
                width_px, height_px = height_px, width_px
            scaled = frame.reformat(width=width_px, height=height_px, format="rgb24", interpolation="BICUBIC")
            rendered[id(frame)] = view.crop(np.rot90(scaled.to_ndarray(), turns))
    return np.stack([rendered[id(frame)] for frame in frames])


def _nothing_there(span: tuple[float, float], end_s: float) -> DecodeFailure:
    return DecodeFailure(
        Status.DECODE_ERROR, f"nothing to show in [{span[0]:.2f}, {span[1]:.2f}) s: the video ends at {end_s:.2f} s"
    )


def _short_note(shown: int, wanted: int) -> str:
    """Instants past the end repeat the last frame, and the row says how many."""
    return "" if shown == wanted else f"partial: {shown} of {wanted} frames, the last one repeated"


def _decord_reason(error: BaseException) -> str:
    """Decord's messages carry source lines and stack traces; the gist is the end of the first line."""
    first = str(error).strip().split("\n")[0]
    return first.rsplit("] ", 1)[-1].split(": ", 1)[-1][:120] or type(error).__name__


DECODERS: dict[str, Decoder] = {"decord": _decode_decord, "pyav": _decode_pyav}
