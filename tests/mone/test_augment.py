import dataclasses
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

from mone import augment as module
from mone.augment import AugmentConfig, Draws, augment, centre, draw_boxes, draw_erased, mix
from mone.rand_augment import OPERATIONS, rand_augment

SIZE = {"num_frames": 4, "height_px": 12, "width_px": 16}
EVERYTHING = AugmentConfig(
    crop_scale=(0.3, 0.9),
    crop_ratio=(0.75, 1.33),
    flip=0.5,
    colour_jitter=0.4,
    rand_augment=(2, 20),
    erasing=0.5,
    mixup=0.3,
)
ALONE = [
    AugmentConfig(crop_scale=(0.3, 0.9), crop_ratio=(0.75, 1.33)),
    AugmentConfig(flip=0.5),
    AugmentConfig(colour_jitter=0.5),
    AugmentConfig(rand_augment=(1, 30)),
    AugmentConfig(erasing=0.9),
]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def run(frames, samples, config, *, seed=1, epoch=2, **changes):
    return augment(frames, samples, config, **{**SIZE, **changes}, seed=seed, epoch=epoch)


@pytest.mark.parametrize("config", [EVERYTHING, *ALONE])
def test_a_clip_comes_out_the_same_in_every_batch_and_order(config, monkeypatch):
    frames, samples = noise(13, 6, 20, 24), list(range(40, 53))
    whole, before = run(frames, samples, config), frames.clone()
    assert whole.shape == (13, 4, 12, 16, 3) and whole.dtype == torch.uint8
    assert torch.equal(run(frames, torch.tensor(samples), config), whole)
    order = torch.randperm(13)
    assert torch.equal(run(frames[order], torch.tensor(samples)[order], config), whole[order])
    alone = [run(clip[None], [sample], config) for clip, sample in zip(frames, samples, strict=True)]
    assert torch.equal(torch.cat(alone), whole)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * 4 * 20 * 24 * 3 * 3)
    assert torch.equal(run(frames, samples, config), whole)
    assert torch.equal(frames, before)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [config for config in ALONE if not config.rand_augment[0]])
def test_a_gpu_gives_the_pixels_of_the_cpu(config):
    if not torch.cuda.is_available() and os.environ.get("REQUIRE_GPU") != "1":
        pytest.skip("no CUDA GPU")
    frames, samples = noise(13, 6, 20, 24), list(range(13))
    assert torch.equal(run(frames.cuda(), samples, config).cpu(), run(frames, samples, config))


def test_global_random_numbers_are_neither_read_nor_moved():
    frames = noise(3, 6, 20, 24)
    torch.manual_seed(1)
    first, state = run(frames, [0, 1, 2], EVERYTHING), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    np.random.seed(3)
    assert torch.equal(run(frames, [0, 1, 2], EVERYTHING), first)


@pytest.mark.parametrize("change", [{"epoch": 3}, {"seed": 2}, {"samples": range(100, 108)}])
def test_epochs_seeds_and_samples_differ(change):
    frames = noise(8, 6, 20, 24)
    samples = change.pop("samples", range(8))
    first, second = run(frames, list(range(8)), EVERYTHING), run(frames, list(samples), EVERYTHING, **change)
    assert not (first == second).flatten(1).all(dim=1).any()


def test_an_option_does_not_move_the_draws_of_another():
    frames = noise(8, 6, 20, 24)
    flip = AugmentConfig(flip=0.5)
    plain = run(frames, list(range(8)), flip)
    erased = run(frames, list(range(8)), dataclasses.replace(flip, erasing=1.0))
    assert ((plain == erased).flatten(1).float().mean(1) > 0.6).all()


def test_with_everything_off_nothing_happens():
    frames = noise(3, 4, 12, 16)
    assert torch.equal(run(frames, [0, 1, 2], AugmentConfig()), frames)
    larger = noise(3, 7, 17, 20)
    middle = larger[:, 1:5, 2:14, 2:18]
    assert torch.equal(run(larger, [0, 1, 2], AugmentConfig()), middle)
    assert torch.equal(centre(larger, **SIZE), middle)


def test_time_is_a_window_of_consecutive_frames_of_every_start():
    frames = torch.arange(7, dtype=torch.uint8)[None, :, None, None, None].expand(200, 7, 12, 16, 3)
    starts = run(frames, list(range(200)), AugmentConfig(mixup=1.0))[:, :, 0, 0, 0].int()
    assert torch.equal(starts - starts[:, :1], torch.arange(4, dtype=torch.int32).expand(200, 4))
    assert set(starts[:, 0].tolist()) == {0, 1, 2, 3}


