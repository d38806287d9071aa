"""Failed rows of a finished run as work that is left to do."""

from pathlib import Path

import numpy as np

from pipelines.clip_ids import Rows
from pipelines.commit import ANNOTATIONS_DIR, fence, keep_rows
from pipelines.planning import MANIFEST_DIR
from pipelines.row_files import has_rows, read_columns
from pipelines.schema import ANNOTATIONS, MANIFEST, Status


def undo_failed(output: Path) -> int:
    """Make a run's failures undone: failed rows leave the annotations, then videos that could not be read the manifest.

    `write_manifest` then plans those videos again, as many as the archive still has, and `write_annotations` does what
    has no row. Each file changes by one rename, and between any two the folder is that of a run that has been stopped:
    the next run does what is missing, and no clip ever has two rows.

    Args:
        output: DIR of the run.

    Returns:
        Rows that are taken from the annotations.

    Raises:
        LedgerError: A file that cannot be read.
    """
    fence(output)
    count = _drop_failed(output, Rows(output / ANNOTATIONS_DIR, ANNOTATIONS))
    _drop_failed(output, Rows(output / MANIFEST_DIR, MANIFEST))
    return count


def _drop_failed(output: Path, rows: Rows) -> int:
    if not has_rows(rows.folder):
        return 0
    statuses = (table["status"].to_numpy() for table in read_columns(rows.folder, ["status"], rows.schema))
    are_ok = [status == Status.OK.value for status in statuses]
    keep_rows(output, rows, are_ok)
    return sum(int(np.count_nonzero(~is_ok)) for is_ok in are_ok)
