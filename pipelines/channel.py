"""Messages between two processes, through a piece of memory that both see.

Arrays travel as they are: copied in on one side and out on the other, through pages that are there since the start (new
pages cost more than the copies). A sender need not wait until it is read, only before it writes again.
"""

import mmap
import os
import pickle
import socket
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

# A message that is longer goes through in parts; a clip of 32 x 224 x 224 goes in one.
_MEMORY_BYTES = 8 << 20


def shared_memory() -> int:
    """The file descriptor of a channel's memory, for its two ends."""
    descriptor = os.memfd_create("channel")
    os.ftruncate(descriptor, _MEMORY_BYTES)
    return descriptor


class Channel:
    """One end of a channel. Both ends may send, in turns: what one sends, the other has to receive before it sends."""

    def __init__(self, connection: socket.socket, memory: int) -> None:
        """Take one end.

        Args:
            connection: Carries a byte for every part of a message: it is there; and one back: it has been read.
            memory: From `shared_memory`; may be closed afterwards.
        """
        self._connection = connection
        self._memory = memoryview(mmap.mmap(memory, _MEMORY_BYTES))
        self._place = 0
        self._is_unread = False  # what was sent last

    def send(self, message: Any) -> None:
        """Send what can be pickled.

        Raises:
            EOFError, ConnectionError: The other end is gone.
        """
        buffers: list[pickle.PickleBuffer] = []
        body = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
        parts = [memoryview(body), *(buffer.raw() for buffer in buffers)]
        self._settle()
        self._place = 0
        for part in (memoryview(struct.pack(f"<{len(parts) + 1}Q", len(parts), *map(len, parts))), *parts):
            for memory, piece in self._pieces(part):
                memory[:] = piece
        self._connection.send(b".")
        self._is_unread = True

    def receive(self) -> Any:
        """The next message.

        Raises:
            EOFError, ConnectionError: The other end is gone.
        """
        self._settle()
        self._await_byte()
        self._place = 0
        (num_parts,) = struct.unpack("<Q", self._read(8))
        sizes = struct.unpack(f"<{num_parts}Q", self._read(8 * num_parts))
        body, *buffers = [self._read(size) for size in sizes]
        self._connection.send(b".")
        return pickle.loads(body, buffers=buffers)

    def _read(self, size: int) -> memoryview:
        content = np.empty(size, np.uint8).data
        for memory, piece in self._pieces(content):
            piece[:] = memory
        return content

    def _pieces(self, whole: memoryview) -> Iterator[tuple[memoryview, memoryview]]:
        """Places in the memory and what belongs there, whether it is written or read."""
        done = 0
        while done < len(whole):
            if self._place == len(self._memory):
                self._connection.send(b".")
                self._await_byte()
                self._place = 0
            size = min(len(self._memory) - self._place, len(whole) - done)
            yield self._memory[self._place : self._place + size], whole[done : done + size]
            self._place += size
            done += size

    def _settle(self) -> None:
        """Wait until the other end has read what was sent last."""
        if self._is_unread:
            self._await_byte()
            self._is_unread = False

    def _await_byte(self) -> None:
        if not self._next_byte():
            raise EOFError

    def _next_byte(self) -> bytes:
        return self._connection.recv(1)
