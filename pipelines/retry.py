"""Failed rows of a finished run as work that is left to do.

First failed rows leave the annotations, then videos that could not be read are planned again; each file changes by one
rename. Between any two renames the folder is that of a run that has been stopped: what is planned and has no row is
done by the next run, and no clip ever has two rows.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.annotate import MANIFEST_DIR, plan_stage
from pipelines.archive import Video
from pipelines.commit import ANNOTATIONS_DIR, StagedFiles, fence
from pipelines.ledger import parquet_files, read_file
from pipelines.limits import DEFAULT_LIMITS, Limits
from pipelines.schema import ANNOTATIONS, MANIFEST, Status
from pipelines.timeline import ClipPlan


def undo_failed(output: Path, plan: ClipPlan, limits: Limits = DEFAULT_LIMITS) -> int:
    """Make a run's failures undone; needs Ray. `write_annotations` then does them.

    A video that could not be probed is probed again, and may have more clips than the one row of its failure. One that
    has changed since it was planned fails again: it needs a new plan.

    Args:
        output: DIR of the run.
        plan: How its videos are cut.
        limits: Of probing.

    Returns:
        Rows that are taken away.

    Raises:
        LedgerError: A file that cannot be read.
    """
    fence(output)
    count = _forget_failed(output)
    _plan_failed_again(output, plan, limits)
    return count


def _forget_failed(output: Path) -> int:
    folder, count = output / ANNOTATIONS_DIR, 0
    if next(folder.glob("*.parquet"), None) is None:
        return 0
    files = StagedFiles(output, ANNOTATIONS_DIR)
    for path in parquet_files(folder):
        rows = read_file(path, ANNOTATIONS.names, ANNOTATIONS)
        kept = rows.filter(_IS_OK)
        count += len(rows) - len(kept)
        if not len(kept):
            path.unlink()
        elif len(kept) < len(rows):
            files.commit(path.name, kept)
    return count


def _plan_failed_again(output: Path, plan: ClipPlan, limits: Limits) -> None:
    """Rows of a video are in one file; each file gets those of its own videos."""
    failed_of = {
        path: read_file(path, MANIFEST.names, MANIFEST).filter(~_IS_OK) for path in parquet_files(output / MANIFEST_DIR)
    }
    failed = pa.concat_tables(failed_of.values()).to_pylist()
    if not failed:
        return
    videos = [Video(uri=row["video"], label=row["label"]) for row in failed]
    planned = pa.concat_tables(plan_stage(videos, plan, limits).iter_batches(batch_size=None, batch_format="pyarrow"))
    files = StagedFiles(output, MANIFEST_DIR)
    for path, rows in failed_of.items():
        if len(rows):
            videos_here = set(rows["video"].to_pylist())
            again = planned.filter(pa.array(video in videos_here for video in planned["video"].to_pylist()))
            kept = read_file(path, MANIFEST.names, MANIFEST).filter(_IS_OK)
            files.commit(path.name, pa.concat_tables([kept, again]))


_IS_OK = pc.field("status") == Status.OK.value
