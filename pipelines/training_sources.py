"""How a worker of a training run gets its clips: from the cache alone where that holds all, else streamed by Ray."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from mone.clips import ClipSource
from pipelines.archive import Video
from pipelines.clip_cache import CachedClips
from pipelines.fill_cache import fill
from pipelines.storage.signatures import Signatures
from pipelines.timeline import ClipPlan
from pipelines.train_loop import Sources
from pipelines.training_stream import StreamedClips, training_manifest
from pipelines.view import View


def prepare(videos: Sequence[Video], labels: Sequence[str], plan: ClipPlan, path: Path) -> dict[str, str]:
    """Probe the videos of a split once, and write their clips to a manifest that a continued run finds again.

    Returns:
        Why a video cannot be read, by name.
    """
    if path.exists():
        return {}
    path.parent.mkdir(parents=True, exist_ok=True)
    planned = training_manifest(videos, labels, plan)
    partial = path.with_suffix(".partial")
    pq.write_table(planned.rows, partial)
    partial.replace(path)
    return planned.failures


def count_clips(path: str) -> int:
    """Rows of a manifest."""
    return pq.read_metadata(path).num_rows


def fill_cache(
    manifests: Mapping[str, str], views: Mapping[str, View], cache: str, max_bytes: int, signatures: Signatures
) -> dict[str, bool]:
    """Decode all splits into the cache; says of each whether it fits."""
    return {
        split: not fill(pq.read_table(path), views[split], cache, max_bytes, signatures)
        for split, path in manifests.items()
    }


def open_sources(
    manifests: Mapping[str, str],
    labels: Sequence[str],
    views: Mapping[str, View],
    cache: str,
    cached: Mapping[str, bool],
    signatures: Signatures,
) -> Sources:
    """The sources of each split, in a worker.

    Args:
        manifests: Path of each split's manifest.
        labels: Name of each class.
        views: Frames and size of each split.
        cache: URI; "" is none.
        cached: Whether all of a split is in it.
        signatures: What signed addresses are read with.
    """

    def source(split: str) -> ClipSource:
        manifest = pq.read_table(manifests[split])
        if cached.get(split):
            return CachedClips(cache, manifest, labels, views[split])
        return StreamedClips(manifest, labels, views[split], cache or None, signatures)

    return Sources(*(source(split) for split in Sources._fields))
