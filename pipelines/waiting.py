"""Waiting for a store that is away, and telling of it: a child its worker, a worker the run, the run its user.

A failure that may pass is waited for where somebody is told of it; elsewhere it is one after a few seconds.
"""

import contextlib
import mmap
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

WAITING_DIR = ".waiting"
# A notice is written again while it is true, so that one of a worker that was killed can be told from it.
_RENEWED_S, _OUTDATED_S = 1.0, 30.0
_BOARD_BYTES = 1 << 10

Tell = Callable[[str], object]
# Those of blocks that have not ended, which threads enter and leave in any order.
_listeners: list[Tell] = []


def tell(text: str) -> None:
    """Say what this thread waits for; "" where it waits no more."""
    for listener in _listeners[-1:]:
        listener(text)


def is_told() -> bool:
    """Whether somebody listens."""
    return bool(_listeners)


@contextlib.contextmanager
def told(listener: Tell) -> Iterator[None]:
    """Listen in this process, all its threads, for the time of a block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def patiently() -> contextlib.AbstractContextManager[None]:
    """Wait in a block also where nobody listens, as in training, which would go on without the clips."""
    return told(_listeners[-1] if _listeners else lambda text: None)


def board() -> int:
    """The file descriptor of memory that holds a text, for two processes."""
    descriptor = os.memfd_create("board")
    os.ftruncate(descriptor, _BOARD_BYTES)
    return descriptor


class Board:
    """One end of it; one process writes, the other reads."""

    def __init__(self, descriptor: int) -> None:
        """Take one end; the descriptor may be closed afterwards."""
        self._memory = mmap.mmap(descriptor, _BOARD_BYTES)

    def write(self, text: str) -> None:
        """Put a text in place of the last."""
        content = text.encode(errors="replace")[: _BOARD_BYTES - 1]
        self._memory[:] = content.ljust(_BOARD_BYTES, b"\0")

    def read(self) -> str:
        """The text."""
        return self._memory[:].partition(b"\0")[0].decode(errors="replace") if self._memory[0] else ""


class Notices:
    """What workers of a run wait for, as files of its folder, which all nodes see."""

    def __init__(self, output: Path) -> None:
        """Those of a run; nothing is written yet."""
        self.folder = output / WAITING_DIR

    def post(self, text: str) -> None:
        """Tell the run what this thread waits for; "" takes that back. It never fails: the work goes before."""
        path = self.folder / f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
        last_text, last_s = _posted.get(path, ("", 0.0))
        if text == last_text and (not text or time.monotonic() - last_s < _RENEWED_S):
            return
        _posted[path] = text, time.monotonic()
        with contextlib.suppress(OSError):
            if text:
                self.folder.mkdir(exist_ok=True)
                path.write_text(text)
            else:
                path.unlink(missing_ok=True)

    def read(self) -> list[str]:
        """What is waited for now, each once."""
        texts = set[str]()
        with contextlib.suppress(OSError):
            now_s = time.time()
            for path in self.folder.glob("[!.]*"):
                if now_s - path.stat().st_mtime < _OUTDATED_S:
                    texts.add(path.read_text())
        return sorted(texts - {""})

    def clear(self) -> None:
        """Take away those of earlier workers."""
        shutil.rmtree(self.folder, ignore_errors=True)


_posted: dict[Path, tuple[str, float]] = {}
