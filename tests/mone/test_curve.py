"""Points of a curve equal a loop over single clips; the focus of routing equals one over single patches."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mone.baselines import METHODS, capacities_of, with_method
from mone.checkpoint import read_checkpoint, save_checkpoint
from mone.clips import MemoryClips
from mone.compute import clip_compute
from mone.curve import CurvePoint, measure, routing_focus
from mone.model import ViViT
from mone.static import kept_patches
from mone.tubelets import to_frames, to_patches
from tests.mone.conftest import small_config, small_model, some_patches

CONFIG = small_config(num_frames=8)  # 4 indices of 12 tokens
CAPACITIES = (0.2, 0.4, 1.0)


@pytest.fixture(autouse=True)
def _on_one_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def some_clips(num_clips=7, config=CONFIG, still_share=0.0):
    """Noise in which, clip by clip more, patches repeat what their place showed before."""
    patches = some_patches(config, num_clips)
    still = torch.rand(patches.shape[:3], generator=torch.Generator().manual_seed(1))
    for clip in range(num_clips):
        for index in range(1, config.num_indices):
            same = still[clip, index] < still_share * clip / num_clips
            patches[clip, index, same] = patches[clip, index - 1, same]
    return MemoryClips(to_frames(patches, config), torch.arange(num_clips) % config.num_classes)


def patches_of(clips):
    """uint8 [S, F, N, P]."""
    return to_patches(clips.frames_STHWC, CONFIG)


def run_alone(model, method, capacity, patches_FNP, drop_static=None):
    """Logits of a clip and what it costs."""
    config = with_method(model.config, method)
    names = ViViT(config).state_dict().keys()
    own = ViViT(config).eval()
    own.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in names})
    with torch.no_grad():
        if drop_static is None:
            return own(patches_FNP[None], capacity).logits_BC[0], clip_compute(config, capacity).flops
        kept_K = torch.from_numpy(kept_patches(patches_FNP.numpy(), drop_static))
        logits = own(patches_FNP.flatten(0, 1)[kept_K][None], capacity, kept_BK=kept_K[None]).logits_BC[0]
        return logits, clip_compute(config, capacity, len(kept_K)).flops


def slow_points(model, clips, methods, drop_static=None):
    points = []
    for method in methods:
        for capacity in capacities_of(method, model.config, CAPACITIES):
            right, nll, flops = 0, 0.0, 0
            for patches_FNP, label in zip(patches_of(clips), clips.labels_S, strict=True):
                logits_C, cost = run_alone(model, method, capacity, patches_FNP, drop_static)
                right += int(logits_C.argmax() == label)
                nll += float(F.cross_entropy(logits_C, label))
                flops += cost
            points.append(
                CurvePoint(
                    method=method,
                    capacity=capacity,
                    drop_static=drop_static,
                    flops_per_clip=flops / len(clips),
                    dense_flops_per_clip=clip_compute(with_method(model.config, method), 1.0).dense_flops,
                    top1=right / len(clips),
                    nll=pytest.approx(nll / len(clips), rel=1e-4),  # pyright: ignore
                    num_clips=len(clips),
                )
            )
    return points


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_points_are_those_of_a_loop(batch_size):
    model, clips = small_model(CONFIG, dtype=torch.float32), some_clips()
    points = measure(model, clips, [*METHODS], CAPACITIES, batch_size=batch_size)
    assert points == slow_points(model, clips, METHODS)
    assert len({point.nll for point in points}) > 10  # the methods do differ


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_points_of_dropped_clips_are_those_of_a_loop(batch_size):
    model, clips = small_model(CONFIG, dtype=torch.float32), some_clips(9, still_share=0.9)
    methods = ["dense", "mone", "random_router", "uniform", "submodel"]
    points = measure(model, clips, methods, CAPACITIES, batch_size=batch_size, drop_static=0)
    assert points == slow_points(model, clips, methods, drop_static=0)
    assert points[0].flops_per_clip < points[0].dense_flops_per_clip
    sizes = [len(kept_patches(patches.numpy(), 0)) for patches in patches_of(clips)]
    assert 2 < len(set(sizes)) < len(sizes)


def test_compute_is_that_of_the_formula():
    model = small_model(CONFIG, dtype=torch.float32)
    for point in measure(model, some_clips(2), [*METHODS], CAPACITIES):
        cost = clip_compute(with_method(CONFIG, point.method), point.capacity)
        assert (point.flops_per_clip, point.dense_flops_per_clip) == (cost.flops, cost.dense_flops)


def test_a_checkpoint_and_its_model_give_the_same(tmp_path):
    model, clips = small_model(CONFIG, dtype=torch.float32), some_clips(3)
    checkpoint = read_checkpoint(save_checkpoint(model, [*"abcde"], tmp_path / "model"))
    asked = [*METHODS], CAPACITIES
    assert measure(checkpoint, clips, *asked) == measure(model, clips, *asked)


def test_the_model_is_left_as_it_was():
    model, clips = small_model(small_config(dropout=0.5, num_frames=8), dtype=torch.float32).train(), some_clips(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert measure(model, clips, ["mone"], [0.4]) == measure(model.eval(), clips, ["mone"], [0.4])
    model.train()
    measure(model, clips, ["dense", "tome"], [0.4])
    routing_focus(model, clips, torch.ones(3, 4, 12, dtype=torch.bool), 0.4)
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_is_asked_twice_is_measured_once():
    model = small_model(CONFIG, dtype=torch.float32)
    points = measure(model, some_clips(2), ["mone", "dense", "mone"], [0.4, 0.2, 0.4])
    assert [(point.method, point.capacity) for point in points] == [("mone", 0.4), ("mone", 0.2), ("dense", 1.0)]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"methods": ["astrology"]}, "unknown method 'astrology'"),
        ({"capacities": [0.05]}, r"between 0\.125 and 1"),
        ({"drop_static": 300}, "grey levels"),
        ({"drop_static": 1, "methods": ["tome"]}, "cannot be dropped with allocation 'tome'"),
        ({"clips": some_clips(0)}, "no clips"),
    ],
)
def test_what_cannot_be_measured_is_refused(asked, message):
    asked = {"clips": some_clips(2), "methods": ["mone"], "capacities": [0.4]} | asked
    with pytest.raises(ValueError, match=message):
        measure(small_model(CONFIG, dtype=torch.float32), **asked)


VARIANTS = [
    {},
    {"budget": "clip"},
    {"router": "motion"},
    {"router": "random"},
    {"allocation": "token_drop", "router": "random"},
    {"allocation": "submodel"},
    {"encoder": "joint", "temporal_depth": 0},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=map(str, VARIANTS))
@pytest.mark.parametrize("capacity", [0.15, 0.4, 1.0])
def test_focus_is_that_of_a_loop(changes, capacity):
    config = small_config(num_frames=8, **changes)
    model, clips = small_model(config, dtype=torch.float32), some_clips(5, config)
    moving_SFN = torch.rand(5, 4, 12, generator=torch.Generator().manual_seed(2)) < 0.3
    taken, moving, both, largest = 0, 0, 0, -1
    width_of_moving = width = 0.0
    experts = [model(patches[None], capacity).plan.expert_BN.flatten().tolist() for patches in patches_of(clips)]
    largest = max(max(expert_K) for expert_K in experts)
    for expert_K, mask_K in zip(experts, moving_SFN.flatten(1).tolist(), strict=True):
        for expert, moves in zip(expert_K, mask_K, strict=True):
            taken += expert == largest
            moving += moves
            both += expert == largest and moves
            own = config.widths[expert] / config.dim if expert >= 0 else 0.0
            width_of_moving += own * moves
            width += own
    focus = routing_focus(model, clips, moving_SFN, capacity, batch_size=2)
    assert (focus.capacity, focus.expert) == (capacity, largest)
    assert focus.moving_share_of_expert == both / taken
    assert focus.expert_share_of_moving == both / moving
    assert focus.moving_share == moving / (5 * 48)
    assert focus.expert_share == taken / (5 * 48)
    assert focus.width_of_moving == pytest.approx(width_of_moving / moving)
    assert focus.width == pytest.approx(width / (5 * 48))


@pytest.mark.parametrize("router", ["random", "learned"])
def test_chance_is_what_a_mask_gives_that_has_nothing_to_do_with_the_clip(router):
    """Over all shifts of the mask within its frame, exactly, whatever the routing."""
    config = small_config(num_frames=8, router=router)
    model, clips = small_model(config, dtype=torch.float32), some_clips(4, config)
    moving_SFN = torch.rand(4, 4, 12, generator=torch.Generator().manual_seed(3)) < 0.25
    found = [routing_focus(model, clips, moving_SFN.roll(shift, -1), 0.4) for shift in range(12)]
    assert math.fsum(focus.moving_share_of_expert for focus in found) / 12 == pytest.approx(found[0].moving_share)
    assert math.fsum(focus.expert_share_of_moving for focus in found) / 12 == pytest.approx(found[0].expert_share)


def test_the_random_router_is_at_chance_and_the_motion_router_is_above():
    """Halves of frames move; the standard error of the random router's share is 0.5 / sqrt(40 * 4 * 2) = 0.03."""
    clips = some_clips(40)
    moving_SFN = torch.zeros(40, 4, 12, dtype=torch.bool)
    moving_SFN[..., :6] = True
    frames = patches_of(clips).unflatten(-1, (2, -1))
    frames[:, :, 6:, 1] = frames[:, :, 6:, 0]  # the other halves repeat their first frame
    clips = MemoryClips(to_frames(frames.flatten(-2), CONFIG), clips.labels_S)
    focus = {}
    for router in ("random", "motion"):
        torch.manual_seed(0)
        model = ViViT(small_config(num_frames=8, router=router))
        if router == "motion":
            torch.nn.init.zeros_(model.encoder.router.weight)
        focus[router] = routing_focus(model, clips, moving_SFN, 0.4)
    assert focus["random"].moving_share == focus["motion"].moving_share == 0.5
    assert focus["random"].moving_share_of_expert == pytest.approx(0.5, abs=0.1)
    assert focus["random"].expert_share_of_moving == pytest.approx(focus["random"].expert_share, abs=0.04)
    assert focus["motion"].moving_share_of_expert == 1.0
    assert focus["motion"].expert_share_of_moving == 2 * focus["motion"].expert_share


