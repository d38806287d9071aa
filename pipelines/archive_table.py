"""Tables of videos, on a disk or elsewhere: .csv, .parquet or .jsonl with a column `video`."""

import io
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from pipelines.storage.address import extension, is_remote, is_web, public_address, scheme_of
from pipelines.storage.ranged import RangedFile
from pipelines.storage.store import StorageFailure
from pipelines.video import ArchiveError, Video

TABLE_EXTENSIONS = frozenset({".csv", ".parquet", ".jsonl"})
_ROWS_AT_A_TIME = 10_000


def list_table(table_uri: str, split_column: str) -> Iterator[Video]:
    """The videos of a table, each once, in its order. All rows are checked before the first is given.

    Raises:
        ArchiveError: No table of videos.
    """
    name, table = public_address(table_uri), read_table(table_uri)
    if "video" not in table.column_names:
        raise ArchiveError(f"{name} has no column 'video'; it has {', '.join(table.column_names) or 'no columns'}")
    if split_column != "split" and split_column not in table.column_names:
        raise ArchiveError(f"{name} has no column {split_column!r}; it has {', '.join(table.column_names)}")
    columns = {column: _strings(table, column, name) for column in ("video", "label", split_column)}
    without = pc.index(columns["video"], "").as_py()
    if without >= 0:
        raise ArchiveError(f"{name}: row {without + 1} has no video")
    texts = pa.table(list(columns.values()), names=["video", "label", "split"])
    base = table_uri if is_remote(table_uri) else str(Path(table_uri).resolve())
    seen: dict[str, str] = {}  # of the videos that were given
    for batch in texts.to_batches(max_chunksize=_ROWS_AT_A_TIME):
        for row in batch.to_pylist():
            video = Video(uri=_absolute(base, row["video"]), label=row["label"], split=row["split"])
            before = seen.setdefault(video.address, video.uri)
            if before != video.uri:
                raise ArchiveError(f"{name} names {video.address} twice, with other letters after the '?'")
            if before is video.uri:
                yield video


def _absolute(table_uri: str, video: str) -> str:
    """The address of a video that a table names, relative to the table."""
    if is_remote(video):
        return checked_address(video)
    if is_web(table_uri):
        return urljoin(public_address(table_uri), video)
    path = local_path(video)
    if is_remote(table_uri) and not path.startswith("/"):
        scheme, _, place = table_uri.partition("://")
        return f"{scheme}://{posixpath.normpath(posixpath.join(posixpath.dirname(place), path))}"
    return os.path.normpath(Path(table_uri).parent / path)


def checked_address(uri: str) -> str:
    """An s3:// or gs:// address must not bring credentials along; those come from the environment.

    Raises:
        ArchiveError: It does.
    """
    if not is_web(uri) and "@" in uri.partition("://")[2].partition("/")[0]:
        raise ArchiveError(f"credentials come from the environment, not from an address: {public_address(uri)}")
    return uri


def local_path(uri: str) -> str:
    """The path of a file:// address or of a plain path.

    Raises:
        ArchiveError: Another scheme.
    """
    if "://" not in uri:
        return uri
    if scheme_of(uri) != "file":
        raise ArchiveError(f"cannot read {scheme_of(uri)}://: only paths, s3://, gs:// and https://")
    return uri.partition("://")[2]


def read_table(uri: str | Path) -> pa.Table:
    """Read a .csv, .parquet or .jsonl file; text in a .csv is taken as it stands.

    Raises:
        ArchiveError: A file that is not what its extension says.
    """
    uri = str(uri)
    try:
        source = io.BufferedReader(RangedFile(uri)) if is_remote(uri) else uri
        if extension(uri) == ".csv":
            text = dict.fromkeys(("video", "label", "split"), pa.string())
            options = pyarrow.csv.ConvertOptions(column_types=text, strings_can_be_null=False)
            return pyarrow.csv.read_csv(source, convert_options=options)
        if extension(uri) == ".jsonl":
            return pyarrow.json.read_json(source)
        return pyarrow.parquet.read_table(source)
    except (pa.ArrowException, OSError, StorageFailure) as error:
        raise ArchiveError(f"cannot read {public_address(uri)}: {error}") from error


def _strings(table: pa.Table, column: str, name: str) -> pa.ChunkedArray:
    if column not in table.column_names:
        return pa.chunked_array([pa.repeat("", len(table))])
    try:
        return pc.fill_null(table[column].cast(pa.string()), "")
    except (pa.ArrowException, KeyError) as error:
        raise ArchiveError(f"{name}: column {column!r} is not one column of text") from error
