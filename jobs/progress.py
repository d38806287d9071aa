"""Progress of planning and of annotating, the latter read from what is committed: clips done, rate, time left."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from jobs.background import looking

_POLL_S = 1.0


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
