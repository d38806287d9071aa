"""What every kind of store answers, and how often it is asked."""

import itertools
import random
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from pipelines import waiting
from pipelines.failure import DecodeFailure
from pipelines.schema import Status

# Until a connection stands, until the next bytes come, and until a range is there in full.
CONNECT_S, STALL_S, FETCH_S = 10.0, 20.0, 60.0
# How often a request is made at least, and how long a store may be away before its files fail. It is away since the
# first failure in a row, so that a host which does not exist costs each process that time once, and not for each file.
ATTEMPTS, PATIENCE_S = 5, 180.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.2, 5.0
_away_since_s: dict[str, float] = {}

Answer = TypeVar("Answer")


class StorageFailure(DecodeFailure):
    """A file that a store does not give.

    Attributes:
        transient: Asking again may help.
    """

    def __init__(self, status: Status, message: str, *, transient: bool = False) -> None:
        super().__init__(status, message)
        self.transient = transient


class Piece(NamedTuple):
    """A range of a file, and the file's identity.

    Attributes:
        data: The bytes; fewer than asked where the file ends, all to its end from a server without ranges.
        size_bytes: Of the whole file.
        version: Entity tag, else the time of the last change; "" where the store says neither.
    """

    data: bytes
    size_bytes: int
    version: str


class Listed(NamedTuple):
    """A file of a listing; size and version are those of a `Piece`."""

    uri: str
    size_bytes: int
    version: str


def retried(ask: Callable[[], Answer], place: str) -> Answer:
    """Ask until there is an answer, with growing pauses; for minutes where somebody is told that this is waited for.

    Args:
        ask: Makes a request.
        place: What fails as a whole: a bucket or a host, for people.

    Raises:
        StorageFailure: The last one; at once where asking again cannot help.
    """
    try:
        for attempt in itertools.count(1):
            try:
                answer = ask()
            except StorageFailure as failure:
                if not failure.transient:
                    _away_since_s.pop(place, None)
                    raise
                away_s = time.monotonic() - _away_since_s.setdefault(place, time.monotonic())
                if attempt >= ATTEMPTS and not (waiting.is_told() and away_s < PATIENCE_S):
                    raise StorageFailure(failure.status, f"{failure} ({attempt} attempts)") from failure
                waiting.tell(f"{place}: {failure}")
            else:
                _away_since_s.pop(place, None)
                return answer
            time.sleep(min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (attempt - 1)) * random.uniform(0.5, 1.5))
        raise AssertionError
    finally:
        waiting.tell("")


def drained(chunks: Iterable[bytes]) -> bytes:
    """Join the chunks of a body.

    Raises:
        StorageFailure: They come too slowly.
    """
    deadline_s, received = time.monotonic() + FETCH_S, []
    for chunk in chunks:
        received.append(chunk)
        if time.monotonic() > deadline_s:
            raise StorageFailure(Status.TIMEOUT, f"a range was not there after {FETCH_S:g} s", transient=True)
    return b"".join(received)


def refusal(code: int, reason: str) -> StorageFailure:
    """What an HTTP status that is no success means for the row."""
    transient = code in (408, 425, 429) or code >= 500
    return StorageFailure(Status.MISSING, f"the store answers {code} {reason}".strip(), transient=transient)
