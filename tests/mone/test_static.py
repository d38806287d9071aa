import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mone.blocks import last_kept
from mone.static import LEVELS, kept_patches


def slow_kept(patches_FNP, threshold):
    """The places to keep, and those of them that only fill the level, with loops."""
    num_indices, num_tokens, _ = patches_FNP.shape
    kept, static = [], []
    for n in range(num_tokens):
        shown = None
        for f in range(num_indices):
            patch = [int(value) for value in patches_FNP[f, n]]
            change = math.inf if shown is None else sum(map(abs, map(int.__sub__, patch, shown))) / len(patch)
            if change > threshold:
                shown = patch
                kept.append(f * num_tokens + n)
            else:
                static.append((-change, f * num_tokens + n))
    total = num_indices * num_tokens
    level = math.ceil(total / LEVELS)
    wanted = min(total, math.ceil(len(kept) / level) * level)
    filling = [place for _, place in sorted(static)[: wanted - len(kept)]]
    return sorted(kept + filling), set(filling)


@st.composite
def clips(draw):
    """uint8 [F, N, P] in which patches drift, jump or stay."""
    shape = draw(st.integers(1, 7)), draw(st.integers(1, 20)), draw(st.integers(1, 6))
    generator = np.random.default_rng(draw(st.integers(0, 2**31)))
    steps = generator.integers(-4, 5, shape) * (
        generator.random((*shape[:2], 1)) < draw(st.sampled_from([0.1, 0.5, 1]))
    )
    steps[0] = generator.integers(60, 180, shape[1:])
    return np.clip(steps.cumsum(0), 0, 255).astype(np.uint8)


@given(clips(), st.sampled_from([0, 0.5, 1.0, 2.5, 6.0, 255]))
def test_kept_places_are_those_of_a_loop(patches_FNP, threshold):
    expected, _ = slow_kept(patches_FNP, threshold)
    kept_K = kept_patches(patches_FNP, threshold)
    assert kept_K.dtype == np.int64
    assert kept_K.tolist() == expected


@given(clips(), st.sampled_from([0, 0.5, 1.0, 2.5, 6.0]))
def test_what_stands_for_a_dropped_patch_looks_like_it(patches_FNP, threshold):
    kept, filling = slow_kept(patches_FNP, threshold)
    num_indices, num_tokens, _ = patches_FNP.shape
    index_FN = last_kept(torch.tensor([kept]), num_indices, num_tokens)[0].numpy()
    flat_KP = patches_FNP.reshape(num_indices * num_tokens, -1).astype(int)
    for place in range(num_indices * num_tokens):
        stand_in = kept[index_FN[place // num_tokens, place % num_tokens]]
        assert stand_in % num_tokens == place % num_tokens
        assert stand_in <= place
        distance = np.abs(flat_KP[place] - flat_KP[stand_in]).mean()
        assert distance <= threshold * (2 if stand_in in filling else 1)
        assert place not in kept or stand_in == place


@pytest.mark.parametrize(("num_indices", "num_tokens"), [(1, 5), (2, 12), (8, 49), (16, 196), (5, 33)])
def test_a_still_clip_keeps_its_first_frame_and_fills_a_level(num_indices, num_tokens):
    frame = np.random.default_rng(0).integers(0, 256, (1, num_tokens, 12), dtype=np.uint8)
    kept_K = kept_patches(frame.repeat(num_indices, 0), 0)
    level = math.ceil(num_indices * num_tokens / LEVELS)
    assert len(kept_K) == min(num_indices * num_tokens, math.ceil(num_tokens / level) * level)
    assert kept_K.tolist() == list(range(len(kept_K)))


def test_noise_keeps_everything_at_threshold_0():
    noise = np.random.default_rng(0).integers(0, 256, (6, 20, 48), dtype=np.uint8)
    assert kept_patches(noise, 0).tolist() == list(range(120))
    assert kept_patches(noise, 255).tolist() == list(range(20))


@pytest.mark.parametrize(("num_indices", "num_tokens"), [(4, 12), (3, 31), (8, 49), (2, 7)])
def test_clips_of_one_size_have_at_most_32_sizes(num_indices, num_tokens):
    generator, sizes = np.random.default_rng(0), set()
    for moving in np.linspace(0, 1, 120):
        clip = generator.integers(0, 256, (num_indices, num_tokens, 3), dtype=np.uint8)
        still = generator.random((num_indices, num_tokens)) > moving
        for f in range(1, num_indices):
            clip[f, still[f]] = clip[f - 1, still[f]]
        sizes.add(len(kept_patches(clip, 0)))
    assert len(sizes) <= LEVELS
    level = math.ceil(num_indices * num_tokens / LEVELS)
    assert all(size % level == 0 or size == num_indices * num_tokens for size in sizes)


def test_a_slow_change_does_not_go_unseen():
    clip = np.arange(0, 40, 4, dtype=np.uint8)[:, None, None].repeat(64, 1)  # 4 levels a frame
    kept_K = kept_patches(clip, 5)
    assert sorted(set(kept_K // 64)) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("threshold", [-1, 256, math.nan, math.inf])
def test_a_threshold_that_is_no_grey_level_is_refused(threshold):
    with pytest.raises(ValueError, match="between 0 and 255 grey levels"):
        kept_patches(np.zeros((2, 3, 4), np.uint8), threshold)


@given(st.data())
def test_last_kept_is_that_of_a_loop(data):
    num_indices, num_tokens = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 8))
    later = st.lists(st.booleans(), min_size=(num_indices - 1) * num_tokens, max_size=(num_indices - 1) * num_tokens)
    chosen = data.draw(later)
    kept = [*range(num_tokens), *(num_tokens + i for i, keep in enumerate(chosen) if keep)]
    expected = []
    for f in range(num_indices):
        row = [max(p for p in kept if p % num_tokens == n and p // num_tokens <= f) for n in range(num_tokens)]
        expected.append([kept.index(place) for place in row])
    assert last_kept(torch.tensor([kept, kept]), num_indices, num_tokens).tolist() == [expected, expected]
