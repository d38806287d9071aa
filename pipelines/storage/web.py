"""Ranges over HTTP. A GET only, since addresses are signed for one method; it also tells the file's identity."""

import functools
import math
import os
from collections.abc import Iterator, Sequence

import requests
import urllib3.exceptions

from pipelines.schema import Status
from pipelines.storage.store import CONNECT_S, STALL_S, Listed, Piece, StorageFailure, drained, refusal

# A server without ranges sends whole files: taken where small, refused where every clip would cost the whole.
MAX_WHOLE_BYTES = 16 << 20
_CHUNK_BYTES = 1 << 16


def fetch(uri: str, start: int, length: int) -> Piece:
    """A range of the file at an http(s) address.

    Raises:
        StorageFailure: There is none.
    """
    return get_range(_session(os.getpid()), uri, start, length)


def listing(prefix: str) -> Iterator[Listed]:
    """Nothing: HTTP has no listings.

    Raises:
        StorageFailure: Always.
    """
    raise StorageFailure(Status.UNSUPPORTED, "https:// cannot be listed: name a video, or a table of videos")


@functools.lru_cache(maxsize=1)
def _session(pid: int) -> requests.Session:
    """Connections of this process: a forked one must not go on with those of its parent."""
    return requests.Session()


def get_range(
    session: requests.Session, url: str, start: int, length: int, tags: Sequence[str] = ("ETag", "Last-Modified")
) -> Piece:
    """Get bytes [start, start + length).

    No message holds the address: it may be signed.

    Args:
        session: Connections.
        url: With its signature.
        start: First byte.
        length: How many.
        tags: Headers that tell the version, the first that is there.

    Raises:
        StorageFailure: There are none.
    """
    headers = {"Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
    try:
        with session.get(url, headers=headers, stream=True, timeout=(CONNECT_S, STALL_S)) as response:
            return _piece(response, start, length, tags)
    except (requests.Timeout, urllib3.exceptions.TimeoutError):
        raise StorageFailure(Status.TIMEOUT, "the server does not answer in time", transient=True) from None
    except (requests.ConnectionError, urllib3.exceptions.HTTPError):
        raise StorageFailure(Status.MISSING, "the connection fails or breaks", transient=True) from None
    except (requests.RequestException, ValueError) as error:
        raise StorageFailure(Status.MISSING, f"the address cannot be used: {type(error).__name__}") from None


def _piece(response: requests.Response, start: int, length: int, tags: Sequence[str]) -> Piece:
    version = next(filter(None, map(response.headers.get, tags)), "").removeprefix("W/").strip('"')
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    if response.status_code == 416 and total.isdecimal():
        return Piece(b"", int(total), version)
    if response.status_code == 206 and total.isdecimal():
        data = drained(_chunks(response))
        if len(data) != min(length, int(total) - start):
            raise StorageFailure(Status.MISSING, "the server sends another range", transient=True)
        return Piece(data, int(total), version)
    if response.status_code == 200:
        whole = _whole(response)
        return Piece(whole[start:], len(whole), version)
    raise refusal(response.status_code, response.reason or "")


def _chunks(response: requests.Response, until_bytes: float = math.inf) -> Iterator[bytes]:
    """What has come, as it comes, until the end or more than so many bytes."""
    received = 0
    while received <= until_bytes and (chunk := response.raw.read1(_CHUNK_BYTES)):
        received += len(chunk)
        yield chunk


def _whole(response: requests.Response) -> bytes:
    """The body of a server without ranges."""
    stated = int(response.headers.get("Content-Length", 0))
    data = drained(_chunks(response, MAX_WHOLE_BYTES)) if stated <= MAX_WHOLE_BYTES else b""
    if max(stated, len(data)) > MAX_WHOLE_BYTES:
        reason = f"the server has no range reads, and the file has more than {MAX_WHOLE_BYTES >> 20} MiB"
        raise StorageFailure(Status.UNSUPPORTED, reason)
    return data
