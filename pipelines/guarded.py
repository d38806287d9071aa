"""Probing and decoding under limits, in a process that can be killed: whatever a file does, it ends as rows."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipelines.child import Call, Killed, call, call_each
from pipelines.decode import DECODERS, Clip, Outcome, Source, decode_clips
from pipelines.probe import DecodeFailure, VideoInfo, probe
from pipelines.schema import Status
from pipelines.view import View

# What a slow disk reads in a second: a file without an index is read to its end.
_BYTES_PER_S = 20 << 20
# 1920 x 1080: a core decodes some hundred of such frames in a second, and is given a second for 30 of them.
_REFERENCE_PIXELS = 1920 * 1080
# Share of the memory that the frames of one call may take: decoders hold them twice, and more.
_FRAMES_SHARE = 1 / 6
# Clips of a file, each tried by itself, that may reach the limit on time before the rest are given up.
_MAX_TIMEOUTS = 2
# What has its turn where decoding was ended.
_LAST_DECODER = list(DECODERS)[-1:]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one file may take.

    Attributes:
        timeout_s: Wall-clock seconds that are always given; more is given for more work, see below.
        memory_bytes: What probing or decoding may allocate.
    """

    timeout_s: float = 30.0
    memory_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: Not positive.
        """
        if not 0 < self.timeout_s < float("inf"):
            raise ValueError(f"a limit on time must be positive, got {self.timeout_s:g} s")
        if self.memory_bytes <= 0:
            raise ValueError(f"a limit on memory must be positive, got {self.memory_bytes} bytes")

    def probe_s(self, size_bytes: int) -> float:
        """Seconds for probing a file: timeout_s, and one for every 20 MiB."""
        return self.timeout_s + size_bytes / _BYTES_PER_S

    def decode_s(self, source: Source, spans: Sequence[tuple[float, float]]) -> float:
        """Seconds for one pass over spans: timeout_s, and one for every second of video from the first to the last.

        Of frames that are larger than 1920 x 1080, as many times as much.
        """
        video_s = max(end_s for _, end_s in spans) - min(start_s for start_s, _ in spans)
        return self.timeout_s + video_s * max(1.0, source.width_px * source.height_px / _REFERENCE_PIXELS)

    def clips_at_once(self, view: View) -> int:
        """Clips of one call, whose frames must fit into the memory several times."""
        clip_bytes = view.num_frames * view.height_px * view.width_px * view.crops * 3
        return max(1, int(self.memory_bytes * _FRAMES_SHARE) // clip_bytes)


DEFAULT_LIMITS = Limits()

Decode = Callable[[Source, Sequence[tuple[float, float]], View, Sequence[str]], list[Outcome]]


class Request(NamedTuple):
    """Spans of a file."""

    source: Source
    spans: Sequence[tuple[float, float]]


class Decoded(NamedTuple):
    """An outcome for each span of a request, in order, and the seconds that took."""

    outcomes: list[Outcome]
    decode_s: float


def probe_guarded(path: str, size_bytes: int, limits: Limits = DEFAULT_LIMITS) -> VideoInfo:
    """As `probe`, under limits.

    Raises:
        DecodeFailure: As `probe`; `timeout`, `unsupported` or `decode_error` where a limit or a crash ended it.
    """
    try:
        return call(Call(probe, (path,), limits.probe_s(size_bytes), limits.memory_bytes))
    except Killed as killed:
        raise DecodeFailure(killed.status, f"probing {killed}") from killed
    except MemoryError as error:
        raise DecodeFailure(Status.UNSUPPORTED, "not enough memory for its frames") from error


def decode_guarded(
    requests: Sequence[Request], view: View, limits: Limits = DEFAULT_LIMITS, decode: Decode = decode_clips
) -> Iterator[Decoded]:
    """As `decode_clips` for each request in turn, under limits; the next one is decoded while a result is used.

    Where decoding was ended, the last decoder of the chain has its turn, as where the others could not serve the file.
    Where it was ended as well, it has each clip by itself, so that one cannot take its neighbours with it.

    Args:
        requests: Files and spans.
        view: Frames and size wanted.
        limits: For each file.
        decode: Stands in for `decode_clips`, in tests.
    """
    step = limits.clips_at_once(view)
    pieces = [
        [_Piece(source, spans[start : start + step], view, limits, decode) for start in range(0, len(spans), step)]
        for source, spans in requests
    ]
    results = call_each([piece.task() for of_request in pieces for piece in of_request])
    for of_request in pieces:
        parts = [piece.settled(next(results)) for piece in of_request]
        yield Decoded([outcome for part in parts for outcome in part.outcomes], sum(part.decode_s for part in parts))


@dataclass(frozen=True, slots=True)
class _Piece:
    """As much of a request as fits into one call."""

    source: Source
    spans: Sequence[tuple[float, float]]
    view: View
    limits: Limits
    decode: Decode

    def task(self, decoders: Sequence[str] = ()) -> Call:
        arguments = (self.decode, self.source, self.spans, self.view, decoders)
        return Call(_timed, arguments, self.limits.decode_s(self.source, self.spans), self.limits.memory_bytes)

    def settled(self, result: Decoded | Exception) -> Decoded:
        """What the call gave; where it was ended, what can still be had."""
        if isinstance(result, Killed):
            started_s, note = time.perf_counter(), f"decoding {result}"
            outcomes = self._by_last_decoder()
            noted = [outcome.with_note(note) if isinstance(outcome, Clip) else outcome for outcome in outcomes]
            return Decoded(noted, time.perf_counter() - started_s)
        if isinstance(result, Exception):
            raise result
        return result

    def _by_last_decoder(self) -> list[Outcome]:
        try:
            return call(self.task(_LAST_DECODER)).outcomes
        except Killed as killed:
            if len(self.spans) == 1:
                return [DecodeFailure(killed.status, f"decoding {killed}")]
        outcomes: list[Outcome] = []
        num_timeouts = 0
        for span in self.spans:
            if num_timeouts < _MAX_TIMEOUTS:
                (outcome,) = dataclasses.replace(self, spans=[span])._by_last_decoder()
            else:
                outcome = DecodeFailure(Status.TIMEOUT, f"not tried: {num_timeouts} clips before it took too long")
                outcomes.append(outcome)
                continue
            num_timeouts += isinstance(outcome, DecodeFailure) and outcome.status == Status.TIMEOUT
            outcomes.append(outcome)
        return outcomes


def _timed(
    decode: Decode, source: Source, spans: Sequence[tuple[float, float]], view: View, decoders: Sequence[str]
) -> Decoded:
    """What a child does with a piece."""
    started_s = time.perf_counter()
    outcomes = decode(source, spans, view, decoders)
    return Decoded(outcomes, time.perf_counter() - started_s)
