"""Who may decode with a GPU, which files are not for it, and what becomes of them; none of this needs a GPU."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines import decode, nvdec
from pipelines.decode import DECODERS, TORCHCODEC, chain_of, decode_clips
from pipelines.decoded import Clip
from pipelines.failure import DecodeFailure
from pipelines.ingest import worth_starting
from pipelines.limits import DecoderChoice
from pipelines.nvdec import GpuPainter, Hardware, Slot, Unfit, free_slot, is_gray, num_gpus
from pipelines.probe import open_video
from pipelines.tokenize import tokenize_table
from pipelines.view import View
from tests.media import indexed_frames, write_video
from tests.pipelines.test_decode import source, view
from tests.pipelines.test_scaling import MOST, MOST_MEAN
from tests.pipelines.test_tokenize import CONFIG, clips, manifest

__all__ = ["clips"]  # a fixture


@pytest.fixture(autouse=True)
def _two_gpus(monkeypatch, tmp_path):
    """Seen, but not there; and slots of this test's own."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(nvdec, "_mine", None)


@pytest.mark.parametrize("visible, count", [("", 0), ("-1", 0), ("3", 1), ("0,2,5", 3), ("GPU-1a2b,GPU-3c4d", 2)])
def test_gpus_are_those_that_may_be_seen(monkeypatch, visible, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert num_gpus() == count


def test_slots_are_taken_from_all_gpus_in_turn_until_none_is_left(tmp_path):
    taken = [free_slot(tmp_path / "slots", per_gpu=2) for _ in range(5)]
    assert [slot and slot.gpu for slot in taken] == [0, 1, 0, 1, None]


def test_a_killed_process_leaves_its_slot(tmp_path):
    script = (
        "from pipelines.nvdec import free_slot; print(free_slot(None, 1) and free_slot(None, 1), flush=True); input()"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout and "Slot" in process.stdout.readline()
    assert free_slot(None, per_gpu=1) is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert isinstance(free_slot(None, per_gpu=1), Slot)


def test_a_slot_of_which_nothing_comes_is_left_alone_for_a_while(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    folder = tmp_path / "slots"
    for _ in range(3):
        slot = free_slot(folder, per_gpu=1)
        assert slot
        slot.strike()
        slot.close()
    assert free_slot(folder, per_gpu=1) is None
    (file,) = folder.iterdir()
    os.utime(file, (0, 0))
    slot = free_slot(folder, per_gpu=1)
    assert slot
    slot.clear()
    slot.close()
    assert free_slot(folder, per_gpu=1)


@pytest.mark.parametrize("num_clips, chosen", [(0, "cpu"), (499, "cpu"), (500, "auto"), (None, "auto")])
def test_few_clips_start_no_gpu_unless_it_is_asked_for(num_clips, chosen):
    assert worth_starting("auto", num_clips) == chosen
    assert worth_starting("nvdec", num_clips) == "nvdec" and worth_starting("cpu", num_clips) == "cpu"


def test_nvdec_comes_first_in_a_process_that_is_ready(tmp_path, monkeypatch):
    video = source(write_video(tmp_path / "a.mp4", indexed_frames(2)))
    on_cpus = chain_of(video)
    assert sorted(set(on_cpus) - {TORCHCODEC}) == sorted(DECODERS)
    assert chain_of(video, "auto") == on_cpus
    assert chain_of(video, "nvdec") == ["nvdec", *on_cpus]
    monkeypatch.setattr(nvdec, "_mine", Hardware(Slot(0, None)))
    assert chain_of(video, "auto") == ["nvdec", *on_cpus]
    assert chain_of(video, "cpu") == on_cpus


def tokenized(table: pa.Table, decoder: DecoderChoice) -> pa.Table:
    """By a new process, which sees the environment as it is now."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(tokenize_table, table, CONFIG, decoder=decoder).result()


def test_without_a_gpu_rows_say_so_where_one_was_asked_for(clips, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    on_cpus, asked = (tokenized(manifest(*clips), choice) for choice in ("cpu", "nvdec"))
    for row, same in zip(asked.to_pylist(), on_cpus.to_pylist(), strict=True):
        assert (row["status"], row["decoder"], row["patches"]) == (same["status"], same["decoder"], same["patches"])
        assert row["note"].startswith("nvdec: no GPU here") == (row["status"] == "ok")
    alike = tokenized(manifest(*clips), "auto")
    assert alike.drop_columns(["decode_ms"]) == on_cpus.drop_columns(["decode_ms"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_without_a_driver_cpus_decode_and_slots_are_given_back(tmp_path):
    assert not nvdec.prepare() and isinstance(free_slot(None, per_gpu=1), Slot)
    video = source(write_video(tmp_path / "a.mp4", indexed_frames(10), codec="libx264", pix_fmt="yuv420p"))
    assert chain_of(video, "auto") == chain_of(video)
    (clip,) = decode_clips(video, [(0.0, 1.0)], view(), chain_of(video, "nvdec"))
    assert isinstance(clip, Clip) and clip.decoder == "pyav"
    assert clip.note.startswith("nvdec: no NVDEC here: ")


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.avi"])
@pytest.mark.parametrize("pix_fmt", ["gray", "yuv420p", "yuv444p"])
def test_gray_is_told_from_the_parameter_sets(tmp_path, name, pix_fmt):
    path = write_video(tmp_path / name, indexed_frames(4), codec="libx264", pix_fmt=pix_fmt)
    container, stream = open_video(str(path))
    with container:
        assert is_gray(stream.codec_context.extradata or b"") == (pix_fmt == "gray")


def test_nothing_is_gray_without_parameter_sets():
    assert not is_gray(b"") and not is_gray(b"\1\x64") and not is_gray(b"\0\0\1\x67")
    assert not is_gray(b"\1\x64\0\x15\xff\xe1\0\x1b\x67\x64\0\x15")


@pytest.mark.parametrize(
    "codec, pix_fmt, size, reason",
    [
        ("mpeg4", "yuv420p", (64, 64), "mpeg4 is left to CPUs"),
        ("libx264", "gray", (64, 64), "gray is left to CPUs"),
        ("libx264", "yuv444p", (65, 64), "odd sizes are left to CPUs, this one is 65x64"),
    ],
)
def test_what_nvdec_shows_otherwise_is_left_to_cpus(tmp_path, monkeypatch, codec, pix_fmt, size, reason):
    path = write_video(tmp_path / "a.mp4", indexed_frames(4, *size), codec=codec, pix_fmt=pix_fmt)
    hardware = Hardware(Slot(0, None))
    monkeypatch.setattr(hardware, "start", lambda: None)
    monkeypatch.setattr(nvdec, "open_video", lambda path, _: open_video(path))
    with pytest.raises(Unfit, match=f"^{reason}$"):
        hardware.open(str(path))


def test_frames_that_ffmpeg_decoded_on_the_cpu_are_not_taken(tmp_path):
    path = write_video(tmp_path / "a.mp4", indexed_frames(4), codec="libx264", pix_fmt="yuv420p")
    container, stream = open_video(str(path))
    with container, pytest.raises(Unfit, match="yuv420p of 64x64 is left to CPUs"):
        next(Hardware(Slot(0, None)).frames(stream, container.decode(stream)))


class OnCpu:
    """Frames in the format of NVDEC's, in this machine's memory: what is done with them is the same."""

    def open(self, path):
        return open_video(path)

    def frames(self, stream, frames):
        for frame in frames:
            same = frame.reformat(format="nv12")
            same.pts, same.time_base, same.duration = frame.pts, frame.time_base, frame.duration
            yield same

    def painter(self, view, codec):
        return GpuPainter(view, codec)


@pytest.mark.parametrize("rotation_deg, crops", [(0, 1), (90, 1), (180, 3), (270, 3)])
def test_pictures_that_are_made_together_are_those_of_pyav(tmp_path, monkeypatch, rotation_deg, crops):
    """At a variable rate, with instants past the end, spans that overlap, and more frames than are made at once."""
    monkeypatch.setattr(nvdec, "_BATCH_FRAMES", 5)
    times_ms = np.cumsum(np.random.default_rng(0).integers(20, 90, 60)).tolist()
    options = {"crf": "10", "g": "12", "bf": "2"}
    path = write_video(
        tmp_path / "a.mp4",
        indexed_frames(60, 160, 90),
        times_ms=times_ms,
        codec="libx264",
        pix_fmt="yuv420p",
        options=options,
        rotation_deg=rotation_deg,
    )
    spans, wanted = (
        [(0.0, 1.0), (0.5, 1.2), (2.0, 2.01), (2.5, 9.0), (90.0, 91.0)],
        View(num_frames=7, width_px=64, height_px=64, crops=crops),
    )
    ours = decode._decode_av(source(path), spans, wanted, OnCpu(), "nvdec")
    theirs = decode._decode_av(source(path), spans, wanted, decode._Cpu(), "pyav")
    for one, other in zip(ours[:-1], theirs[:-1], strict=True):
        assert isinstance(one, Clip) and isinstance(other, Clip)
        assert (one.decoder, one.note, one.repeated_share) == ("nvdec", other.note, other.repeated_share)
        differences = np.abs(one.frames_THWC.astype(int) - other.frames_THWC)
        assert differences.mean(axis=(1, 2, 3)).max() <= MOST_MEAN and differences.max() <= MOST
    assert isinstance(ours[-1], DecodeFailure) and str(ours[-1]) == str(theirs[-1])
