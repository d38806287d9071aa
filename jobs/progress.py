"""Progress of planning and of annotating, the latter read from what is committed: clips done, rate, time left."""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from jobs.background import looking
from jobs.cli import JobFailed
from pipelines.output import failure_of, told_in
from pipelines.waiting import Notices, told

_POLL_S = 1.0
_LOOKS_BEFORE_SAID = 3
# A hiccup is shorter; a mount that hangs is longer.
_NO_ANSWER_S = 5.0


@contextlib.contextmanager
def clips_progress(annotations: Path, total: int, on_left: Callable[[int], object]) -> Iterator[None]:
    """Show a bar while the block runs. It counts the rows of finished files, so it never shows what could be lost.

    Args:
        annotations: Folder of the files.
        total: Rows that there will be.
        on_left: Called about once a second, and at the end, with the number of rows that are not there yet.
    """
    counter = _RowCounter(annotations)
    done_before = counter.count()
    with tqdm(total=total, initial=done_before, desc="annotate", unit="clip", smoothing=0.1, mininterval=1) as bar:

        def update() -> None:
            bar.update(counter.count() - bar.n)
            on_left(total - int(bar.n))

        try:
            with looking(update, _POLL_S):
                yield
        finally:
            update()


@contextlib.contextmanager
def videos_progress() -> Iterator[Callable[[int], object]]:
    """Count videos while they are planned; how many there will be is not known while the archive is listed."""
    with tqdm(desc="plan", unit="video", smoothing=0.1, mininterval=1) as bar:
        yield bar.update


@contextlib.contextmanager
def waiting_shown(output: Path) -> Iterator[None]:
    """Say in a line when the run begins to wait for a store or the output that is away, here or on its workers.

    Args:
        output: DIR, which has the run's description by now.

    Raises:
        JobFailed: The output has been away for too long.
    """
    notices, waits, probe, here = Notices(output), _Waits(), _Probe(output), dict[int, str]()
    notices.clear()

    def listen(text: str) -> None:  # not in the folder, which may be what is away
        here[threading.get_ident()] = text

    def say() -> None:
        if line := waits.seen([*notices.read(), *filter(None, [*here.values(), probe.said()])]):
            tqdm.write(line, file=sys.stderr)

    try:
        with looking(probe.ask, _POLL_S), looking(say, _POLL_S), told(listen):
            yield
    except Exception as error:
        if line := told_in(f"{type(error).__name__}: {error}"):
            raise JobFailed(line) from error
        raise
    finally:
        notices.clear()


class _Probe:
    """Whether the output can be written. A mount may also hang, and with it who asks."""

    def __init__(self, output: Path) -> None:
        self._output, self._reason, self._asked_s = output, "", math.inf

    def ask(self) -> None:
        self._asked_s = time.monotonic()
        self._reason = failure_of(self._output)
        self._asked_s = math.inf

    def said(self) -> str:
        hangs = time.monotonic() - self._asked_s > _NO_ANSWER_S
        reason = "it does not answer" if hangs else self._reason
        return f"{self._output}: {reason}" if reason else ""


class _Waits:
    """From what is waited for at each look to what is said: once for each time that a store is away."""

    def __init__(self) -> None:
        self.looks: dict[str, int] = {}

    def seen(self, notices: list[str]) -> str:
        """A line where something has been away for some looks, longer than a hiccup."""
        reasons = {notice.partition(": ")[0]: notice for notice in notices}
        self.looks = {place: self.looks.get(place, 0) + 1 for place in reasons}
        new = [reason for place, reason in reasons.items() if self.looks[place] == _LOOKS_BEFORE_SAID]
        return f"waiting   for {'; '.join(new)}; goes on when that is over" if new else ""


class _RowCounter:
    """Rows in the parquet files of a folder; each footer is read once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows = folder, dict[Path, int]()

    def count(self) -> int:
        with contextlib.suppress(OSError):  # not there yet, or away: as before
            present = {path for path in self.folder.iterdir() if path.suffix == ".parquet"}
            self.rows = {path: count for path, count in self.rows.items() if path in present}
            for path in present - self.rows.keys():
                with contextlib.suppress(pa.ArrowInvalid):  # the audit will name it
                    self.rows[path] = pq.read_metadata(path).num_rows
        return sum(self.rows.values())
