"""From an archive to DIR/manifest, in parallel and in pieces: a killed run continues, a later run adds what is new.

Videos are taken from the listing as it goes on; what is held is a few tasks and two hashes for each video. A task
commits its clips as one file. A new manifest grows as DIR/manifest.partial and appears whole; afterwards only files of
changed videos are replaced.
"""

import dataclasses
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import ray

from pipelines.clip_ids import Rows
from pipelines.commit import StagedFiles, fence, keep_rows
from pipelines.failure import DecodeFailure
from pipelines.known_videos import KnownVideos, identity_hashes
from pipelines.manifest import plan_video
from pipelines.probe import file_identity
from pipelines.row_files import read_columns
from pipelines.schema import MANIFEST, PlannedClip
from pipelines.storage.address import is_remote
from pipelines.timeline import ClipPlan
from pipelines.video import Video

MANIFEST_DIR, PARTIAL_DIR = "manifest", "manifest.partial"

# Videos of a task and so of a file: a second of work on a disk, which is what a crash can cost.
_VIDEOS_PER_TASK = 256
# Remote videos that a task looks at together: that is waiting, not work.
_REMOTE_TOGETHER = 16
# Tasks in flight for each core: one that runs and one that waits.
_TASKS_PER_CPU = 2


def write_manifest(
    videos: Iterable[Video], plan: ClipPlan, output: Path, on_videos: Callable[[int], object] = lambda count: None
) -> None:
    """Make DIR/manifest hold the clips of these videos as they are now.

    Videos that are there already and have not changed are not probed again. The clips of a changed video take the place
    of its old ones. A video that is not in the archive (any more) or cannot be reached now keeps its clips.

    Args:
        videos: An archive.
        plan: How to cut it; that of the manifest that is there.
        output: DIR.
        on_videos: Is told how many more videos were looked at.

    Raises:
        LedgerError: A manifest that cannot be read.
    """
    fence(output)
    is_new = not (output / MANIFEST_DIR).exists()
    folder = output / (PARTIAL_DIR if is_new else MANIFEST_DIR)
    known, current = KnownVideos.read(folder), []
    for seen in _in_tasks(videos, plan, StagedFiles(output, folder.name), known):
        on_videos(len(seen))
        current.append(KnownVideos.of(pair for pair in seen if pair is not None))
    now = KnownVideos.joined(current)
    if KnownVideos.joined([known, now]).has_changes:
        _drop_outdated(output, folder, now)
    if is_new:
        folder.rename(output / MANIFEST_DIR)
    fence(output)


def _in_tasks(
    videos: Iterable[Video], plan: ClipPlan, files: StagedFiles, known: KnownVideos
) -> Iterator[list[tuple[int, int] | None]]:
    task = ray.remote(num_cpus=1)(plan_chunk)
    everywhere, pending = ray.put(known), []
    chunks = iter(videos)
    for number in itertools.count():
        chunk = list(itertools.islice(chunks, _VIDEOS_PER_TASK))
        while pending and (not chunk or len(pending) >= _TASKS_PER_CPU * ray.cluster_resources().get("CPU", 1)):
            done, pending = ray.wait(pending)
            yield from ray.get(done)
        if not chunk:
            return
        pending.append(task.remote(chunk, plan, files, number, everywhere))


def plan_chunk(
    videos: Sequence[Video], plan: ClipPlan, files: StagedFiles, number: int, known: KnownVideos
) -> list[tuple[int, int] | None]:
    """Commit the clips of those videos that are new or have changed.

    Returns:
        For each video its hashes; None where it cannot be reached but is known.
    """
    together = _REMOTE_TOGETHER if any(is_remote(video.uri) for video in videos) else 1
    with ThreadPoolExecutor(together) as pool:
        planned = list(pool.map(lambda video: _plan_unknown(video, plan, known), videos))
    clips = [clip for _, new in planned for clip in new]
    if clips:
        files.commit(f"{files.run}-{number:06d}.parquet", manifest_table(clips))
    return [hashes for hashes, _ in planned]


def manifest_table(clips: Sequence[PlannedClip]) -> pa.Table:
    """MANIFEST rows."""
    return pa.table({name: list(map(operator.attrgetter(name), clips)) for name in MANIFEST.names}, schema=MANIFEST)


def _plan_unknown(video: Video, plan: ClipPlan, known: KnownVideos) -> tuple[tuple[int, int] | None, list[PlannedClip]]:
    try:
        size_bytes, version = (video.size_bytes, video.version) if video.version else file_identity(video.uri)
    except DecodeFailure:
        size_bytes, version = 0, ""
    is_known = known.has(video.address, size_bytes, version)
    hashes = identity_hashes(video.address, size_bytes, version)
    if is_known:
        return (hashes if version or size_bytes else None), []
    return hashes, plan_video(dataclasses.replace(video, size_bytes=size_bytes, version=version), plan)


def _drop_outdated(output: Path, folder: Path, current: KnownVideos) -> None:
    """Clips of earlier versions of videos that were planned again."""
    tables = read_columns(folder, ["video", "size_bytes", "version"], MANIFEST)
    outdated = [current.outdated_rows(table) for table in tables]
    keep_rows(output, Rows(folder, MANIFEST), [~rows for rows in outdated])
