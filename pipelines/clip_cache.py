"""A cache of decoded clips: what decoding costs is paid once, and training reads at the speed of a disk.

A folder or an address of an object store holds one folder for each view (URI/HASH): `cache.json`, which says what the
pixels are, and `clips/`, parquet shards of CACHED rows. A shard is not compressed and has one row group a clip, so
that the pixels of a clip are one range of bytes: one request to an object store, and no copy. Its footer says where.

Shapes: T frames of H x W pixels; S rows of a manifest.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import torch

from mone.clips import Batch
from pipelines.clip_source import classes_of, clip_bytes, frames_like, name_of, read_ahead
from pipelines.view import PIXELS_VERSION, View

CACHE_FILE, CLIPS_DIR = "cache.json", "clips"

CACHED = pa.schema(
    [
        ("clip_id", pa.string()),
        ("frames", pa.large_binary()),  # uint8 [T, H, W, 3]; null after a failure
        ("status", pa.string()),
        ("error", pa.string()),
    ]
)
# Of a shard's footer: JSON [[clip_id, reason], ...], one a row group; reason "" where there are frames.
CLIPS_KEY = b"clips"
# Requests to an object store mostly wait.
_THREADS = 16


class CacheError(ValueError):
    """A cache that cannot be used; one line that names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where the clips of a manifest are in a cache.

    Attributes:
        shards: Paths.
        shard_S: int32, which of them has the row; -1 where none has.
        offset_S: int64, where its frames begin; -1 where there are none.
        reasons: Why there are no frames, by row.
    """

    shards: list[str]
    shard_S: np.ndarray
    offset_S: np.ndarray
    reasons: dict[int, str]

    def of(self, sample: int) -> tuple[str, int]:
        """Shard and offset of a row that has frames."""
        return self.shards[self.shard_S[sample]], int(self.offset_S[sample])


class _Entry(NamedTuple):
    clip_id: str
    offset: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipCache:
    """The cached clips of one view.

    Attributes:
        filesystem: Local, or any that pyarrow knows.
        folder: URI/HASH there.
        view: Frames and size of all clips.
    """

    filesystem: pyarrow.fs.FileSystem
    folder: str
    view: View

    @staticmethod
    def open(uri: str, view: View) -> "ClipCache":
        """The cache for a view, which may be empty yet.

        Args:
            uri: A path that all nodes see, or an address such as s3://bucket/cache.
            view: Each has a folder of its own below the uri.

        Raises:
            CacheError: An address that pyarrow does not know, or other pixels in the folder of this view.
        """
        if view.crops != 1:
            raise ValueError(f"a cache has one crop of a clip, got {view.crops}")
        filesystem, root = _filesystem(uri)
        cache = ClipCache(filesystem=filesystem, folder=f"{root.rstrip('/')}/{_digest(fingerprint(view))}", view=view)
        cache._check()
        return cache

    @property
    def local(self) -> Path | None:
        """The folder, where it is one of this machine's."""
        return Path(self.folder) if isinstance(self.filesystem, pyarrow.fs.LocalFileSystem) else None

    def find(self, clip_ids: pa.ChunkedArray) -> Places:
        """Look clips up in the footers of all shards.

        Raises:
            CacheError: A shard that cannot be read.
        """
        ids = clip_ids.to_pylist()
        rows: dict[str, int] = {}
        first_S = np.array([rows.setdefault(id_, row) for row, id_ in enumerate(ids)], dtype=np.int64)
        shards = self._shards()
        shard_S, offset_S = np.full(len(ids), -1, dtype=np.int32), np.full(len(ids), -1, dtype=np.int64)
        reasons: dict[int, str] = {}
        with ThreadPoolExecutor(_THREADS) as pool:
            for number, entries in enumerate(pool.map(self._entries, shards)):
                for entry in entries:
                    row = rows.get(entry.clip_id, -1)
                    if row < 0 or shard_S[row] >= 0:  # another manifest's, or written twice by two jobs at a time
                        continue
                    shard_S[row], offset_S[row] = number, entry.offset
                    if entry.reason:
                        reasons[row] = entry.reason
        reasons = {row: reasons[first] for row, first in enumerate(first_S.tolist()) if first in reasons}
        return Places(shards=shards, shard_S=shard_S[first_S], offset_S=offset_S[first_S], reasons=reasons)

    def read_into(self, frames_THWC: np.ndarray, shard: str, offset: int) -> None:
        """Read a clip to where it is wanted.

        Raises:
            CacheError: The shard is gone or cut short.
        """
        try:
            with self.filesystem.open_input_file(shard) as file:
                file.seek(offset)
                num_bytes = file.readinto(frames_THWC.reshape(-1).data)
        except (pa.ArrowException, OSError) as error:
            raise CacheError(f"cannot read {shard}: {error}") from error
        if num_bytes != clip_bytes(self.view):
            raise CacheError(
                f"cannot read {shard}: {num_bytes} bytes at {offset} where {clip_bytes(self.view)} should be"
            )

    def _check(self) -> None:
        info = self.filesystem.get_file_info(self.path(CACHE_FILE))
        if info.type == pyarrow.fs.FileType.NotFound:
            return
        try:
            with self.filesystem.open_input_stream(info.path) as file:
                found = json.loads(file.read())
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CacheError(f"cannot read {info.path}: {error}") from error
        wanted = fingerprint(self.view)
        if found != wanted:
            raise CacheError(f"{self.folder} holds {found}, not {wanted}; choose another place for the cache")

    def path(self, name: str) -> str:
        """A file of this cache, on its filesystem."""
        return f"{self.folder}/{name}"

    def _shards(self) -> list[str]:
        selector = pyarrow.fs.FileSelector(self.path(CLIPS_DIR), allow_not_found=True)
        try:
            return sorted(
                info.path for info in self.filesystem.get_file_info(selector) if info.path.endswith(".parquet")
            )
        except OSError as error:
            raise CacheError(f"cannot list {self.folder}: {error}") from error

    def _entries(self, shard: str) -> list[_Entry]:
        try:
            metadata = pq.read_metadata(shard, filesystem=self.filesystem)
            clips = json.loads(metadata.metadata[CLIPS_KEY])
            ends = [_end_of_frames(metadata.row_group(number)) for number in range(metadata.num_row_groups)]
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            message = f"{shard} is no shard of clips ({error}); delete it and fill the cache again"
            raise CacheError(message) from error
        return [
            _Entry(clip_id, -1 if reason else end - clip_bytes(self.view), reason)
            for (clip_id, reason), end in zip(clips, ends, strict=True)
        ]


