"""Where in a rendered clip things move, patch by patch."""

import numpy as np
import pytest

from pipelines.synthetic import MOTIONS, render, split_seeds
from pipelines.synthetic_stream import motions, motions_moving, moving_patches
from pipelines.view import View
from tests.conftest import TINY


def slow_moving(moving_THW):
    """A patch moves where 5 % of its 2 x 16 x 16 pixels do: from 26 on."""
    side, rows = TINY.tubelet_px, TINY.height_px // TINY.tubelet_px
    found = np.zeros((TINY.num_indices, rows * rows), dtype=bool)
    for f in range(TINY.num_indices):
        for n in range(rows * rows):
            top, left = n // rows * side, n % rows * side
            count = sum(
                bool(moving_THW[2 * f + t, top + y, left + x])
                for t in range(2)
                for y in range(side)
                for x in range(side)
            )
            found[f, n] = count >= 26
    return found


def test_moving_patches_are_those_of_a_loop():
    for seed in split_seeds("val", 4):
        moving_THW = render(seed, num_frames=8, size_px=64).moving
        moving_FN = moving_patches(moving_THW, TINY)
        assert 0 < moving_FN.sum() < moving_FN.size
        np.testing.assert_array_equal(moving_FN, slow_moving(moving_THW))


@pytest.mark.parametrize("count, moves", [(25, False), (26, True)])
def test_the_threshold_is_5_percent(count, moves):
    patches = np.zeros((TINY.num_indices, TINY.num_tokens, 2 * 16 * 16), dtype=bool)
    patches[1, 3, :count] = True
    frames = patches.reshape(4, 4, 4, 2, 16, 16).transpose(0, 3, 1, 4, 2, 5).reshape(8, 64, 64)
    assert moving_patches(frames, TINY)[1, 3] == moves and moving_patches(frames, TINY).sum() == moves


def test_masks_have_the_order_of_the_clips():
    view = View(num_frames=8, height_px=64, width_px=64)
    clips, moving_SFN = motions("val", 5, view, num_workers=1), motions_moving("val", 5, TINY, num_workers=1)
    assert moving_SFN.shape == (5, TINY.num_indices, TINY.num_tokens)
    for row, seed in enumerate(split_seeds("val", 5)):
        clip = render(seed, num_frames=8, size_px=64)
        np.testing.assert_array_equal(clips.frames_STHWC[row], clip.frames)
        assert int(clips.labels_S[row]) == seed % len(MOTIONS)
        np.testing.assert_array_equal(moving_SFN[row], moving_patches(clip.moving, TINY))


def test_the_training_split_is_refused():
    with pytest.raises(ValueError, match="held-out"):
        motions_moving("train", 5, TINY)
