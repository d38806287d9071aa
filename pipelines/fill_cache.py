"""Filling a cache of decoded clips, on all CPUs of the cluster."""

import contextlib
import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import ray
from tqdm import tqdm

from pipelines.clip_cache import CACHE_FILE, CACHED, CLIPS_DIR, CLIPS_KEY, ClipCache, fingerprint
from pipelines.clip_source import clip_bytes
from pipelines.commit import STAGING_DIR, StagedFiles
from pipelines.decoded import Clip
from pipelines.ingest import DECODE_MEMORY_BYTES
from pipelines.manifest import decode_planned
from pipelines.schema import PlannedClip, Status
from pipelines.storage.signatures import UNSIGNED, Signatures
from pipelines.view import View

# What a crash can cost to decode again, and a good size of an object. A task decodes one shard.
_SHARD_BYTES = 64 << 20
_MAX_CLIPS_PER_SHARD = 64
# A shard on its way out is in memory as frames, as a table and as a file.
_TASK_MEMORY_BYTES = DECODE_MEMORY_BYTES + 3 * _SHARD_BYTES
# Rows that Ray cuts into tasks at a time.
_ROWS_PER_BLOCK = 10_000
# A writer is done with its file in minutes.
_STALE_S = 24 * 3600.0
# So that the pixels of a clip lie there as one plain range of bytes.
_SHARD_OPTIONS: dict[str, Any] = {
    "row_group_size": 1,
    "compression": "none",
    "use_dictionary": False,
    "write_statistics": False,
}

Commit = Callable[[str, pa.Table], None]


def fill(manifest: pa.Table, view: View, uri: str, max_bytes: int, signatures: Signatures = UNSIGNED) -> int:
    """Decode what is not in the cache yet; needs Ray.

    It may be killed at any moment, and run by several jobs at a time: what is there is whole, and what is not is
    decoded by the next call. A failure is a row too, and not tried again.

    Args:
        manifest: MANIFEST rows.
        view: Frames and size.
        uri: As `ClipCache.open`.
        max_bytes: Room for the clips of this manifest; those that do not fit, from the end, are left out.
        signatures: What signed addresses are read with.

    Returns:
        Rows of the manifest that are left out; if none, `CachedClips` can serve it.

    Raises:
        CacheError: A cache that cannot be used.
    """
    cache = ClipCache.open(uri, view)
    fitting = manifest.slice(0, max(0, max_bytes) // clip_bytes(cache.view))
    missing = fitting.filter(pa.array(cache.find(fitting["clip_id"]).shard_S < 0))
    if len(missing):
        num_done = len(fitting) - len(missing)
        bar = tqdm(total=len(fitting), initial=num_done, desc="decode", unit="clip", smoothing=0.1, mininterval=1)
        with bar, _committing(cache) as commit:
            for num_clips in _decode(missing, cache, commit, signatures):
                bar.update(num_clips)
    return len(manifest) - len(fitting)


def _decode(missing: pa.Table, cache: ClipCache, commit: Commit, signatures: Signatures) -> Iterator[int]:
    """MANIFEST rows -> shards of CACHED rows; yields how many clips each has, once it is safe."""
    clips_per_shard = max(1, min(_MAX_CLIPS_PER_SHARD, _SHARD_BYTES // clip_bytes(cache.view)))
    blocks = [missing.slice(start, _ROWS_PER_BLOCK) for start in range(0, len(missing), _ROWS_PER_BLOCK)]
    rows = ray.data.from_arrow(blocks)
    rows.context.enable_progress_bars = False  # ours counts clips
    written = rows.repartition(target_num_rows_per_block=clips_per_shard).map_batches(
        functools.partial(_write_shard, view=cache.view, commit=commit, signatures=signatures),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=1,  # both decoders run on one thread
        memory=_TASK_MEMORY_BYTES,
    )
    for table in written.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield int(np.sum(table["num_clips"]))


def _write_shard(manifest: pa.Table, view: View, commit: Commit, signatures: Signatures) -> pa.Table:
    """Decode a task's rows and commit them as one shard; a task that Ray runs again replaces its own."""
    shard = cached_rows(manifest, view, signatures)
    commit(f"{hashlib.sha256(str(shard['clip_id'].to_pylist()).encode()).hexdigest()[:20]}.parquet", shard)
    return pa.table({"num_clips": pa.array([len(shard)], pa.int64())})


def cached_rows(manifest: pa.Table, view: View, signatures: Signatures = UNSIGNED) -> pa.Table:
    """MANIFEST rows to CACHED rows, one for one, in order; their footer says which are there."""
    clips = [PlannedClip(**row) for row in manifest.to_pylist()]
    rows: list[dict[str, Any]] = []
    for clip, outcome in zip(clips, decode_planned(clips, view, signatures=signatures), strict=True):
        row = {"clip_id": clip.clip_id, "frames": None, "status": Status.OK.value, "error": ""}
        if isinstance(outcome, Clip):
            row["frames"] = np.ascontiguousarray(outcome.frames_THWC).reshape(-1).data
        else:
            row |= {"status": outcome.status.value, "error": str(outcome)}
        rows.append(row)
    footer = [[row["clip_id"], "" if row["frames"] else f"{row['status']}: {row['error']}"] for row in rows]
    return pa.Table.from_pylist(rows, schema=CACHED.with_metadata({CLIPS_KEY: json.dumps(footer)}))


@contextlib.contextmanager
def _committing(cache: ClipCache) -> Iterator[Commit]:
    """How a shard gets into the cache, whole: by a rename on a local disk, elsewhere as one object."""
    cache.filesystem.create_dir(cache.path(CLIPS_DIR))
    text = json.dumps(fingerprint(cache.view)).encode()
    if cache.local is None:
        _upload(cache.filesystem, cache.path(CACHE_FILE), text)
        yield functools.partial(_upload_shard, cache)
        return
    # Not a fence as for annotations: another job may be filling the same cache, and a shard that is there twice is
    # read once. What writers that were killed have left goes after a day.
    for left in (cache.local / STAGING_DIR).glob("*"):
        with contextlib.suppress(FileNotFoundError):  # another job takes it away, too
            if time.time() - left.stat().st_mtime > _STALE_S:
                shutil.rmtree(left, ignore_errors=True)
    files = StagedFiles(cache.local, CLIPS_DIR)
    try:
        (files.staging / CACHE_FILE).write_bytes(text)
        (files.staging / CACHE_FILE).replace(cache.local / CACHE_FILE)
        yield functools.partial(_commit_shard, files)
    finally:
        shutil.rmtree(files.staging, ignore_errors=True)


def _commit_shard(files: StagedFiles, name: str, shard: pa.Table) -> None:
    files.commit(name, shard, **_SHARD_OPTIONS)


def _upload_shard(cache: ClipCache, name: str, shard: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(shard, sink, **_SHARD_OPTIONS)
    _upload(cache.filesystem, cache.path(f"{CLIPS_DIR}/{name}"), sink.getvalue())


def _upload(filesystem: pyarrow.fs.FileSystem, path: str, content: bytes | pa.Buffer) -> None:
    """Write an object in one go: whatever fails before has not opened it, so that half of it never appears."""
    with filesystem.open_output_stream(path) as file:
        file.write(content)
