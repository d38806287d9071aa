"""Whether a folder is one and the same on all nodes: each writes a file there, and each reads those of all others.

Files appear as those of a job do, written under another name and renamed, and no folder is ever made: on a node without
the shared disk that would succeed, on its own disk.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path


@contextlib.contextmanager
def probe_folder(output: Path) -> Iterator[Path]:
    """A folder in DIR for the time of a diagnosis."""
    folder = output / f".doctor-{uuid.uuid4().hex}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_mark(folder: Path, node: str) -> str:
    """Leave a file that names the node; returns why it cannot, or ""."""
    try:
        partial = folder / f"{node}.partial"
        with partial.open("w") as file:
            file.write(node)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(folder / node)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def unread_marks(folder: Path, nodes: Iterable[str]) -> list[str]:
    """Those of the nodes whose files cannot be read here as they were written."""
    return [node for node in nodes if not _is_marked(folder / node, node)]


def _is_marked(path: Path, node: str) -> bool:
    try:
        return path.read_text() == node
    except (OSError, UnicodeDecodeError):
        return False
