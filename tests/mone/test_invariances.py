"""What must not change an answer: the neighbours in a batch, and the order in which tokens are written down."""

import dataclasses

import pytest
import torch

from mone.pixels import to_float
from tests.mone.conftest import JOINT, VARIANTS, keep, small_config, small_model, some_inputs, some_patches, variant

EXACT = {"atol": 1e-12, "rtol": 1e-12}


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_a_clip_does_not_depend_on_its_neighbours(name):
    config, num_kept = variant(name)
    model, inputs = small_model(config, alpha=0.5), some_inputs(config, num_kept, batch=4)
    together = model(**inputs, capacity=0.4)
    for index in range(4):
        alone = model(**{key: value[index : index + 1] for key, value in inputs.items()}, capacity=0.4)
        torch.testing.assert_close(alone.logits_BC[0], together.logits_BC[index], **EXACT)
        for one, all_ in zip(alone.plan[:3], together.plan[:3], strict=True):
            torch.testing.assert_close(one[0], all_[index], **EXACT)


def move_positions(model, places):
    """Give the token that now stands at i the position embedding of places[i]."""
    model.encoder.position_ND.copy_(model.encoder.position_ND[places])


def frame_wise(permutation_N, num_indices):
    """The same permutation in each frame, over all places of a clip."""
    num_tokens = len(permutation_N)
    return torch.cat([permutation_N + index * num_tokens for index in range(num_indices)])


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("budget", ["frame", "clip"])
@pytest.mark.parametrize("encoder", [{}, JOINT], ids=["factorised", "joint"])
@torch.no_grad()
def test_order_of_a_frames_tokens_does_not_matter_beyond_their_positions(encoder, budget, pooling):
    model = small_model(small_config(**encoder, budget=budget, pooling=pooling), alpha=0.5)
    patches, permutation_N = some_patches(model.config), torch.randperm(12)
    before = model(patches, 0.4)
    move_positions(model, frame_wise(permutation_N, 2) if encoder else permutation_N)
    after = model(patches[:, :, permutation_N], 0.4)
    torch.testing.assert_close(after.logits_BC, before.logits_BC, **EXACT)
    expert_BFN = before.plan.expert_BN.reshape(2, 2, 12)
    assert torch.equal(after.plan.expert_BN.reshape(2, 2, 12), expert_BFN[..., permutation_N])


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@torch.no_grad()
def test_a_joint_clip_with_one_budget_is_a_set(pooling):
    model = small_model(small_config(**JOINT, budget="clip", pooling=pooling), alpha=0.5)
    patches, permutation_K = some_patches(model.config), torch.randperm(24)
    before = model(patches, 0.4)
    move_positions(model, permutation_K)
    after = model(patches.flatten(1, 2)[:, permutation_K].unflatten(1, (2, 12)), 0.4)
    torch.testing.assert_close(after.logits_BC, before.logits_BC, **EXACT)
    assert torch.equal(after.plan.expert_BN, before.plan.expert_BN[:, permutation_K])


@torch.no_grad()
def test_frames_of_a_joint_encoder_may_swap_with_their_positions():
    model = small_model(small_config(**JOINT), alpha=0.5)
    patches = some_patches(model.config)
    before = model(patches, 0.4)
    move_positions(model, torch.arange(24).roll(12))
    after = model(patches.roll(1, dims=1), 0.4)
    torch.testing.assert_close(after.logits_BC, before.logits_BC, **EXACT)
    assert torch.equal(after.plan.expert_BN, before.plan.expert_BN.roll(1, dims=1))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("encoder", [{}, JOINT], ids=["factorised", "joint"])
@torch.no_grad()
def test_places_of_kept_patches_may_be_renamed(encoder, pooling):
    config = small_config(**encoder, pooling=pooling, num_frames=6)
    model, inputs = small_model(config, alpha=0.5), some_inputs(config, 19)
    before = model(**inputs, capacity=0.4)
    permutation_N = torch.randperm(12)
    permutation_K = frame_wise(permutation_N, 3)
    move_positions(model, permutation_K if encoder else permutation_N)
    # The token of place p now stands at the place that reads its position from p.
    renamed_BK, order_BK = permutation_K.argsort()[inputs["kept_BK"]].sort(-1)
    patches = torch.stack([clip[order] for clip, order in zip(inputs["patches"], order_BK, strict=True)])
    after = model(patches, 0.4, kept_BK=renamed_BK)
    torch.testing.assert_close(after.logits_BC, before.logits_BC, **EXACT)
    assert torch.equal(after.plan.expert_BN, before.plan.expert_BN.gather(1, order_BK))


