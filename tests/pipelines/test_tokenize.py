"""Manifest rows to patches: one for one, in order, the same as decoding each clip alone."""

import dataclasses
import os
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from mone.config import ModelConfig
from mone.tubelets import to_frames, to_patches
from pipelines.archive import Video
from pipelines.decode import decode_clips
from pipelines.decoded import Clip
from pipelines.manifest import plan_video, source_of
from pipelines.patches import cut, decode_patches, view_of
from pipelines.schema import DECODED, MANIFEST, PlannedClip
from pipelines.timeline import ClipPlan
from pipelines.tokenize import tokenize_table, tokenize_tables, tokens_of
from pipelines.view import TokenOptions, View
from tests.media import indexed_frames, read_index, write_video

CONFIG = ModelConfig(num_classes=3, num_frames=8, height_px=64, width_px=64, dim=32, num_heads=4, depth=1)


def manifest(*clips: PlannedClip) -> pa.Table:
    return pa.Table.from_pylist([dataclasses.asdict(clip) for clip in clips], schema=MANIFEST)


@pytest.fixture
def clips(tmp_path) -> list[PlannedClip]:
    """Two videos, 5 and 3 clips, with a missing and an unreadable one between."""
    plan = ClipPlan(span_s=0.8, stride_s=0.4)
    (tmp_path / "text.mp4").write_text("hello")
    paths = [
        write_video(tmp_path / "a.mp4", indexed_frames(24)),
        tmp_path / "missing.mp4",
        write_video(tmp_path / "b.mkv", indexed_frames(16, first=100)),
        tmp_path / "text.mp4",
    ]
    return [clip for path in paths for clip in plan_video(Video(uri=str(path), label="x"), plan)]


def test_view_of_is_the_size_of_the_model():
    assert view_of(CONFIG) == View(num_frames=8, height_px=64, width_px=64)


def test_a_process_that_decodes_holds_pixels_once(tmp_path):
    """Frames go as their clips come, clips as their patches; else it would come to the memory at which it is ended."""
    path = write_video(tmp_path / "long.mp4", indexed_frames(512))
    clips = plan_video(Video(uri=str(path), label=""), ClipPlan(span_s=0.8, stride_s=0.8))
    spans = [(clip.start_s, clip.end_s) for clip in clips]
    tracemalloc.start()
    patches = decode_patches(CONFIG, TokenOptions(), "cpu", source_of(clips[0]), spans, view_of(CONFIG), ())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert {each.decoder for each in patches} == {"pyav"}
    assert peak < 1.5 * sum(each.patches.nbytes for each in patches)


def test_rows_are_one_for_one_in_order_and_keep_the_manifest(clips):
    decoded = tokenize_table(manifest(*clips), CONFIG)
    assert decoded.schema == DECODED
    kept = [name for name in MANIFEST.names if name != "note"]
    assert decoded.select(kept).to_pylist() == manifest(*clips).select(kept).to_pylist()
    assert [row["status"] for row in decoded.to_pylist()] == ["ok"] * 5 + ["missing"] + ["ok"] * 3 + ["decode_error"]


def test_failed_rows_have_no_patches_and_others_have_all(clips):
    num_bytes = CONFIG.num_frames * CONFIG.height_px * CONFIG.width_px * 3
    for row in tokenize_table(manifest(*clips), CONFIG).to_pylist():
        if row["status"] == "ok":
            assert len(row["patches"]) == num_bytes and row["error"] == ""
            assert row["decoder"] in ("decord", "pyav") and row["decode_ms"] > 0
        else:
            assert row["patches"] is None and row["error"] and row["decoder"] == ""


@pytest.mark.parametrize("order", ["planned", "reversed", "interleaved"])
def test_rows_equal_decoding_one_by_one(clips, order):
    arranged = {"planned": clips, "reversed": clips[::-1], "interleaved": clips[::2] + clips[1::2]}[order]
    together = tokenize_table(manifest(*arranged), CONFIG).drop_columns(["decode_ms"])
    alone = [tokenize_table(manifest(clip), CONFIG).drop_columns(["decode_ms"]) for clip in arranged]
    assert together.to_pylist() == pa.concat_tables(alone).to_pylist()


