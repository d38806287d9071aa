"""From an archive to DIR/manifest, in parallel and in pieces: a killed run continues, a later run adds what is new.

Videos are taken from the listing as it goes on; what is held is a few tasks and two hashes for each video. A task
commits its clips as one file. A new manifest grows as DIR/manifest.partial and appears whole; afterwards only files of
changed videos are replaced.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import ray

from pipelines.child import num_children
from pipelines.clip_ids import Rows
from pipelines.commit import StagedFiles, fence, keep_rows
from pipelines.failure import DecodeFailure
from pipelines.known_videos import KnownVideos, identity_hashes
from pipelines.limits import DEFAULT_LIMITS, Limits
from pipelines.manifest import plan_video
from pipelines.output import in_output
from pipelines.probe import file_identity
from pipelines.row_files import read_columns
from pipelines.schema import MANIFEST, PlannedClip
from pipelines.storage.address import is_remote
from pipelines.timeline import ClipPlan
from pipelines.video import Video
from pipelines.waiting import Notices, told

MANIFEST_DIR, PARTIAL_DIR = "manifest", "manifest.partial"

# Videos of a task and so of a file: a second of work on a disk, which is what a crash can cost.
_VIDEOS_PER_TASK = 256
# Remote videos whose version a task asks for together: that is waiting, not work. Those that it probes together: mostly
# waiting as well, but each in a process of its own.
_ASKED_TOGETHER, _PROBED_TOGETHER = 16, 4
# Tasks in flight for each core: one that runs and one that waits.
_TASKS_PER_CPU = 2

Result = TypeVar("Result")


def write_manifest(
    videos: Iterable[Video],
    plan: ClipPlan,
    output: Path,
    limits: Limits = DEFAULT_LIMITS,
    on_videos: Callable[[int], object] = lambda count: None,
) -> None:
    """Make DIR/manifest hold the clips of these videos as they are now.

    Videos that are there already and have not changed are not probed again. The clips of a changed video take the place
    of its old ones. A video that is not in the archive (any more) or cannot be reached now keeps its clips.

    Args:
        videos: An archive.
        plan: How to cut it; that of the manifest that is there.
        output: DIR.
        limits: Of probing a video.
        on_videos: Is told how many more videos were looked at.

    Raises:
        LedgerError: A manifest that cannot be read.
        OutputFailedError: One that cannot be written.
    """
    fence(output)
    is_new = not _exists(output, output / MANIFEST_DIR)
    folder = output / (PARTIAL_DIR if is_new else MANIFEST_DIR)
    known, current = KnownVideos.read(folder), []
    for seen in _in_tasks(videos, plan, limits, StagedFiles(output, folder.name), known):
        on_videos(len(seen))
        current.append(KnownVideos.of(pair for pair in seen if pair is not None))
    now = KnownVideos.joined(current)
    if KnownVideos.joined([known, now]).has_changes:
        _drop_outdated(output, folder, now)
    if is_new:
        _appear(output, folder)
    fence(output)


def _exists(output: Path, folder: Path) -> bool:
    try:
        return bool(in_output(output, folder.stat))
    except FileNotFoundError:
        return False


def _appear(output: Path, partial: Path) -> None:
    try:
        in_output(output, lambda: partial.rename(output / MANIFEST_DIR))
    except FileNotFoundError:
        if not _exists(output, output / MANIFEST_DIR):  # it was done, and the answer was lost
            raise


def _in_tasks(
    videos: Iterable[Video], plan: ClipPlan, limits: Limits, files: StagedFiles, known: KnownVideos
) -> Iterator[list[tuple[int, int] | None]]:
    task = ray.remote(num_cpus=1, max_retries=-1)(plan_chunk)  # a node may go as often as it likes
    everywhere, pending = ray.put(known), []
    chunks = iter(videos)
    for number in itertools.count():
        chunk = list(itertools.islice(chunks, _VIDEOS_PER_TASK))
        while pending and (not chunk or len(pending) >= _TASKS_PER_CPU * ray.cluster_resources().get("CPU", 1)):
            done, pending = ray.wait(pending)
            yield from ray.get(done)
        if not chunk:
            return
        pending.append(task.remote(chunk, plan, limits, files, number, everywhere))


def plan_chunk(
    videos: Sequence[Video], plan: ClipPlan, limits: Limits, files: StagedFiles, number: int, known: KnownVideos
) -> list[tuple[int, int] | None]:
    """Commit the clips of those videos that are new or have changed.

    Returns:
        For each video its hashes; None where it cannot be reached but is known.
    """
    with told(Notices(files.output).post):
        return _plan_chunk(videos, plan, limits, files, number, known)


def _plan_chunk(
    videos: Sequence[Video], plan: ClipPlan, limits: Limits, files: StagedFiles, number: int, known: KnownVideos
) -> list[tuple[int, int] | None]:
    are_remote = any(is_remote(video.uri) for video in videos)
    found = _map(_identified, videos, _ASKED_TOGETHER if are_remote else 1)
    known_V = [known.has(video.address, video.size_bytes, video.version) for video in found]
    new = [video for video, is_known in zip(found, known_V, strict=True) if not is_known]
    probed_together = num_children(len(new), _PROBED_TOGETHER) if are_remote else 1
    planned = _map(functools.partial(plan_video, plan=plan, limits=limits), new, probed_together)
    clips = [clip for of_video in planned for clip in of_video]
    if clips:
        files.commit(f"{files.run}-{number:06d}.parquet", manifest_table(clips))
    return [
        None if is_known and not video.size_bytes else identity_hashes(video.address, video.size_bytes, video.version)
        for video, is_known in zip(found, known_V, strict=True)
    ]


def manifest_table(clips: Sequence[PlannedClip]) -> pa.Table:
    """MANIFEST rows."""
    return pa.table({name: list(map(operator.attrgetter(name), clips)) for name in MANIFEST.names}, schema=MANIFEST)


def _map(function: Callable[[Video], Result], videos: Sequence[Video], threads: int) -> list[Result]:
    if threads == 1:  # in this thread, whose child is there for the next task too
        return list(map(function, videos))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, videos))


def _identified(video: Video) -> Video:
    """With size and version, 0 and "" where it cannot be reached."""
    if video.version:
        return video
    try:
        size_bytes, version = file_identity(video.uri)
    except DecodeFailure:
        size_bytes, version = 0, ""
    return dataclasses.replace(video, size_bytes=size_bytes, version=version)


def _drop_outdated(output: Path, folder: Path, current: KnownVideos) -> None:
    """Clips of earlier versions of videos that were planned again."""
    tables = read_columns(folder, ["video", "size_bytes", "version"], MANIFEST)
    outdated = [current.outdated_rows(table) for table in tables]
    keep_rows(output, Rows(folder, MANIFEST), [~rows for rows in outdated])
