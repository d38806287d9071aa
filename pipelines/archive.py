"""Listing an archive: a folder, a glob, a file, or a table with a column `video`; here or elsewhere."""

import dataclasses
import glob
import os
from collections.abc import Iterator
from pathlib import Path

from pipelines.archive_remote import list_remote
from pipelines.archive_table import TABLE_EXTENSIONS, list_table, local_path
from pipelines.storage.address import extension, is_remote, is_web, public_address
from pipelines.storage.signatures import UNSIGNED, Signatures
from pipelines.video import ArchiveError, Video

__all__ = ["ArchiveError", "Video", "list_labelled", "list_videos", "signatures_of"]

# Containers that FFmpeg reads and that people keep video in. Tables and globs may name files of any extension.
VIDEO_EXTENSIONS = frozenset(
    {
        *(".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".h264"),
        *(".h265", ".hevc", ".ivf", ".m1v", ".m2ts", ".m2v", ".m4v", ".mjpeg", ".mjpg", ".mkv"),
        *(".mov", ".mp4", ".mpe", ".mpeg", ".mpg", ".mts", ".mxf", ".nut", ".obu", ".ogm"),
        *(".ogv", ".qt", ".rm", ".rmvb", ".ts", ".vob", ".webm", ".wmv", ".y4m"),
    }
)


def list_videos(archive: str, *, split_column: str = "split") -> Iterator[Video]:
    """The videos of an archive, each address once, in a stable order. They come while the listing goes on.

    Args:
        archive: A folder (searched recursively for video extensions), a glob, one video file, or a .csv, .parquet or
            .jsonl file with a column `video` (and `label`, `split`); relative paths there are relative to that file.
            The same at s3:// and gs:// addresses; at an https:// address a video or such a file.
        split_column: Column of a table that says which split a video belongs to.

    Raises:
        ArchiveError: Nothing there, no video in it, or a table without the column.
    """
    last = None
    for last in _list(archive, split_column):
        yield last
    if last is None:
        raise ArchiveError(f"no videos in {public_address(archive)}")


def list_labelled(data: str, *, split_column: str = "split") -> Iterator[Video]:
    """Labelled videos: a table with `video` and `label` (and `split`), or a folder with one folder per class.

    Raises:
        ArchiveError: As `list_videos`, or a video without a label.
    """
    root = public_address(data).rstrip("/") if is_remote(data) else str(Path(local_path(data)).resolve())
    if (Path(root) / "labels.csv").is_file():
        root = data = str(Path(root) / "labels.csv")
    for video in list_videos(data, split_column=split_column):
        below = video.address.removeprefix(f"{root}/")
        label = video.label
        if not label and below != video.address and "/" in below:
            label = below.partition("/")[0]
        if not label:
            raise ArchiveError(f"{video.address} has no label in {public_address(data)}")
        yield dataclasses.replace(video, label=label)


def signatures_of(archive: str) -> Signatures:
    """What the addresses of an archive are to be read with; only tables, and an https:// address, hold such.

    Raises:
        ArchiveError: As `list_videos`.
    """
    may_be_signed = extension(archive) in TABLE_EXTENSIONS or is_web(archive)
    return Signatures.of(video.uri for video in list_videos(archive)) if may_be_signed else UNSIGNED


def _list(archive: str, split_column: str) -> Iterator[Video]:
    path = Path() if is_remote(archive) else Path(local_path(archive))
    if is_remote(archive):
        yield from list_remote(archive, split_column, VIDEO_EXTENSIONS)
    elif path.is_dir():
        yield from _list_folder(path)
    elif path.is_file():
        is_table = path.suffix.lower() in TABLE_EXTENSIONS
        yield from list_table(str(path), split_column) if is_table else [Video(uri=str(path.resolve()))]
    elif glob.has_magic(str(path)):
        matches = sorted(glob.iglob(str(path), recursive=True))  # noqa: PTH207 - absolute patterns too
        files = dict.fromkeys(str(Path(match).resolve()) for match in matches if Path(match).is_file())
        yield from (Video(uri=_readable_name(file)) for file in files)
    else:
        raise ArchiveError(f"no such archive: {archive}")


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
