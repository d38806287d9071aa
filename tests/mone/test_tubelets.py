import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mone.config import ModelConfig
from mone.tubelets import to_frames, to_patches


@st.composite
def clips(draw):
    """A config with an odd grid and frames for it, in one of several dtypes, with or without batch dimensions."""
    tubelet_frames, tubelet_px = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    indices, rows, columns = (draw(st.integers(1, 5)) for _ in range(3))
    config = ModelConfig(
        num_classes=2,
        num_frames=indices * tubelet_frames,
        height_px=rows * tubelet_px,
        width_px=columns * tubelet_px,
        tubelet_frames=tubelet_frames,
        tubelet_px=tubelet_px,
    )
    batch = draw(st.sampled_from([(), (2,), (2, 3)]))
    shape = (*batch, config.num_frames, config.height_px, config.width_px, 3)
    frames = np.random.default_rng(draw(st.integers(0, 999))).integers(0, 256, shape)
    return config, frames.astype(draw(st.sampled_from([np.uint8, np.int32, np.float32])))


@given(clips(), st.sampled_from([np.asarray, torch.from_numpy]))
def test_patches_go_back_to_the_same_frames(case, convert):
    config, frames = case
    patches = to_patches(convert(frames), config)
    assert patches.shape == (*frames.shape[:-4], config.num_indices, config.num_tokens, config.patch_values)
    back = to_frames(patches, config)
    assert type(patches) is type(back) is type(convert(frames))
    assert patches.dtype == back.dtype == convert(frames).dtype
    assert np.array_equal(np.asarray(back), frames)


def test_values_run_over_time_row_column_channel_and_tokens_over_rows_first():
    config = ModelConfig(num_classes=2, num_frames=6, height_px=4, width_px=10, tubelet_frames=3, tubelet_px=2)
    frames = np.arange(6 * 4 * 10 * 3).reshape(6, 4, 10, 3)
    patches = to_patches(frames, config)
    for index in range(2):
        for row in range(2):
            for column in range(5):
                expected = [
                    frames[index * 3 + t, row * 2 + y, column * 2 + x, channel]
                    for t in range(3)
                    for y in range(2)
                    for x in range(2)
                    for channel in range(3)
                ]
                assert patches[index, row * 5 + column].tolist() == expected


@pytest.mark.parametrize("shape", [(6, 4, 8, 3), (5, 4, 10, 3), (6, 4, 10, 1), (6, 10, 4, 3), (4, 10, 3)])
def test_frames_of_another_size_are_refused_with_both_sizes(shape):
    config = ModelConfig(num_classes=2, num_frames=6, height_px=4, width_px=10, tubelet_frames=3, tubelet_px=2)
    with pytest.raises(ValueError) as caught:
        to_patches(np.zeros(shape, np.uint8), config)
    assert str(shape) in str(caught.value)
    assert "(6, 4, 10, 3)" in str(caught.value)