@pytest.mark.parametrize("rows_each", [1, 3, 9, 32])
def test_tables_end_where_they_should_and_hold_the_same_rows(clips, rows_each):
    tables = list(tokenize_tables(manifest(*clips), CONFIG, rows_each=rows_each))
    assert [len(table) for table in tables[:-1]] == [rows_each] * (len(tables) - 1) and len(tables[-1]) <= rows_each
    whole = tokenize_table(manifest(*clips), CONFIG)
    assert pa.concat_tables(tables).drop_columns(["decode_ms"]).equals(whole.drop_columns(["decode_ms"]))


def test_patches_are_those_of_the_decoded_frames(clips):
    decoded = tokenize_table(manifest(*clips), CONFIG)
    shown = [clip for clip in clips if clip.status == "ok"]
    patches_BFNP = tokens_of(decoded, CONFIG)[0].patches[:, 0]
    assert patches_BFNP.shape == (8, CONFIG.num_indices, CONFIG.num_tokens, CONFIG.patch_values)
    assert patches_BFNP.dtype == np.uint8
    for clip, patches_FNP in zip(shown, patches_BFNP, strict=True):
        (outcome,) = decode_clips(source_of(clip), [(clip.start_s, clip.end_s)], view_of(CONFIG))
        assert isinstance(outcome, Clip)
        np.testing.assert_array_equal(to_frames(patches_FNP, CONFIG), outcome.frames_THWC)


@pytest.mark.parametrize("tubelet_px", [8, 16, 32])
def test_cutting_in_pieces_is_cutting(tubelet_px):
    config = dataclasses.replace(CONFIG, tubelet_px=tubelet_px, height_px=96)
    frames_THWC = np.random.default_rng(0).integers(0, 256, (8, 96, 192, 3), np.uint8)
    for window_THWC in (frames_THWC[:, :, :64], frames_THWC[:, :, 5:69]):  # of which neither lies in one piece
        patches_FNP = cut(window_THWC, config)
        assert patches_FNP.flags.c_contiguous
        np.testing.assert_array_equal(patches_FNP, to_patches(window_THWC, config))
    with pytest.raises(ValueError, match=r"frames are \(8, 96, 192, 3\), the model takes \(8, 96, 64, 3\)"):
        cut(frames_THWC, config)


def test_patches_say_which_frames_they_are(clips):
    frames_BTHWC = to_frames(tokens_of(tokenize_table(manifest(*clips), CONFIG), CONFIG)[0].patches[:, 0], CONFIG)
    starts = [0, 4, 8, 12, 16, 100, 104, 108]
    assert [[read_index(frame) for frame in clip] for clip in frames_BTHWC] == [[*range(s, s + 8)] for s in starts]


def test_frames_survive_the_round_trip():
    frames = np.random.default_rng(0).integers(0, 256, (2, 8, 64, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(to_frames(to_patches(frames, CONFIG), CONFIG), frames)


def test_a_file_changed_since_planning_is_refused(tmp_path, clips):
    os.utime(tmp_path / "a.mp4", ns=(0, 1))
    (tmp_path / "b.mkv").unlink()
    for row in tokenize_table(manifest(*clips), CONFIG).to_pylist():
        assert row["status"] != "ok" and row["patches"] is None
        if row["video"].endswith("a.mp4"):
            assert "changed" in row["error"]
        if row["video"].endswith("b.mkv"):
            assert row["status"] == "missing" and row["error"]


def test_a_video_cut_since_planning_is_refused_though_its_time_is_the_same(tmp_path, clips):
    path = tmp_path / "a.mp4"
    stat = path.stat()
    path.write_bytes(path.read_bytes()[:-1])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    rows = tokenize_table(manifest(*clips[:5]), CONFIG).to_pylist()
    assert all("changed" in row["error"] for row in rows)


def test_notes_of_probe_and_decoder_are_both_kept(tmp_path):
    path = write_video(tmp_path / "a.mkv", indexed_frames(40))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    clips = plan_video(Video(uri=str(path)), ClipPlan(span_s=0.8))
    past = dataclasses.replace(clips[-1], start_s=clips[-1].end_s - 0.2, end_s=clips[-1].end_s + 0.6)
    (row,) = tokenize_table(manifest(past), CONFIG).to_pylist()
    assert row["note"].startswith("partial: the header") and "partial: 2 of 8 frames" in row["note"]


def test_an_empty_table(clips):
    decoded = tokenize_table(manifest(*clips[:0]), CONFIG)
    assert decoded.schema == DECODED and len(decoded) == 0
    assert tokens_of(decoded, CONFIG) == []
