"""What every kind of store answers, and how often it is asked."""

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from pipelines.failure import DecodeFailure
from pipelines.patience import OutOfPatienceError, tried
from pipelines.schema import Status

# Until a connection stands, until the next bytes come, and until a range is there in full.
CONNECT_S, STALL_S, FETCH_S = 10.0, 20.0, 60.0

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
        return tried(ask, place, _passing)
    except OutOfPatienceError as end:
        failure = end.__cause__
        assert isinstance(failure, StorageFailure)
        raise StorageFailure(failure.status, f"{failure} ({end})") from failure


def _passing(failure: Exception) -> str:
    return str(failure) if isinstance(failure, StorageFailure) and failure.transient else ""


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
