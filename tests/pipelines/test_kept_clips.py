"""Clips that stay on disk between runs: bit for bit those of the call, one file for each call, whole or not there."""

import functools

import pytest
import torch

import pipelines.kept_clips
from mone.clips import MemoryClips
from pipelines.kept_clips import kept
from pipelines.view import View

VIEW = View(num_frames=2, height_px=4, width_px=6)
FAILURES = {'a "quoted" é name.mp4 [0.00, 1.00)': "missing: no such file"}


class Calls(list):
    """A list whose text says nothing of how often `load` was called."""

    def __repr__(self) -> str:
        return "calls"


def load(calls: Calls, split: str, count: int, view: View, *, failures: bool = True) -> MemoryClips:
    calls.append((split, count, view))
    generator = torch.Generator().manual_seed(count + len(split))
    shape = (count, view.num_frames, view.height_px, view.width_px, 3)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    clips = MemoryClips(frames, torch.arange(count) % 3)
    clips.failures = dict(FAILURES) if failures else {}
    return clips


def call(calls: Calls, split: str = "train", count: int = 5, view: View = VIEW, **options) -> functools.partial:
    return functools.partial(load, calls, split, count, view, **options)


@pytest.mark.parametrize("count", [0, 5])
def test_the_second_time_the_file_is_read(tmp_path, count):
    calls, expected = Calls(), load(Calls(), "train", count, VIEW)
    for _ in range(2):
        clips = kept(call(calls, count=count), tmp_path / "made" / "here")
        assert torch.equal(clips.frames_STHWC, expected.frames_STHWC) and clips.frames_STHWC.dtype == torch.uint8
        assert torch.equal(clips.labels_S, expected.labels_S) and clips.labels_S.dtype == torch.int64
        assert clips.failures == FAILURES
    assert len(calls) == 1 and len([*(tmp_path / "made" / "here").iterdir()]) == 1


def test_another_call_is_another_file(tmp_path, monkeypatch):
    calls, taller = Calls(), View(num_frames=2, height_px=6, width_px=6)
    changes = [{}, {"split": "val"}, {"count": 4}, {"view": taller}, {"failures": False}]
    for _ in range(2):
        found = [kept(call(calls, **change), tmp_path) for change in changes]
        assert [len(clips) for clips in found] == [5, 5, 4, 5, 5]
        assert found[3].frames_STHWC.shape[2] == 6 and found[4].failures == {}
        assert not torch.equal(found[0].frames_STHWC, found[1].frames_STHWC)
    assert len(calls) == len([*tmp_path.iterdir()]) == len(changes)
    monkeypatch.setattr(pipelines.kept_clips, "PIXELS_VERSION", pipelines.kept_clips.PIXELS_VERSION + 1)
    kept(call(calls), tmp_path)
    assert len(calls) == len([*tmp_path.iterdir()]) == len(changes) + 1


@pytest.mark.parametrize("moment", ["loading", "writing"])
def test_a_crash_leaves_no_file(tmp_path, monkeypatch, moment):
    def broken(*args, **kwargs) -> MemoryClips:
        raise KeyboardInterrupt

    def half_written(tensors, path, metadata) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "writing":
            patch.setattr(pipelines.kept_clips, "save_file", half_written)
        stopped = functools.update_wrapper(broken, load) if moment == "loading" else load
        with pytest.raises(KeyboardInterrupt):
            kept(functools.partial(stopped, Calls(), "train", 5, VIEW), tmp_path)
    assert [*tmp_path.iterdir()] == []
    calls = Calls()
    assert len(kept(call(calls), tmp_path)) == 5 and len(calls) == 1


def test_what_another_process_was_writing_when_it_was_killed_is_not_read(tmp_path):
    calls = Calls()
    kept(call(calls), tmp_path)
    (path,) = tmp_path.iterdir()
    path.rename(path.with_suffix(".1.partial"))
    path.with_suffix(".1.partial").write_bytes(b"half")
    assert len(kept(call(calls), tmp_path)) == 5 and len(calls) == 2
    assert path.exists()
