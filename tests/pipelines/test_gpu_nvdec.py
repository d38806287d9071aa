"""NVDEC shows the frames that PyAV shows on a CPU, and leaves nothing behind on the GPU."""

import dataclasses
import os
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
import torch

from mone.config import ModelConfig
from pipelines import child, nvdec
from pipelines.archive import Video
from pipelines.decode import chain_of, decode_clips
from pipelines.decoded import Clip
from pipelines.manifest import plan_video
from pipelines.schema import MANIFEST
from pipelines.timeline import ClipPlan
from pipelines.tokenize import tokenize_table
from pipelines.view import View
from tests.media import indexed_frames, read_index, write_video
from tests.pipelines.test_child import crash
from tests.pipelines.test_decode import source
from tests.pipelines.test_scaling import MOST, MOST_MEAN

pytestmark = pytest.mark.gpu

SIZE = (320, 240)
LOSSY = {"codec": "libx264", "pix_fmt": "yuv420p"}
SPANS = [(0.0, 1.0), (1.3, 2.1), (0.4, 0.9), (2.05, 3.0), (2.9, 3.4)]
CONFIG = ModelConfig(num_classes=3, num_frames=8, height_px=64, width_px=64, dim=32, num_heads=4, depth=1)
OPTIONS = {"crf": "10", "preset": "ultrafast", "g": "12", "bf": "2"}


@pytest.fixture(autouse=True)
def _gpu(monkeypatch, tmp_path):
    if not torch.cuda.is_available() and os.environ.get("REQUIRE_GPU") != "1":
        pytest.skip("no GPU")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # slots of this test's own
    monkeypatch.setattr("tempfile.tempdir", None)


def agree(path, spans, wanted: View) -> list[Clip]:
    """What NVDEC gives, after comparing it with PyAV."""
    ours, theirs = (decode_clips(source(path), spans, wanted, [name]) for name in ("nvdec", "pyav"))
    for one, other in zip(ours, theirs, strict=True):
        assert isinstance(one, Clip) and isinstance(other, Clip), (one, other)
        assert (one.decoder, one.note) == ("nvdec", other.note)
        differences = np.abs(one.frames_THWC.astype(int) - other.frames_THWC)
        assert differences.mean(axis=(1, 2, 3)).max() <= MOST_MEAN and differences.max() <= MOST
    return [clip for clip in ours if isinstance(clip, Clip)]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
@pytest.mark.parametrize("view_px", [112, 240])
def test_frames_are_those_of_pyav(tmp_path, name, view_px):
    path = write_video(tmp_path / name, indexed_frames(34, *SIZE), options=OPTIONS, **LOSSY)
    clips = agree(path, SPANS, View(num_frames=5, width_px=view_px, height_px=view_px))
    assert [read_index(frame) for frame in clips[0].frames_THWC] == [1, 3, 5, 7, 9]


def test_frames_of_a_variable_rate_and_a_late_start(tmp_path):
    times_ms = [5000, 5040, 5120, 5500, 5540, 5900, 7900, 7950, 8600]
    path = write_video(tmp_path / "a.mkv", indexed_frames(9, *SIZE), times_ms=times_ms, options=OPTIONS, **LOSSY)
    (clip,) = agree(path, [(0.0, 3.0)], View(num_frames=11, width_px=112, height_px=112))
    assert sorted({read_index(frame) for frame in clip.frames_THWC}) == [2, 4, 5]


@pytest.mark.parametrize("rotation_deg", [0, 90, 180, 270])
@pytest.mark.parametrize("crops", [1, 3])
def test_frames_are_upright_in_every_window(tmp_path, rotation_deg, crops):
    frames = indexed_frames(10, 320, 180)
    path = write_video(tmp_path / "a.mp4", frames, rotation_deg=rotation_deg, options=OPTIONS, **LOSSY)
    agree(path, [(0.0, 1.0)], View(num_frames=10, width_px=112, height_px=112, crops=crops))


@pytest.mark.parametrize("codec, name", [("libx265", "a.mp4"), ("libvpx-vp9", "a.webm")])
def test_other_codecs(tmp_path, codec, name):
    options = {"crf": "10"}
    path = write_video(tmp_path / name, indexed_frames(20, *SIZE), codec=codec, pix_fmt="yuv420p", options=options)
    agree(path, [(0.0, 1.0), (1.0, 2.0)], View(num_frames=8, width_px=112, height_px=112))


