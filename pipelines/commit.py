"""What of a run is committed, and what is left to do.

Ray Data commits in two phases: ids of a file are written as pending, then the file, then the ids become committed. A
later run deletes files whose ids stayed pending. We keep that, and replace how committed ids are left out: Ray does it
in actors that hold a CPU to the end, which on two cores leaves none to decode; here the manifest's remaining rows are
written beside it before the run starts.
"""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from ray.data.checkpoint import CheckpointConfig
from ray.data.checkpoint.checkpoint_filter import IdColumnCheckpointManager
from ray.data.checkpoint.checkpoint_writer import PENDING_CHECKPOINT_SUFFIX

from pipelines.ledger import read_columns
from pipelines.schema import MANIFEST

CHECKPOINT_DIR, REMAINING_DIR = ".checkpoint", ".remaining"
# Rows of a file of remaining clips: some ten megabytes, and a task of its own to read.
_ROWS_PER_FILE = 50_000


class _RecoverOnly(IdColumnCheckpointManager):
    """Deletes files that were never committed, and filters nothing."""

    def load_checkpoint(self, *args, **kwargs):
        super().load_checkpoint(*args, **kwargs)
        return None, 0


def checkpoint_config(output: Path) -> CheckpointConfig:
    """Commit by clip_id; the committed ids stay after success, and tell a later run that nothing is left."""
    return CheckpointConfig(
        id_column="clip_id",
        checkpoint_path=str(output / CHECKPOINT_DIR),
        delete_checkpoint_on_success=False,
        checkpoint_manager_cls=_RecoverOnly,
    )


def committed_ids(output: Path) -> set[str]:
    """Ids of all rows that are safe."""
    files = (path for path in (output / CHECKPOINT_DIR).glob("*.parquet") if PENDING_CHECKPOINT_SUFFIX not in path.name)
    return {id_ for path in files for id_ in pq.read_table(path, columns=["clip_id"])["clip_id"].to_pylist()}


def write_remaining(output: Path, manifest: Path) -> int:
    """Write the manifest's rows that are not committed to DIR/.remaining; returns how many there are.

    Raises:
        LedgerError: A manifest that cannot be read.
    """
    folder, committed, count = output / REMAINING_DIR, committed_ids(output), 0
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, table in enumerate(read_columns(manifest, MANIFEST.names, MANIFEST)):
        left = table.filter(pa.array(id_ not in committed for id_ in table["clip_id"].to_pylist()))
        for start in range(0, len(left), _ROWS_PER_FILE):
            pq.write_table(left.slice(start, _ROWS_PER_FILE), folder / f"{number:06d}-{start:09d}.parquet")
        count += len(left)
    return count
