"""Calls in a process that can be killed: code that hangs, crashes or eats memory ends there, and not here.

A child starts once, imports the decoders, and serves one call after the other. It dies with its parent, however busy it
is and however the parent ends.
"""

import contextlib
import fcntl
import importlib
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipelines import waiting
from pipelines.channel import Channel, shared_memory
from pipelines.heap import keep_memory
from pipelines.schema import Status

# One thread, so that so many of them use so many cores.
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
# Imported by a child before its first call, so that no call pays for it.
_PRELOADED = ["pipelines.patches"]
_START_TIMEOUT_S = 120.0
# How often the memory of a child is looked at; a processor can fill some 100 MB between two looks.
_LOOK_S = 0.02
# Above the limit that is watched, the kernel's own: the interpreter, libraries, stacks of threads.
_ROOM_BYTES = 1 << 30
_PAGE_BYTES = resource.getpagesize()
# Of 19, so that it gets its share on a machine that is busy with other things.
_NICENESS = 10
# Files that a child should be there for: it takes about as long to start.
_FILES_PER_CHILD = 4


class Killed(Exception):  # noqa: N818 - becomes a row
    """A call that ended with its process.

    Attributes:
        status: `timeout`, `unsupported` for memory, or `decode_error` for a crash.
    """

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


class Call(NamedTuple):
    """What a child is asked to do.

    Attributes:
        function: Of a module that the child can import.
        arguments: They are pickled, as is the result.
        timeout_s: Wall-clock limit, beside waiting for a store that is away.
        memory_bytes: Limit on the child's memory: resident, without files that it has mapped.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    timeout_s: float
    memory_bytes: int


def call(task: Call, first: Call | None = None) -> Any:
    """Do one call, as `call_each`.

    Raises:
        Exception: What stands there in place of a result.
    """
    (result,) = call_each([task], first)
    if isinstance(result, Exception):
        raise result
    return result


def call_each(tasks: Sequence[Call], first: Call | None = None) -> Iterator[Any]:
    """Do calls one after the other in this thread's child; it goes on with the next one while a result is used.

    Args:
        tasks: The calls.
        first: What a new child does before, whatever comes of it. Memory that it has then counts against no call.

    Yields:
        For each call its result, or the exception that it raised, or `Killed`.
    """
    done = 0
    while done < len(tasks):
        child = getattr(_children, "child", None)
        # What earlier calls have leaked must not be held against the next.
        if child is None or not child.serves(first) or child.memory_bytes() > tasks[done].memory_bytes // 2:
            child = _children.child = _started(first)
        try:
            for result in child.call_each(tasks[done:]):
                done += 1
                yield result
        except Killed as killed:
            done += 1
            yield killed


def _started(first: Call | None) -> "_Child":
    child = _Child(first)
    if first is not None:
        try:
            child.prepare(first)
        except Killed:
            return _Child(first)
    return child


def num_children(num_files: int, most: int) -> int:
    """Threads, each with its child, that are worth their start for so many files."""
    return max(1, min(most, -(-num_files // _FILES_PER_CHILD)))


_children = threading.local()  # a child for each thread that calls, ended with it


class _Child(Channel):
    """One process, from its start to its end."""

    def __init__(self, first: Call | None = None) -> None:
        """Start it; `first` is what it is started for."""
        connection, theirs = socket.socketpair()
        memory, board, (lifeline, ours) = shared_memory(), waiting.board(), os.pipe()
        super().__init__(connection, memory)
        self._board = waiting.Board(board)
        descriptors = (theirs.fileno(), memory, board, lifeline)
        self._owner, self._is_busy, self._held_bytes, self._first = os.getpid(), False, 0, first
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from pipelines.child import _serve; _serve(*{descriptors}, {_PRELOADED})"],
            pass_fds=descriptors,
            env=os.environ
            | _ENVIRONMENT
            | {"PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us
        )
        theirs.close()
        for descriptor in (memory, board, lifeline):
            os.close(descriptor)
        self.end = weakref.finalize(self, _end, self._process, connection, ours)
        connection.settimeout(_START_TIMEOUT_S)
        if not connection.recv(1):
            raise RuntimeError(f"a process for decoding does not start: {_ending(self._process.wait())}")
        connection.settimeout(_LOOK_S)

    def serves(self, first: Call | None) -> bool:
        """Whether it waits for calls, after such a start if one is wanted."""
        is_wanted = first is None or first == self._first
        return is_wanted and not self._is_busy and self._owner == os.getpid() and self._process.poll() is None

    def memory_bytes(self) -> int:
        """Resident memory without shared pages: what it has allocated since it was prepared."""
        with contextlib.suppress(OSError), open(f"/proc/{self._process.pid}/statm") as file:  # noqa: PTH123
            _, resident, shared, *_ = map(int, file.read().split())
            return (resident - shared) * _PAGE_BYTES - self._held_bytes
        return 0

    def prepare(self, task: Call) -> None:
        """Do a call that counts as the child's start."""
        for _ in self.call_each([task]):
            pass
        self._held_bytes = self.memory_bytes()

    def call_each(self, tasks: Sequence[Call]) -> Iterator[Any]:
        self._is_busy, self._task = True, tasks[0]
        try:
            room_bytes = self._held_bytes + _ROOM_BYTES
            self.send([(task.function, task.arguments, task.memory_bytes + room_bytes) for task in tasks])
            for number, self._task in enumerate(tasks, start=1):
                self._deadline_s = time.monotonic() + self._task.timeout_s
                result = self.receive()
                self._is_busy = number < len(tasks)
                yield result
        except Killed:
            raise
        except Exception as error:  # it is gone, or does not know any more what it says
            self._process.kill()
            raise Killed(Status.DECODE_ERROR, f"ended by {_ending(self._process.wait())}") from error
        finally:
            waiting.tell("")
            if self._is_busy:  # also where nobody takes the rest of the results
                self.end()

    def _next_byte(self) -> bytes:
        looked_s = time.monotonic()
        while True:
            with contextlib.suppress(TimeoutError):
                return super()._next_byte()
            if what := self._board.read():
                self._deadline_s += time.monotonic() - looked_s
            waiting.tell(what)
            looked_s = time.monotonic()
            if self.memory_bytes() > self._task.memory_bytes:
                limit = f"{self._task.memory_bytes / 2**30:.3g} GiB of memory"
                raise Killed(Status.UNSUPPORTED, f"ended: it took more than {limit}")
            if time.monotonic() > self._deadline_s:
                raise Killed(Status.TIMEOUT, f"ended: no answer after {self._task.timeout_s:.3g} s")


