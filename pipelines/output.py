"""The output folder of a run, on a file system that may fail for a while: what is done there is done again.

What may pass: a disk, server or network that does not answer; a mount that has dropped, whose folder is then missing or
empty; a file system that the kernel has made read-only; and one that is full, because others free space and a person
can, while what has been computed waits. Anything else, as a permission that is lacking, is final at once.
"""

import contextlib
import errno
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pipelines import waiting
from pipelines.patience import OutOfPatienceError, tried

_PASSING = frozenset(
    [
        *(errno.EIO, errno.EREMOTEIO, errno.ENXIO, errno.ENODEV, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
        *(errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
        *(errno.ENOTCONN, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ESHUTDOWN, errno.EPIPE),
        *(errno.EAGAIN, errno.EBUSY, errno.EINTR),
    ]
)
_MISSING = (FileNotFoundError, NotADirectoryError)
# No less than a file system gives out.
_PROBE_BYTES = 1 << 12

T = TypeVar("T")


class OutputFailedError(Exception):
    """An output folder has failed for too long; one line that says what to do."""


def told_in(text: str) -> str:
    """What an `OutputFailedError` says whose traceback is somewhere in a text, as of a task; "" where none is."""
    found = re.search(rf"{OutputFailedError.__name__}: (.+)", text)
    return found[1] if found else ""


def is_there(output: Path) -> bool:
    """Whether the folder of a run can be seen.

    Each has a file that is not hidden from its start; a mount point whose file system has dropped has none.
    """
    try:
        return any(not path.name.startswith(".") for path in output.iterdir())
    except OSError:
        return False


def in_output(output: Path, do: Callable[[], T]) -> T:
    """Do something in an output folder, until that can be done: for minutes where somebody is told of it.

    Args:
        output: Of the run.
        do: May be done any number of times, also where it had failed after it was done.

    Raises:
        OutputFailedError: It has failed for too long.
        FileNotFoundError: Something is missing in a folder that is there.
        OSError: A failure that does not pass.
    """
    try:
        return tried(lambda: _done(output, do), str(output), _passing)
    except OutOfPatienceError as end:
        what = f"the output folder {output} fails on {socket.gethostname()}: {_passing(end.__cause__)}"
        advice = "put that right, and the same command continues; what is committed stays"
        raise OutputFailedError(f"{what}; {advice}") from end.__cause__


class _AwayError(OSError):
    """The folder itself cannot be seen."""


def _done(output: Path, do: Callable[[], T]) -> T:
    if not waiting.is_told():  # the folder may be anything, with nobody to wait for it
        return do()
    _see(output)
    try:
        return do()
    except _MISSING:
        _see(output)
    try:  # it may have been away for that moment
        return do()
    except _MISSING:
        _see(output)
        raise


def _see(output: Path) -> None:
    if not is_there(output):
        raise _AwayError(errno.EAGAIN, "it is missing or empty, as where a mount has dropped")


def _passing(failure: BaseException | None) -> str:
    if isinstance(failure, OSError) and failure.errno in _PASSING:
        return failure.strerror or type(failure).__name__
    return ""


def failure_of(output: Path) -> str:
    """Why nothing can be written there now, as far as that may pass; "" where it can."""
    try:
        _see(output)
        write_probe(output)
    except OSError as error:
        return _passing(error)
    return ""


def write_probe(output: Path) -> None:
    """Write a small file, and take it away.

    Raises:
        OSError: That cannot be done.
    """
    # Among the notices, which are taken away at the next start, if need be.
    probe = output / waiting.WAITING_DIR / f".probe-{socket.gethostname()}-{os.getpid()}"
    probe.parent.mkdir(exist_ok=True)
    probe.write_bytes(bytes(_PROBE_BYTES))
    probe.unlink()
    with contextlib.suppress(OSError):  # there are notices
        probe.parent.rmdir()


def append_line(path: Path, line: bytes) -> None:
    """Add a line to a file of lines of which no two are alike; may be done again after a failure, at whichever byte.

    Args:
        path: Made where it does not exist.
        line: With the newline at its end.

    Raises:
        OSError: It cannot be written.
    """
    with path.open("ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - len(line)))
        last = file.read()
        if last == line:
            return
        if last and not last.endswith(b"\n"):  # a part of it
            file.truncate(path.read_bytes().rfind(b"\n") + 1)
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
