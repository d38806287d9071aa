"""The archive that a job was given, opened before any work."""

import itertools
from collections.abc import Iterator

from jobs.cli import checking_input
from pipelines.archive import Video, list_videos, signatures_of
from pipelines.storage.signatures import Signatures


def open_archive(archive: str) -> tuple[Iterator[Video], Signatures]:
    """The videos of an archive as they are listed, of which the first is there; and what they are read with.

    Raises:
        UserError: Nothing there, or nothing that can be listed. (Later, while it goes on: ArchiveError.)
    """
    with checking_input():
        videos = list_videos(archive)
        return itertools.chain([next(videos)], videos), signatures_of(archive)
