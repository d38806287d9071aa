"""Listing an archive: a folder, a glob, a file, or a table with a column `video`."""

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

# Containers that FFmpeg reads and that people keep video in. Tables and globs may name files of any extension.
VIDEO_EXTENSIONS = frozenset(
    {
        *(".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".h264"),
        *(".h265", ".hevc", ".ivf", ".m1v", ".m2ts", ".m2v", ".m4v", ".mjpeg", ".mjpg", ".mkv"),
        *(".mov", ".mp4", ".mpe", ".mpeg", ".mpg", ".mts", ".mxf", ".nut", ".obu", ".ogm"),
        *(".ogv", ".qt", ".rm", ".rmvb", ".ts", ".vob", ".webm", ".wmv", ".y4m"),
    }
)
TABLE_EXTENSIONS = frozenset({".csv", ".parquet", ".jsonl"})


class ArchiveError(ValueError):
    """An archive that cannot be listed; one line that names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    """One video of an archive.

    Attributes:
        uri: Absolute path.
        label: Class, "" where the archive names none.
        split: "train", "val", "test" or whatever the table says; "" where it says nothing.
    """

    uri: str
    label: str = ""
    split: str = ""


def list_videos(archive: str, *, split_column: str = "split") -> Iterator[Video]:
    """The videos of an archive, each path once, in a stable order.

    Args:
        archive: A folder (searched recursively for video extensions), a glob, one video file, or a .csv, .parquet or
            .jsonl file with a column `video` (and `label`, `split`); relative paths there are relative to that file.
        split_column: Column of a table that says which split a video belongs to.

    Raises:
        ArchiveError: Nothing there, no video in it, or a table without the column.
    """
    seen: set[str] = set()
    for video in _list(archive, split_column):
        if video.uri not in seen:
            seen.add(video.uri)
            yield video
    if not seen:
        raise ArchiveError(f"no videos in {archive}")


def list_labelled(data: str, *, split_column: str = "split") -> Iterator[Video]:
    """Labelled videos: a table with `video` and `label` (and `split`), or a folder with one folder per class.

    Raises:
        ArchiveError: As `list_videos`, or a video without a label.
    """
    path = Path(local_path(data))
    if path.is_dir() and (path / "labels.csv").is_file():
        path = path / "labels.csv"
    for video in list_videos(str(path), split_column=split_column):
        label = video.label
        if path.is_dir():
            relative = Path(video.uri).relative_to(path.resolve())
            label = relative.parts[0] if len(relative.parts) > 1 else ""
        if not label:
            raise ArchiveError(f"{video.uri} has no label in {data}")
        yield Video(uri=video.uri, label=label, split=video.split)


def _list(archive: str, split_column: str) -> Iterator[Video]:
    path = Path(local_path(archive))
    if path.is_dir():
        yield from _list_folder(path)
    elif path.is_file():
        is_table = path.suffix.lower() in TABLE_EXTENSIONS
        yield from _list_table(path, split_column) if is_table else [Video(uri=str(path.resolve()))]
    elif glob.has_magic(str(path)):
        for match in sorted(glob.iglob(str(path), recursive=True)):  # noqa: PTH207 - absolute patterns too
            if Path(match).is_file():
                yield Video(uri=_readable_name(str(Path(match).resolve())))
    else:
        raise ArchiveError(f"no such archive: {archive}")


def local_path(uri: str) -> str:
    """The path of a file:// address or of a plain path.

    Raises:
        ArchiveError: Another scheme.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri
    if scheme != "file":
        raise ArchiveError(f"cannot read {scheme}:// yet: copy the archive to a disk that all nodes see")
    return rest


def _readable_name(path: str) -> str:
    """The path, if it can be written in UTF-8, as every table that we make is.

    Raises:
        ArchiveError: It cannot.
    """
    if not path.isprintable() and any("\udc80" <= letter <= "\udcff" for letter in path):
        raise ArchiveError(f"the name of {path!r} is not UTF-8; rename the file")
    return path


def _list_folder(folder: Path) -> Iterator[Video]:
    def refuse(error: OSError) -> None:
        raise ArchiveError(f"cannot list {error.filename}: {error.strerror}") from error

    visited: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(folder.resolve(), onerror=refuse, followlinks=True):
        stat = Path(parent).stat()
        if (stat.st_dev, stat.st_ino) in visited:  # a link back up
            folders.clear()
            continue
        visited.add((stat.st_dev, stat.st_ino))
        folders.sort()
        for name in sorted(names):
            if Path(name).suffix.lower() in VIDEO_EXTENSIONS:
                yield Video(uri=_readable_name(str(Path(parent) / name)))


def _list_table(path: Path, split_column: str) -> Iterator[Video]:
    table = read_table(path)
    if "video" not in table.column_names:
        raise ArchiveError(f"{path} has no column 'video'; it has {', '.join(table.column_names) or 'no columns'}")
    if split_column != "split" and split_column not in table.column_names:
        raise ArchiveError(f"{path} has no column {split_column!r}; it has {', '.join(table.column_names)}")
    columns = [_strings(table, name, path) for name in ("video", "label", split_column)]
    for number, (video, label, split) in enumerate(zip(*columns, strict=True), start=1):
        if not video:
            raise ArchiveError(f"{path}: row {number} has no video")
        yield Video(uri=os.path.normpath(path.resolve().parent / local_path(video)), label=label, split=split)


def read_table(path: Path) -> pa.Table:
    """Read a .csv, .parquet or .jsonl file; text in a .csv is taken as it stands.

    Raises:
        ArchiveError: A file that is not what its extension says.
    """
    try:
        if path.suffix.lower() == ".csv":
            text = dict.fromkeys(("video", "label", "split"), pa.string())
            options = pyarrow.csv.ConvertOptions(column_types=text, strings_can_be_null=False)
            return pyarrow.csv.read_csv(path, convert_options=options)
        if path.suffix.lower() == ".jsonl":
            return pyarrow.json.read_json(path)
        return pyarrow.parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ArchiveError(f"cannot read {path}: {error}") from error


def _strings(table: pa.Table, name: str, path: Path) -> list[str]:
    if name not in table.column_names:
        return [""] * len(table)
    try:
        return [value or "" for value in table[name].cast(pa.string()).to_pylist()]
    except (pa.ArrowException, KeyError) as error:
        raise ArchiveError(f"{path}: column {name!r} is not one column of text") from error
