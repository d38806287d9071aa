import numpy as np
import torch

from mone.clips import Batch, MemoryClips


def some_memory_clips(num_clips=5):
    frames = torch.arange(num_clips * 2 * 3 * 4 * 3, dtype=torch.int64).remainder(251).to(torch.uint8)
    return MemoryClips(frames.view(num_clips, 2, 3, 4, 3), torch.arange(num_clips) + 10)


def test_batches_are_those_of_the_plan_in_its_order():
    clips = some_memory_clips()
    plan = [np.array([3, 0]), np.array([], dtype=np.int64), np.array([4, 4, 1])]
    batches = list(clips.batches(plan))
    assert len(clips) == 5 and clips.failures == {} and len(batches) == 3
    for batch, samples in zip(batches, plan, strict=True):
        assert batch.samples_B.tolist() == samples.tolist()
        assert batch.labels_B.tolist() == (samples + 10).tolist()
        assert batch.frames_BTHWC.shape == (len(samples), 2, 3, 4, 3)
        for frames_THWC, sample in zip(batch.frames_BTHWC, samples, strict=True):
            assert torch.equal(frames_THWC, clips.frames_STHWC[sample])
    assert all(batch.samples_B.dtype == batch.labels_B.dtype == torch.int64 for batch in batches)


def test_a_batch_is_read_when_it_is_asked_for():
    def plan():
        yield np.array([0])
        raise AssertionError("read ahead")

    batches = some_memory_clips().batches(plan())
    assert next(batches).samples_B.tolist() == [0]


def test_a_batch_is_the_callers_own():
    clips = some_memory_clips()
    before = clips.frames_STHWC.clone()
    for batch in clips.batches([np.array([0, 1])]):
        batch.frames_BTHWC.zero_()
    assert torch.equal(clips.frames_STHWC, before)


def test_sample_numbers_stay_where_draws_are_made():
    """On the "meta" device, which stands for any other: reading them back there would wait for it."""
    clips = some_memory_clips().to("meta")
    assert (clips.frames_STHWC.device.type, clips.labels_S.device.type, len(clips)) == ("meta", "meta", 5)
    (batch,) = clips.batches([np.array([2, 1])])
    there = batch.to(torch.device("meta"))
    assert isinstance(there, Batch)
    assert (there.frames_BTHWC.device.type, there.labels_B.device.type) == ("meta", "meta")
    assert there.samples_B.tolist() == batch.samples_B.tolist() == [2, 1]
