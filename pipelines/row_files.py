"""Reading folders of parquet files, one file after the other. Those of a run are waited for where they are away."""

import functools
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.output import in_output


class LedgerError(ValueError):
    """A folder that is not, or not yet, what a job left; one line that names it."""


def parquet_files(folder: Path) -> list[Path]:
    """The parquet files of a folder, sorted.

    Raises:
        LedgerError: No such folder, or none in it.
    """
    files = _listed(folder)
    if not files:
        raise LedgerError(f"no parquet files in {folder}; run `python -m jobs.annotate` first")
    return files


def read_columns(folder: Path, columns: list[str], schema: pa.Schema) -> Iterator[pa.Table]:
    """Some columns of each file in turn, so that memory does not grow with the archive.

    Raises:
        LedgerError: A file that cannot be read or lacks a column; it is named.
    """
    for path in parquet_files(folder):
        try:
            table = in_output(folder.parent, functools.partial(_read, path, columns, schema))
        except (pa.ArrowException, OSError) as error:
            raise LedgerError(f"cannot read {path}: {error}") from error
        yield table


def _read(path: Path, columns: list[str], schema: pa.Schema) -> pa.Table:
    lacking = set(columns) - set(pq.read_schema(path).names)
    if lacking:
        raise LedgerError(f"{path} has no column {', '.join(sorted(lacking))}")
    return pq.read_table(path, columns=columns, schema=schema)


def count_rows(folder: Path) -> int:
    """Rows in the parquet files of a folder.

    Raises:
        LedgerError: A file that cannot be read, or none.
    """
    return sum(_footer(path).num_rows for path in parquet_files(folder))


def _footer(path: Path) -> pq.FileMetaData:
    try:
        return in_output(path.parent.parent, lambda: pq.read_metadata(path))
    except (pa.ArrowException, OSError) as error:
        raise LedgerError(f"cannot read {path}: {error}") from error


def has_rows(folder: Path) -> bool:
    """Whether there is a file.

    Raises:
        LedgerError: A folder that cannot be read.
    """
    return bool(_listed(folder))


def _listed(folder: Path) -> list[Path]:
    """Sorted; none where there is no folder; `Path.glob` finds none, too, in a folder that is away."""
    try:
        paths = in_output(folder.parent, lambda: list(folder.iterdir()))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise LedgerError(f"cannot read {folder}: {error.strerror}") from error
    return sorted(path for path in paths if path.suffix == ".parquet")