def test_flip_is_exact_and_as_frequent_as_asked():
    frames = noise(400, 1, 2, 4)
    small = {"num_frames": 1, "height_px": 2, "width_px": 4}
    result = run(frames, list(range(400)), AugmentConfig(flip=0.3), **small)
    flipped = (result == frames.flip(3)).flatten(1).all(1)
    assert torch.equal(result, torch.where(flipped[:, None, None, None, None], frames.flip(3), frames))
    assert abs(flipped.float().mean() - 0.3) < 0.07
    assert torch.equal(run(frames, list(range(400)), AugmentConfig(flip=1.0), **small), frames.flip(3))


def test_a_crop_of_a_ramp_is_the_ramp_of_its_box():
    """Values are coordinates, so the result at a pixel is the place it was taken from, away from the frame's edge."""
    height, width, count = 60, 80, 20
    ramp = torch.zeros(count, 4, height, width, 3, dtype=torch.uint8)
    ramp[..., 0] = 3 * torch.arange(width)
    ramp[..., 1] = 4 * torch.arange(height)[:, None]
    config = AugmentConfig(crop_scale=(0.1, 0.6), crop_ratio=(0.75, 1.33))
    result = run(ramp, list(range(count)), config).double()
    boxes = torch.from_numpy(draw_boxes(Draws(tuple(range(count)), 1, 2), config, (60, 80), (12, 16)))
    top, left, box_height, box_width = boxes[:, :, None]
    x = (left + (torch.arange(16) + 0.5) * box_width / 16 - 0.5)[:, None, None, :]
    y = (top + (torch.arange(12) + 0.5) * box_height / 12 - 0.5)[:, None, :, None]
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    assert (result[..., 0] - 3 * x)[inside].abs().max() < 1
    assert (result[..., 1] - 4 * y)[inside].abs().max() < 1
    assert not result[..., 2].any()


@pytest.mark.parametrize("size", [(12, 16), (20, 24), (31, 50), (64, 64)])
def test_the_whole_frame_resized_is_the_antialiased_resize_of_torchvision(size):
    frames, (height, width) = noise(2, 3, 20, 24), size
    boxes = torch.tensor([0.0, 0.0, 20.0, 24.0])[:, None].expand(4, 2)
    expected = TF.resize(frames.permute(0, 1, 4, 2, 3).float(), [height, width], antialias=True).permute(0, 1, 3, 4, 2)
    assert (module._resize(frames, boxes, height, width) - expected).abs().max() < 0.8
    flat = torch.full_like(frames, 201)
    assert (module._resize(flat, boxes, height, width) == 201).all()


def test_a_box_of_the_size_of_the_result_is_cut_out_exactly():
    frames = noise(2, 3, 20, 24)
    boxes = torch.tensor([[2.0, 8.0], [5.0, 0.0], [12.0, 12.0], [16.0, 16.0]])
    result = module._resize(frames, boxes, 12, 16)
    assert torch.equal(result[0], frames[0, :, 2:14, 5:21])
    assert torch.equal(result[1], frames[1, :, 8:20, :16])


def test_crops_are_exact_sums_in_any_order():
    """Float64 changes no pixel: nothing was rounded on the way."""
    frames, boxes = noise(2, 2, 64, 96), torch.tensor([[1.3, 8.2], [5.1, 0.7], [50.9, 30.4], [77.7, 20.2]])
    rows, columns = (module._triangles(boxes[i], boxes[i + 2], n, m).double() for i, n, m in [(0, 12, 64), (1, 16, 96)])
    wide = torch.einsum("bvw,bthwc->bthvc", columns, frames.double())
    wide = (wide * 8 / columns.sum(-1)[:, None, None, :, None]).round()
    small = torch.einsum("bgh,bthvc->btgvc", rows, wide) / (8 * rows.sum(-1))[:, None, :, None, None]
    assert torch.equal(module._resize(frames, boxes, 12, 16), small.round().to(torch.uint8))


@pytest.mark.parametrize("frame", [(40, 60), (60, 40)])
def test_drawn_boxes_keep_area_and_ratio_and_lie_in_the_frame(frame):
    draws = Draws(tuple(range(3000)), 5, 0)
    config = AugmentConfig(crop_scale=(0.2, 0.8), crop_ratio=(0.5, 2.0))
    top, left, height, width = draw_boxes(draws, config, frame, (20, 20))
    assert top.min() >= 0 and left.min() >= 0
    assert (top + height).max() <= frame[0] + 1e-9 and (left + width).max() <= frame[1] + 1e-9
    share, ratio = height * width / 40**2, width / height
    assert share.min() >= 0.2 and share.max() <= 0.8 and abs(share.mean() - 0.5) < 0.02
    assert ratio.min() >= 0.5 - 1e-9 and ratio.max() <= 2 + 1e-9
    assert ratio.min() < 0.55 and ratio.max() > 1.8


