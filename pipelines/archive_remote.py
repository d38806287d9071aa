"""Archives that are elsewhere: what is below a prefix of a bucket, what matches a glob there, one file, a table."""

import glob
import re
from collections.abc import Iterator

from pipelines.archive_table import TABLE_EXTENSIONS, checked_address, list_table
from pipelines.storage.address import extension, is_web, public_address
from pipelines.storage.ranged import listing
from pipelines.storage.store import Listed, StorageFailure
from pipelines.video import ArchiveError, Video


def list_remote(archive: str, split_column: str, extensions: frozenset[str]) -> Iterator[Video]:
    """The videos of an archive, page by page of its listing.

    Args:
        archive: An address.
        split_column: Of a table.
        extensions: Of videos.

    Raises:
        ArchiveError: It cannot be listed.
    """
    checked_address(archive)
    if extension(archive) in TABLE_EXTENSIONS:
        yield from list_table(archive, split_column)
    elif is_web(archive):
        yield Video(uri=archive)
    elif glob.has_magic(archive):
        wanted = re.compile(_pattern(archive))
        before = re.split(r"[*?\[]", archive, maxsplit=1)[0]
        yield from (_video(found) for found in _listed(before) if wanted.fullmatch(found.uri))
    elif extension(archive) in extensions:
        yield Video(uri=archive)
    else:
        below = _listed(archive.rstrip("/") + "/")
        yield from (_video(found) for found in below if extension(found.uri) in extensions)


def _video(found: Listed) -> Video:
    return Video(uri=found.uri, size_bytes=found.size_bytes, version=found.version)


def _listed(prefix: str) -> Iterator[Listed]:
    try:
        yield from listing(prefix)
    except StorageFailure as failure:
        raise ArchiveError(f"cannot list {public_address(prefix)}: {failure}") from failure


def _pattern(archive: str) -> str:
    """The glob as a regular expression, as `glob` reads it: * and ? stay within a folder, ** does not."""
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\])", archive)
    sets = {piece: "[" + piece[1:].replace("!", "^", 1) for piece in pieces if piece.startswith("[!")}
    return "".join(
        parts.get(piece)
        or sets.get(piece)
        or (piece if piece.startswith("[") and piece.endswith("]") else re.escape(piece))
        for piece in pieces
    )