def _end(process: subprocess.Popen[bytes], connection: socket.socket, lifeline: int) -> None:
    process.kill()
    process.wait()
    connection.close()
    os.close(lifeline)


def _ending(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def _serve(connection_fd: int, memory_fd: int, board_fd: int, lifeline_fd: int, modules: list[str]) -> None:
    """What a child does."""
    _die_with(lifeline_fd)
    _give_way()
    keep_memory()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for module in modules:
        importlib.import_module(module)
    connection = socket.socket(fileno=connection_fd)
    channel = Channel(connection, memory_fd)
    connection.send(b"r")
    with waiting.told(waiting.Board(board_fd).write), contextlib.suppress(EOFError, ConnectionError):
        while True:
            for task in channel.receive():
                channel.send(_answer(*task))


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...], data_bytes: int) -> Any:
    """What the function returned or raised."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes, hard))
    try:
        return function(*arguments)
    except Exception as error:
        error.add_note(traceback.format_exc())
        return error


def _give_way() -> None:
    """Whoever hands out clips and takes them comes first; without, a model starts late beside so many that decode."""
    os.nice(_NICENESS)
    with contextlib.suppress(OSError):  # where the kernel shares processors among sessions, of which a child is one
        Path("/proc/self/autogroup").write_text(str(_NICENESS))


def _die_with(lifeline_fd: int) -> None:
    """End this process as soon as nobody holds the other end of a pipe.

    The kernel sends SIGIO, whose default is to end the process, and needs nothing of it: native code that never comes
    back, Python's lock in its hand, ends too. (PR_SET_PDEATHSIG would end with the parent's thread.)
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, fcntl.fcntl(lifeline_fd, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline_fd], [], [], 0)[0]:  # it was gone before
        sys.exit()
