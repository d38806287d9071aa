"""Comparing the ids of tables of any size in bounded memory: in parts, by the first letters of the ids."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.row_files import count_rows, has_rows, read_columns

# Ids of one table that are held at a time: some hundred megabytes while they are sorted.
_IDS_PER_PART = 2_000_000
_PREFIX_LETTERS = 3


class Rows(NamedTuple):
    """A folder of parquet files with a column `clip_id`, and their schema."""

    folder: Path
    schema: pa.Schema


def num_parts(*folders: Path) -> int:
    """In how many parts to compare tables.

    Raises:
        LedgerError: A file that cannot be read.
    """
    rows = max((count_rows(folder) for folder in folders if has_rows(folder)), default=0)
    return max(1, -(-rows // _IDS_PER_PART))


def all_parts(folder: Path, schema: pa.Schema, parts: int) -> Iterator[np.ndarray]:
    """The ids of each part in turn, ascending, as often as they are there, bytes [I]; none where there is no file.

    Raises:
        LedgerError: A file that cannot be read.
    """
    for part in range(parts):
        found = [np.empty(0, dtype="S1")]
        for table in read_columns(folder, ["clip_id"], schema) if has_rows(folder) else ():
            ids = _as_bytes(table["clip_id"])
            found.append(ids if parts == 1 else ids[_parts_of(ids, parts) == part])
        yield np.sort(np.concatenate(found))


def rows_found(rows: Rows, among: Rows) -> list[np.ndarray]:
    """For each file of a table, which of its rows have an id that the other table has, bool.

    Raises:
        LedgerError: A file that cannot be read.
    """
    found: list[np.ndarray] = []
    for ids in all_parts(*among, num_parts(among.folder)):
        tables = read_columns(rows.folder, ["clip_id"], rows.schema)
        for number, here in enumerate(are_in(_as_bytes(table["clip_id"]), ids) for table in tables):
            if number < len(found):
                found[number] |= here
            else:
                found.append(here)
    return found


def are_in(ids: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Which ids are in a sorted array, bool [I]."""
    if not len(ascending):
        return np.zeros(len(ids), dtype=bool)
    places = np.searchsorted(ascending, ids)
    return ascending[np.minimum(places, len(ascending) - 1)] == ids


def _as_bytes(ids: pa.ChunkedArray) -> np.ndarray:
    """Ids as numpy holds and compares them best."""
    return np.array(ids.cast(pa.binary()).to_pylist(), dtype=np.bytes_) if len(ids) else np.empty(0, dtype="S1")


def _parts_of(ids: np.ndarray, parts: int) -> np.ndarray:
    prefixes, prefix_of_id = np.unique(ids.astype(f"S{_PREFIX_LETTERS}"), return_inverse=True)
    return np.array([zlib.crc32(prefix) % parts for prefix in prefixes.tolist()], dtype=np.int64)[prefix_of_id]