def _filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    if "://" not in uri:
        return pyarrow.fs.LocalFileSystem(), str(Path(uri).absolute())
    try:
        return pyarrow.fs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError) as error:
        raise CacheError(f"no place for a cache: {uri}: {error}") from error


def fingerprint(view: View) -> dict[str, int]:
    """What decides the pixels of a clip."""
    sizes = {name: getattr(view, name) for name in ("num_frames", "height_px", "width_px")}
    return {**sizes, "pixels_version": PIXELS_VERSION}


def _digest(fingerprint: dict[str, int]) -> str:
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:8]


def _end_of_frames(row_group: pq.RowGroupMetaData) -> int:
    """Where the frames of the only clip of a row group end.

    One value, plain and not compressed, lies at the end of its page (after levels and its length), which is the only
    one of the column.
    """
    column = row_group.column(CACHED.get_field_index("frames"))
    if row_group.num_rows != 1 or column.compression != "UNCOMPRESSED" or column.has_dictionary_page:
        raise ValueError("its clips are not one a row group, plain")
    return column.data_page_offset + column.total_compressed_size


class CachedClips:
    """A `ClipSource` that reads a cache in which all clips are; threads, and no Ray."""

    def __init__(self, uri: str, manifest: pa.Table, labels: Sequence[str], view: View) -> None:
        """Look all clips up.

        Raises:
            CacheError: Clips that are not in the cache, or a cache that cannot be used.
            ValueError: A label that is none of `labels`.
        """
        self.manifest, self.view, self.classes_S = manifest, view, classes_of(manifest, labels)
        self.cache = ClipCache.open(uri, view)
        self.places = self.cache.find(manifest["clip_id"])
        self.failures: dict[str, str] = {}
        num_absent = int((self.places.shard_S < 0).sum())
        if num_absent:
            raise CacheError(f"{num_absent} of {len(self)} clips are not in the cache {uri}: fill it, or decode them")

    def __len__(self) -> int:
        """Rows of the manifest."""
        return len(self.manifest)

    def batches(self, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        """A batch for each array of rows.

        Raises:
            CacheError: A shard that cannot be read any more.
        """
        pool = ThreadPoolExecutor(_THREADS)
        try:
            yield from read_ahead(self._start(pool, samples_B) for samples_B in plan)
        finally:
            pool.shutdown(cancel_futures=True)

    def _start(self, pool: ThreadPoolExecutor, samples_B: np.ndarray) -> Callable[[], Batch]:
        readable_B = self.places.offset_S[samples_B] >= 0
        for sample in samples_B[~readable_B].tolist():
            self.failures[name_of(self.manifest, sample)] = self.places.reasons[sample]
        samples_B = samples_B[readable_B]
        frames_BTHWC = frames_like(self.view, len(samples_B))
        reads = [
            pool.submit(self.cache.read_into, frames_THWC, *self.places.of(sample))
            for frames_THWC, sample in zip(frames_BTHWC.numpy(), samples_B.tolist(), strict=True)
        ]

        def finish() -> Batch:
            for read in reads:
                read.result()
            return Batch(frames_BTHWC, torch.from_numpy(self.classes_S[samples_B]), torch.from_numpy(samples_B))

        return finish