# --- clips that stand still: dropping what repeats changes nothing ---


def still_clips(config, shown):
    """Clips that show these frames, by number: (0, 0, 1) repeats the first."""
    frames = some_patches(dataclasses.replace(config, num_frames=2 * (max(shown) + 1)), seed=5)
    return frames[:, list(shown)]


def kept_of(shown, num_tokens=12):
    frames = [f for f in range(len(shown)) if f == 0 or shown[f] != shown[f - 1]]
    return torch.cat([torch.arange(num_tokens) + f * num_tokens for f in frames]).expand(2, -1)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("capacity", [0.2, 0.5, 1.0])
@torch.no_grad()
def test_a_still_clip_needs_only_its_first_frame(pooling, capacity):
    config = small_config(num_frames=6, pooling=pooling)
    model, patches, kept_BK = small_model(config, alpha=0.5), still_clips(config, (0, 0, 0)), kept_of((0, 0, 0))
    whole, dropped = model(patches, capacity), model(keep(patches, kept_BK), capacity, kept_BK=kept_BK)
    torch.testing.assert_close(dropped.logits_BC, whole.logits_BC, atol=1e-10, rtol=1e-10)
    assert torch.equal(dropped.plan.expert_BN, whole.plan.expert_BN[:, 0])


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("pixels", ["scaled", "centred"])
@pytest.mark.parametrize("shown", [(0, 0, 1, 1), (0, 1, 1, 0)])
@torch.no_grad()
def test_whole_frames_that_repeat_can_go_at_full_capacity(pooling, pixels, shown):
    config = small_config(num_frames=8, pooling=pooling, pixels=pixels)
    model, patches, kept_BK = small_model(config, alpha=0.5), still_clips(config, shown), kept_of(shown)
    dropped = model(keep(patches, kept_BK), kept_BK=kept_BK).logits_BC
    torch.testing.assert_close(dropped, model(patches).logits_BC, atol=1e-10, rtol=1e-10)


def repeat_dropped(patches, kept_BK):
    """Overwrite every patch that is not kept with the one before it, in place."""
    for clip, kept in zip(patches, kept_BK.tolist(), strict=True):
        for place in range(12, clip.shape[0] * 12):
            if place not in kept:
                clip[place // 12, place % 12] = clip[place // 12 - 1, place % 12]
    return patches


@torch.no_grad()
def test_any_exact_repeats_can_go_before_one_block_that_is_read_at_class_tokens():
    # Keys and values of a first block depend on the patch alone; what a repeated patch itself sees is read by nobody.
    config = small_config(num_frames=6, depth=1)
    model, kept_BK = small_model(config, alpha=0.5), some_inputs(config, 20)["kept_BK"]
    patches = repeat_dropped(some_patches(config), kept_BK)
    dropped = model(keep(patches, kept_BK), kept_BK=kept_BK).logits_BC
    torch.testing.assert_close(dropped, model(patches).logits_BC, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("pixels", ["scaled", "centred"])
def test_kept_patches_have_the_pixel_values_of_the_whole_clip(pixels):
    config = small_config(num_frames=6, pixels=pixels)
    kept_BK = some_inputs(config, 20)["kept_BK"]
    patches = repeat_dropped(some_patches(config), kept_BK)
    whole = to_float(patches.flatten(1, 2), config, torch.float64)
    dropped = to_float(keep(patches, kept_BK), config, torch.float64, kept_BK)
    torch.testing.assert_close(dropped, keep(whole.unflatten(1, (3, 12)), kept_BK), atol=1e-12, rtol=1e-12)
    frames = patches.double()
    means = frames.mean((2, 3), keepdim=True)
    expected = (frames - means) / 64 if pixels == "centred" else frames / 127.5 - 1
    torch.testing.assert_close(whole, expected.flatten(1, 2), atol=1e-12, rtol=1e-12)
