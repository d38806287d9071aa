"""Probing and decoding under limits, in a process that can be killed: whatever a file does, it ends as rows."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from pipelines.child import Call, Killed, call, call_each
from pipelines.decode import cpu_decoders, decode_clips
from pipelines.decoded import Served, Source
from pipelines.failure import DecodeFailure
from pipelines.limits import DEFAULT_LIMITS, Limits
from pipelines.probe import VideoInfo
from pipelines.schema import Status
from pipelines.torchcodec_decoder import probe_by_any
from pipelines.view import View

# Clips of a file, each tried by itself, that may reach the limit on time before the rest are given up.
_MAX_TIMEOUTS = 2


T = TypeVar("T", bound=Served)
# As `decode_clips`, or `pipelines.patches.decode_patches` with its first arguments bound.
Decode = Callable[[Source, Sequence[tuple[float, float]], View, Sequence[str]], list[T | DecodeFailure]]


class Request(NamedTuple):
    """Spans of a file."""

    source: Source
    spans: Sequence[tuple[float, float]]


class Decoded(NamedTuple, Generic[T]):
    """An outcome for each span of a request, in order, and the seconds that took."""

    outcomes: list[T | DecodeFailure]
    decode_s: float


def probe_guarded(path: str, size_bytes: int, limits: Limits = DEFAULT_LIMITS) -> VideoInfo:
    """As `probe_by_any`, under limits.

    Raises:
        DecodeFailure: As `probe_by_any`; `timeout`, `unsupported` or `decode_error` where a limit or a crash ended it.
    """
    try:
        return call(Call(probe_by_any, (path,), limits.probe_s(size_bytes), limits.memory_bytes))
    except Killed as killed:
        raise DecodeFailure(killed.status, f"probing {killed}") from killed
    except MemoryError as error:
        raise DecodeFailure(Status.UNSUPPORTED, "not enough memory for its frames") from error


def decode_guarded(
    requests: Sequence[Request],
    view: View,
    limits: Limits = DEFAULT_LIMITS,
    decode: Decode[T] = decode_clips,
    first: Call | None = None,
) -> Iterator[Decoded[T]]:
    """As `decode_clips` for each request in turn, under limits; the next one is decoded while a result is used.

    Where decoding was ended, the last of the decoders on CPUs has its turn, as where the others could not serve the
    file. Where it was ended as well, it has each clip by itself, so that one cannot take its neighbours with it.

    Args:
        requests: Files and spans.
        view: Frames and size wanted.
        limits: For each file.
        decode: What is done with a file, in a process that can be killed.
        first: What such a process does before.
    """
    step = limits.clips_at_once(view)
    pieces = [
        [_Piece(source, spans[at : at + step], view, limits, decode, first) for at in range(0, len(spans), step)]
        for source, spans in requests
    ]
    results = call_each([piece.task() for of_request in pieces for piece in of_request], first)
    for of_request in pieces:
        parts = [piece.settled(next(results)) for piece in of_request]
        yield Decoded([outcome for part in parts for outcome in part.outcomes], sum(part.decode_s for part in parts))


@dataclass(frozen=True, slots=True)
class _Piece(Generic[T]):
    """As much of a request as fits into one call."""

    source: Source
    spans: Sequence[tuple[float, float]]
    view: View
    limits: Limits
    decode: Decode[T]
    first: Call | None = None

    def task(self, decoders: Sequence[str] = ()) -> Call:
        arguments = (self.decode, self.source, self.spans, self.view, decoders)
        return Call(_timed, arguments, self.limits.decode_s(self.source, self.spans), self.limits.memory_bytes)

    def settled(self, result: Decoded[T] | Exception) -> Decoded[T]:
        """What the call gave; where it was ended, what can still be had."""
        if isinstance(result, Killed):
            started_s, note = time.perf_counter(), f"decoding {result}"
            outcomes = self._by_last_decoder()
            noted = [outcome if isinstance(outcome, DecodeFailure) else outcome.with_note(note) for outcome in outcomes]
            return Decoded(noted, time.perf_counter() - started_s)
        if isinstance(result, Exception):
            raise result
        return result

    def _by_last_decoder(self) -> list[T | DecodeFailure]:
        try:
            return call(self.task(cpu_decoders(self.source)[-1:]), self.first).outcomes
        except Killed as killed:
            if len(self.spans) == 1:
                return [DecodeFailure(killed.status, f"decoding {killed}")]
        outcomes: list[T | DecodeFailure] = []
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
    decode: Decode[T], source: Source, spans: Sequence[tuple[float, float]], view: View, decoders: Sequence[str]
) -> Decoded[T]:
    """What a child does with a piece."""
    started_s = time.perf_counter()
    outcomes = decode(source, spans, view, decoders)
    return Decoded(outcomes, time.perf_counter() - started_s)
