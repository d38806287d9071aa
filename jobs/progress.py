"""Progress of planning and of annotating, the latter read from what is committed: clips done, rate, time left."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from jobs.background import looking
from pipelines.waiting import Notices, told

_POLL_S = 1.0
_LOOKS_BEFORE_SAID = 3


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
    """Say in a line when the run begins to wait for a store that is away, here or on its workers.

    Args:
        output: DIR.
    """
    notices, waits = Notices(output), _Waits()
    notices.clear()

    def say() -> None:
        if line := waits.seen(notices.read()):
            tqdm.write(line, file=sys.stderr)

    try:
        with looking(say, _POLL_S), told(notices.post):
            yield
    finally:
        notices.clear()


class _Waits:
    """From what is waited for at each look to what is said: once for each time that a store is away."""

    def __init__(self) -> None:
        self.looks: dict[str, int] = {}

    def seen(self, notices: list[str]) -> str:
        """A line where something has been away for some looks, longer than a hiccup."""
        reasons = {notice.partition(": ")[0]: notice for notice in notices}
        self.looks = {place: self.looks.get(place, 0) + 1 for place in reasons}
        new = [reason for place, reason in reasons.items() if self.looks[place] == _LOOKS_BEFORE_SAID]
        return f"waiting   for {'; '.join(new)}; goes on when it is back" if new else ""


class _RowCounter:
    """Rows in the parquet files of a folder; each footer is read once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows = folder, dict[Path, int]()

    def count(self) -> int:
        present = set(self.folder.glob("*.parquet"))
        for path in present - self.rows.keys():
            with contextlib.suppress(pa.ArrowInvalid, OSError):  # still being written
                self.rows[path] = pq.read_metadata(path).num_rows
        return sum(rows for path, rows in self.rows.items() if path in present)