def test_a_crop_at_ratio_1_is_not_stretched_in_a_frame_of_another_shape():
    boxes = draw_boxes(Draws((1, 2, 3), 0, 0), AugmentConfig(crop_scale=(0.5, 1.0)), (40, 90), (20, 30))
    assert np.allclose(boxes[3] / boxes[2], 1.5)


def test_erasing_takes_one_box_from_all_frames():
    frames, count = noise(50, 4, 12, 16), 50
    result = run(frames, list(range(count)), AugmentConfig(erasing=0.7))
    boxes = draw_erased(Draws(tuple(range(count)), 1, 2), 0.7, 12, 16).astype(int)
    assert 20 < (boxes[2] > 0).sum() < 48
    for clip, before, (top, left, height, width) in zip(result, frames, boxes.T, strict=True):
        expected = before.clone()
        mean = before.double().mean((0, 1, 2)).round().to(torch.uint8)
        expected[:, top : top + height, left : left + width] = mean
        assert torch.equal(clip, expected)


def test_erased_boxes_lie_in_the_frame_with_the_area_of_the_paper():
    top, left, height, width = draw_erased(Draws(tuple(range(2000)), 0, 0), 1.0, 120, 100)
    assert (top + height).max() <= 120 and (left + width).max() <= 100
    share = height * width / 12000
    assert 0.015 < share.min() < 0.05 and 0.3 < share.max() < 0.34


def test_colours_are_those_of_torchvision_where_nothing_is_clamped():
    frames = noise(3, 2, 6, 6) // 4 + 90
    factors = torch.tensor([[1.1, 0.8, 1.0], [0.7, 1.0, 1.2], [1.3, 0.9, 0.6]])
    result = module._change_colours(frames, factors)
    for clip, before, (brightness, contrast, saturation) in zip(result, frames, factors.T.tolist(), strict=True):
        picture = before.double().permute(3, 0, 1, 2).flatten(1, 2) / 255
        picture = TF.adjust_contrast(TF.adjust_brightness(picture, brightness), contrast)
        expected = TF.adjust_saturation(picture, saturation).unflatten(1, (2, 6)).permute(1, 2, 3, 0) * 255
        assert (clip - expected).abs().max() < 0.6
    assert torch.equal(module._change_colours(frames, torch.ones(3, 3)), frames)


def test_floats_become_the_nearest_pixel():
    values = torch.tensor([-3.0, -0.4, 0.49, 0.51, 1.5, 2.5, 254.6, 255.4, 300.0])
    assert module._to_pixels(values).tolist() == [0, 0, 0, 1, 2, 2, 255, 255, 255]


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_treat_equal_frames_alike_and_change_something(name):
    ramp = (torch.linspace(6, 14, 16) ** 2).to(torch.uint8)[None, :, None] + torch.tensor([0, 9, 30], dtype=torch.uint8)
    frames = (ramp + torch.arange(0, 84, 7, dtype=torch.uint8)[:, None, None] % 12)[None].repeat(3, 1, 1, 1)
    choice = (list(OPERATIONS).index(name) + 0.5) / len(OPERATIONS)
    less, more = (rand_augment(frames, np.array([choice]), np.array([sign]), 20) for sign in (0.2, 0.8))
    for result in (less, more):
        assert result.shape == frames.shape and result.dtype == torch.uint8
        assert torch.equal(result, result[:1].expand_as(result))
        assert torch.equal(result, frames) == (name == "identity")
    signless = name in ("identity", "posterize", "solarize", "autocontrast", "equalize")
    assert torch.equal(less, more) == signless


@pytest.mark.parametrize("name", ["contrast", "autocontrast", "equalize"])
def test_statistics_are_the_clips_so_a_level_maps_to_one_level(name):
    dark = noise(1, 8, 8)[..., :1].expand(1, 8, 8, 3) // 4
    frames = torch.cat([dark, dark + 30])
    result = OPERATIONS[name](frames.permute(0, 3, 1, 2).contiguous(), 0.5)
    shared = set(frames[0].unique().tolist()) & set(frames[1].unique().tolist())
    assert shared
    for level in shared:
        assert len(result.permute(0, 2, 3, 1)[frames == level].unique()) == 1