def test_a_focus_that_means_nothing_is_refused():
    model, clips = small_model(CONFIG, dtype=torch.float32), some_clips(2)
    mask = torch.ones(2, 4, 12, dtype=torch.bool)
    for wrong, message in [
        (mask[:1], r"\[2, 4, 12\]"),
        (mask.float(), "torch.float32"),
        (torch.zeros_like(mask), "no patch"),
    ]:
        with pytest.raises(ValueError, match=message):
            routing_focus(model, clips, wrong, 0.4)
    with pytest.raises(ValueError, match="tome"):
        routing_focus(ViViT(small_config(num_frames=8, allocation="tome")), clips, mask, 0.4)


class Unreadable(MemoryClips):
    """Some of its clips cannot be read, and are left out."""

    def __init__(self, clips, lost):
        super().__init__(clips.frames_STHWC, clips.labels_S)
        self.lost = lost

    def batches(self, plan):
        yield from super().batches(
            [np.array([sample for sample in samples if sample not in self.lost]) for samples in plan]
        )


@pytest.mark.parametrize("drop_static", [None, 4.0])
def test_clips_that_cannot_be_read_do_not_count(drop_static):
    model, clips, lost = small_model(CONFIG), some_clips(9, still_share=0.8), {0, 2, 3, 6, 7, 8}  # the last batch whole
    there = torch.tensor([number for number in range(9) if number not in lost])
    read = MemoryClips(clips.frames_STHWC[there], clips.labels_S[there])
    options = {"batch_size": 3, "drop_static": drop_static}
    points = measure(model, Unreadable(clips, lost), ["mone", "dense"], CAPACITIES, **options)
    for found, expected in zip(points, measure(model, read, ["mone", "dense"], CAPACITIES, **options), strict=True):
        assert found.num_clips == 3 and found.top1 == expected.top1
        assert found.nll == pytest.approx(expected.nll) and found.flops_per_clip == expected.flops_per_clip
    with pytest.raises(ValueError, match="no clip could be read"):
        measure(model, Unreadable(clips, set(range(9))), ["mone"], CAPACITIES, **options)