@pytest.mark.parametrize("matrix", ["bt709", "smpte170m"])
@pytest.mark.parametrize("full", ["off", "on"])
def test_colours_are_those_that_the_file_names(tmp_path, matrix, full):
    options = OPTIONS | {"x264-params": f"colormatrix={matrix}:fullrange={full}"}
    path = write_video(tmp_path / "a.mp4", indexed_frames(10, *SIZE), options=options, **LOSSY)
    agree(path, [(0.0, 1.0)], View(num_frames=10, width_px=112, height_px=112))


@pytest.mark.parametrize(
    "codec, pix_fmt, size, reason",
    [
        ("libx264", "yuv420p10le", SIZE, "(yuv420p10le|p010le) of 320x240 is left to CPUs"),
        ("libx264", "yuv444p", SIZE, "yuv444p of 320x240 is left to CPUs"),
        ("libx265", "yuv420p10le", SIZE, "p010le of 320x240 is left to CPUs"),
        ("libx264", "yuv420p", (32, 32), "yuv420p of 32x32 is left to CPUs"),
        ("libx264", "gray", SIZE, "gray is left to CPUs"),
        ("mpeg4", "yuv420p", SIZE, "mpeg4 is left to CPUs"),
    ],
)
def test_what_it_cannot_do_cpus_do_and_the_reason_is_told(tmp_path, codec, pix_fmt, size, reason):
    path = write_video(tmp_path / "a.mp4", indexed_frames(10, *size), codec=codec, pix_fmt=pix_fmt)
    video = source(path)
    (clip,) = decode_clips(video, [(0.0, 1.0)], View(num_frames=8, width_px=32, height_px=32), chain_of(video, "nvdec"))
    assert isinstance(clip, Clip) and clip.decoder in ("pyav", "decord")
    assert re.match(f"nvdec: {reason}", clip.note)


def planned(tmp_path, count: int) -> pa.Table:
    clips = []
    for number in range(count):
        frames = indexed_frames(40, *SIZE, first=number)
        path = write_video(tmp_path / f"{number}.mp4", frames, options=OPTIONS, **LOSSY)
        clips += plan_video(Video(uri=str(path)), ClipPlan(span_s=1.0))
    return pa.Table.from_pylist([dataclasses.asdict(clip) for clip in clips], schema=MANIFEST)


def test_processes_beyond_the_slots_decode_on_cpus_and_a_killed_one_leaves_no_trace(tmp_path):
    taken = [nvdec.free_slot() for _ in range(1, nvdec.SLOTS_PER_GPU * nvdec.num_gpus())]  # all but one
    table, used = planned(tmp_path, 2), gpu_bytes()
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        with_gpu = first.submit(tokenize_table, table, CONFIG, decoder="auto").result()
        without = second.submit(tokenize_table, table, CONFIG, decoder="auto").result()
        assert set(with_gpu["decoder"].to_pylist()) == {"nvdec"} and set(without["decoder"].to_pylist()) == {"pyav"}
        assert gpu_bytes() > used + (200 << 20)
        with pytest.raises(child.Killed, match="SIGSEGV"):
            first.submit(child.call, child.Call(crash, (), 60.0, 1 << 30)).result()
        assert gpu_bytes(until=used + (50 << 20)) <= used + (50 << 20)
        again = first.submit(tokenize_table, table, CONFIG, decoder="auto").result()
        assert set(again["decoder"].to_pylist()) == {"nvdec"}
        assert again["note"].to_pylist() == without["note"].to_pylist() == [""] * len(table)
    assert len([slot for slot in taken if slot]) == len(taken)


def gpu_bytes(until: int = -1) -> int:
    """Memory of the GPUs in use; waits some seconds until it is no more than asked for."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    for _ in range(20):
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        used = sum(int(line) << 20 for line in answer.split())
        if used <= until or until < 0:
            break
        time.sleep(0.5)
    return used


def test_a_gpu_without_memory_leaves_the_work_to_cpus(tmp_path):
    free_bytes, _ = torch.cuda.mem_get_info()
    held = torch.empty(free_bytes - (100 << 20), dtype=torch.uint8, device="cuda")
    try:
        with ThreadPoolExecutor(1) as thread:
            rows = thread.submit(tokenize_table, planned(tmp_path, 1), CONFIG, decoder="auto").result().to_pylist()
    finally:
        del held
        torch.cuda.empty_cache()
    assert {row["status"] for row in rows} == {"ok"} and {row["decoder"] for row in rows} == {"pyav"}
