"""Reading folders of parquet files, one file after the other."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


class LedgerError(ValueError):
    """A folder that is not, or not yet, what a job left; one line that names it."""


def parquet_files(folder: Path) -> list[Path]:
    """The parquet files of a folder, sorted.

    Raises:
        LedgerError: No such folder, or none in it.
    """
    files = sorted(folder.glob("*.parquet"))
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
            lacking = set(columns) - set(pq.read_schema(path).names)
            if lacking:
                raise LedgerError(f"{path} has no column {', '.join(sorted(lacking))}")
            yield pq.read_table(path, columns=columns, schema=schema)
        except (pa.ArrowException, OSError) as error:
            raise LedgerError(f"cannot read {path}: {error}") from error


def count_rows(folder: Path) -> int:
    """Rows in the parquet files of a folder.

    Raises:
        LedgerError: A file that cannot be read, or none.
    """
    return sum(_footer(path).num_rows for path in parquet_files(folder))


def _footer(path: Path) -> pq.FileMetaData:
    try:
        return pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise LedgerError(f"cannot read {path}: {error}") from error


def has_rows(folder: Path) -> bool:
    """Whether there is a file."""
    return next(folder.glob("*.parquet"), None) is not None