def test_mix_pairs_neighbours_in_both_directions():
    frames, labels = noise(5, 2, 4, 4), torch.tensor([0, 2, 1, 1, 3])
    config = AugmentConfig(mixup=0.8)
    mixed, targets = mix(frames, labels, [7, 8, 9, 10, 11], config, num_classes=4, seed=1, epoch=2)
    assert mixed.dtype == torch.uint8 and targets.dtype == torch.float32
    for pair, share in enumerate(Draws((7, 9), 1, 2).beta(module._MIX, 0.8)):
        a, b = frames[2 * pair].double(), frames[2 * pair + 1].double()
        hot_a, hot_b = F.one_hot(labels[2 * pair : 2 * pair + 2], 4).double()
        for clip, first, second in [(2 * pair, share, 1 - share), (2 * pair + 1, 1 - share, share)]:
            assert (mixed[clip] - (first * a + second * b)).abs().max() < 0.501
            assert torch.allclose(targets[clip].double(), first * hot_a + second * hot_b)
    assert torch.allclose(targets.sum(1), torch.ones(5))
    assert torch.equal(mixed[4], frames[4]) and targets[4].tolist() == [0, 0, 0, 1]


def test_mix_is_the_same_on_two_workers_and_in_chunks(monkeypatch):
    frames, labels, samples = noise(12, 2, 4, 4), torch.arange(12) % 5, list(range(30, 42))
    settings = {"num_classes": 5, "seed": 1, "epoch": 2}
    config = AugmentConfig(mixup=0.3)
    mixed, targets = mix(frames, labels, samples, config, **settings)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * 2 * 2 * 4 * 4 * 3)
    halves = [mix(frames[h], labels[h], samples[h], config, **settings) for h in (slice(0, 4), slice(4, 12))]
    assert torch.equal(torch.cat([half[0] for half in halves]), mixed)
    assert torch.equal(torch.cat([half[1] for half in halves]), targets)


def test_mix_without_mixup_or_with_a_share_of_1_changes_nothing(monkeypatch):
    frames, labels = noise(4, 2, 4, 4), torch.tensor([0, 2, 1, 1])
    for config in (AugmentConfig(), AugmentConfig(mixup=0.5)):
        mixed, targets = mix(frames, labels, range(4), config, num_classes=4, seed=0, epoch=0)
        assert torch.equal(mixed, frames) and torch.equal(targets, F.one_hot(labels, 4).float())
        monkeypatch.setattr(Draws, "beta", lambda self, purpose, alpha: np.ones(len(self.samples)))
    single, _ = mix(frames[:1], labels[:1], [0], AugmentConfig(mixup=0.5), num_classes=4, seed=0, epoch=0)
    assert torch.equal(single, frames[:1])


def test_a_flipped_clip_keeps_its_label():
    config, labels = AugmentConfig(flip=1.0), torch.tensor([3, 0])
    flipped = run(noise(2, 4, 12, 16), [0, 1], config)
    _, targets = mix(flipped, labels, [0, 1], config, num_classes=4, seed=1, epoch=2)
    assert targets.argmax(1).tolist() == [3, 0]


@pytest.mark.parametrize(
    "change",
    [
        {"crop_scale": (0.0, 1.0)},
        {"crop_scale": (0.5, 1.2)},
        {"crop_ratio": (2.0, 1.0)},
        {"crop_ratio": (1.0, float("inf"))},
        {"flip": -0.1},
        {"flip": float("nan")},
        {"colour_jitter": 1.5},
        {"rand_augment": (-1, 5)},
        {"rand_augment": (2, 31)},
        {"rand_augment": (0, 9)},
        {"erasing": 2.0},
        {"mixup": -1.0},
        {"mixup": float("inf")},
    ],
)
def test_values_out_of_range_are_named(change):
    (name, value), *_ = change.items()
    with pytest.raises(ValueError, match=name) as error:
        AugmentConfig(**change)
    assert repr(value) in str(error.value)


def test_lists_are_taken_for_tuples():
    assert AugmentConfig(crop_scale=[1.0, 1.0], rand_augment=[0, 0]).off  # pyright: ignore[reportArgumentType]


def test_wrong_frames_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        run(noise(1, 4, 12, 16).float(), [0], EVERYTHING)
    with pytest.raises(ValueError, match=r"\(1, 3, 12, 16, 3\).*\[B, 4, 12, 16, 3\]"):
        run(noise(1, 3, 12, 16), [0], EVERYTHING)
    with pytest.raises(ValueError, match="2 samples for 1 clips"):
        run(noise(1, 4, 12, 16), [0, 1], EVERYTHING)
