"""A remote file that can be read and sought like a local one: a few large requests in place of many small ones."""

import importlib
import io
from collections.abc import Iterator
from types import ModuleType

from pipelines.schema import Status
from pipelines.storage.address import place_of, public_address, scheme_of
from pipelines.storage.store import Listed, Piece, StorageFailure, retried

# Imported when the first such address is met: most archives are on a disk.
_STORES = {"s3": "s3", "gs": "gcs", "http": "web", "https": "web"}

# The first request of a stretch, and what it grows to while reading goes straight on: a clip in the middle of a long
# file costs little more than its bytes, and a whole file few requests.
FIRST_BYTES, MAX_BYTES = 1 << 18, 1 << 22
# Stretches that are kept: index, picture and sound may be far apart, and reading goes back and forth between them.
_KEPT = 4


def _store(uri: str) -> ModuleType:
    return importlib.import_module(f"pipelines.storage.{_STORES[scheme_of(uri)]}")


def fetch(uri: str, start: int, length: int) -> Piece:
    """A range of a remote file, asked for several times if need be.

    Raises:
        StorageFailure: There is none.
    """
    store = _store(uri)
    return retried(lambda: store.fetch(uri, start, length), place_of(uri))


def listing(prefix: str) -> Iterator[Listed]:
    """Files whose addresses begin so, page by page.

    Raises:
        StorageFailure: There is no listing.
    """
    return _store(prefix).listing(prefix)


class RangedFile(io.RawIOBase):
    """A remote file, for `av.open` and pyarrow. Memory is bounded, whatever the size of the file.

    Attributes:
        name: Its public address.
        size_bytes, version: Its identity; a file that changes while it is read is a failure.
    """

    def __init__(self, uri: str) -> None:
        """Ask for the first bytes.

        Raises:
            StorageFailure: There are none.
        """
        self._uri, self.name = uri, public_address(uri)
        piece = fetch(uri, 0, FIRST_BYTES)
        self.size_bytes, self.version = piece.size_bytes, piece.version
        self._stretches = [(0, piece.data)]
        self._place = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Where the next byte comes from."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go there; nothing is asked for yet."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.size_bytes}[whence]
        self._place = max(0, origin + offset)
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Read up to the end of what one request gave.

        Raises:
            StorageFailure: The store gives no more, or another file.
        """
        if self._place >= self.size_bytes or not len(buffer):
            return 0
        start, data = self._stretch()
        chunk = data[self._place - start : self._place - start + len(buffer)]
        buffer[: len(chunk)] = chunk
        self._place += len(chunk)
        return len(chunk)

    def _stretch(self) -> tuple[int, bytes]:
        """The bytes around the place, the latest used stretch last."""
        for stretch in self._stretches:
            if stretch[0] <= self._place < stretch[0] + len(stretch[1]):
                self._stretches.remove(stretch)
                break
        else:
            stretch = self._place, self._fetch(self._next_length())
            del self._stretches[: len(self._stretches) + 1 - _KEPT]
        self._stretches.append(stretch)
        return stretch

    def _next_length(self) -> int:
        before = next((len(data) for start, data in self._stretches if start + len(data) == self._place), 0)
        return min(max(FIRST_BYTES, 2 * before), MAX_BYTES)

    def _fetch(self, length: int) -> bytes:
        piece = fetch(self._uri, self._place, length)
        if (piece.size_bytes, piece.version) != (self.size_bytes, self.version) or not piece.data:
            raise StorageFailure(Status.MISSING, "the file has changed while it was read")
        return piece.data
