"""What of a run is committed, and what is left to do.

A file of annotations is written under DIR/.staging/RUN and committed by one rename into DIR/annotations: it is there
with all its rows, or not at all, and what is committed is what can be read there. A task that Ray runs again replaces
its own file. A new run first takes the staging folder away, so that a worker which outlived its driver (a second or two
after a SIGKILL) has nothing left to rename and cannot commit behind the new run's back. (Ray Data's checkpoints, which
commit by id in a folder of their own, do not have this fence: we saw rows twice after a quick restart.)
"""

import contextlib
import functools
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ray.data import Datasink
from ray.data.block import Block, BlockAccessor

from pipelines.clip_ids import Rows, rows_found
from pipelines.metrics import SILENT, RunMetrics
from pipelines.output import in_output
from pipelines.row_files import has_rows, parquet_files, read_columns
from pipelines.schema import ANNOTATIONS, MANIFEST
from pipelines.waiting import Notices, told

ANNOTATIONS_DIR, STAGING_DIR, REMAINING_DIR = "annotations", ".staging", ".remaining"
# Files of annotations that a long run leaves, about, and the most rows that wait for each other to become one: listing
# and opening files is what takes time of a large archive, but a crash costs the rows that wait.
_FILES, _MOST_WAITING_ROWS = 1000, 4096
# Rows of a file of remaining clips: some ten megabytes, and a task of its own to read.
_ROWS_PER_FILE = 50_000


class StagedFiles:
    """A folder of parquet files that appear whole, each by one rename.

    Attributes:
        output: Of the run.
        run: Unlike that of any other writer.
        staging: Where this writer's files grow.
        target: Where they are committed.
    """

    def __init__(self, output: Path, folder: str) -> None:
        self.output, self.run = output, uuid.uuid4().hex
        self.staging, self.target = output / STAGING_DIR / self.run, output / folder
        in_output(output, self._make)

    def _make(self) -> None:
        self.staging.mkdir(parents=True, exist_ok=True)
        self.target.mkdir(exist_ok=True)

    def commit(self, name: str, table: pa.Table, **options: Any) -> None:
        """Write a file and commit it.

        Args:
            name: Of the file; an earlier one of that name is replaced.
            table: Its rows.
            options: Of `pyarrow.parquet.write_table`.

        Raises:
            FileNotFoundError: The staging folder was taken away: another run has taken over.
            OutputFailedError: It cannot be written.
        """
        in_output(self.output, lambda: self._commit(name, table, options))

    def _commit(self, name: str, table: pa.Table, options: dict[str, Any]) -> None:
        staged = self.staging / name
        with staged.open("wb") as file:
            pq.write_table(table, file, **options)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(self.target / name)


class CommittedFiles(Datasink[None]):
    """Writes ANNOTATIONS rows to DIR/annotations, a file per task, each by one rename."""

    def __init__(self, output: Path, metrics: RunMetrics = SILENT, num_clips: int = 0) -> None:
        """Of how many clips are to come, files of long runs have more rows."""
        self.files, self.metrics = StagedFiles(output, ANNOTATIONS_DIR), metrics
        self.rows_per_file = max(1, min(_MOST_WAITING_ROWS, num_clips // _FILES))

    @property
    def min_rows_per_write(self) -> int:
        """Rows that Ray collects for a task."""
        return self.rows_per_file

    def write(self, blocks: Iterable[Block], ctx) -> None:
        """Write and commit one task's rows.

        Raises:
            FileNotFoundError: Another run has taken over.
            OutputFailedError: They cannot be written.
        """
        # Ray's empty blocks may lack a schema.
        tables = [table for table in (BlockAccessor.for_block(block).to_arrow() for block in blocks) if len(table)]
        if tables:
            name = f"{self.files.run}-{ctx.task_idx:06d}.parquet"
            rows = pa.concat_tables(tables).cast(ANNOTATIONS)
            with told(Notices(self.files.output).post):
                self.files.commit(name, rows)
            self.metrics.committed(rows)


def fence(output: Path) -> None:
    """End what an earlier run may still be writing; by one rename, so that there is no moment in between."""
    fenced = output / f"{STAGING_DIR}-{uuid.uuid4().hex}"
    with contextlib.suppress(FileNotFoundError):  # no earlier run
        in_output(output, lambda: (output / STAGING_DIR).rename(fenced))
    for left in output.glob(f"{STAGING_DIR}-*"):
        shutil.rmtree(left, ignore_errors=True)


def write_remaining(output: Path, manifest: Path) -> int:
    """Write the manifest's rows that are not committed to DIR/.remaining; returns how many there are.

    Raises:
        LedgerError: A manifest that cannot be read.
    """
    folder, count = output / REMAINING_DIR, 0
    _empty(output, folder)
    committed = rows_found(Rows(manifest, MANIFEST), Rows(output / ANNOTATIONS_DIR, ANNOTATIONS))
    for number, table in enumerate(read_columns(manifest, MANIFEST.names, MANIFEST)):
        left = table.filter(pa.array(~committed[number]))
        for start in range(0, len(left), _ROWS_PER_FILE):
            path = folder / f"{number:06d}-{start:09d}.parquet"
            in_output(output, functools.partial(_write, left.slice(start, _ROWS_PER_FILE), path))
        count += len(left)
    return count


def _write(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path)


def _empty(output: Path, folder: Path) -> None:
    """Take a folder's files away, each for certain."""
    for path in parquet_files(folder) if has_rows(folder) else ():
        _remove(output, path)


def _remove(output: Path, path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # done, and the answer was lost
        in_output(output, path.unlink)


def withdraw(output: Path, manifest: Path, model_id: str) -> None:
    """Take back the rows of clips that are planned no more, and those of another model.

    Raises:
        LedgerError: A file that cannot be read.
    """
    annotations = Rows(output / ANNOTATIONS_DIR, ANNOTATIONS)
    if not has_rows(annotations.folder):
        return
    planned = rows_found(annotations, Rows(manifest, MANIFEST))
    models = read_columns(annotations.folder, ["model_id"], ANNOTATIONS)
    current = [np.array([of == model_id for of in table["model_id"].to_pylist()], dtype=bool) for table in models]
    keep_rows(output, annotations, [here & ours for here, ours in zip(planned, current, strict=True)])


def keep_rows(output: Path, rows: Rows, kept: list[np.ndarray]) -> None:
    """Leave only some rows of each file. A file changes by one rename, so that a kill loses nothing.

    Args:
        output: Of the run.
        rows: A table in it.
        kept: For each file which rows stay, bool.
    """
    files = StagedFiles(output, rows.folder.name)
    for path, mask in zip(parquet_files(rows.folder), kept, strict=True):
        if not mask.any():
            _remove(output, path)
        elif not mask.all():
            table = in_output(output, functools.partial(pq.read_table, path, schema=rows.schema))
            files.commit(path.name, table.filter(pa.array(mask)))
