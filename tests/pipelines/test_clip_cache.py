"""The cache of decoded clips: bit for bit what decoding gives, whole or not there, and never more than it may hold."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

import pipelines.clip_cache
import pipelines.fill_cache
import pipelines.manifest
from pipelines.clip_cache import CACHE_FILE, CACHED, CLIPS_DIR, CachedClips, CacheError, ClipCache
from pipelines.clip_source import clip_bytes
from pipelines.commit import STAGING_DIR
from pipelines.fill_cache import cached_rows, fill
from pipelines.view import View
from tests.pipelines.training_data import (
    CHANGED,
    LABELS,
    NUM_CLIPS,
    VIEW,
    assert_batches,
    frames_of,
    planned,
    with_a_changed_video,
    write_videos,
)

CLIP_BYTES = clip_bytes(VIEW)
PLENTY = 1 << 40
WHOLE = [np.arange(NUM_CLIPS)]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> pa.Table:
    return with_a_changed_video(tmp_path_factory.mktemp("videos"))


@pytest.fixture
def five_per_shard(monkeypatch) -> None:
    monkeypatch.setattr(pipelines.fill_cache, "_SHARD_BYTES", 5 * CLIP_BYTES)


@pytest.fixture
def without_ray(monkeypatch) -> None:
    """The tasks of filling, one after the other in this process."""

    def decode(missing: pa.Table, cache: ClipCache, commit, signatures) -> Iterator[int]:
        for start in range(0, len(missing), 5):
            written = pipelines.fill_cache._write_shard(missing.slice(start, 5), cache.view, commit, signatures)
            yield from written[0].to_pylist()

    monkeypatch.setattr(pipelines.fill_cache, "_decode", decode)


def shards(uri: Path) -> list[Path]:
    return sorted(uri.glob(f"*/{CLIPS_DIR}/*"))


def ids_in(paths: list[Path]) -> list[str]:
    return [id_ for path in paths for id_ in pq.read_table(path)["clip_id"].to_pylist()]


def contents(uri: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in shards(uri)}


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray", "five_per_shard")
def test_it_has_every_clip_bit_for_bit_and_a_second_filling_does_nothing(tmp_path, manifest, capfd):
    assert fill(manifest, VIEW, str(tmp_path), PLENTY) == 0
    assert f"{NUM_CLIPS}/{NUM_CLIPS}" in capfd.readouterr().err
    source = CachedClips(str(tmp_path), manifest, LABELS, VIEW)
    assert_batches(list(source.batches(WHOLE)), WHOLE, manifest)
    assert len(source) == NUM_CLIPS and len(source.failures) == len(CHANGED)
    assert all("has changed" in reason for reason in source.failures.values())

    assert len(shards(tmp_path)) == 4
    table = pa.concat_tables(pq.read_table(path) for path in shards(tmp_path))
    assert table.schema.equals(CACHED)
    assert sorted(table["clip_id"].to_pylist()) == sorted(manifest["clip_id"].to_pylist())
    frames = dict(zip(manifest["clip_id"].to_pylist(), frames_of(manifest), strict=True))
    for row in table.to_pylist():
        expected = frames[row["clip_id"]]
        assert row["frames"] == (None if expected is None else expected.tobytes())
        assert (row["status"], row["error"] == "") == (("missing", False) if expected is None else ("ok", True))
    for path in shards(tmp_path):
        assert pq.read_metadata(path).num_row_groups == len(pq.read_table(path)) <= 5

    before = contents(tmp_path)
    assert fill(manifest, VIEW, str(tmp_path), PLENTY) == 0
    assert contents(tmp_path) == before
    assert not any(tmp_path.glob(f"*/{STAGING_DIR}/*"))


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray", "five_per_shard")
def test_only_what_is_missing_is_decoded_and_what_a_killed_run_has_left_goes(tmp_path, manifest):
    fill(manifest, VIEW, str(tmp_path), PLENTY)
    lost, *kept = shards(tmp_path)
    lost_ids = ids_in([lost])
    lost.unlink()
    before = {path: content for path, content in contents(tmp_path).items() if path in kept}
    killed, living = (lost.parents[1] / STAGING_DIR / name for name in ("killed", "living"))
    for folder in (killed, living):
        folder.mkdir(parents=True)
        (folder / "half.parquet").write_bytes(b"PAR1")
    a_week_ago_s = time.time() - 7 * 24 * 3600
    os.utime(killed, (a_week_ago_s, a_week_ago_s))

    assert fill(manifest, VIEW, str(tmp_path), PLENTY) == 0
    assert {path: content for path, content in contents(tmp_path).items() if path in kept} == before
    assert sorted(ids_in([path for path in shards(tmp_path) if path not in kept])) == sorted(lost_ids)
    assert [path.name for path in (lost.parents[1] / STAGING_DIR).iterdir()] == ["living"]
    assert_batches(list(CachedClips(str(tmp_path), manifest, LABELS, VIEW).batches(WHOLE)), WHOLE, manifest)


@pytest.mark.usefixtures("without_ray")
class TestWithoutRay:
    @pytest.mark.parametrize("room", [0, 1, CLIP_BYTES - 1, CLIP_BYTES, 7 * CLIP_BYTES + 1, NUM_CLIPS * CLIP_BYTES])
    def test_what_does_not_fit_is_left_out_from_the_end(self, tmp_path, manifest, room):
        fitting = room // CLIP_BYTES
        assert fill(manifest, VIEW, str(tmp_path), room) == NUM_CLIPS - fitting
        assert sorted(ids_in(shards(tmp_path))) == sorted(manifest["clip_id"].to_pylist()[:fitting])
        if fitting < NUM_CLIPS:
            with pytest.raises(CacheError, match=f"{NUM_CLIPS - fitting} of {NUM_CLIPS} clips are not in the cache"):
                CachedClips(str(tmp_path), manifest, LABELS, VIEW)

    def test_each_view_has_a_place_of_its_own(self, tmp_path, manifest):
        other = View(num_frames=2, height_px=16, width_px=32)
        fill(manifest, VIEW, str(tmp_path), PLENTY)
        with pytest.raises(CacheError, match="16 of 16 clips are not"):
            CachedClips(str(tmp_path), manifest, LABELS, other)
        fill(manifest, other, str(tmp_path), PLENTY)
        (batch,) = CachedClips(str(tmp_path), manifest, LABELS, other).batches(WHOLE)
        assert batch.frames_BTHWC.shape == (12, 2, 16, 32, 3)
        assert_batches(list(CachedClips(str(tmp_path), manifest, LABELS, VIEW).batches(WHOLE)), WHOLE, manifest)

    def test_a_folder_with_other_pixels_is_refused(self, tmp_path, manifest):
        fill(manifest, VIEW, str(tmp_path), PLENTY)
        (description,) = tmp_path.glob(f"*/{CACHE_FILE}")
        description.write_text(json.dumps(json.loads(description.read_text()) | {"pixels_version": 0}))
        for use in (lambda: fill(manifest, VIEW, str(tmp_path), PLENTY), lambda: ClipCache.open(str(tmp_path), VIEW)):
            with pytest.raises(CacheError, match="'pixels_version': 0"):
                use()
        description.write_text("{")
        with pytest.raises(CacheError, match=r"cannot read .*cache\.json"):
            ClipCache.open(str(tmp_path), VIEW)

    def test_a_file_that_has_changed_is_another_clip_and_two_manifests_share_a_cache(self, tmp_path):
        videos = write_videos(tmp_path)
        before = planned(videos)
        fill(before.slice(0, 8), VIEW, str(tmp_path / "cache"), PLENTY)
        os.utime(videos[0].uri, ns=(1, 1))
        after = planned(videos)
        fill(after, VIEW, str(tmp_path / "cache"), PLENTY)
        assert len(ids_in(shards(tmp_path / "cache"))) == 8 + 4 + 8
        for manifest in (before.slice(0, 8), after):
            source = CachedClips(str(tmp_path / "cache"), manifest, LABELS, VIEW)
            (batch,) = source.batches([np.arange(len(manifest))])
            assert len(batch.samples_B) == len(manifest) and not source.failures

    def test_a_clip_that_is_planned_or_written_twice_is_found(self, tmp_path, manifest):
        twice = pa.concat_tables([manifest, manifest.slice(3, 2)])
        fill(twice, VIEW, str(tmp_path), PLENTY)
        plan = [np.array([17, 3, 16])]
        assert_batches(list(CachedClips(str(tmp_path), twice, LABELS, VIEW).batches(plan)), plan, twice)

    def test_shards_that_are_none_are_named(self, tmp_path, manifest):
        fill(manifest, VIEW, str(tmp_path), PLENTY)
        source, first = CachedClips(str(tmp_path), manifest, LABELS, VIEW), shards(tmp_path)[0]
        whole = first.read_bytes()
        first.write_bytes(whole[:100])
        with pytest.raises(CacheError, match=rf"cannot read .*{first.name}.* bytes at"):
            list(source.batches(WHOLE))
        compressed = first.with_name("compressed.parquet")
        pq.write_table(cached_rows(manifest.slice(0, 2), VIEW), compressed)
        for content in (whole[:100], b"", compressed.read_bytes()):
            first.write_bytes(content)
            with pytest.raises(CacheError, match=rf"{first.name} is no shard of clips .* delete it"):
                CachedClips(str(tmp_path), manifest, LABELS, VIEW)
            compressed.unlink(missing_ok=True)
        first.unlink()
        with pytest.raises(CacheError, match=rf"cannot read .*{first.name}"):
            list(source.batches(WHOLE))

    def test_a_shard_appears_whole_or_not_at_all(self, tmp_path, manifest, monkeypatch):
        with monkeypatch.context() as patched:

            def write_half(table, file, **options):
                file.write(b"PAR1 and a little")
                raise OSError("no space left on device")

            patched.setattr(pq, "write_table", write_half)
            with pytest.raises(OSError, match="no space"):
                fill(manifest, VIEW, str(tmp_path), PLENTY)
        assert shards(tmp_path) == [] and not any(tmp_path.glob(f"*/{STAGING_DIR}/*"))
        assert fill(manifest, VIEW, str(tmp_path), PLENTY) == 0


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray", "five_per_shard")
def test_any_filesystem_of_pyarrow_will_do(tmp_path, manifest, monkeypatch):
    """Not the local one: objects are uploaded under their names, by tasks that are sent the filesystem."""
    bucket = pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())
    monkeypatch.setattr(pipelines.clip_cache, "_filesystem", lambda uri: (bucket, uri.removeprefix("bucket://")))
    assert fill(manifest, VIEW, "bucket://some/cache", PLENTY) == 0
    assert len(list((tmp_path / "some" / "cache").glob(f"*/{CLIPS_DIR}/*.parquet"))) == 4
    assert fill(manifest, VIEW, "bucket://some/cache/", PLENTY) == 0
    assert_batches(list(CachedClips("bucket://some/cache", manifest, LABELS, VIEW).batches(WHOLE)), WHOLE, manifest)


@pytest.mark.usefixtures("without_ray")
def test_a_file_address_and_a_relative_path_are_paths(tmp_path, manifest, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(manifest, VIEW, f"file://{tmp_path}/cache", PLENTY)
    for uri in ("cache", "cache/", f"{tmp_path}/cache"):
        assert len(CachedClips(uri, manifest, LABELS, VIEW)) == NUM_CLIPS


@pytest.mark.parametrize("uri", ["nowhere://cache", "http://host/cache"])
def test_an_address_that_nothing_can_read_is_named(uri):
    with pytest.raises(CacheError, match=uri):
        ClipCache.open(uri, VIEW)


def test_several_crops_are_refused():
    with pytest.raises(ValueError, match="one crop"):
        ClipCache.open("cache", View(num_frames=4, height_px=32, width_px=32, crops=3))


def test_rows_of_one_video_share_a_pass(manifest, monkeypatch):
    passes = []
    decode = pipelines.manifest.decode_guarded

    def counted(requests, *rest):
        passes.extend(request.source.path for request in requests)
        return decode(requests, *rest)

    monkeypatch.setattr(pipelines.manifest, "decode_guarded", counted)
    cached_rows(manifest, VIEW)
    assert len(passes) == len(set(passes)) == 3
